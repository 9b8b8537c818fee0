"""What only a GPU can show about the CUDA kernels.

The other tests of operators run on it as well, in the form "cuda".
"""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from sampling_problems import (
    LEAVES,
    SIZES,
    assert_rounded_once,
    assert_same,
    cast,
    level_tensors,
    make_problem,
    relative_error,
    run,
    run_python,
    run_with_gradients,
    transform,
)
from torch.utils.cpp_extension import CUDA_HOME

from lite_detr import ops
from lite_detr.modeling import KeyAwareDeformableAttention, MultiScaleDeformableAttention, Scales

pytestmark = pytest.mark.gpu
SHARED_KEY = pytest.mark.parametrize("shared_key", [False, True])
# 2125 tokens, and a query for each: many of them add to one token.
MAPS = ((40, 40), (20, 20), (10, 10), (5, 5))
# A number of queries that does not fill a block.
PROBLEM = dict(sizes=SIZES, points=4, channels=32, queries=37, heads=3)


def on_device(problem, device="cuda"):
    """Move a problem to a device, as leaves of autograd."""
    return transform(problem, lambda tensor: tensor.detach().to(device).requires_grad_())


def arguments(attention, problem, levels):
    """Return the arguments of an operator in `lite_detr.ops`."""
    names = {
        "ms_deform_attn": ("value", None, None, "locations", "weights"),
        "key_aware_ms_deform_attn": ("query", "key", "value", None, None, "locations"),
    }
    levels = iter(levels)
    return [problem[name] if name else next(levels) for name in names[attention]]


def make_leaves(**sizes):
    """Return leaves and a gradient of the output, all in float32 on the device."""
    leaves = on_device(cast(make_problem(**(PROBLEM | sizes)), torch.float32))
    return leaves, torch.randn_like(leaves["query"]).flatten(2)


def step(attention, leaves, grad_output):
    """Return the output and, by name, the gradients, on the device."""
    shared_key = leaves["key"] is leaves["value"]
    names = [name for name in LEAVES[attention] if not (shared_key and name == "key")]
    output = run(attention, "native", leaves)
    grads = torch.autograd.grad(output, [leaves[name] for name in names], grad_output)
    return {"output": output.detach()} | dict(zip(names, grads))


@SHARED_KEY
@pytest.mark.parametrize("channels", [1, 16, 17, 32, 48, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_width_of_a_head(attention, dtype, channels, shared_key):
    problem = make_problem(SIZES, 3, channels, 3, 37, 3, shared_key=shared_key, seed=channels)
    problem = cast(problem, dtype, torch.promote_types(dtype, torch.float32))
    grad_output = problem["query"].flip(1).flatten(2)
    results = run_with_gradients(attention, "cuda", problem, grad_output)
    if dtype.itemsize == 2:
        assert_rounded_once(attention, problem, grad_output, results)
        return
    bound = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for name, expected in run_with_gradients(attention, "pytorch", problem, grad_output).items():
        error = relative_error(results[name], expected)
        assert error <= bound, f"{name} is {error:.1e} off"


@SHARED_KEY
@pytest.mark.parametrize("channels", [8, 32, 64, 128, 256])
def test_gradients_of_every_kernel(attention, channels, shared_key):
    problem = make_problem(SIZES[:2], 2, channels, 1, 2, 1, shared_key=shared_key)
    leaves = on_device(problem)
    names = [name for name in LEAVES[attention] if not (shared_key and name == "key")]

    def function(*tensors):
        changed = leaves | dict(zip(names, tensors))
        return run(attention, "native", changed | ({"key": changed["value"]} if shared_key else {}))

    tensors = [leaves[name] for name in names]
    # Sums of up to four terms for each token have any order.
    assert torch.autograd.gradcheck(function, tensors, nondet_tol=1e-13, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_and_written(dtype):
    """Including subnormal and infinite ones; a NaN stays a NaN."""
    problem = cast(make_problem(((1, 1),), 1, 256, 1, 1, 256), dtype)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    problem["value"] = numbers.view(1, 1, 256, 256)
    problem["weights"].fill_(1)
    problem["locations"].fill_(0.5)
    returned = run("ms_deform_attn", "cuda", problem).flatten()
    assert numbers.isinf().any() and numbers.isnan().any()
    assert ((returned == numbers) | (returned.isnan() & numbers.isnan())).all()


@pytest.mark.parametrize("batch", [3, 16])
def test_an_image_is_computed_as_if_alone(attention, batch):
    problem = cast(make_problem(**PROBLEM, batch=batch), torch.float32)
    grad_output = problem["query"].flip(1).flatten(2)
    results = run_with_gradients(attention, "cuda", problem, grad_output)
    for image in range(batch):
        only = slice(image, image + 1)
        alone = transform(problem, lambda tensor, only=only: tensor[only])
        expected = run_with_gradients(attention, "cuda", alone, grad_output[only])
        for name, result in results.items():
            assert_same("cuda", name, result[only], expected[name], problem)


@SHARED_KEY
def test_the_same_bits_every_time(attention, shared_key):
    """For everything that is not a sum over queries."""
    sizes = dict(sizes=MAPS, queries=2125, heads=8, shared_key=shared_key)
    leaves, grad_output = make_leaves(**sizes)
    expected = step(attention, leaves, grad_output)
    for _ in range(4):
        for name, result in step(attention, leaves, grad_output).items():
            assert_same("cuda", name, result, expected[name], leaves)


def test_levels_may_lie_on_the_device(attention):
    leaves, _ = make_leaves()
    levels = level_tensors(leaves["sizes"])
    function = getattr(ops, attention)
    expected = function(*arguments(attention, leaves, levels))
    on_gpu = [tensor.cuda() for tensor in levels]
    assert torch.equal(function(*arguments(attention, leaves, on_gpu)), expected)
    # Mistakes are found there as well, and do not affect the device.
    starts = on_gpu[1] + 1
    with pytest.raises(ValueError, match=r"level_start_index\[0\] must be 0.*got 1"):
        function(*arguments(attention, leaves, (on_gpu[0], starts)))
    with pytest.raises(ValueError, match="reaches past the value's S"):
        function(*arguments(attention, leaves, (2 * on_gpu[0], on_gpu[1])))
    on_cpu = transform(leaves, lambda tensor: tensor.detach().cpu())
    with pytest.raises(ValueError, match="on the value's device cpu, got cuda"):
        function(*arguments(attention, on_cpu, on_gpu))
    assert torch.equal(function(*arguments(attention, leaves, levels)), expected)


@pytest.fixture
def set_sync_debug_mode():
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def test_levels_on_the_host_cost_no_synchronisation(attention, set_sync_debug_mode):
    leaves, grad_output = make_leaves()
    levels = [tensor.cuda() for tensor in level_tensors(leaves["sizes"])]
    set_sync_debug_mode("error")
    step(attention, leaves, grad_output)
    # On the device they do, which shows that the test notices a synchronisation.
    with pytest.raises(RuntimeError, match="synchronizing"):
        getattr(ops, attention)(*arguments(attention, leaves, levels))


def test_the_current_stream_is_taken(attention):
    """Inputs get their values late, on a stream that nothing else waits for."""
    leaves, grad_output = make_leaves()
    expected = step(attention, leaves, grad_output)
    late = transform(leaves, lambda tensor: torch.zeros_like(tensor).requires_grad_())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for name in ("query", "key", "value", "locations", "weights"):
                late[name].copy_(leaves[name])
        results = step(attention, late, grad_output)
    stream.synchronize()
    for name, result in results.items():
        assert_same("cuda", name, result, expected[name], leaves)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_taken(attention):
    leaves, grad_output = make_leaves()
    expected = step(attention, leaves, grad_output)
    others = on_device(leaves, "cuda:1")
    for name, result in step(attention, others, grad_output.to("cuda:1")).items():
        assert result.device == torch.device("cuda:1")
        assert_same("cuda", name, result.to("cuda:0"), expected[name], leaves)
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="must be on the value's device cuda:0, got cuda:1"):
        run(attention, "native", leaves | {"locations": others["locations"]})


def test_graph_capture(attention):
    """Forward and backward, replayed with other inputs."""
    leaves, grad_output = make_leaves()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(attention, leaves, grad_output)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(attention, leaves, grad_output)
    others, _ = make_leaves(seed=1)
    with torch.no_grad():
        for name in ("query", "key", "value", "locations", "weights"):
            leaves[name].copy_(others[name])
    graph.replay()
    for name, expected in step(attention, leaves, grad_output).items():
        assert_same("cuda", name, results[name], expected, leaves)


@pytest.fixture
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(attention, deterministic_algorithms):
    leaves, grad_output = make_leaves()
    output = run(attention, "native", leaves)
    assert output.isfinite().all()
    message = f"lite_detr::{attention}_backward on CUDA does not have a deterministic"
    with pytest.raises(RuntimeError, match=message):
        output.backward(grad_output)


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(sizes=((1, 1),) * 33), "up to 32 levels, got 33"),
        (dict(channels=257), "up to 256 channels, got 257"),
        (dict(batch=2**16), "up to 65535 images and heads, got 65536 images and 2 heads"),
    ],
)
def test_limits(attention, sizes, message):
    sizes = dict(sizes=((1, 1),), points=1, queries=1) | sizes
    problem = cast(make_problem(**sizes), torch.float32)
    with pytest.raises(ValueError, match=message):
        run(attention, "cuda", problem)


def skip_without_memory(gibibytes):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, and {free:.0f} are there")


def at_the_end(tensor, length, fill):
    """``[B, N, ...]`` -> ``[B, length, ...]``, a leaf whose last N are the tensor's."""
    shape = (tensor.shape[0], length, *tensor.shape[2:])
    longer = torch.full(shape, fill, dtype=tensor.dtype, device="cuda")
    longer[:, -tensor.shape[1] :] = tensor
    return longer.requires_grad_()


# Only the last rows are sampled; 32 channels of 8 heads are more than 2**31 numbers.
HEIGHT, WIDTH = 2900, 2896


def test_values_beyond_2_31_numbers(attention):
    skip_without_memory(20)
    rows = 8
    problem = make_problem(((rows, WIDTH),), 4, 32, 1, 64, 8, shared_key=True)
    # Inside these rows; the larger map continues above them.
    cells = problem["locations"][..., 1] * rows - 0.5
    cells = cells - cells.floor() + cells.floor() % (rows - 4) + 2
    problem["locations"][..., 1] = (cells + 0.5) / rows
    problem = cast(problem, torch.bfloat16, torch.float32)
    grad_output = problem["query"].flip(1).flatten(2)
    expected = run_with_gradients(attention, "pytorch", problem, grad_output)

    large = at_the_end(problem["value"], HEIGHT * WIDTH, torch.nan)
    assert large.numel() > 2**31
    locations = problem["locations"].double()
    locations[..., 1] = (cells + (HEIGHT - rows) + 0.5) / HEIGHT
    leaves = on_device(problem | {"sizes": ((HEIGHT, WIDTH),), "locations": locations.float()})
    results = step(attention, leaves | {"value": large, "key": large}, grad_output.cuda())
    tokens = problem["value"].shape[1]
    assert not results["value"][:, :-tokens].any()
    results["value"] = results["value"][:, -tokens:]
    expected["locations"][..., 1] *= HEIGHT / rows
    for name, result in results.items():
        # float32 locates a point in a map of that size to 1e-4 of a cell.
        assert relative_error(result.cpu(), expected[name]) < 0.02, name


def test_outputs_beyond_2_31_numbers(attention):
    skip_without_memory(12)
    queries = 2**23 + 5
    problem = make_problem(((7, 9),), 1, 32, 1, 5, 8, shared_key=True)
    problem = transform(cast(problem, torch.bfloat16, torch.float32), torch.Tensor.cuda)
    longer = problem | {
        "query": at_the_end(problem["query"], queries, 0.0),
        "locations": at_the_end(problem["locations"], queries, torch.nan),
        "weights": at_the_end(problem["weights"], queries, 0.0),
    }
    with torch.no_grad():
        output = run(attention, "native", longer)
    assert output.numel() > 2**31
    assert torch.equal(output[:, -5:], run(attention, "native", problem))
    assert not output[:, :-5].any()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(MultiScaleDeformableAttention, id="msda"),
        pytest.param(KeyAwareDeformableAttention, id="kda"),
        pytest.param(
            lambda *sizes: KeyAwareDeformableAttention(*sizes, key_proj=True), id="kda-key_proj"
        ),
    ],
)
def test_modules_do_on_a_gpu_what_they_do_on_a_cpu(make):
    torch.manual_seed(0)
    module = make(64, 2, 2, 3).double()
    torch.nn.init.normal_(module.sampling_offsets.weight)
    masks = [torch.zeros(2, 6, 8, dtype=torch.bool), torch.zeros(2, 3, 4, dtype=torch.bool)]
    inputs = torch.randn(2, 21, 64), torch.rand(2, 21, 2, 2), torch.randn(2, 60, 64)
    results = []
    for device in ("cpu", "cuda"):
        moved = copy.deepcopy(module).to(device)
        scales = Scales.from_masks([mask.to(device) for mask in masks], False, torch.float64)
        output = moved(*(tensor.double().to(device) for tensor in inputs), scales)
        grads = torch.autograd.grad(output.square().sum(), list(moved.parameters()))
        results.append([tensor.cpu() for tensor in (output.detach(), *grads)])
    for cpu, cuda in zip(*results):
        assert relative_error(cuda, cpu) < 1e-11


def test_key_aware_attention_takes_a_tenth_of_the_memory():
    """Forward and backward, including the output and the gradients."""
    problem = cast(make_problem(MAPS, 4, 32, 1, 2125, 8, shared_key=True), torch.float32)
    leaves = on_device(problem)
    tensors = [leaves[name] for name in ("query", "value", "locations")]
    grad_output = torch.randn(1, 2125, 256, device="cuda")
    peaks = {}
    for form in ("native", "pytorch"):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = run("key_aware_ms_deform_attn", form, leaves)
        grads = torch.autograd.grad(output, tensors, grad_output)
        peaks[form] = torch.cuda.max_memory_allocated() - before
        del output, grads
    assert 0 < peaks["native"] < peaks["pytorch"] / 10


SMALL_RUNS = """
import torch
from sampling_problems import LEAVES, cast, make_problem, run_with_gradients
for attention in LEAVES:
    for channels in (5, 32, 256):
        for shared_key in (False, True):
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                problem = make_problem(channels=channels, queries=7, shared_key=shared_key)
                problem = cast(problem, dtype, torch.promote_types(dtype, torch.float32))
                run_with_gradients(attention, "cuda", problem)
"""


def find_sanitizer():
    """Find compute-sanitizer, in its own folder of a toolkit or beside the compiler."""
    folders = [Path(CUDA_HOME or "/usr/local/cuda") / name for name in ("bin", "compute-sanitizer")]
    found = map(shutil.which, ["compute-sanitizer", *(f / "compute-sanitizer" for f in folders)])
    return next(filter(None, found), None)


# Without racecheck, which is about shared memory: the kernels have none.
@pytest.mark.skipif(find_sanitizer() is None, reason="compute-sanitizer is not found")
@pytest.mark.parametrize("tool", ["memcheck", "initcheck", "synccheck"])
def test_compute_sanitizer(tool):
    launcher = [find_sanitizer(), "--tool", tool, "--error-exitcode", "99"]
    # Otherwise tensors would be parts of large blocks, all of which can be accessed.
    result = run_python(SMALL_RUNS, launcher=launcher, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ERROR SUMMARY: 0 errors" in result.stdout
