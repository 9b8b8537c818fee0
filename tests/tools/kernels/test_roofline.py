"""The program that computes how fast the CUDA kernels could be, on problems counted by hand."""

import json
from dataclasses import replace

import pytest
import roofline
import torch

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
    # Two images and heads, of which blocks fetch 9 rows of 4 channels where 6 are in memory.
    again = (2 if operator.endswith("separate") else 1) * 2 * 3 * 4 * size
    assert roofline.cost(TINY, operator, direction, size, fetched=9) == {
        "memory": memory,
        "L2": memory + again + added,
        "L1": gathered,
        "float32": operations,
    }


@pytest.mark.parametrize("operator", roofline.OPERATORS)
@pytest.mark.parametrize("direction", roofline.PASSES)
def test_costs_grow_with_the_problem(operator, direction):
    fetched = 3 * ENCODER.tokens
    once = roofline.cost(ENCODER, operator, direction, 4, fetched)
    images = roofline.cost(replace(ENCODER, batch=16), operator, direction, 4, fetched)
    assert images == {part: 16 * amount for part, amount in once.items()}
    points = roofline.cost(replace(ENCODER, points=32), operator, direction, 4, fetched)
    assert points["L1"] == 2 * once["L1"]
    assert once["float32"] < points["float32"] <= 2 * once["float32"]
    halves = roofline.cost(ENCODER, operator, direction, 2, fetched)
    assert halves["L1"] == once["L1"] / 2


def test_rows_that_blocks_fetch(monkeypatch):
    """Expectations, beside a count of what random points reach from tiles of 4x8 queries."""
    monkeypatch.setattr(roofline, "SAMPLED_BLOCKS", 1)
    levels = ((12, 9), (6, 5))
    # All of a map for a block of all queries whose points go far, and of each block again.
    assert roofline.fetched_rows(((2, 2),), 4, 1.0) == pytest.approx(4, rel=2e-2)
    generator = torch.Generator().manual_seed(0)
    queries = [
        (level, y, x) for level, (h, w) in enumerate(levels) for y in range(h) for x in range(w)
    ]
    blocks = [(level, y // 4, x // 8) for level, y, x in queries]
    centers = torch.tensor(
        [((y + 0.5) / levels[level][0], (x + 0.5) / levels[level][1]) for level, y, x in queries]
    )
    counts = []
    for _ in range(20):
        found = set()
        for level, (height, width) in enumerate(levels):
            size = torch.tensor([height, width])
            points = centers[:, None] * size - 0.5
            points = points + 1.5 * torch.randn(len(centers), 4, 2, generator=generator)
            for block, cells in zip(blocks, points.floor().long()):
                for y, x in cells.tolist():
                    for row, column in ((y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1)):
                        if 0 <= row < height and 0 <= column < width:
                            found.add((block, level, row, column))
        counts.append(len(found))
    expected = roofline.fetched_rows(levels, 32, 1.5)
    assert expected == pytest.approx(sum(counts) / len(counts), rel=1e-2)


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
    # 17,821 queries of 8 heads gather 64 rows of 128 bytes: 1.168 GB at 19.49 TB/s. A fifth of them
    # comes through the L2 cache.
    assert rows[2] == "| msda | forward | float32 | L1 | 1 | 31 | 40 | 60 | 32 | **60** |".split(
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
