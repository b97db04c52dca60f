"""Loading of the parts of a model from the tensors of a file, one at a time, with shapes checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from itertools import accumulate, pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oxjax.config import DTYPES, AttentionSpec, MLPSpec, MoESpec
from oxjax.errors import ModelError
from oxjax.gguf import GGUFFile
from oxjax.kernels.quantized import QuantizedTensor
from oxjax.models.layers.attention import Attention
from oxjax.models.layers.linear import Linear
from oxjax.models.layers.mlp import MLP
from oxjax.models.layers.moe import Experts, MoE
from oxjax.models.layers.norms import Norm
from oxjax.models.matrices import Matrices
from oxjax.models.options import QUANTIZE


class ParamLoader:
    """Hands out parameters by tensor name, to several threads at once, and remembers which names were asked for.

    Args:
        file: an open GGUF file.
        dtype: of activations, and of what is computed with as it is; vectors stay float32.
        progress: called with the bytes of the file read so far, after each part of a tensor.
        weights: see `LoadOptions.weights`, of which "auto" is resolved; None is `dtype`.
    """

    def __init__(
        self,
        file: GGUFFile,
        dtype: str,
        progress: Callable[[int], None] | None = None,
        *,
        weights: str | None = None,
    ):
        self.file, self.dtype = file, np.dtype(DTYPES[dtype])
        dense = np.dtype(DTYPES.get(weights or dtype, self.dtype))
        quantize = QUANTIZE.get(weights or dtype)
        keep = weights == "file" or quantize is not None
        self._matrices = Matrices(file, dense, self._count, keep=keep, quantize=quantize)
        self._progress, self._bytes_read, self._lock = progress, 0, threading.Lock()
        self._used: set[str] = set()

    def has(self, name: str) -> bool:
        """The file holds this tensor."""
        return name in self.file.tensors

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.file.tensors:
            raise ModelError(f"{self.file.path}: tensor {name!r} is missing, expected with shape {shape}")
        found = self.file.tensors[name].shape
        if found != shape:
            raise ModelError(f"{self.file.path}: tensor {name!r} has shape {found}, metadata says {shape}")
        self._used.add(name)

    def _read(self, name: str) -> None:
        """A tensor was read, and will not be again."""
        self.file.release(name)
        self._count(self.file.tensors[name].n_bytes)

    def _count(self, n_bytes: int) -> None:
        with self._lock:
            self._bytes_read += n_bytes
            if self._progress is not None:
                self._progress(self._bytes_read)

    def vector(self, name: str, *shape: int) -> np.ndarray:
        """A float32 vector `[d]`, or a small table of them."""
        self._check(name, shape)
        vector = np.array(self.file.tensor(name), np.float32)
        self._read(name)
        return vector

    def embedding(self, name: str, n: int, d: int, pool: Executor | None = None) -> Array | QuantizedTensor:
        """A table `[n, d]` to look up and multiply with; as a quantised matrix, where it is one, `[d, n]`.

        See `fused` about the pool.
        """
        self._check(name, (n, d))
        table = self._matrices.table(name, pool)
        self.file.release(name)
        return table

    def table(self, name: str, n: int, d: int) -> Array:
        """A small table `[n, d]` in the activations' dtype, whose rows are added to them."""
        return jax.device_put(self.vector(name, n, d).astype(self.dtype))

    def linear(self, name: str, d_in: int, d_out: int, *, keep: bool = True, pool: Executor | None = None) -> Linear:
        """The map `<name>.weight`, with `<name>.bias` if the file has one; see `fused`."""
        return self.fused(name, d_in, (d_out,), keep=keep, pool=pool)[0]

    def fused(
        self, name: str, d_in: int, d_outs: tuple[int, ...], *, keep: bool = True, pool: Executor | None = None
    ) -> tuple[Linear, ...]:
        """Maps whose outputs lie one after another in `<name>.weight` (and `.bias`), taken apart.

        Args:
            name: of the tensors, without their endings.
            d_in: what all take.
            d_outs: what each gives.
            keep: allow the file's own form of weights; not where they will be taken apart further.
            pool: threads that share the work; for calls that do not come from one of them.
        """
        total = sum(d_outs)
        self._check(f"{name}.weight", (total, d_in))
        bias = self.vector(f"{name}.bias", total) if self.has(f"{name}.bias") else None
        # NVFP4 files carry one multiplier per matrix beside it; `.input_scale` concerns activations on GPUs.
        scale = self.vector(f"{name}.scale", 1)[0] if self.has(f"{name}.scale") else None
        self._used.add(f"{name}.input_scale")
        ends = [*accumulate(d_outs, initial=0)]
        maps = []
        for start, stop in pairwise(ends):
            part = None if bias is None else jax.device_put(bias[start:stop].copy())
            weight = self._matrices.columns(f"{name}.weight", range(start, stop), keep=keep, scale=scale, pool=pool)
            maps.append(Linear(weight=weight, bias=part))
        self.file.release(f"{name}.weight")
        return tuple(maps)

    def interleaved(self, name: str, d_in: int, groups: int, widths: tuple[int, ...]) -> tuple[Linear, ...]:
        """Maps whose outputs take turns in `<name>.weight`: each of the groups holds this many of each."""
        weight = self.linear(name, d_in, groups * sum(widths), keep=False).weight.reshape(d_in, groups, -1)
        parts = jnp.split(weight, np.cumsum(widths)[:-1], axis=2)
        return tuple(Linear(part.reshape(d_in, -1)) for part in parts)

    def norm(self, name: str, *shape: int) -> Norm:
        """The norm `<name>.weight`, or plain `<name>` where it is called so, with `<name>.bias` if the file has one."""
        weight = name if self.has(name) and not self.has(f"{name}.weight") else f"{name}.weight"
        bias = jax.device_put(self.vector(f"{name}.bias", *shape)) if self.has(f"{name}.bias") else None
        return Norm(weight=jax.device_put(self.vector(weight, *shape)), bias=bias)

    def attention(
        self,
        prefix: str,
        spec: AttentionSpec,
        d_model: int,
        *,
        qk_norm: str | None = None,
        gated: bool = False,
        out: str = "attn_output",
    ) -> Attention:
        """Projections `<prefix>.attn_*`, whether q, k and v are three tensors or one.

        Args:
            prefix: of the block's tensors.
            spec: the layer's static facts.
            d_model: width of the residual stream.
            qk_norm: what the norms of queries and keys weigh: "head" by head dimension, "heads" by head and
                dimension, "whole" the same without taking heads apart; None has none.
            gated: `attn_q` gives each head's query and then the gate of its values.
            out: name of the projection back.
        """
        heads = {"q": spec.n_heads, "k": spec.n_kv_heads, "v": spec.n_kv_heads}
        widths = {"q": spec.key_dim, "k": spec.key_dim, "v": spec.value_dim}
        totals, gate = tuple(heads[n] * widths[n] for n in "qkv"), None
        if gated:
            q, gate = self.interleaved(f"{prefix}.attn_q", d_model, spec.n_heads, (spec.key_dim, spec.value_dim))
            maps = (q, *(self.linear(f"{prefix}.attn_{n}", d_model, d) for n, d in zip("kv", totals[1:], strict=True)))
        elif self.has(f"{prefix}.attn_qkv.weight"):
            maps = self.fused(f"{prefix}.attn_qkv", d_model, totals)
            if maps[0].bias is None:
                names = (f"{prefix}.attn_{n}.bias" for n in "qkv")
                maps = tuple(self._biased(p, name) for p, name in zip(maps, names, strict=True))
        else:
            maps = tuple(self.linear(f"{prefix}.attn_{n}", d_model, d) for n, d in zip("qkv", totals, strict=True))

        def norm(n: str) -> Norm | None:
            shapes = {"head": (widths[n],), "heads": (heads[n], widths[n]), "whole": (heads[n] * widths[n],)}
            return None if qk_norm is None else self.norm(f"{prefix}.attn_{n}_norm", *shapes[qk_norm])

        back = self.linear(f"{prefix}.{out}", spec.n_heads * spec.value_dim, d_model)
        sinks = jax.device_put(self.vector(f"{prefix}.attn_sinks.weight", spec.n_heads)) if spec.sinks else None
        return Attention(*maps, out=back, q_norm=norm("q"), k_norm=norm("k"), sinks=sinks, gate=gate)

    def _biased(self, p: Linear, name: str) -> Linear:
        """The same map with the bias `name`, if the file has one."""
        return p.replace(bias=jax.device_put(self.vector(name, p.weight.shape[1]))) if self.has(name) else p

    def feed_forward(self, prefix: str, spec: MLPSpec | MoESpec, d_model: int) -> MLP | MoE:
        """The network `<prefix>.ffn_*`, of either kind."""
        return self.moe(prefix, spec, d_model) if isinstance(spec, MoESpec) else self.mlp(prefix, spec, d_model)

    def mlp(self, prefix: str, spec: MLPSpec, d_model: int, suffix: str = "") -> MLP:
        """The network `<prefix>.ffn_*`; where a gated one has no gate tensor, the gate is the first half of `up`."""
        gate_name, up_name, down_name = (f"{prefix}.ffn_{n}{suffix}" for n in ("gate", "up", "down"))
        if spec.gated and not self.has(f"{gate_name}.weight"):
            gate, up = self.fused(up_name, d_model, (spec.d_ff, spec.d_ff))
        else:
            gate = self.linear(gate_name, d_model, spec.d_ff) if spec.gated else None
            up = self.linear(up_name, d_model, spec.d_ff)
        return MLP(gate=gate, up=up, down=self.linear(down_name, spec.d_ff, d_model))

    def moe(self, prefix: str, spec: MoESpec, d_model: int) -> MoE:
        """Experts `<prefix>.ffn_*_exps`, gate and up in one tensor or in two, with the router and shared expert."""
        shared = shared_gate = bias = latent_down = latent_up = None
        if spec.shared is not None:  # grok keeps the names of a network without experts
            suffix = "" if self.has(f"{prefix}.ffn_up.weight") else "_shexp"
            shared = self.mlp(prefix, spec.shared, d_model, suffix)
        if self.has(name := f"{prefix}.ffn_gate_inp_shexp.weight"):
            column = self.vector(name, d_model).astype(self.dtype)[:, None]
            shared_gate = Linear(weight=jax.device_put(column))
        if self.has(name := f"{prefix}.exp_probs_b.bias"):
            bias = jax.device_put(self.vector(name, spec.n_experts))
        d = d_model
        if spec.d_latent is not None:
            d = spec.d_latent
            latent_down = self.linear(f"{prefix}.ffn_latent_down", d_model, d)
            latent_up = self.linear(f"{prefix}.ffn_latent_up", d, d_model)
        if self.has(f"{prefix}.ffn_gate_up_exps.weight"):
            gate, up = self.experts(f"{prefix}.ffn_gate_up", spec.n_experts, d, (spec.d_ff, spec.d_ff))
        else:
            gate, up = (
                self.experts(f"{prefix}.ffn_{n}", spec.n_experts, d, (spec.d_ff,))[0]
                if n == "up" or spec.gated
                else None
                for n in ("gate", "up")
            )
        return MoE(
            # Small, and its errors choose.
            router=self.linear(f"{prefix}.ffn_gate_inp", d_model, spec.n_experts, keep=False),
            score_correction_bias=bias,
            gate=gate,
            up=up,
            down=self.experts(f"{prefix}.ffn_down", spec.n_experts, spec.d_ff, (d,))[0],
            shared=shared,
            shared_gate=shared_gate,
            latent_down=latent_down,
            latent_up=latent_up,
        )

    def experts(self, name: str, n: int, d_in: int, d_outs: tuple[int, ...]) -> tuple[Experts, ...]:
        """Stacked maps `<name>_exps`, or `<name>.0` and so on in old files, taken apart where several are in one."""
        total, stack = sum(d_outs), f"{name}_exps"
        scales = self.vector(f"{stack}.scale", n) if self.has(f"{stack}.scale") else None
        self._used.add(f"{stack}.input_scale")
        stacked = self.has(f"{stack}.weight") or not self.has(f"{name}.0.weight")
        names = [f"{stack}.weight"] if stacked else [f"{name}.{e}.weight" for e in range(n)]
        for found in names:
            self._check(found, (n, total, d_in) if stacked else (total, d_in))
        places = [(names[0], e) if stacked else (names[e], 0) for e in range(n)]
        weights = self._matrices.experts(places, d_outs, scales)
        for found in names:
            self.file.release(found)
        bias = self.vector(f"{stack}.bias", n, total) if self.has(f"{stack}.bias") else None
        parts = [None] * len(d_outs) if bias is None else np.split(bias, np.cumsum(d_outs)[:-1], axis=1)
        return tuple(
            Experts(weight=w, bias=None if b is None else jax.device_put(b.copy()))
            for w, b in zip(weights, parts, strict=True)
        )

    def skip(self, prefix: str) -> None:
        """Count the tensors whose names begin so as used: they are known to have no part in the answer."""
        self._used.update(name for name in self.file.tensors if name.startswith(prefix))

    def finish(self, ignore: Iterable[str] = ()) -> None:
        """Refuse a file with tensors that nobody asked for: leaving numbers out gives wrong answers quietly.

        Args:
            ignore: names, or endings of names, that are known not to matter.
        """
        ignore = tuple(ignore)
        left = [n for n in self.file.tensors if n not in self._used and not n.endswith(ignore)]
        if left:
            shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
            raise ModelError(f"{self.file.path}: {len(left)} tensors have no place in this architecture: {shown}")
