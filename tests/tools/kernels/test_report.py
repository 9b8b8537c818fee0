"""The program that inspects compiled CUDA kernels, and what it must find in ours."""

import functools
import json
import os
import shlex
import subprocess
from collections import Counter

import compare_nvrtc
import cuda_harness
import machine_code
import nvcc
import pytest
import report
import torch
from sampling_problems import cast, fuse, make_problem, run_kernels

from lite_detr.analysis.markdown_page import BEGIN, END
from lite_detr.errors import LiteDetrError

# Those that the project makes promises for, with different atomic additions.
ARCHITECTURES = ("8.0", "9.0")
# To compile the others takes as long again.
DTYPES, OTHERS = ("float32", "bfloat16"), ("float64", "float16")
EVERY_DTYPE = pytest.mark.parametrize(
    "dtypes", [DTYPES, pytest.param(OTHERS, marks=pytest.mark.slow)]
)
KERNELS = {"float32": 30, "bfloat16": 30, "float64": 24, "float16": 30}
# The original's loads for a point: two coordinates, a weight and four corners; two sizes and a
# start for each level with four points; and backward the gradient for a query's 16 points. None of
# its loads depends on the compiler, so that machines without its source can compare with it.
ORIGINAL_LOADS = {"forward": 2 + 1 + 4 + 3 / 4, "backward": 2 + 1 + 4 + 3 / 4 + 1 / 16}


def reason():
    try:
        nvcc.disassemblers()
    except LiteDetrError as error:
        return str(error)
    return None


needs_compiler = pytest.mark.skipif(reason() is not None, reason=str(reason()))


@functools.cache
def make_records(dtypes):
    """Return the records of our kernels: about half a minute on two cores."""
    return report.make_records(ARCHITECTURES, dtypes, original=None)


@needs_compiler
@EVERY_DTYPE
def test_our_kernels_keep_their_bounds(dtypes):
    records = make_records(dtypes)
    # One half takes locations, the other reference points and offsets.
    assert len(records) == len(ARCHITECTURES) * 2 * sum(map(KERNELS.get, dtypes))
    assert {entry["threads"] for entry in records} == {128, 256}
    originals = [
        {"whose": "original", "architecture": architecture, "pass": direction, "dtype": dtype}
        | {"for a point": {"loads": loads}, "loads for a corner": loads / 4}
        for architecture in ARCHITECTURES
        for direction, loads in ORIGINAL_LOADS.items()
        for dtype in ("float32", "float64")
    ]
    report.compare(records + originals)
    compared = [entry for entry in records if "loads of the original's" in entry]
    assert len(compared) == len(ARCHITECTURES) * 2 * len(dtypes) * 6
    assert report.violations(records) == []


@needs_compiler
@EVERY_DTYPE
def test_every_gather_of_a_forward_pass_is_as_wide_as_a_load_can_be(dtypes):
    """8 lanes load a row of 32 channels in float32, 4 in 16 bits, and 16 in float64."""
    lanes = {"float32": 8, "float16": 4, "bfloat16": 4, "float64": 16}
    for entry in make_records(dtypes):
        if entry["pass"] == "forward" and "for a point" in entry:
            # One lane finds a point with one or two loads; the query's channels are few.
            gathers = lanes[entry["dtype"]] / 32
            assert gathers < entry["loads for a corner"] < 1.6 * gathers, entry["kernel"]


@needs_compiler
@cuda_harness.needs_harness
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("keys", ["none", "shared", "separate"])
@pytest.mark.parametrize("fused", ["", "fused_"])
def test_counts_are_those_of_a_run(fused, keys, architecture, dtype):
    """The same kernels run on the CPU, where all lanes load, add and shuffle for 64 queries."""
    attention = fused + ("ms_deform_attn" if keys == "none" else "key_aware_ms_deform_attn")
    queries, levels, points = 64, 4, 4
    sizes = ((9, 9),) * levels
    problem = make_problem(sizes, points, 32, 1, queries, 1, shared_key=keys != "separate")
    # All four corners exist.
    problem["locations"] = problem["locations"].clamp(0.2, 0.8)
    # Boxes, as code that both sides of a branch count for reads their extents.
    problem = fuse(problem, 4, dtype) if fused else cast(problem, dtype, torch.float32)
    cuda_harness.counters()
    run_kernels(attention, problem, arch=int(architecture.replace(".", "")))
    launches = cuda_harness.counters()
    for direction, counters in zip(("forward", "backward"), launches, strict=True):
        entry = next(
            entry
            for entry in make_records(DTYPES)
            if "for a point" in entry
            and entry["architecture"] == architecture
            and entry["pass"] == direction
            and entry["keys"] == keys
            and entry["attention"].startswith("fused") == bool(fused)
            and entry["dtype"] == str(dtype).removeprefix("torch.")
        )
        for kind in ("loads", "atomics", "shuffles"):
            ran = counters[kind] / 32 / (queries * levels * points)
            assert entry["for a point"][kind] == pytest.approx(ran), (entry["kernel"], kind)


LISTING = """
\t.section\t.text._Z3fooPf,"ax",@progbits
_Z3fooPf:
.text._Z3fooPf:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/              @!P0 EXIT ;
.L_x_2:
        /*0020*/                   SHFL.IDX PT, R1, R1, R3, 0x1f ;
        /*0030*/              @!P0 CALL.REL.NOINC `(.L_x_3) ;
.L_x_1:
        /*0040*/               @P1 LDG.E.128.CONSTANT R8, desc[UR6][R20.64] ;
        /*0050*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*0060*/                   SHFL.BFLY PT, R1, R1, 0x1, 0x1f ;
.L_x_6:
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR8][R12.64], R27 ;
        /*0090*/                   REDUX.SUM UR4, R4 ;
        /*00a0*/                   BRA.U UP0, `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   STG.E.128 desc[UR6][R2.64], R4 ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   SHFL.BFLY PT, R1, R1, 0x1, 0x1f ;
        /*00e0*/                   BRA `(.L_x_6) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
        /*0100*/                   NOP;
"""


def test_instructions_count_as_often_as_their_loops_run():
    (code,) = machine_code.parse_code(LISTING).values()
    counts = code.executed((2, 5), alone=2)
    # Code for diverged lanes is not reached, nor is the trap after the end.
    assert counts == {"loads": 1 + 10, "shuffles": 2 + 10, "atomics": 2, "stores": 1} | {
        "instructions": 2 + 2 * 2 + 10 * 4 + 2 * 3 + 2
    }
    names = [code.instructions[index].name.split(".")[0] for index in sorted(code.innermost())]
    assert names == "LDG BRA SHFL BRA".split()
    assert code.count("shuffles") == 3
    for trips, alone in [((2,), 1), ((2, 5, 4), 3)]:
        with pytest.raises(ValueError, match=r"they are at depths \[1, 2\]"):
            code.executed(trips, alone)


UNROLLED = """
.text._Z3barPf:
.L_x_1:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R1, desc[UR4][R2.64+0x4] ;
        /*0040*/                   F2I.FLOOR.NTZ R29, R26 ;
        /*0050*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0060*/               @P1 BRA `(.L_x_5) ;
        /*0070*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0080*/              @!P2 BRA `(.L_x_4) ;
        /*0090*/                   F2I.FLOOR.NTZ R29, R26 ;
.L_x_4:
        /*00a0*/                   FADD R3, R3, R1 ;
.L_x_5:
        /*00b0*/               @P3 BRA `(.L_x_1) ;
        /*00c0*/                   EXIT ;
"""


def test_points_left_over_do_not_count():
    (code,) = machine_code.parse_code(UNROLLED).values()
    innermost = code.innermost()
    assert innermost == {2, 3, 4, 5}
    rounds = {index for index in code.reachable() if code.rounds_down(index)}
    assert rounds == {4, 9}
    # All of them, and not only the part that depends on the point's place.
    skipped = code.skipped_by_a_branch(rounds - innermost, kept=innermost)
    assert skipped == {7, 8, 9, 10}
    assert code.executed((3, 2), alone=2)["loads"] == 3 * (1 + 2 * 2 + 1)
    assert code.executed((3, 2), alone=2, skipped=skipped)["loads"] == 3 * (1 + 2 * 2)
    assert code.skipped_by_a_branch(rounds, kept=innermost) == set()


def test_loops_beside_the_others_run_as_often_as_the_outermost():
    first = """
.text._Z3barPf:
.L_x_0:
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_0) ;"""
    (code,) = machine_code.parse_code(UNROLLED.replace("\n.text._Z3barPf:", first)).values()
    (alone,) = machine_code.parse_code(UNROLLED).values()
    assert code.executed((3, 2), alone=2, beside=1) == alone.executed((3, 2), alone=2) + Counter(
        {"loads": 3, "instructions": 6}
    )
    for beside in (0, 2):
        with pytest.raises(ValueError, match=rf"and {beside} beside them; .* depths \[1, 1, 2\]"):
            code.executed((3, 2), alone=2, beside=beside)


def test_a_computed_branch_is_refused():
    with pytest.raises(ValueError, match="cannot follow the computed branch BRX R4 -0x60"):
        machine_code.parse_code(LISTING.replace("BRA.U UP0, `(.L_x_2)", "BRX R4 -0x60"))


def test_resources():
    log = """
ptxas info    : Compiling entry function '_Z3fooPf' for 'sm_80'
ptxas info    : Function properties for _Z3fooPf
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size, 384 bytes smem
ptxas info    : Compile time = 1.000 ms
ptxas info    : Compiling entry function '_Z3barPf' for 'sm_80'
ptxas info    : Function properties for _Z3barPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
    assert machine_code.parse_resources(log) == {
        "_Z3fooPf": {"registers": 64, "spills": 28, "local": 8, "shared": 384},
        "_Z3barPf": {"registers": 40, "spills": 0, "local": 0, "shared": 0},
    }


def test_a_broken_bound_gets_a_line():
    good = {"whose": "ours", "kernel": "k<float>", "architecture": "9.0", "dtype": "float32"}
    good |= {"pass": "backward", "keys": "none"}
    good |= {"spills": 0, "local": 0, "shared": 0, "occupancy": 0.5, "loads of the original's": 0.5}
    good["code"] = {"local": 0, "shared": 0}
    assert report.violations([good, good | {"architecture": "8.9", "occupancy": 0.4}]) == []
    for change, words in [
        ({"spills": 4}, "spills 4 bytes"),
        ({"local": 8}, "has 8 bytes of local memory"),
        ({"code": {"local": 2, "shared": 0}}, "2 instructions for it"),
        ({"shared": 16385}, "has 16385 bytes of shared memory, accepted are 16384"),
        ({"pass": "forward", "for a point": {"instructions": 24.1}}, "issues 24.1 instructions"),
        ({"not counted": "five loops"}, "has loops that cannot be counted: five loops"),
        ({"occupancy": 0.49}, "occupies 49% of a multiprocessor"),
        ({"dtype": "float64", "occupancy": 0.24}, "24% of a multiprocessor, accepted are 25%"),
        ({"loads of the original's": 0.51}, "loads 0.51 times as often"),
        ({"dtype": "bfloat16", "loads of the original's": 0.26}, "accepted is 0.25"),
    ]:
        (line,) = report.violations([good | change])
        assert line.startswith("k<float> on 9.0 ")
        assert words in line
    assert report.violations([good | {"whose": "original", "spills": 4}]) == []


@pytest.mark.parametrize(
    "architecture, registers, threads, shared, expected",
    [
        ("8.0", 64, 256, 0, 0.5),
        ("8.0", 65, 256, 0, 0.375),  # 72 are handed out, and blocks are whole
        ("8.0", 32, 32, 0, 0.5),  # 32 blocks
        ("8.0", 32, 1024, 0, 1.0),
        ("8.0", 32, 256, 48 * 1024, 0.375),  # three times 49 KiB
        ("7.5", 64, 256, 0, 1.0),
        ("8.6", 40, 256, 0, 1.0),
        ("9.0", 68, 32, 768, 0.4375),
    ],
)
def test_occupancy(architecture, registers, threads, shared, expected):
    assert machine_code.occupancy(architecture, registers, threads, shared) == expected


CALCULATOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, threads_held, shared_held, reserved, registers, threads, shared;
  while (std::scanf("%d.%d %d %d %d %d %d %d", &major, &minor, &threads_held, &shared_held,
                    &reserved, &registers, &threads, &shared) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = threads_held;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = shared_held;
    device.sharedMemPerBlockOptin = shared_held - reserved;
    device.reservedSharedMemPerBlock = reserved;
    device.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, 0))
      return 1;
    std::printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_compiler
def test_occupancy_is_that_of_nvidias_calculator(tmp_path):
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    include = f"-I{nvcc.toolkit().home}/include"
    program = tmp_path / "calculator"
    machine_code.run(*compiler, include, tmp_path / "calculator.cpp", "-o", program)
    cases = [
        (architecture, registers, threads, shared)
        for architecture in machine_code.MULTIPROCESSORS
        for registers in (16, 40, 41, 56, 63, 64, 65, 80, 128)
        for threads in (16, 32, 64, 96, 128, 256, 480, 512)
        for shared in (0, 384, 1000, 12288, 40000)
    ]
    lines = []
    for architecture, *sizes in cases:
        limits = machine_code.MULTIPROCESSORS[architecture]
        held = (limits.threads, limits.shared, limits.shared_reserved)
        lines.append(" ".join(map(str, (architecture, *held, *sizes))))
    result = subprocess.run(
        [program], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    blocks = [int(line) for line in result.stdout.splitlines()]
    assert len(blocks) == len(cases)
    for (architecture, registers, threads, shared), count in zip(cases, blocks):
        warps = count * -(-threads // 32)
        expected = warps * 32 / machine_code.MULTIPROCESSORS[architecture].threads
        ours = machine_code.occupancy(architecture, registers, threads, shared)
        assert ours == expected, (architecture, registers, threads, shared)


@needs_compiler
def test_the_tool_writes_tables(tmp_path, capsys):
    page, figures = tmp_path / "page.md", tmp_path / "figures.json"
    page.write_text(f"Before.\n{BEGIN}\nold\n{END}\nAfter.\n")
    options = "--arch 9.0 --dtype float32 --markdown".split()
    report.main([*options, str(page), "--json", str(figures)])
    text = page.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.\n")
    assert "old" not in text
    assert capsys.readouterr().out.strip() in text
    kernels = json.loads(figures.read_text())["records"]
    # One half takes locations, the other reference points and offsets.
    assert len(kernels) == 60
    for kernel in kernels:
        assert f"| `{kernel['kernel']}` | {kernel['threads']} | {kernel['registers']} · " in text


def test_a_folder_without_the_original_is_refused(tmp_path):
    with pytest.raises(
        LiteDetrError, match="without csrc/cuda/ms_deform_im2col_cuda.cuh; accepted"
    ):
        nvcc.unpack(tmp_path, tmp_path)


@needs_compiler
def test_a_source_that_does_not_compile_is_an_error(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void kernel() { no_such_function(); }\n")
    with pytest.raises(LiteDetrError, match='error: identifier "no_such_function" is undefined'):
        nvcc.compile_kernels(source, "8.0", tmp_path)


@pytest.mark.slow
@needs_compiler
def test_nvrtcs_kernels_keep_the_bounds_of_nvccs(capsys):
    # Registers differ where points go through shared memory: its addresses have 32 bits with nvcc
    # and 64 with NVRTC.
    compare_nvrtc.main(["--check", "--arch", *ARCHITECTURES])
    rows = [row.strip("| ").split(" | ") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[a, d] for a in ARCHITECTURES for d in report.DTYPES]
    for architecture, dtype, count, *_, spills, instructions in rows:
        assert int(count) == 2 * KERNELS[dtype]
        assert spills == "0, 0"
        assert float(instructions.split()[-1]) <= 1.02, (architecture, dtype)


@needs_compiler
def test_what_exceeds_a_bound_is_an_error_with_check(monkeypatch):
    monkeypatch.setattr(report, "INSTRUCTIONS", {"none": 1, "shared": 30, "separate": 50})
    with pytest.raises(SystemExit, match="issues .* instructions for a point, accepted are 1"):
        compare_nvrtc.main("--check --arch 9.0 --dtype float32".split())
