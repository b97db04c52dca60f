import pytest

from oxjax import LLM


@pytest.fixture(scope="module")
def llm():
    with LLM(max_batch=4, max_context=256) as llm:
        yield llm
