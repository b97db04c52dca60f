"""Architectures by the name that GGUF files give them: a module each in `arch/`, or in a folder of your own.

Names are looked up in the listings of these folders. The text of a file is only ever compared with what is there; it
never becomes part of an import or a path.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module, invalidate_caches
from pathlib import Path
from types import ModuleType
from typing import Any

from oxjax.config import ModelConfig
from oxjax.errors import UnsupportedArchitectureError
from oxjax.models.base import Frequencies, load_layer
from oxjax.models.hyperparameters import Hyperparameters
from oxjax.models.loader import ParamLoader

_BUILT_IN = Path(__file__).with_name("arch")
_folders: dict[Path, str] = {_BUILT_IN: "oxjax.models.arch"}  # and the package that its modules are in


@dataclass(frozen=True)
class Architecture:
    """One architecture, as its module describes it.

    Attributes:
        config: metadata to `ModelConfig`, and the float32 rotation frequencies of its `ropes`.
        layer: `layer(tensors, i, spec, config)` loads the parameters of block `i`; a module without one has blocks
            of the usual tensors, which `load_layer` reads.
        final_norm: the tensor of the norm after the last block, without `.weight`; None where there is none.
    """

    config: Callable[[Hyperparameters, ParamLoader], tuple[ModelConfig, Frequencies]]
    layer: Callable[..., Any] = load_layer
    final_norm: str | None = "output_norm"


def architecture_names() -> list[str]:
    """Names of all architectures, sorted; imports every module."""
    return sorted(_name(import_module(f"{package}.{stem}")) for package, stem in _listed())


def architecture(name: str) -> Architecture:
    """The architecture that a file names.

    Raises:
        UnsupportedArchitectureError: no module has this name.
    """
    for package, stem in _listed():
        if stem == name.replace("-", "_") and _name(module := import_module(f"{package}.{stem}")) == name:
            fields = {"layer": "layer", "final_norm": "FINAL_NORM"}
            given = {field: getattr(module, n) for field, n in fields.items() if hasattr(module, n)}
            return Architecture(module.config, **given)
    stems = [stem for _, stem in _listed()]
    shown = name if len(name) <= 40 else f"{name[:40]}..."
    near = difflib.get_close_matches(shown, stems) or stems
    raise UnsupportedArchitectureError(
        f"architecture {shown!r} is not one of the {len(stems)} that are known; nearest: {', '.join(near[:5])}"
    )


def register_folder(path: str | Path) -> None:
    """Look architectures up in a folder of your own as well.

    Each module in it (`<name>.py`, with `_` for `-`) describes one architecture, as those in `oxjax/models/arch` do;
    see `docs/adding-an-architecture.md`. It is imported when a file of that architecture is loaded.

    Raises:
        NotADirectoryError: there is no such folder.
        ValueError: an architecture in it has the name of one that is known.
    """
    folder = Path(path).resolve()
    if folder in _folders:
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder of architectures")
    if clash := sorted({stem for _, stem in _listed()} & set(_stems(folder))):
        raise ValueError(f"{folder}: {', '.join(clash)}: there are architectures of these names already")
    # A package of its own, named after its path, so that another folder never gets this one's imported modules.
    name = f"oxjax_architectures_{sha256(str(folder).encode()).hexdigest()[:16]}"
    package = sys.modules[name] = ModuleType(name)
    package.__path__ = [str(folder)]
    invalidate_caches()
    _folders[folder] = name


def unregister_folder(path: str | Path) -> None:
    """Undo `register_folder`."""
    _folders.pop(Path(path).resolve(), None)


def _stems(folder: Path) -> list[str]:
    return sorted(p.stem for p in folder.glob("*.py") if p.stem.isidentifier() and p.stem != "__init__")


def _listed() -> list[tuple[str, str]]:
    """Packages and module names of all architectures."""
    return [(package, stem) for folder, package in _folders.items() for stem in _stems(folder)]


def _name(module: ModuleType) -> str:
    """The architecture's name: the module's `NAME`, which it needs where there is a dash, or that of its file."""
    return getattr(module, "NAME", module.__name__.rpartition(".")[2])
