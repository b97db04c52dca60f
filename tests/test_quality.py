"""What quantised products cost: the perplexity of models that know the text stays within half a percent."""

import pytest

from benchmarks.quality import FORMATS, compare
from benchmarks.random_model import quantize
from oxjax.assets import embedded_model
from oxjax.kernels import native
from tests.helpers.oracle import require_llama_cpp

BOUND = 0.005
STORIES = "models/stories260K/stories260K.gguf"
pytestmark = pytest.mark.skipif(native.kernels() is None, reason=native.describe())


def check(path, n_stories, what, report):
    plain, quantised = compare(path, n_stories)
    report(f"perplexity of {what}: {plain:.4f}, with quantised products {quantised / plain - 1:+.3%}")
    assert quantised != plain
    assert abs(quantised / plain - 1) <= BOUND


def test_the_embedded_model_keeps_its_perplexity(report):
    check(embedded_model(), 3, "demo.gguf", report)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(n, k, marks=() if (n, k) == (STORIES, "Q4_0") else pytest.mark.slow)
        for n in (None, STORIES)
        for k in FORMATS
    ],
)
def test_every_format_keeps_its_perplexity(data, tmp_path, report, name, kind):
    require_llama_cpp()
    source = embedded_model() if name is None else data / name
    quantize(source, tmp_path / "quantised.gguf", kind)
    check(tmp_path / "quantised.gguf", 6, f"{source.name} in {kind}", report)
