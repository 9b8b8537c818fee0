"""The program that computes how fast the CUDA kernels could be, on problems counted by hand."""

import json
from dataclasses import replace

import pytest
import roofline

# 6 tokens, 5 queries, 2 heads: 10 pairs of query and head with 3 points each, 30 points of 4
# channels; 48 channels of tokens, 40 of queries.
TINY = roofline.Geometry(batch=1, tokens=6, queries=5, heads=2, channels=4, points=3)
ENCODER = roofline.Geometry(batch=1, tokens=17821, queries=17821, heads=8, channels=32, points=16)


@pytest.mark.parametrize(
    "operator, direction, size, memory, added, gathered, operations",
    [
        # value, locations and weights, output
        ("msda", "forward", 4, 48 * 4 + 30 * 12 + 40 * 4, 0, 30 * 4 * 16, 30 * (12 + 36)),
        ("msda", "forward", 2, 48 * 2 + 30 * 10 + 40 * 2, 0, 30 * 4 * 8, 30 * (12 + 36)),
        # value, points and their gradients, output's gradient; zeros, sums read and written
        (
            "msda", "backward", 4,
            48 * 4 + 2 * 30 * 12 + 40 * 4 + 48 * 12, 30 * 4 * 16, 30 * 4 * 16, 30 * (12 + 80),
        ),
        # ... and rounded to 16 bits
        (
            "msda", "backward", 2,
            48 * 2 + 2 * 30 * 10 + 40 * 2 + 48 * 18, 30 * 4 * 16, 30 * 4 * 8, 30 * (12 + 80),
        ),
        # value, locations, query and output, logsumexp
        (
            "key-aware, shared", "forward", 4,
            48 * 4 + 30 * 8 + 80 * 4 + 10 * 4, 0, 30 * 4 * 16, 30 * (12 + 32 + 26),
        ),
        (
            "key-aware, separate", "forward", 2,
            96 * 2 + 30 * 8 + 80 * 2 + 10 * 4, 0, 2 * 30 * 4 * 8, 30 * (12 + 68 + 18),
        ),
        (
            "key-aware, shared", "backward", 4,
            48 * 4 + 2 * 30 * 8 + 160 * 4 + 10 * 4 + 48 * 12, 30 * 4 * 16, 30 * 4 * 16,
            30 * (12 + 160 + 34) + 10 * 8,
        ),
        (
            "key-aware, separate", "backward", 2,
            96 * 2 + 2 * 30 * 8 + 160 * 2 + 10 * 4 + 96 * 18, 2 * 30 * 4 * 16, 2 * 30 * 4 * 8,
            30 * (12 + 180 + 26) + 10 * 8,
        ),
    ],
)  # fmt: skip
def test_costs_by_hand(operator, direction, size, memory, added, gathered, operations):
    assert roofline.cost(TINY, operator, direction, size) == {
        "memory": memory,
        "L2": memory + added,
        "L1": gathered,
        "float32": operations,
    }


@pytest.mark.parametrize("operator", roofline.OPERATORS)
@pytest.mark.parametrize("direction", roofline.PASSES)
def test_costs_grow_with_the_problem(operator, direction):
    once = roofline.cost(ENCODER, operator, direction, 4)
    images = roofline.cost(replace(ENCODER, batch=16), operator, direction, 4)
    assert images == {part: 16 * amount for part, amount in once.items()}
    points = roofline.cost(replace(ENCODER, points=32), operator, direction, 4)
    assert points["L1"] == 2 * once["L1"]
    assert once["float32"] < points["float32"] <= 2 * once["float32"]
    halves = roofline.cost(ENCODER, operator, direction, 2)
    assert halves["L1"] == once["L1"] / 2
    assert halves["L2"] - halves["memory"] == once["L2"] - once["memory"]


def test_times_are_costs_at_the_peaks():
    gpu = roofline.Gpu("9.0", 1e12, 2e12, 10, 1e9, 1000, 100)
    costs = {"memory": 1e6, "L2": 3e6, "L1": 8e6, "float32": 10e6, "issue": 2e6}
    expected = {"memory": 1.0, "L2": 3.0, "L1": 8.0, "float32": 5.0, "issue": 50.0}
    assert roofline.times(costs, gpu) == pytest.approx(expected)


def test_peaks_of_the_data_sheets():
    """Lanes of float32 times cycles, two operations each: NVIDIA rounds them to 19.5 and 67."""
    for name, lanes in [("A100 SXM 80 GB", 64), ("H100 SXM", 128)]:
        gpu = roofline.GPUS[name]
        assert 2 * lanes * gpu.multiprocessors * gpu.clock == pytest.approx(
            gpu.operations, rel=2e-3
        )


def run_main(capsys, *arguments):
    roofline.main(list(map(str, arguments)))
    return capsys.readouterr().out


def test_tables_of_the_encoder(capsys):
    text = run_main(capsys)
    assert text.startswith("Computed, not measured. 17,821 queries and tokens")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| msda | forward")]
    # One query with two dtypes; then two GPUs, two dtypes and two batches.
    assert len(rows) == 2 + 2 * 2 * 2
    # 17,821 queries of 8 heads fetch 64 rows of 128 bytes: 1.168 GB at 19.49 TB/s.
    assert rows[2] == "| msda | forward | float32 | L1 | 1 | 31 | 9 | 60 | 32 | **60** |".split(
        " | "
    )


def test_instructions_of_a_report(capsys, tmp_path):
    entry = {"whose": "ours", "dtype": "float32", "for a point": {"instructions": 1000}}
    records = [
        entry | {"architecture": architecture, "attention": attention, "keys": keys, "pass": passed}
        for architecture in ("8.0", "9.0")
        for passed in ("forward", "backward")
        for attention, keys in [
            ("msda", "none"),
            ("key-aware", "shared"),
            ("key-aware", "separate"),
        ]
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"records": records}))
    options = ["--kernels", report, "--batch", 1, "--dtype"]
    text = run_main(capsys, *options, "float32")
    # 17,821 queries, 8 heads, 16 points: 2.281e9 instructions at 609.12e9 and 1045.44e9 a second.
    assert text.count("| issue | 1 |") == 12
    assert text.count("| **3745** |") == text.count("| **2182** |") == 6
    with pytest.raises(SystemExit):
        run_main(capsys, *options, "float16")
    assert "'dtype': 'float16'" in capsys.readouterr().err


def test_a_report_of_other_levels_is_refused(capsys, tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"records": [{}]}))
    with pytest.raises(SystemExit):
        run_main(capsys, "--kernels", report, "--levels", "4x4")
    assert "--kernels is for 4 levels, given 1" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_file_that_is_not_a_report_is_one_line(content, capsys, tmp_path):
    report = tmp_path / "report.json"
    if content is not None:
        report.write_text(content)
    with pytest.raises(SystemExit):
        run_main(capsys, "--kernels", report)
    printed = capsys.readouterr().err
    assert (
        printed.startswith(f"error: --kernels {report} is not a file") and printed.count("\n") == 1
    )
