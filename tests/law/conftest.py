"""Models that the law is held for, loaded once each."""

import pytest
from harness import Harness, load


@pytest.fixture(scope="session")
def harnesses(data):
    made = {}

    def get(name):
        if name not in made:
            made[name] = Harness(load(name, data))
        return made[name]

    return get


@pytest.fixture
def harness(harnesses, request):
    return harnesses(request.param)
