"""Architectures are found by listing folders, the built-in one and those that users register."""

import re
from pathlib import Path

import numpy as np
import pytest

import oxjax
from oxjax.errors import UnsupportedArchitectureError
from oxjax.models import architectures
from oxjax.models.architectures import architecture, architecture_names, register_folder, unregister_folder
from oxjax.models.base import load_layer
from tests.helpers.synth import RECIPES, write

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-architecture.md"
NAME = "toy_architecture"


@pytest.fixture
def folder(tmp_path):
    """A folder with the architecture that the documentation shows."""
    folder = tmp_path / "architectures"
    folder.mkdir()
    (code,) = re.findall(rf"^```{NAME}.py\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    (folder / f"{NAME}.py").write_text(code)
    yield folder
    unregister_folder(folder)


def test_every_module_is_an_architecture():
    names = architecture_names()
    assert len(names) == len(set(names)) == len(list(Path(architectures.__file__).with_name("arch").glob("[a-z]*.py")))
    for name in names:
        assert callable(architecture(name).config) and callable(architecture(name).layer)
    assert architecture("llama").layer is load_layer
    assert architecture("bert").final_norm is None and architecture("lfm2").final_norm == "token_embd_norm"


@pytest.mark.parametrize(
    "name",
    [
        *("", "base", "arch", "__init__", "../base", "arch/llama", "llama.py", "llama ", "Llama", "os"),
        *("command_r", "ernie4_5_moe", "ernie4-5-moe", "gpt_oss", "x" * 2**20, "llama\0", "\u1e37lama"),
    ],
    ids=lambda name: ascii(name[:20]),
)
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UnsupportedArchitectureError, match="is not one of the") as refused:
        architecture(name)
    assert len(str(refused.value)) < 300


def test_the_nearest_names_are_shown():
    with pytest.raises(UnsupportedArchitectureError, match="nearest: qwen3"):
        architecture("qwen3x")


def test_a_folder_of_ones_own(folder, tmp_path, data):
    """The page's example loads a file, and gives what starcoder2, which is the same, gives for the same tensors."""
    logits = {}
    register_folder(folder)
    register_folder(folder)  # again is fine
    assert NAME in architecture_names()
    for name in ("starcoder2", NAME):
        path = tmp_path / f"{name}.gguf"
        recipe = RECIPES["starcoder2"].but(arch=name)
        write(path, recipe, data / "archs" / "llama.gguf")
        model = oxjax.load(path, weights="float32")
        assert model.config.architecture == name
        with oxjax.LLM(path, weights="float32") as llm:
            (logits[name],) = llm.logits([1, 5, 9, 300, 7])
    assert np.array_equal(logits[NAME], logits["starcoder2"])
    unregister_folder(folder)
    with pytest.raises(UnsupportedArchitectureError):
        architecture(NAME)


def test_a_folder_cannot_replace_what_is_there(folder, tmp_path):
    (folder / "llama.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="llama"):
        register_folder(folder)
    assert folder.resolve() not in architectures._folders
    with pytest.raises(NotADirectoryError, match="nowhere"):
        register_folder(tmp_path / "nowhere")


def test_folders_do_not_share_modules(tmp_path):
    """Two folders, one after the other, with a module of the same name: each gives its own."""
    for answer in ("first", "second"):
        folder = tmp_path / answer
        folder.mkdir()
        (folder / f"{NAME}.py").write_text(f"def config(hp, tensors):\n    return {answer!r}\n")
        register_folder(folder)
        try:
            assert architecture(NAME).config(None, None) == answer
        finally:
            unregister_folder(folder)


def test_a_module_that_fails_fails_every_time(tmp_path):
    (tmp_path / "broken.py").write_text("raise RuntimeError('half written')\n")
    register_folder(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="half written"):
                architecture("broken")
    finally:
        unregister_folder(tmp_path)
