"""What happens when a loss or a gradient is not finite."""

import logging
import math

import pytest
import torch
from programs import ONE_PROCESS, TRAIN_NET, data_options, run_program
from training_runs import CONFIG, batch_of, make_trainer, record

from lite_detr.data.digits import write_digits_dataset
from lite_detr.errors import DivergenceError
from lite_detr.optimizer import ClippedAdamW

GOOD, BAD = batch_of(1.0, "good.jpg"), batch_of(math.nan, "bad.jpg")
STEEP = batch_of(1.0, "steep.jpg", steep=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_all_that_is_known(value):
    bad = batch_of(value, "left.jpg") + batch_of(1.0, "right.jpg")
    trainer = make_trainer([GOOD, GOOD, bad, GOOD])
    with pytest.raises(DivergenceError) as caught:
        trainer.train(0, 4)
    error = caught.value
    assert error.iteration == 2
    assert set(error.losses) == {"loss_a", "loss_b"} and not math.isfinite(error.losses["loss_a"])
    assert error.files == ["left.jpg", "right.jpg"]
    error.checkpoint = "output/model_0000001.pth"
    for part in ("iteration 2", f"loss_a {value}", "loss_b 1", "left.jpg, right.jpg", "0000001"):
        assert part in str(error)


def test_nothing_is_learned_from_it():
    undisturbed = make_trainer([GOOD, GOOD])
    undisturbed.train(0, 2)
    trainer = make_trainer([GOOD, GOOD, BAD])
    with pytest.raises(DivergenceError):
        trainer.train(0, 3)
    assert torch.equal(trainer.model.weight, undisturbed.model.weight)


def test_the_log_tells_what_happened_and_not_where_in_the_code(caplog):
    trainer = make_trainer([BAD])
    with pytest.raises(DivergenceError), caplog.at_level(logging.ERROR):
        trainer.train(0, 1)
    assert "the loss is not finite at iteration 0" in caplog.text and "bad.jpg" in caplog.text
    assert "Traceback" not in caplog.text


def test_other_errors_are_logged_with_their_traceback(caplog):
    trainer = make_trainer([[{"file_name": "no value.jpg"}]])
    with pytest.raises(KeyError), caplog.at_level(logging.ERROR):
        trainer.train(0, 1)
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("bad", [BAD, STEEP], ids=["loss", "gradient"])
def test_as_many_bad_batches_as_allowed_are_skipped_and_counted(bad, caplog):
    undisturbed = make_trainer([GOOD, GOOD])
    undisturbed.train(0, 2)
    trainer = make_trainer([GOOD, bad, bad, GOOD], max_bad_batches=2)
    with caplog.at_level(logging.WARNING):
        trainer.train(0, 4)
    assert record(trainer)["bad_batches"] == [(1, 1), (2, 2)]
    assert caplog.text.count(bad[0]["file_name"]) == 2
    assert torch.equal(trainer.model.weight, undisturbed.model.weight)


def test_one_more_than_allowed_stops():
    trainer = make_trainer([BAD, GOOD, BAD, GOOD], max_bad_batches=1)
    with pytest.raises(DivergenceError, match="iteration 2"):
        trainer.train(0, 4)


def test_bad_batches_before_a_resume_count():
    trainer = make_trainer([BAD], max_bad_batches=1)
    trainer.train(0, 1)
    resumed = make_trainer([BAD], max_bad_batches=1)
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(DivergenceError):
        resumed.train(1, 2)


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_a_weight():
    trainer = make_trainer([STEEP])
    with pytest.raises(DivergenceError, match="the gradient is not finite at iteration 0"):
        trainer.train(0, 1)
    assert torch.equal(trainer.model.weight, torch.ones(3))


def test_a_bad_batch_among_accumulated_ones_is_the_one_that_is_named():
    trainer = make_trainer([GOOD, BAD, GOOD], accumulation=3)
    with pytest.raises(DivergenceError) as caught:
        trainer.train(0, 1)
    assert caught.value.files == ["bad.jpg"]


def test_float16_lowers_its_scale_at_an_overflow_and_goes_on():
    trainer = make_trainer([STEEP, GOOD], precision="float16")
    trainer.train(0, 2)
    scales = [scale for scale, _ in record(trainer)["grad_scale"]]
    assert scales[1] == scales[0] < 2.0**16
    assert not torch.equal(trainer.model.weight, torch.ones(3))


def test_float16_stops_when_no_scale_helps():
    trainer = make_trainer([STEEP] * 40, precision="float16")
    with pytest.raises(DivergenceError, match="however small the loss is scaled"):
        trainer.train(0, 40)


def test_the_optimizer_keeps_its_state_at_a_gradient_that_is_not_finite():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = ClippedAdamW([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, math.inf])
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(2)) and not optimizer.state


def test_train_net_ends_with_the_message_and_where_to_go_on(tmp_path):
    write_digits_dataset(tmp_path, num_train=2, num_val=1)
    run = run_program(
        *(TRAIN_NET, *ONE_PROCESS, "--config-file", CONFIG, *data_options(tmp_path)),
        f"train.output_dir={tmp_path}/output",
        "train.checkpointer.period=1",
        "optimizer.lr=1e30",
    )
    assert run.returncode == 1, run.stderr[-3000:]
    assert "Traceback" not in run.stderr + run.stdout
    message = run.stderr[run.stderr.index("error: ") :]
    assert message.startswith("error: the loss is not finite at iteration 1\n")
    assert "loss_ce nan" in message and "loss_giou_enc" in message
    assert f"{tmp_path}/train/" in message
    assert f"last checkpoint: {tmp_path}/output/model_0000000.pth" in message
