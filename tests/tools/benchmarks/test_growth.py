"""The plot of how encoders' costs grow, with invented points and with tiny encoders."""

import dataclasses
import json

import growth
import pytest
import torch
from programs import TINY

CONFIG = str(TINY)


def points(sides=(256, 512, 1600), batches=(1, 3)):
    """Time grows with side^1.7 * batch^0.9, memory with side^2 * batch."""
    return [
        growth.Point(
            encoder="a.py",
            long_side=side,
            batch=batch,
            tokens=1,
            seconds=3e-6 * side**1.7 * batch**0.9,
            memory=0.5 * side**2 * batch,
        )
        for side in sides
        for batch in batches
    ]


def test_exponents_are_found():
    found = growth.fits(points())["a.py"]
    assert found["seconds"] == pytest.approx({"long_side": 1.7, "batch": 0.9})
    assert found["memory"] == pytest.approx({"long_side": 2.0, "batch": 1.0})


def test_what_does_not_vary_has_no_exponent():
    found = growth.fit(points(batches=(2,)), "seconds")
    assert found == {"long_side": pytest.approx(1.7), "batch": None}
    assert growth.fit(points((512,), (2,)), "seconds") == {"long_side": None, "batch": None}
    unknown = [dataclasses.replace(point, memory=None) for point in points()]
    assert growth.fit(unknown, "memory") == {"long_side": None, "batch": None}
    assert growth.table(unknown).splitlines()[-1] == "| a | 1.70 | 0.90 | – | – |"


def test_tokens_are_those_of_an_image_of_4_to_3():
    seen = []

    class Encoder(torch.nn.Module):
        def forward(self, tokens, pos, scales):
            seen.append((tokens.shape, scales.shapes))
            return tokens * 2

    call, tokens = growth.make_call(Encoder(), 8, 1066, 2, True, "cpu")
    call()
    assert tokens == 17821 and seen[0][0] == (2, 17821, 8)
    assert seen[0][1] == ((100, 134), (50, 67), (25, 34), (13, 17))


def test_a_picture_and_figures_are_written(tmp_path, capsys):
    picture, figures = tmp_path / "growth.png", tmp_path / "growth.json"
    options = "--long-sides 64 128 --batch 1 2 --rounds 1 --threads 1 --task training".split()
    threads = torch.get_num_threads()
    growth.main(
        ["--config-file", CONFIG, *options, "--output", str(picture), "--json", str(figures)]
    )
    torch.set_num_threads(threads)
    report = json.loads(figures.read_text())
    found = [(point["long_side"], point["batch"]) for point in report["points"]]
    assert found == [(64, 1), (64, 2), (128, 1), (128, 2)]
    assert all(point["seconds"] > 0 for point in report["points"])
    assert report["exponents"][CONFIG]["seconds"]["long_side"] is not None
    assert picture.stat().st_size > 10000
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and lines[3].startswith("| tiny | ")


def test_a_side_without_a_cell_at_the_coarsest_stride_is_refused(capsys):
    with pytest.raises(SystemExit):
        growth.main(["--long-sides", "32"])
    assert "given 32, accepted are whole numbers from 64 on" in capsys.readouterr().err
