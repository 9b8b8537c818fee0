"""Precision and accumulation of the trainer."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from small_detectors import (
    assert_same_gradients,
    gradients,
    small_config,
    small_detector,
    small_inputs,
)
from training_runs import batch_of, make_trainer, record

from lite_detr.engine.trainer import Trainer
from lite_detr.modeling import (
    ContrastiveDenoising,
    HungarianMatcher,
    KeyAwareDeformableAttention,
)
from lite_detr.optimizer import ClippedAdamW

DETECTORS = pytest.mark.parametrize("name", ["deformable_detr", "dino", "h_detr"])


def trainer_of(model, batches, **options):
    return Trainer(model, batches, ClippedAdamW(model.parameters(), lr=1e-4), **options)


def accumulated(model, batches):
    """The losses and gradients of an iteration of so many batches."""
    losses = trainer_of(model, [], accumulation=len(batches)).accumulate(batches)
    return losses, gradients(model)


@DETECTORS
def test_accumulated_batches_have_the_gradients_of_a_large_one(name):
    """Also of batches with different numbers of objects, and one without any."""
    model, inputs = small_detector(name), small_inputs(3, 1, 0, 2)
    losses, expected = accumulated(model, [inputs])
    parts, found = accumulated(model, [inputs[:2], inputs[2:3], inputs[3:]])
    assert_same_gradients(found, expected)
    assert {k: v.item() for k, v in parts.items()} == pytest.approx(
        {k: v.item() for k, v in losses.items()}, rel=1e-5
    )


def test_so_have_batches_without_objects_but_for_one():
    """Where the number of objects is less than one a batch."""
    model, inputs = small_detector("h_detr"), small_inputs(0, 0, 1, 0)
    _, expected = accumulated(model, [inputs])
    _, found = accumulated(model, [[image] for image in inputs])
    assert_same_gradients(found, expected)


def test_so_have_denoising_queries_of_equally_many_objects_without_noise():
    denoising = ContrastiveDenoising(64, 5, num_queries=6, label_noise=0.0, box_noise=0.0)
    model, inputs = small_detector("dino"), small_inputs(2, 2)
    model.denoising = denoising.double()
    _, expected = accumulated(model, [inputs])
    _, found = accumulated(model, [inputs[:1], inputs[1:]])
    assert any("denoising" in name for name in found)
    assert_same_gradients({n: g for n, g in found.items() if g.any()}, nonzero(expected))


def nonzero(gradients):
    return {name: gradient for name, gradient in gradients.items() if gradient.any()}


def test_an_iteration_is_one_step_of_as_many_batches_as_are_accumulated():
    """Whose losses are recorded as their sum."""
    trainer = make_trainer([batch_of(value) for value in (1.0, 2.0, 3.0, 4.0)], accumulation=2)
    trainer.train(0, 2)
    steps = trainer.optimizer.state[trainer.model.weight]["step"]
    assert trainer.model.steps == 4 and steps == 2
    assert record(trainer)["loss_a"][0] == (9.0, 0)
    assert [iteration for _, iteration in record(trainer)["loss_a"]] == [0, 1]


class Dtypes:
    """What passes some parts of a detector in a training step."""

    def __init__(self, model, monkeypatch):
        self.matched, self.locations, self.projected = set(), set(), set()

        def match(matcher, predictions, targets):
            self.matched |= {tensor.dtype for tensor in (*predictions, targets[0].boxes)}
            return original(matcher, predictions, targets)

        original = HungarianMatcher.forward
        monkeypatch.setattr(HungarianMatcher, "forward", match)
        for module in model.modules():
            if isinstance(module, KeyAwareDeformableAttention):
                monkeypatch.setattr(module, "attend", self.watch(module.attend))
                module.register_forward_pre_hook(self.look)

    def watch(self, attend):
        def watched(query, memory, locations, scales):
            self.locations.add(locations.dtype)
            output = attend(query, memory, locations, scales)
            self.projected.add(output.dtype)
            return output

        return watched

    def look(self, module, inputs):
        _, reference_points, _, scales = inputs
        self.locations |= {
            reference_points.dtype,
            scales.centers.dtype,
            scales.reference_points.dtype,
            scales.valid_ratios.dtype,
            scales.cell_sizes.dtype,
        }


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@DETECTORS
def test_matching_losses_and_locations_stay_in_float32(name, precision, monkeypatch):
    torch.manual_seed(0)
    model = instantiate(small_config(name))
    dtypes = Dtypes(model, monkeypatch)
    trainer = trainer_of(model, [], precision=precision)
    losses = trainer.losses(small_inputs(2, 3))
    assert dtypes.matched == dtypes.locations == {torch.float32}
    assert dtypes.projected == {getattr(torch, precision)}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    trainer.grad_scaler.scale(sum(losses.values())).backward()
    assert {gradient.dtype for gradient in gradients(model).values()} == {torch.float32}


def test_in_float16_the_optimizer_clips_the_unscaled_gradient(monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, norm: norms.append(clip(parameters, norm)) or norms[-1],
    )
    for precision in ("float32", "float16"):
        make_trainer([batch_of(2.0)], precision=precision).train(0, 1)
    assert norms[0] == norms[1] == pytest.approx(2 * 3**0.5)


@pytest.mark.parametrize("before, after", [("float32", "float16"), ("float16", "bfloat16")])
def test_a_training_goes_on_in_another_precision(before, after):
    trainer = make_trainer([batch_of(1.0)], precision=before)
    trainer.train(0, 1)
    resumed = make_trainer([batch_of(1.0)], precision=after)
    resumed.load_state_dict(trainer.state_dict())
    resumed.train(1, 2)


def test_the_scale_of_float16_goes_on():
    trainer = make_trainer([batch_of(1.0, steep=True)], precision="float16")
    trainer.train(0, 1)
    resumed = make_trainer([], precision="float16")
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.grad_scaler.get_scale() == trainer.grad_scaler.get_scale() == 2.0**15


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(precision="fp16"), ["train.amp.precision", "'fp16'", "bfloat16, float16"]),
        (dict(accumulation=0), ["train.accumulation", "at least 1", "got 0"]),
        (dict(max_bad_batches=-1), ["train.max_bad_batches", "at least 0", "-1"]),
    ],
)
def test_options_out_of_range_are_named_with_what_is_accepted(options, words):
    with pytest.raises(ValueError) as caught:
        make_trainer([], **options)
    for word in words:
        assert word in str(caught.value)


@DETECTORS
def test_a_step_in_bfloat16_changes_every_weight(name):
    torch.manual_seed(0)
    model = instantiate(small_config(name))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = trainer_of(model, [small_inputs(2, 3)], precision="bfloat16")
    with EventStorage() as trainer.storage:
        trainer.run_step()
    moved = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for part, weight in before.items():
        assert not torch.equal(moved[part], weight), part


def test_a_model_that_a_hook_has_left_in_evaluation_mode_is_named():
    trainer = make_trainer([batch_of(1.0), batch_of(1.0)])
    trainer.model.eval()
    with pytest.raises(RuntimeError, match="the Toy .* evaluation mode at iteration 0.*train()"):
        trainer.train(0, 1)


@pytest.mark.parametrize("fails", [True, False])
def test_a_hook_that_fails_after_an_error_does_not_hide_it(fails):
    class Broken(HookBase):
        def after_train(self):
            raise ZeroDivisionError

    trainer = make_trainer([[{"file_name": "no value.jpg"}] if fails else batch_of(1.0)])
    trainer.register_hooks([Broken()])
    with pytest.raises(KeyError if fails else ZeroDivisionError):
        trainer.train(0, 1)


def test_an_image_without_ground_truth_is_named_before_objects_are_counted():
    inputs = small_inputs(1, 2)
    del inputs[1]["instances"]
    trainer = trainer_of(small_detector("dino"), [], accumulation=2)
    with pytest.raises(ValueError, match="1.jpg has none: give them, or call model.eval"):
        trainer.accumulate([[image] for image in inputs])
