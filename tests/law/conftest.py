import pytest

from tests.helpers.law_harness import Harness, load, prompts


@pytest.fixture(scope="module")
def harnesses(data):
    """Models by name, loaded once each."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Harness(load(name, data))
        return made[name]

    return get


@pytest.fixture
def harness(harnesses, request):
    return harnesses(request.param)


@pytest.fixture(scope="module")
def expected(harnesses):
    """Results of a request by itself, computed once per model and prompt length."""
    known = {}

    def get(harness, length=90):
        if (id(harness), length) not in known:
            known[id(harness), length] = harness.alone(prompts(1, length)[0])
        return known[id(harness), length]

    return get
