"""Sampling: parameters on the host, one pipeline on the device."""

from oxjax.sampling.params import SamplingParams

__all__ = ["SamplingParams"]
