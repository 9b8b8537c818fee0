"""Our graph against what the authors' code computes, in float64; see tests/golden/README.md."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from reference_checkpoints import golden_batch, golden_targets, reference_checkpoint
from torch import Tensor

from lite_detr import model_zoo
from lite_detr.checkpoint import Conversion, convert_weights
from lite_detr.modeling.detector import evaluating

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = {
    "lite_dino_r50_h3l1_2p1x3": "dino/lite_dino_r50_h3l1_2p1x3_36ep.py",
    "lite_dino_swin_t_h3l1_2p1x3": "dino/lite_dino_swin_t_h3l1_2p1x3_36ep.py",
    "dino_r50_4scale": "dino/dino_r50_4scale_36ep.py",
    "deformable_detr_r50_single_stage": "deformable_detr/deformable_detr_r50_single_stage_50ep.py",
    "deformable_detr_r50_two_stage": "deformable_detr/deformable_detr_r50_two_stage_50ep.py",
    "h_detr_r50": "h_detr/h_detr_r50_36ep.py",
    "detrex_dino_r50_4scale": "dino/detrex_dino_r50_4scale_12ep.py",
}
# Their names' rules are tested in test_other_zoos.py.
SLOW_CONFIGS = {
    "mmdet_dino_r50_4scale": "dino/mmdet_dino_r50_4scale_12ep.py",
    "detrex_deformable_detr_r50_two_stage": "deformable_detr/"
    "detrex_deformable_detr_r50_two_stage_50ep.py",
    "mmdet_deformable_detr_r50_two_stage": "deformable_detr/deformable_detr_r50_two_stage_50ep.py",
}
BATCHES = ("single", "padded")
OUTPUTS = ("memory", "pred_logits", "pred_boxes")

pytestmark = [
    # Of Detectron2's Swin.
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:Importing from timm.models.layers:FutureWarning"),
]


class Run(NamedTuple):
    """What a golden file holds, and what our model makes of the same input."""

    golden: dict[str, np.ndarray]
    conversion: Conversion
    outputs: dict[str, dict[str, Tensor]]
    losses: dict[str, Tensor]
    weights: dict[str, float]
    gradients: dict[str, Tensor]


@pytest.fixture(
    scope="module",
    params=[*CONFIGS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CONFIGS)],
)
def run(request):
    """One conversion, two forward passes and a training step for all tests of a file."""
    path = GOLDEN / f"{request.param}.npz"
    if "_swin_" in request.param:
        pytest.importorskip("timm")  # Detectron2's Swin takes its stochastic depth from there
    golden = dict(np.load(path))
    config = model_zoo.get_config((CONFIGS | SLOW_CONFIGS)[request.param]).model
    config.num_classes = golden["single.pred_logits"].shape[-1]
    # The losses of the files are without dropout.
    config.encoder.layer.dropout = 0.0
    if "drop_path_rate" in config.backbone:
        config.backbone.drop_path_rate = 0.0
    model = instantiate(config)
    conversion = convert_weights(reference_checkpoint(path), model)
    model.load_state_dict(conversion.state_dict)
    model.double()
    with torch.no_grad():
        outputs = {"single": model.forward_queries(golden_batch(golden, "single"))}
    # Encoded once for the outputs and the losses.
    memory, scales = model.train().encode(model.preprocess_images(golden_batch(golden, "padded")))
    with evaluating(model), torch.no_grad():
        logits, boxes = model.predict(memory, scales)
    outputs["padded"] = {"memory": memory, "pred_logits": logits, "pred_boxes": boxes}
    # The files are without denoising.
    model.denoising = None
    objects = golden_targets(golden)
    num_objects = torch.tensor(float(sum(len(target.labels) for target in objects)))
    losses = model.losses(memory, scales, objects, num_objects)
    sum(losses.values()).backward()
    return Run(
        golden,
        conversion,
        outputs,
        {name: loss.detach() for name, loss in losses.items()},
        model.criterion.weights,
        {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
    )


def reference_name(loss, golden):
    """``_one2many_0`` is ``_0_one2many`` in H-DETR, and ``_enc`` is ``_interm`` in DINO."""
    name = re.sub(r"_one2many_(\d)", r"_\1_one2many", loss)
    if "loss.loss_ce_interm" in golden:
        name = name.replace("_enc", "_interm")
    if "loss.loss_class" in golden:  # detrex
        name = name.replace("_ce", "_class")
    if "loss.loss_cls" in golden:  # MMDetection
        name = name.replace("_ce", "_cls").replace("_giou", "_iou")
        name = re.sub(r"(.+)_enc", r"enc_\1", re.sub(r"(.+)_(\d)", r"d\2.\1", name))
    return f"loss.{name}"


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", BATCHES)
def test_outputs(run, name, output):
    ours = run.outputs[name][output].detach()
    if output == "memory":
        ours = ours[:, ::37]
    reference = torch.from_numpy(run.golden[f"{name}.{output}"])
    # A file in float32 is rounded.
    tolerance = 1e-6 if reference.dtype == torch.float64 else 5e-6
    torch.testing.assert_close(ours, reference.double(), rtol=0, atol=tolerance)


def test_every_loss_before_weighting(run):
    ours = {
        reference_name(name, run.golden): loss.item() / run.weights["_".join(name.split("_")[:2])]
        for name, loss in run.losses.items()
    }
    total = sum(loss.item() for loss in run.losses.values())
    reference = {key: float(value) for key, value in run.golden.items() if key.startswith("loss.")}
    assert total == pytest.approx(reference.pop("loss.total"), rel=1e-7, abs=0)
    assert ours == pytest.approx(reference, rel=1e-6, abs=0)


def test_gradient_norms_of_every_trained_parameter(run):
    """Norms of parameters that were one in the reference, as the query embedding, are added up."""
    reference = dict(zip(map(str, run.golden["gradnorm_names"]), run.golden["gradnorm"]))
    # The references always have an embedding of classes; it learns nothing without denoising.
    for name in ("label_enc.weight", "dn_query_generator.label_embedding.weight"):
        assert reference.pop(name, 0.0) == 0.0
    squares = dict.fromkeys(reference, 0.0)
    for name, gradient in run.gradients.items():
        if name in run.conversion.added:
            continue
        # A parameter that several keys stand for is listed by one of them.
        (key,) = (key for key in run.conversion.used[name] if key in reference)
        squares[key] += gradient.square().sum().item()
    norms = {key: square**0.5 for key, square in squares.items()}
    # The code of the two zoos normalises images in other units than ours and the authors'. That
    # rounding alone, undone or not, moves gradients of sampling offsets by up to 7e-5.
    tolerance = 1e-4 if "loss.loss_ce" not in run.golden else 1e-5
    assert norms == pytest.approx(reference, rel=tolerance, abs=0)
