import math
import subprocess
import sys

import pytest

from oxjax import SamplingParams
from oxjax.errors import InvalidRequestError, OxjaxError


@pytest.mark.parametrize(
    "field,value",
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
        ("logprobs", -1),
        ("min_tokens", -1),
        ("temperature_range", -1.0),
        ("temperature_exponent", 0.0),
        ("typical_p", 0.0),
        ("top_a", 1.1),
        ("epsilon_cutoff", -0.1),
        ("eta_cutoff", math.nan),
        ("top_n_sigma", -1.0),
        ("xtc_probability", 1.5),
        ("xtc_threshold", 0.6),
        ("order", ("top_k", "top_k")),
        ("order", ("top_q",)),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", math.inf),
        ("presence_penalty", math.nan),
        ("penalty_window", -1),
        ("banned_tokens", (-1,)),
        ("stop_token_ids", (2**31,)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", [(1, 1.0), (1, 2.0)]),
        ("logit_bias", [(1,)]),
        ("stop", ("",)),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(InvalidRequestError, match=field) as error:
        SamplingParams(**{field: value})
    assert isinstance(error.value, OxjaxError)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("field,value", [("max_tokens", 1.5), ("temperature", "1"), ("stop", (1,)), ("top_k", None)])
def test_values_of_the_wrong_type_are_named(field, value):
    """In a process of its own, without the type checks that tests put on every annotated function."""
    code = f"""
from oxjax import SamplingParams
from oxjax.errors import InvalidRequestError
try:
    SamplingParams({field}={value!r})
except InvalidRequestError as error:
    assert {field!r} in str(error)
else:
    raise SystemExit("accepted")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stop_takes_one_text_or_several():
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_more_tokens_at_least_than_at_most():
    with pytest.raises(InvalidRequestError, match="min_tokens 5"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_biases_come_as_a_mapping_or_pairs():
    assert SamplingParams(logit_bias={3: 1, 2: -0.5}).logit_bias == ((3, 1.0), (2, -0.5))
    assert SamplingParams(logit_bias={3: 1}) == SamplingParams(logit_bias=[[3, 1.0]])
    assert hash(SamplingParams(logit_bias={3: 1}, banned_tokens=[1], stop_token_ids=[2])) is not None


def test_stages_in_use_act_in_the_order_given():
    assert SamplingParams(top_k=3, temperature=0.5, xtc_probability=0.1).stages == ("temperature", "top_k", "xtc")
    assert SamplingParams(top_k=3, temperature=0.5, order=("top_k", "min_p", "temperature")).stages == (
        "top_k",
        "temperature",
    )
    assert SamplingParams().stages == ()
    with pytest.raises(InvalidRequestError, match="leaves out temperature, xtc, which are in use"):
        SamplingParams(top_k=3, temperature=0.5, xtc_probability=0.1, order=("top_k",))


def test_equal_params_are_equal_and_hashable():
    assert len({SamplingParams(seed=1), SamplingParams(seed=1)}) == 1
