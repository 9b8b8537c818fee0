"""The harness that runs CUDA kernels on the CPU, tested by kernels with and without faults."""

import ctypes

import cuda_harness as harness
import pytest
import torch
from cuda_harness import Source, launch_planted, on_device, run_planted, to_device

pytestmark = harness.needs_harness

ORDERS = ("ascending", "descending", "random")
LANES = torch.arange(32)


@pytest.fixture(params=ORDERS)
def order(request):
    with harness.schedule(request.param):
        yield request.param


# The thread that is caught, if it does not depend on the order, and what it did.
RAW_ACCESS = r"an access at .*, offset \d+ of a block of 128 bytes: dereferenced without a checked"
OUT_OF_BOUNDS = "read-only load of 4 bytes at .*, offset {} of a block of 128 bytes: out of bounds"
FAULTS = {
    "read_past_the_end": (31, OUT_OF_BOUNDS.format(128)),
    "read_before_the_beginning": (0, OUT_OF_BOUNDS.format(-4)),
    "read_without_a_check": (None, RAW_ACCESS),
    "write_without_a_check": (None, RAW_ACCESS),
    "read_from_null": (None, "an access at .*, which is not in device memory"),
    "use_up_the_stack": (None, "has used up its stack"),
    "sum_with_a_lane_missing": (
        13,
        "__shfl_xor_sync of 4 bytes with mask 0xffffdfff does not name the lane that calls it, 13",
    ),
    "sum_without_a_lane": (29, "__shfl_xor_sync .* reads from lane 13, which is not in the mask"),
    "sum_while_a_lane_is_elsewhere": (
        0,
        "waits forever at __shfl_xor_sync .* with mask 0xffffffff for lane 13, which waits at "
        "__syncwarp with mask 0x2001",
    ),
    "sum_while_a_lane_is_at_the_barrier": (
        0,
        "waits forever at __shfl_xor_sync .* for lane 13, which waits at __syncthreads",
    ),
    "shuffle_with_a_width_of_three": (
        None,
        "__shfl_sync .* has a width of 3, which is not a power of two up to 32",
    ),
    "shuffle_from_a_lane_that_exited": (
        0,
        "__shfl_sync .* reads from lane 20, which has exited",
    ),
    "read_only_what_is_written": (
        None,
        r"a launch both reads this block as read-only \(__ldg\) and writes to it",
    ),
}


@pytest.mark.parametrize("kernel", FAULTS)
def test_planted_fault_is_caught(kernel, order):
    thread, words = FAULTS[kernel]
    number = r"\d+" if thread is None else thread
    words = rf"block \(0, 0, 0\), thread \({number}, 0, 0\): .*{words}"
    with pytest.raises(RuntimeError, match=words):
        run_planted(kernel)
    # The fault leaves nothing behind.
    assert run_planted("copy").equal(LANES.float())


@pytest.mark.parametrize(
    "kernel, access",
    [("write_past_the_end", "store"), ("add_past_the_end", "atomic addition")],
)
def test_write_past_the_end_is_caught(kernel, access):
    with pytest.raises(
        RuntimeError,
        match=rf"block \(3, 0, 0\), thread \(4, 0, 0\): {access} of 4 bytes .*, offset 400 of a "
        "block of 400 bytes: out of bounds",
    ):
        run_planted(kernel, size=100, grid=(4, 1, 1))


def test_kernels_without_faults(order):
    numbers = torch.arange(100, dtype=torch.float32)
    assert run_planted("copy", size=100, grid=(4, 1, 1)).equal(numbers)
    assert run_planted("copy_vectors", size=100).equal(numbers)
    assert run_planted("sum").equal(torch.full((32,), 496.0))
    assert run_planted("exchange").equal((LANES ^ 1).float())
    assert run_planted("exchange_in_the_block", size=96, block=(96, 1, 1)).equal(
        numbers[:96].flip(0)
    )
    assert run_planted("exchange_shared").equal((LANES ^ 1).float())
    output = run_planted("shuffle_after_others_exited")
    assert output[:16].equal((LANES[:16] ^ 1).float())
    assert output[16:].isnan().all()


def test_what_is_left_unwritten_is_nan():
    output = run_planted("leave_the_last_one_unwritten", size=100, grid=(4, 1, 1))
    assert output[:99].equal(torch.arange(99, dtype=torch.float32))
    assert output[99].isnan()
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert on_device(9, dtype=dtype).isnan().all()


def test_bounds_are_exact_to_the_byte():
    """Reads the last vector of tensors that contain 16, 15 or one of its bytes."""
    launch_planted("copy_vectors", on_device(64, dtype=torch.uint8), on_device(16))
    for size in (63, 49):
        message = f"of 16 bytes .*, offset 48 of a block of {size} bytes: out of bounds"
        with pytest.raises(RuntimeError, match=message):
            launch_planted("copy_vectors", on_device(size, dtype=torch.uint8), on_device(16))


@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_alignment(offset):
    """Reads vectors some floats into a tensor, by the kernel's or the tensor's offset."""
    numbers = torch.arange(100, dtype=torch.float32)
    input = to_device(numbers)
    for tensor, argument in ((input, offset), (input[offset:], 0)):
        output = on_device(16)
        if offset == 4:
            launch_planted("copy_vectors", tensor, output, argument=argument)
            assert output.equal(numbers[4:20])
        else:
            with pytest.raises(
                RuntimeError, match=f"of 16 bytes .*, offset {4 * offset} of .*: not aligned"
            ):
                launch_planted("copy_vectors", tensor, output, argument=argument)


def test_only_live_device_memory_can_be_read():
    output = on_device(32)
    with pytest.raises(RuntimeError, match="load of 4 bytes .* which is not in device memory"):
        launch_planted("copy", torch.zeros(32), output)

    freed = on_device(32)
    buffer = (ctypes.c_float * 32).from_address(freed.data_ptr())
    del freed
    with pytest.raises(RuntimeError, match="load of 4 bytes .*: out of bounds"):
        launch_planted("copy", torch.frombuffer(buffer, dtype=torch.float32), output)


def test_device_memory_goes_back():
    before = harness.resident_bytes()
    tensor = on_device(2**24)
    assert harness.resident_bytes() - before >= 2**26
    del tensor
    assert harness.resident_bytes() == before
    # A nested one changes nothing; outside both, tensors are ordinary again.
    with harness.device_memory():
        with harness.device_memory():
            torch.ones(2**20)
        inner = torch.ones(2**20)
        assert harness.resident_bytes() - before >= 2**22
    outer = torch.ones(2**24)
    del inner
    assert harness.resident_bytes() == before
    assert outer.sum() == 2**24


def test_large_tensors_take_only_what_is_written():
    before = harness.resident_bytes()
    tensor = on_device(3 * 2**30, dtype=torch.uint8)
    tensor[-4:] = torch.tensor([0, 0, 128, 63], dtype=torch.uint8)  # 1.0 in float32
    assert harness.resident_bytes() - before < 2**20
    output = on_device(1)
    launch_planted("copy", tensor[-4:], output)
    assert output == 1


def test_orders_show_a_missing_synchronisation_of_shared_memory(order):
    """It is NaN until it is written, in the other blocks as well."""
    output = run_planted("exchange_shared_unsynchronised", size=32, grid=(3, 1, 1))
    assert output.isnan().any()


def test_writing_beyond_shared_memory_is_caught(order):
    with pytest.raises(RuntimeError, match=r"block \(0, 0, 0\) has written beyond the end of its"):
        run_planted("write_beyond_shared_memory")


def test_orders_show_a_missing_synchronisation():
    """Of two neighbours that exchange numbers, only the one that runs later gets one."""
    outputs = {}
    for order in ORDERS:
        with harness.schedule(order):
            outputs[order] = run_planted("exchange_unsynchronised")
    assert outputs["ascending"][1::2].equal(LANES[::2].float())
    assert outputs["ascending"][::2].isnan().all()
    assert outputs["descending"][::2].equal(LANES[1::2].float())
    assert outputs["descending"][1::2].isnan().all()
    missing = outputs["random"].isnan()
    assert 0 < missing[::2].sum() < 16 and 0 < missing[1::2].sum() < 16


def test_orders_show_a_missing_barrier(order):
    output = run_planted("exchange_in_the_block_unsynchronised", size=96, block=(96, 1, 1))
    assert output.isnan().any()


def test_additions_are_atomic(order):
    """Other threads run between a load and a store, but not within an atomic addition."""
    assert count_threads("count_threads") == 512
    lost = count_threads("count_threads_without_atomics") < 512
    assert lost == (order == "random")


def count_threads(kernel):
    """By 512 threads, each of which adds 1."""
    output = to_device(torch.zeros(1))
    launch_planted(kernel, output, output, grid=(8, 1, 1), block=(64, 1, 1))
    return output.item()


def test_random_order_depends_on_the_seed():
    def count(seed):
        with harness.schedule("random", seed):
            return count_threads("count_threads_without_atomics")

    counts = [count(seed) for seed in range(8)]
    assert counts == [count(seed) for seed in range(8)]
    assert len(set(counts)) > 1


def test_an_order_holds_to_the_end_of_a_statement():
    def is_ascending():
        return run_planted("exchange_unsynchronised")[0].isnan().item()

    assert is_ascending()
    with harness.schedule("descending"):
        assert not is_ascending()
        harness.schedule("ascending")
        assert is_ascending()
    harness.schedule("descending")
    assert not is_ascending()
    harness.schedule("ascending")


def test_unknown_order():
    with pytest.raises(ValueError, match="ascending, descending or random, got sideways"):
        harness.schedule("sideways")


def test_halves_of_a_warp_shuffle_apart(order):
    expected = torch.cat([LANES[:16] ^ 1, LANES[16:] ^ 6])
    assert run_planted("shuffle_in_halves").equal(expected.float())


def test_all_threads_of_all_blocks_run(order):
    options = dict(grid=(3, 2, 4), block=(5, 3, 2))
    assert run_planted("number_threads", size=720, **options).equal(torch.arange(720.0))


def test_counters(order):
    harness.counters()
    threads = 5 * 64
    output = to_device(torch.zeros(2 * threads + 2))
    for _ in range(2):
        launch_planted("do_some_of_each", to_device(torch.ones(4)), output, (5, 1, 1), (64, 1, 1))
    expected = {
        "blocks": 5,
        "threads": 64,
        "loads": threads,
        "loaded_bytes": 16 * threads,
        "stores": threads,
        "stored_bytes": 8 * threads,
        "atomics": 2 * threads,
        "atomic_bytes": 8 * threads,
        "shuffles": 3 * threads,
    }
    assert harness.counters() == [expected, expected]
    assert harness.counters() == []


@pytest.mark.parametrize(
    "grid, block",
    [
        ((0, 1, 1), (32, 1, 1)),
        ((2**31, 1, 1), (32, 1, 1)),
        ((1, 2**16, 1), (32, 1, 1)),
        ((1, 1, 2**16), (32, 1, 1)),
        ((1, 1, 1), (0, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (1, 1025, 1)),
        ((1, 1, 1), (1, 1, 65)),
        ((1, 1, 1), (32, 33, 1)),
    ],
)
def test_grids_that_cuda_refuses(grid, block):
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        run_planted("copy", grid=grid, block=block)


def test_builds_what_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "BUILD", tmp_path / "build")
    header, source = tmp_path / "number.h", tmp_path / "number.cpp"
    header.write_text("constexpr int kNumber = NUMBER;\n")
    source.write_text('#include "number.h"\nextern "C" int number() { return kNumber; }\n')

    def number(macro):
        library = harness.build("number", [Source(source, (f"NUMBER={macro}",))])
        made.append((library, library.stat().st_mtime_ns))
        return ctypes.CDLL(str(library)).number()

    made = []
    assert [number(3), number(3)] == [3, 3]
    assert made[0] == made[1]
    assert number(4) == 4
    header.write_text("constexpr int kNumber = NUMBER + 1;\n")
    assert number(4) == 5
    assert not list((tmp_path / "build").glob("tmp*"))

    source.write_text("int number() { return missing; }\n// the rest\nint other = absent;\n")
    with pytest.raises(RuntimeError, match="(?s)number.cpp:1:.*missing.*number.cpp:3:.*absent"):
        number(3)
