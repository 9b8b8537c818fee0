"""The moving average of the weights."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from programs import data_options
from training_runs import batch_of, make_trainer, train

from lite_detr.data.digits import write_digits_dataset
from lite_detr.engine.ema import EMA

BATCHES = [batch_of(value) for value in (1.0, -2.0, 3.0, 0.5, -1.0)]


class Watch(EMA):
    """Remembers the weights behind each iteration."""

    def after_step(self):
        super().after_step()
        self.seen = [*getattr(self, "seen", ()), self.model.weight.detach().clone()]


def trained(folder, decay=0.9, iterations=5):
    trainer = make_trainer(BATCHES)
    ema = Watch(trainer.model, decay, str(folder))
    trainer.register_hooks([ema])
    trainer.train(0, iterations)
    return trainer, ema


@pytest.mark.parametrize("decay", [0.9, 0.3])
def test_the_average_forgets_the_first_weights_soon(decay, tmp_path):
    _, ema = trained(tmp_path, decay)
    expected = ema.seen[0]
    for n, weight in enumerate(ema.seen[1:], 1):
        kept = min(decay, (1 + n) / (10 + n))
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(ema.averaged.module.weight, expected)
    assert not torch.equal(ema.averaged.module.weight, ema.model.weight)


def test_buffers_are_those_of_the_model(tmp_path):
    _, ema = trained(tmp_path)
    assert ema.averaged.module.steps == ema.model.steps == 5


def test_training_is_as_without_it(tmp_path):
    plain = make_trainer(BATCHES)
    plain.train(0, 5)
    trainer, _ = trained(tmp_path)
    assert torch.equal(trainer.model.weight, plain.model.weight)


def test_the_final_average_is_a_file_of_weights(tmp_path):
    _, ema = trained(tmp_path)
    weights = torch.load(tmp_path / "model_final_ema.pth", weights_only=True)["model"]
    assert set(weights) == set(ema.model.state_dict())
    assert torch.equal(weights["weight"], ema.averaged.module.weight)


def test_a_training_that_goes_on_has_the_same_average(tmp_path):
    _, uninterrupted = trained(tmp_path)
    trainer, ema = trained(tmp_path, iterations=3)
    saving = DetectionCheckpointer(trainer.model, str(tmp_path), trainer=trainer, ema=ema.averaged)
    saving.save("model_0000002")

    trainer = make_trainer(BATCHES[3:])
    ema = EMA(trainer.model, 0.9, str(tmp_path))
    loading = DetectionCheckpointer(trainer.model, str(tmp_path), trainer=trainer, ema=ema.averaged)
    loading.resume_or_load("", resume=True)
    trainer.register_hooks([ema])
    trainer.train(3, 5)
    expected = uninterrupted.averaged.state_dict()
    assert expected.keys() == ema.averaged.state_dict().keys()
    for name, value in ema.averaged.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_decay_beyond_1_is_refused():
    with pytest.raises(ValueError, match=r"train.ema.decay must be from 0 to 1, got 9997"):
        EMA(torch.nn.Linear(1, 1), 9997, "")


@pytest.mark.slow
def test_train_net_evaluates_saves_and_resumes_it(tmp_path):
    """Together with the other options of the trainer."""
    write_digits_dataset(tmp_path, num_train=4, num_val=1)
    options = [
        *data_options(tmp_path),
        f"train.output_dir={tmp_path}/output",
        "train.checkpointer.period=1",
        "train.ema.enabled=True",
        "train.accumulation=2",
        "model.encoder.layer._target_=lite_detr.modeling.CheckpointedEncoderLayer",
    ]
    assert train(*options) == 0
    averaged, final = (torch.load(tmp_path / "output" / name, weights_only=True) for name in FINAL)
    assert averaged["model"].keys() == final["model"].keys()
    for name, weight in averaged["model"].items():
        assert torch.equal(final["ema"][f"module.{name}"], weight)
    lines = (tmp_path / "output" / "metrics.json").read_text().splitlines()
    assert any({"bbox/AP", "bbox_ema/AP"} <= json.loads(line).keys() for line in lines)

    # From the first iteration on.
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000000.pth")
    assert train(*options, resume=True) == 0
    again = torch.load(tmp_path / "output" / FINAL[0], weights_only=True)["model"]
    for name, weight in averaged["model"].items():
        assert torch.equal(again[name], weight), name


FINAL = ("model_final_ema.pth", "model_final.pth")
