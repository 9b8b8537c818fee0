"""The program that times detectors part by part, on very small models."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import competitor
import detectors
import efficientdet
import numpy as np
import pytest
import records
import subjects
import torch
import turns
from programs import TINY
from torch import nn

from lite_detr import ops
from lite_detr.analysis.flops import count_cost
from lite_detr.errors import ConfigError
from lite_detr.modeling import MultiScaleDeformableAttention

CONFIG = str(TINY)
OTHER_CONFIG = str(TINY.with_name("small_two_stage.py"))
CASE = records.Case(
    subject=CONFIG,
    overrides=(),
    task="inference",
    size=(64, 96),
    batch=1,
    dtype="float32",
    optimized="off",
    compiled=False,
    operators=ops.backend(),
    device="cpu",
    threads=1,
)
TRAINING = dataclasses.replace(CASE, task="training", batch=2)
INFERENCE_PARTS = {"data", "backbone", "neck", "encoder", "queries", "decoder", "other"}
TRAINING_PARTS = INFERENCE_PARTS | {"losses", "matcher", "backward", "optimizer"}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Clock:
    """A clock that only the timed functions advance."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Takes(nn.Module):
    """Takes some seconds, and calls another module."""

    def __init__(self, clock, seconds, inner=None):
        super().__init__()
        self.clock, self.seconds, self.inner = clock, seconds, inner

    def forward(self):
        self.clock.now += self.seconds
        if self.inner:
            self.inner()


def test_a_moment_belongs_to_the_innermost_part(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(turns, "time", clock)
    stopwatch = turns.Stopwatch("cpu")
    matcher = Takes(clock, 2.0)
    losses = Takes(clock, 1.0, matcher)
    stopwatch.watch(matcher, "matcher")
    stopwatch.watch(losses, "losses")
    for _ in range(2):  # What was before the start does not count.
        stopwatch.start()
        clock.now += 4.0
        losses()
        losses()
        with stopwatch.part("backward"):
            clock.now += 8.0
        seconds = stopwatch.stop()
        assert seconds == {"other": 4.0, "losses": 2.0, "matcher": 4.0, "backward": 8.0}


def test_a_gpu_is_waited_for_at_the_start_and_the_end_alone(monkeypatch):
    gpu = Clock()
    waits = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu.now

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    fake = SimpleNamespace(Event=Event, synchronize=lambda: waits.append(gpu.now))
    monkeypatch.setattr(turns.torch, "cuda", fake)
    stopwatch = turns.Stopwatch("cuda")
    encoder = Takes(gpu, 2.0)
    stopwatch.watch(encoder, "encoder")
    stopwatch.start()
    encoder()
    gpu.now += 1.0
    assert stopwatch.stop() == {"other": 1.0, "encoder": 2.0}
    assert waits == [0.0, 3.0]


def test_all_that_is_asked_for_is_measured_and_written(tmp_path, capsys):
    files = ["--json", str(tmp_path / "figures.json"), "--chart", str(tmp_path / "chart.png")]
    kinds = ["native", "pytorch"] if ops.backend() == "native" else ["pytorch"]
    asked = ["--config-file", CONFIG, "--tasks", "inference", "training", "--operators", *kinds]
    options = "--sizes 64x96 --batch 1 --rounds 2 --threads 1 --no-memory".split()
    detectors.main([*asked, *options, *files, "--opts", "model.queries.num_queries=7"])

    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["environment"]["torch"] == torch.__version__
    cases = [(r["case"]["task"], r["case"]["operators"]) for r in report["records"]]
    assert cases == [(task, kind) for task in ("inference", "training") for kind in kinds]
    for record in report["records"]:
        training = record["case"]["task"] == "training"
        rounds = record["rounds_ms"]
        latency = rounds.pop("latency")
        assert rounds.keys() == (TRAINING_PARTS if training else INFERENCE_PARTS)
        assert all(len(times) == 2 and min(times) > 0 for times in rounds.values())
        data = np.array(rounds.pop("data"))
        assert np.sum(list(rounds.values()), axis=0) == pytest.approx(latency)
        assert record["images_per_second"] == pytest.approx(1000 / np.median(latency))
        assert record["milliseconds"]["data"]["median"] == pytest.approx(np.median(data))
        assert record["memory_bytes"] is None
    assert (tmp_path / "chart.png").stat().st_size > 1000
    environment, _, common, _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in environment
    assert "size 64x96, batch 1, dtype float32" in common and "2 rounds" in common
    assert header.startswith("| subject | task |")
    assert len(rows) == len(cases) and all(row.startswith("| tiny | ") for row in rows)


def test_two_configs_are_compared(capsys):
    options = "--sizes 64x96 --rounds 2 --threads 1 --no-memory".split()
    detectors.main(["--compare", CONFIG, OTHER_CONFIG, *options])
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("|  | tiny | small_two_stage | ratio | p10 | p90 |")
    names = [line.split(" | ")[0] for line in lines[start + 2 :]]
    assert names[:3] == ["| latency, ms", "| data, ms", "| backbone, ms"]
    assert len(names) == 1 + len(INFERENCE_PARTS)


def test_a_config_can_be_compared_with_itself():
    record = detectors.Record(CASE, {"other": [1.0, 1.0]}, None)
    again = detectors.Record(CASE, {"other": [2.0, 3.0]}, None)
    (text,) = detectors.comparisons([record, again])
    assert "| latency, ms | 1000 | 2500 | 2.50 | 2.10 | 2.90 |" in text


def test_every_other_round_is_in_reverse_and_the_first_do_not_count(monkeypatch):
    taken = []

    class Turns:
        def __init__(self, case):
            self.case = case

        def turn(self):
            taken.append(self.case.subject)
            return {"other": float(len(taken))}

    monkeypatch.setattr(detectors, "Runner", Turns)
    cases = [dataclasses.replace(CASE, subject=name) for name in "ab"]
    first, second = detectors.measure(cases, rounds=2, with_memory=False)
    assert "".join(taken) == "baab" * 2
    assert first.seconds == {"other": [6.0, 7.0]} and second.seconds == {"other": [5.0, 8.0]}


def test_images_have_the_size_and_objects_of_the_models_classes():
    batches = turns.RandomBatches((64, 96), batch=2, num_classes=3, training=True)
    first, second = batches.next()
    assert first["image"].shape == second["image"].shape == (3, 64, 96)
    assert first["image"].float().std() > 20
    for inputs in (first, second):
        instances = inputs["instances"]
        assert len(instances) == 10 and instances.image_size == (64, 96)
        assert set(instances.gt_classes.tolist()) <= {0, 1, 2}
        boxes = instances.gt_boxes.tensor
        assert (boxes[:, 2:] - boxes[:, :2]).min() > 6
        assert boxes.min() >= 0 and (boxes[:, 2:] <= torch.tensor([96, 64])).all()
    assert not torch.equal(boxes, first["instances"].gt_boxes.tensor)
    again = batches.next()
    assert torch.equal(again[0]["image"], first["image"])
    assert torch.equal(again[1]["instances"].gt_boxes.tensor, boxes)
    inference = turns.RandomBatches((64, 96), batch=1, num_classes=3, training=False)
    assert "instances" not in inference.next()[0]


def test_a_step_trains_and_a_pass_does_not():
    torch.set_num_threads(1)
    for case in (TRAINING, CASE):
        runner = turns.Runner(case)
        before = [parameter.clone() for parameter in runner.subject.model.parameters()]
        runner.turn()
        after = runner.subject.model.parameters()
        changed = any(not torch.equal(*pair) for pair in zip(before, after))
        assert changed == (case is TRAINING)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_computed_in(dtype):
    # A narrower image would be float32 in the backbone: see lite_detr.modeling.neck.extract_maps.
    runner = turns.Runner(dataclasses.replace(CASE, dtype=dtype, size=(64, 128)))
    found = []
    runner.subject.model.backbone.register_forward_hook(
        lambda _, args, maps: found.append(maps["res5"].dtype)
    )
    runner.turn()
    assert found == [getattr(torch, dtype)]


def test_with_float16_a_step_is_under_a_gradient_scaler():
    runner = turns.Runner(dataclasses.replace(TRAINING, dtype="float16"))
    steps = []
    runner.subject.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    # A scale so large that gradients overflow: the scaler skips the step and lowers it.
    runner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    runner.turn()
    assert not steps and runner.scaler.get_scale() == 2.0**99


def test_parts_are_compiled_each_alone_and_still_timed(monkeypatch):
    compiled = []

    def compile(function, dynamic, options):
        assert options == {"freezing": True}
        compiled.append(type(function.__self__).__name__)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    runner = turns.Runner(dataclasses.replace(CASE, compiled=True))
    assert compiled == ["ResNet", "MultiScaleNeck", "InterleavedEncoder", "DeformableDecoder"]
    assert runner.turn().keys() == INFERENCE_PARTS


def test_operators_are_put_back():
    attention = MultiScaleDeformableAttention(8, 2)
    assert attention.operator is ops.fused_ms_deform_attn
    with subjects.operators("pytorch"):
        assert attention.operator is ops.fused_ms_deform_attn_pytorch
    assert attention.operator is ops.fused_ms_deform_attn
    with subjects.operators("native"):
        assert attention.operator is ops.fused_ms_deform_attn


def test_inference_is_optimized_wholly_or_by_a_step(monkeypatch, capsys, tmp_path):
    # Not in the process that runs all tests.
    monkeypatch.setattr(turns, "set_memory", lambda case: None)
    figures = tmp_path / "figures.json"
    choices = subjects.CHOICES
    options = "--sizes 64x96 --batch 2 --rounds 2 --threads 1 --no-memory --rates".split()
    files = ["--json", str(figures), "--config-file", CONFIG]
    detectors.main([*files, *options, "--optimize", *choices])
    *_, header, _, first = capsys.readouterr().out.splitlines()[: 1 - len(choices)]
    assert header.startswith("| subject | optimized | latency |") and "of a product's" in header
    assert first.startswith("| tiny | off |")
    records = json.loads(figures.read_text())["records"]
    assert [record["case"]["optimized"] for record in records] == list(choices)
    cost = count_cost(subjects.build_detector(CONFIG, ()), 64, 96).flops["total"]
    for record in records:
        assert record["multiply_adds"] == cost
        rate = cost * record["images_per_second"]
        assert record["multiply_adds_per_second"] == pytest.approx(rate)
        assert len(record["products_multiply_adds_per_second"]) == 2


@pytest.mark.parametrize("option", [["--rates"], ["--optimize", "on"]])
def test_training_is_not_optimized(option, capsys):
    with pytest.raises(SystemExit):
        detectors.main(["--config-file", CONFIG, "--tasks", "training", *option])
    assert "are for --tasks inference only" in capsys.readouterr().err


def test_a_competitor_is_there_once(monkeypatch):
    monkeypatch.setattr(efficientdet, "is_installed", lambda: False)
    arguments = ["--config-file", CONFIG, "--competitors", "--optimize", "off", "on"]
    (cases,) = detectors.groups(detectors.parse_args(arguments))
    assert [case.optimized for case in cases] == ["off", "off", "on"]
    assert cases[1].subject == competitor.NAME


def test_an_optimized_case_has_its_dtype_in_its_weights():
    case = dataclasses.replace(CASE, dtype="bfloat16", optimized="on")
    runner = turns.Runner(case)
    assert runner.subject.model.encoder.layers[0].norm.weight.dtype == torch.bfloat16
    assert not runner.autocast()._enabled
    norms = dataclasses.replace(CASE, optimized="norms")
    backbone = turns.Runner(norms).subject.model.backbone
    assert not any("Norm" in type(module).__name__ for module in backbone.modules())


def test_memory_is_kept_where_a_case_says_so(monkeypatch):
    kept = []
    monkeypatch.setattr(subjects, "keep_freed_memory", lambda: kept.append(1))
    for optimized in subjects.CHOICES:
        before = len(kept)
        subjects.set_memory(dataclasses.replace(CASE, optimized=optimized))
        assert (len(kept) > before) == (optimized in ("on", "freed-memory"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_memory_is_that_of_the_case_alone():
    ballast = torch.ones(2**26)  # 256 MiB, which are another case's.
    memory = turns.memory_in_own_process(TRAINING)
    del ballast
    model = turns.Runner(TRAINING).subject.model
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    everything = [*model.parameters(), *model.buffers()]
    # AdamW keeps two moments of each trained parameter, and a counter of 4 bytes.
    moments = 2 * trained + 4 * sum(p.requires_grad for p in model.parameters())
    assert memory.held == sum(tensor.nbytes for tensor in everything) + moments
    assert trained < memory.step < trained + 100 * 2**20
    assert 0 < memory.encoder < memory.step
    assert memory.peak == memory.held + memory.step


@pytest.mark.parametrize("case", [CASE, TRAINING], ids=lambda case: case.task)
def test_the_encoder_alone_is_run_forward_and_in_training_backward(case):
    runner = turns.Runner(case)
    encoder = runner.subject.model.encoder
    calls, gradients = [], []
    encoder.register_forward_pre_hook(lambda _, args: calls.append(args))
    runner.turn()
    encoder.layers[0].norm.weight.register_hook(gradients.append)
    args, options = turns._as_leaves(calls[0], {})
    turns._run_encoder(runner, encoder, args, options)
    assert len(gradients) == (case is TRAINING)
    assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "dino/dino_r50.py"], "neither a file nor one of the model zoo's"),
        (["--config-file", CONFIG, "--device", "cuda"], "--device cuda needs a GPU"),
        (["--config-file", CONFIG, "--operators", "native"], "there are no native operators for"),
        (["--config-file", CONFIG, "--competitors"], "pip install transformers"),
    ],
)
def test_what_is_missing_is_said_in_a_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "backend", lambda device="cpu": "pytorch")
    monkeypatch.setattr(competitor, "is_installed", lambda: False)
    with pytest.raises(SystemExit):
        detectors.main(arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_model_of_another_kind_is_refused():
    case = dataclasses.replace(CASE, overrides=("model._target_=builtins.dict",))
    with pytest.raises(
        ConfigError, match=r"tiny.py has a dict, accepted are lite_detr's detectors"
    ):
        subjects.detector_subject(case)


def test_what_was_measured_before_an_error_is_not_lost(monkeypatch, capsys):
    class Fails:
        def __init__(self, case):
            self.case = case

        def turn(self):
            if self.case.batch > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.\nMuch else.")
            return {"other": 0.25}

    monkeypatch.setattr(detectors, "Runner", Fails)
    options = "--sizes 64x96 --batch 1 2 --rounds 1 --threads 1 --no-memory".split()
    with pytest.raises(SystemExit):
        detectors.main(["--config-file", CONFIG, *options])
    said = capsys.readouterr()
    name = f"tiny, inference, 64x96, 2, float32, off, no, {ops.backend()}"
    assert said.err.splitlines()[-1] == f"error: {name}: CUDA out of memory."
    assert "| tiny | 250 | 250 | 250 | 4.00 | 250 |" in said.out


@pytest.mark.parametrize("option", ["--rounds", "--batch", "--threads"])
def test_numbers_are_from_1_on(option, capsys):
    with pytest.raises(SystemExit):
        detectors.main(["--config-file", CONFIG, option, "0"])
    assert "given 0, accepted are whole numbers from 1 on" in capsys.readouterr().err
