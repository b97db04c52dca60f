"""Names that are imported at first use are there for editors and notebooks too."""

import importlib

import pytest


@pytest.mark.parametrize("module", ["oxjax", "oxjax.evaluate"])
def test_lazy_names_are_complete(module):
    package = importlib.import_module(module)
    assert set(package.__all__) == set(package._HOMES) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018
