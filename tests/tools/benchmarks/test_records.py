"""The records of a benchmark, and the tables made from them."""

import dataclasses
import json

import pytest
import records

Case, Memory, Record = records.Case, records.Memory, records.Record

CASE = Case(
    subject="dino/full.py",
    overrides=("a=1",),
    task="inference",
    size=(800, 1066),
    batch=2,
    dtype="float32",
    optimized="off",
    compiled=False,
    operators="native",
    device="cpu",
    threads=1,
)
MIB = 2**20
FULL = Record(
    CASE,
    {"data": [9.0, 9.0, 9.0], "encoder": [1.0, 4.0, 2.0], "other": [1.0, 4.0, 2.0]},
    Memory(held=100 * MIB, step=60 * MIB, encoder=40 * MIB),
)
# Half of it in each round.
LITE = Record(
    dataclasses.replace(CASE, subject="dino/lite.py", compiled=True),
    {"data": [9.0, 9.0, 9.0], "encoder": [0.5, 2.0, 1.0], "other": [0.5, 2.0, 1.0]},
    Memory(held=100 * MIB, step=20 * MIB, encoder=10 * MIB),
)


def test_latency_is_all_but_the_data():
    assert FULL.rounds("latency").tolist() == [2000, 8000, 4000]
    assert FULL.images_per_second == 0.5


def test_the_spread_of_a_ratio_is_that_of_each_rounds_ratio():
    """The machine was four times slower in one round than in another; the ratio is the same."""
    rows = records.comparison(FULL, LITE).splitlines()
    assert rows[0] == "|  | full | lite | ratio | p10 | p90 |"
    assert rows[2] == "| latency, ms | 4000 | 2000 | 0.50 | 0.50 | 0.50 |"
    assert rows[-2] == "| memory, MiB | 160 | 120 | 0.75 | – | – |"
    assert rows[-1] == "| encoder's memory, MiB | 40.0 | 10.0 | 0.25 | – | – |"


def test_parts_that_only_one_has_are_not_compared():
    extra = dataclasses.replace(LITE, seconds=LITE.seconds | {"matcher": [1.0, 1.0, 1.0]})
    assert "matcher" not in records.comparison(FULL, extra)


def test_a_table_has_columns_for_what_varies_and_parts_in_the_order_of_a_step():
    header, rule, full, lite = records.table([FULL, LITE]).splitlines()
    assert header == (
        "| subject | compiled | latency | p10 | p90 | images / s | memory | of it held "
        "| encoder's memory | data | encoder | other |"
    )
    assert rule == "|---|---" + "|---:" * 10 + "|"
    assert full == (
        "| full | no | 4000 | 2400 | 7200 | 0.50 | 160 | 100 | 40.0 | 9000 | 2000 | 2000 |"
    )
    assert lite.startswith("| lite | yes | 2000 ")


def test_what_a_record_lacks_is_a_dash():
    bare = dataclasses.replace(LITE, seconds={"other": [0.5, 0.5, 0.5]}, memory=None)
    assert records.table([FULL, bare]).splitlines()[3].endswith("| – | – | – | – | – | 500 |")


def test_json_holds_the_case_the_summary_and_the_rounds():
    found = json.loads(json.dumps(FULL.as_json()))
    assert found["case"]["subject"] == "dino/full.py" and found["case"]["size"] == [800, 1066]
    latency = found["milliseconds"]["latency"]
    assert latency == pytest.approx({"median": 4000, "p10": 2400, "p90": 7200})
    assert found["rounds_ms"]["encoder"] == [1000, 4000, 2000]
    assert found["memory_bytes"]["peak"] == 160 * MIB


@pytest.mark.parametrize("value, text", [(0.5, "0.50"), (12.34, "12.3"), (1234.4, "1234")])
def test_numbers_have_about_three_digits(value, text):
    assert records.digits(value) == text
