"""Errors survive pickling: `multiprocessing` and Ray raise them in another process."""

import pickle

import pytest

from oxjax import errors

ARGUMENTS = {
    errors.GGUFError: (("bad magic",), {"path": "model.gguf", "offset": 4, "field": "magic"}),
    errors.GrammarError: (("unknown rule",), {"line": 3, "column": 7}),
    errors.CannotTruncate: ((5, range(40)), {}),
    errors.SnapshotMismatchError: (("one model", "another"), {}),
}


def kinds(base: type = errors.OxjaxError) -> list[type]:
    return [base, *(kind for child in base.__subclasses__() for kind in kinds(child))]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_an_error_can_be_pickled(kind):
    args, keywords = ARGUMENTS.get(kind, (("a message",), {}))
    error = kind(*args, **keywords)
    if isinstance(error, errors.RequestError):
        error.index, error.results = 2, ("one", None)
    error.add_note("while loading")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.args, vars(copy)) == (str(error), error.args, vars(error))
    assert copy.__notes__ == ["while loading"]
