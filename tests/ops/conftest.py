import pytest
from cuda_harness import needs_harness
from sampling_problems import LEAVES, needs_native

NATIVE = pytest.param("native", marks=needs_native)
PYTORCH = pytest.param("pytorch")
HARNESS = pytest.param("harness", marks=needs_harness)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(scope="session", params=[NATIVE, PYTORCH, HARNESS, CUDA])
def form(request):
    """The operators' forms: native on the CPU, PyTorch, CUDA kernels on the CPU and on a GPU."""
    return request.param


@pytest.fixture(scope="session", params=[NATIVE, CUDA])
def native_form(request):
    return request.param


@pytest.fixture(scope="session", params=list(LEAVES))
def attention(request):
    return request.param
