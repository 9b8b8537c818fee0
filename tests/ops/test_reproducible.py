"""Results of the native operators with any number of threads and any instruction set."""

import sys

import pytest
import torch
from sampling_problems import (
    cast,
    make_problem,
    needs_native,
    run_python,
    run_with_gradients,
)

pytestmark = needs_native
LEVELS = ((12, 16), (6, 8), (3, 4))  # 252 tokens
# More and fewer samples than tokens: rows are packed, or read in place.
QUERIES = {"encoder": 252, "decoder": 7}


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("queries", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("channels", [12, 32])
@pytest.mark.parametrize("shared_key", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(
    set_threads, attention, dtype, shared_key, channels, queries
):
    problem = make_problem(LEVELS, 7, channels, 1, queries, heads=2, shared_key=shared_key)
    problem = cast(problem, dtype, locations_dtype=torch.float32)
    results = []
    # Of two heads, three and five threads have parts of the three levels.
    for threads in (1, 2, 3, 5):
        set_threads(threads)
        results.append(run_with_gradients(attention, "native", problem))
    for name, result in results[0].items():
        for others in results[1:]:
            assert torch.equal(result, others[name]), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize(
    "attention, direction",
    [("ms_deform_attn", "forward"), ("key_aware_ms_deform_attn", "backward")],
)
def test_threads_share_the_work(attention, direction):
    """On tensors too small for PyTorch to start a thread for them."""
    run = run_python(f"""
import os, torch
from sampling_problems import make_problem, run, run_with_gradients
def count():
    return len(os.listdir("/proc/self/task"))
if {direction!r} == "backward":
    torch.set_num_threads(1)
    run_with_gradients({attention!r}, "native", make_problem())
torch.set_num_threads(2)
before = count()
(run if {direction!r} == "forward" else run_with_gradients)({attention!r}, "native", make_problem())
print(count() - before)
""")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["1"]


def skip_without(capability):
    best = torch.backends.cpu.get_cpu_capability()
    if best not in {"avx2": ("AVX2", "AVX512"), "avx512": ("AVX512",)}[capability]:
        pytest.skip(f"PyTorch finds no {capability} here but {best}")


RESULTS = """
import sys, torch
from sampling_problems import LEAVES, cast, make_problem, run, run_with_gradients
results = {}
for dtype in (torch.bfloat16, torch.float16):
    # Every possible number, in a map of one cell that is sampled at its centre with weight 1.
    problem = cast(make_problem(((1, 1),), 1, 2**16, 1, 1, 1), dtype)
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    problem["value"] = numbers.view(1, 1, 1, 2**16)
    problem["weights"].fill_(1)
    problem["locations"].fill_(0.5)
    results[dtype] = numbers, run("ms_deform_attn", "native", problem).flatten()
for channels in (7, 16, 32, 80):
    for queries in (3, 40):
        problem = make_problem(points=6, channels=channels, queries=queries)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            converted = cast(problem, dtype, locations_dtype=torch.float32)
            for attention in LEAVES:
                for name, result in run_with_gradients(attention, "native", converted).items():
                    results[attention, name, channels, queries, dtype] = result
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    """``results_of(capability)``: many outputs and gradients, from a process of its own."""
    folder = tmp_path_factory.mktemp("results")

    def results_of(capability):
        path = folder / capability
        if not path.exists():
            code = RESULTS.replace("sys.argv[1]", repr(str(path)))
            run = run_python(code, LITE_DETR_CPU_CAPABILITY=capability)
            assert run.returncode == 0, run.stderr
        return torch.load(path)

    return results_of


@pytest.mark.parametrize("capability", ["avx2", "avx512"])
def test_instruction_sets_agree(results_of, capability):
    skip_without(capability)
    others = results_of(capability)
    differing = 0
    for case, expected in results_of("portable").items():
        if not isinstance(case, tuple):
            continue
        *_, dtype = case
        result = others[case]
        # Sums have another order. In 16 bits that may round an output, from which the key-aware
        # backward pass starts, to the next number.
        bound = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
        largest = expected.double().abs().max().clamp(min=0.1)
        assert ((result.double() - expected.double()).abs() <= bound * largest).all(), case
        differing += not torch.equal(result, expected)
    # Fused multiply-adds round differently: with equal bits, the same kernels would have run.
    assert differing > 0


def test_the_two_vector_instruction_sets_are_not_one(results_of):
    """Sums by halving, of 8 numbers in one set and of 16 in the other."""
    skip_without("avx512")
    wide, narrow = results_of("avx512"), results_of("avx2")
    cases = [case for case in wide if isinstance(case, tuple)]
    assert any(not torch.equal(narrow[case], wide[case]) for case in cases)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_16_bit_number_is_read_and_written(results_of, capability, dtype):
    """Including subnormal and infinite ones; a NaN stays a NaN."""
    if capability != "portable":
        skip_without(capability)
    given, returned = results_of(capability)[dtype]
    assert given.isfinite().any() and given.isinf().any() and given.isnan().any()
    assert ((returned == given) | (returned.isnan() & given.isnan())).all()


def test_unknown_instruction_set():
    code = """
from sampling_problems import make_problem, run
run("ms_deform_attn", "native", make_problem())
"""
    run = run_python(code, LITE_DETR_CPU_CAPABILITY="sse9")
    message = "ValueError: LITE_DETR_CPU_CAPABILITY must be portable, avx2 or avx512, got sse9"
    assert message in run.stderr
