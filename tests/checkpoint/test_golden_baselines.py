"""The detectors to compare with against their authors' code, in float64; see tests/golden."""

import re

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from reference_checkpoints import GOLDEN, golden_batch, golden_targets, reference_checkpoint

from lite_detr import model_zoo
from lite_detr.checkpoint import convert_weights
from lite_detr.modeling.detector import evaluating

CONFIGS = {
    "detr_dc5_r50": "detr_dc5_r50_500ep",
    "conditional_detr_dc5_r50": "conditional_detr_dc5_r50_50ep",
    "dab_detr_dc5_r50": "dab_detr_dc5_r50_50ep",
    "anchor_detr_dc5_r50": "anchor_detr_dc5_r50_50ep",
    "imfa_detr_r50": "imfa_detr_r50_36ep",
    "sparse_detr_r50_rho03": "sparse_detr_r50_rho03_50ep",
}


def compare(golden, batch, outputs):
    """To the rounding of float32, which the authors' positions and the files have."""
    stride = int(golden["memory_stride"])
    for name, output in outputs.items():
        output = output[:, ::stride] if name == "memory" else output
        reference = torch.from_numpy(golden[f"{batch}.{name}"]).double()
        # Nothing depends on the memory of padding, where positions are huge.
        valid = golden.get(f"{batch}.{name}_valid", np.ones(output.shape[:2], dtype=bool))
        tolerance = 2e-5 if name == "pred_logits" and "dam_attention_map" in golden else 5e-6
        difference = (output.detach() - reference)[torch.from_numpy(valid)].abs().max()
        assert difference <= tolerance, (batch, name)


@pytest.fixture(scope="module", params=CONFIGS)
def run(request):
    """A golden file, and our model with its weights."""
    path = GOLDEN / f"{request.param}.npz"
    config = model_zoo.get_config(f"baselines/{CONFIGS[request.param]}.py").model
    config.num_classes = 91
    # The losses of the files are without dropout.
    config.encoder.layer.dropout = 0.0
    model = instantiate(config)
    conversion = convert_weights(reference_checkpoint(path), model)
    assert not conversion.ignored and not conversion.own
    model.load_state_dict(conversion.state_dict)
    return dict(np.load(path)), model.double(), conversion


def compute_losses(golden, model):
    """Memory and geometry of the padded batch, and its losses."""
    images = model.preprocess_images(golden_batch(golden, "padded"))
    memory, scales = model.train().encode(images)
    targets = golden_targets(golden)
    num_objects = torch.tensor(float(sum(len(target.labels) for target in targets)))
    return memory, scales, model.losses(memory, scales, targets, num_objects)


@torch.no_grad()
def test_outputs_and_losses(run):
    golden, model, _ = run
    compare(golden, "single", model.forward_queries(golden_batch(golden, "single")))
    memory, scales, losses = compute_losses(golden, model)
    with evaluating(model):
        logits, boxes = model.predict(memory, scales)
    compare(golden, "padded", {"memory": memory, "pred_logits": logits, "pred_boxes": boxes})

    weights = model.criterion.weights
    unweighted = {
        f"loss.{key}": loss.item() / weights.get(re.match(r"loss_[a-z]+", key)[0], 1.0)
        for key, loss in losses.items()
    }
    total = sum(loss.item() for loss in losses.values())
    reference = {key: float(value) for key, value in golden.items() if key.startswith("loss.")}
    assert unweighted | {"loss.total": total} == pytest.approx(reference, rel=1e-6, abs=0)


@pytest.mark.slow
def test_gradient_norms_of_every_trained_parameter(run):
    """Norms of parameters that were one in the reference are added up."""
    golden, model, conversion = run
    sum(compute_losses(golden, model)[2].values()).backward()
    norms = dict(zip(map(str, golden["gradnorm_names"]), golden["gradnorm"]))
    squares = dict.fromkeys(norms, 0.0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (key,) = (key for key in conversion.used[name] if key in norms)
            squares[key] += parameter.grad.square().sum().item()
    # The norms up to 1e-9 are zero but for rounding.
    found = {key: square**0.5 for key, square in squares.items()}
    assert found == pytest.approx(norms, rel=1e-4, abs=1e-9)
