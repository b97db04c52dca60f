"""The default run compares every architecture with llama.cpp."""

from oxjax.gguf import GGUFFile
from oxjax.models.architectures import architecture_names
from tests.parity import test_embeddings, test_parity, test_recurrent_sweep, test_synthetic


def test_every_architecture_is_compared_by_default(data):
    compared = set(test_synthetic.BASIC)
    for cases in (test_synthetic.QUICK, test_recurrent_sweep.EXACT, test_recurrent_sweep.FAST, test_embeddings.QUICK):
        compared |= {case.split(":")[0] for case in cases}
    for name in test_parity.ARCHS:
        with GGUFFile.open(data / "archs" / f"{name}.gguf") as file:
            compared.add(file.metadata["general.architecture"])
    assert set(architecture_names()) <= compared
