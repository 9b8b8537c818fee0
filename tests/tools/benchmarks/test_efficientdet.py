"""EfficientDet as a competitor of the benchmark, and without the library its place in the turns."""

import dataclasses

import competitor
import detectors
import efficientdet
import pytest
import records
import turns
from programs import TINY

from lite_detr.errors import LiteDetrError

CONFIG = str(TINY)


def test_efficientdet_competes_in_inference_if_it_is_installed(monkeypatch):
    monkeypatch.setattr(efficientdet, "is_installed", lambda: True)
    arguments = ["--config-file", CONFIG, "--competitors", "--optimize", "on"]
    arguments += ["--tasks", "inference"]
    (cases,) = detectors.groups(detectors.parse_args(arguments))
    assert [case.subject for case in cases[1:]] == [competitor.NAME, efficientdet.NAME]
    assert cases[2].optimized == "off" and detectors.multiply_adds(cases[2].subject, (), ()) is None
    args = detectors.parse_args(["--config-file", CONFIG, "--competitors", "--tasks", "training"])
    ((_, *others),) = detectors.groups(args)
    assert [case.subject for case in others] == [competitor.NAME]


def test_efficientdet_takes_turns_like_ours(monkeypatch):
    pytest.importorskip("effdet", reason="needs the effdet library")
    build = efficientdet.efficientdet_subject
    monkeypatch.setattr(
        turns, "efficientdet_subject", lambda case: build(case, model="tf_efficientdet_lite0")
    )
    case = records.Case(
        subject=efficientdet.NAME,
        overrides=(),
        task="inference",
        size=(64, 96),
        batch=1,
        dtype="float32",
        optimized="off",
        compiled=False,
        operators=competitor.OPERATORS,
        device="cpu",
        threads=1,
    )
    assert turns.Runner(case).turn().keys() == {"data", "backbone", "encoder", "decoder", "other"}
    with pytest.raises(LiteDetrError, match="images of up to 320x320"):
        turns.Runner(dataclasses.replace(case, size=(64, 400)))
