import pytest
from sampling_problems import LEAVES, needs_native


@pytest.fixture(
    scope="session", params=[pytest.param("native", marks=needs_native), pytest.param("pytorch")]
)
def form(request):
    """The operators' two forms."""
    return request.param


@pytest.fixture(scope="session", params=list(LEAVES))
def attention(request):
    return request.param
