"""The toy architectures of the law."""

import pytest

from tests.helpers.toy import toys


@pytest.fixture(scope="module", autouse=True)
def with_toys():
    """Toy architectures are known while a module of the law runs."""
    with toys():
        yield
