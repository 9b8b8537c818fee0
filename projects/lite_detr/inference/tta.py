"""Test-time augmentation: a detector that looks at each image in several sizes, also mirrored."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data.transforms import Transform
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..errors import ConfigError

# Of weighted boxes fusion's paper (arXiv 1910.13302).
IOU_THRESHOLD = 0.55
# Of two boxes of one view. Two objects of a class hardly ever overlap so much.
DUPLICATE_IOU = 0.8


class DetectorWithTTA(nn.Module):
    """A detector with test-time augmentation, as Detectron2's ``GeneralizedRCNNWithTTA``.

    Each image is predicted once for each view, and :func:`fuse_boxes` merges the detections. A
    score is the mean of all views. The contract is that of the detector, which must be trained
    without it.

    Args:
        model: a detector, or its DDP wrapper.
        mapper: makes the views of an input, each with its ``transforms``, as Detectron2's
            ``DatasetMapperTTA`` does.
        iou_threshold: see :func:`fuse_boxes`.

    Raises:
        ConfigError: a size of the mapper is not a positive number, or there is none.
    """

    def __init__(
        self, model: nn.Module, mapper: DatasetMapperTTA, iou_threshold: float = IOU_THRESHOLD
    ):
        super().__init__()
        sizes = [*getattr(mapper, "min_sizes", [1]), getattr(mapper, "max_size", 1)]
        if len(sizes) < 2 or min(sizes) < 1:
            raise ConfigError(
                f"test-time augmentation resizes images to min_sizes {sizes[:-1]} with max_size "
                f"{sizes[-1]}: give one size or more, in pixels"
            )
        self.model = getattr(model, "module", model)
        self.mapper = mapper
        self.iou_threshold = iou_threshold

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "DetectorWithTTA":
        """Return a detector with the augmentation of ``TEST.AUG`` of a YAML config."""
        return cls(model, DatasetMapperTTA(cfg))

    def forward(self, batched_inputs: list[dict]) -> list[dict[str, Instances]]:
        """Return the merged detections of each image.

        As :class:`~lite_detr.modeling.detector.Detector` does without losses.

        Args:
            batched_inputs: ``image`` is ``[3, H, W]``, uint8; ``height`` and ``width`` are the size
                to scale the boxes to.

        Raises:
            ConfigError: it is in training mode.
        """
        if self.training:
            raise ConfigError(
                "test-time augmentation has no losses: train the detector without it, and call "
                "eval() here"
            )
        return [{"instances": self.predict(inputs)} for inputs in batched_inputs]

    def predict(self, inputs: dict) -> Instances:
        """Return the merged detections of an image."""
        image = inputs["image"]
        size = inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2])
        # The mapper's transforms are NumPy's.
        views = self.mapper(
            inputs | {"image": image.cpu(), "height": size[0], "width": size[1]},
        )
        transforms = [view.pop("transforms") for view in views]
        found = []
        # An image beside its mirror image: padding to other sizes would change what is found.
        for _, same in itertools.groupby(views, key=lambda view: view["image"].shape):
            batch = [in_its_own_pixels(view) for view in same]
            found += [output["instances"] for output in self.model(batch)]
        boxes = [restore(instances, tfm) for instances, tfm in zip(found, transforms)]
        classes = [instances.pred_classes for instances in found]
        scores = [instances.scores for instances in found]
        return self.keep_best(Instances(size), *fuse_boxes(boxes, scores, classes))

    def keep_best(
        self, instances: Instances, boxes: Tensor, scores: Tensor, classes: Tensor
    ) -> Instances:
        """Fill in as many detections as the detector returns, of those that reach its threshold."""
        kept = scores >= getattr(self.model, "score_thresh", 0.0)
        limit = getattr(self.model, "detections_per_image", len(scores))
        instances.pred_boxes = Boxes(boxes[kept][:limit])
        instances.scores = scores[kept][:limit]
        instances.pred_classes = classes[kept][:limit]
        return instances


def in_its_own_pixels(view: dict) -> dict:
    """Return an input whose boxes are those of its image, whatever the file's size."""
    height, width = view["image"].shape[1:]
    return view | {"height": height, "width": width}


def restore(instances: Instances, transform: Transform) -> Tensor:
    """Return the boxes ``[N, 4]`` of a view in pixels of the original image."""
    boxes = instances.pred_boxes.tensor
    original = transform.inverse().apply_box(boxes.cpu().numpy())
    return torch.from_numpy(original).to(boxes)


def fuse_boxes(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    classes: Sequence[Tensor],
    iou_threshold: float = IOU_THRESHOLD,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the detections of several views of an image by weighted boxes (arXiv 1910.13302).

    From the best on, a box joins the group of its class that it overlaps most, or starts one. A
    group's box is the mean of its boxes, weighted by their scores; its score is the mean over all
    views, zero for those without a box in it. Unlike in the paper, a view has one box in a group
    at most, as a DETR tells objects that overlap apart by itself. A second box of a view that
    nearly covers a group is dropped: it is the same object once more.

    Args:
        boxes: of each view, ``[N, 4]``, corners in the same coordinates.
        scores, classes: of each view, ``[N]``.
        iou_threshold: the least IoU of a box and the group that it joins.

    Returns:
        Boxes ``[M, 4]``, scores ``[M]`` and classes ``[M]``, best first.
    """
    num_views = len(boxes)
    views = np.concatenate([np.full(len(view), number) for number, view in enumerate(boxes)])
    corners = torch.cat([*boxes]).double().cpu().numpy()
    weights = torch.cat([*scores]).double().cpu().numpy()
    labels = torch.cat([*classes]).cpu().numpy()
    # Each group's sum of weights, its weighted sum of boxes, its class, and the views in it.
    sums, sides = np.zeros(len(labels)), np.zeros((len(labels), 4))
    fused, kinds = np.zeros((len(labels), 4)), np.full(len(labels), -1)
    seen = np.zeros((len(labels), num_views), dtype=bool)
    num_groups = 0
    for index in np.argsort(-weights, kind="stable"):
        groups = np.flatnonzero(kinds[:num_groups] == labels[index])
        overlaps = iou(corners[index], fused[groups])
        is_second = seen[groups, views[index]]
        joinable = np.where(is_second, 0, overlaps)
        if joinable.max(initial=0) > iou_threshold:
            group = groups[joinable.argmax()]
        elif overlaps[is_second].max(initial=0) > DUPLICATE_IOU:
            continue
        else:
            group, num_groups = num_groups, num_groups + 1
            kinds[group] = labels[index]
        seen[group, views[index]] = True
        sums[group] += weights[index]
        sides[group] += weights[index] * corners[index]
        fused[group] = sides[group] / sums[group] if sums[group] > 0 else corners[index]
    order = np.argsort(-sums[:num_groups], kind="stable")
    return (
        torch.from_numpy(fused[order]).to(boxes[0]),
        torch.from_numpy(sums[order] / num_views).to(scores[0]),
        torch.from_numpy(kinds[order]).to(classes[0]),
    )


def iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the IoU ``[N]`` of a box with others, ``[N, 4]``; 0 where neither has an area."""
    corner = np.maximum(box[:2], boxes[:, :2])
    sides = np.clip(np.minimum(box[2:], boxes[:, 2:]) - corner, 0, None)
    shared = sides.prod(axis=1)
    area = (box[2:] - box[:2]).prod()
    total = area + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared
    return shared / np.maximum(total, np.finfo(total.dtype).tiny)


def uses_tta(cfg: DictConfig) -> bool:
    """Return whether a lazy config turns test-time augmentation on."""
    return bool(OmegaConf.select(cfg, "dataloader.test_aug.enabled"))


def add_tta(cfg: DictConfig, model: nn.Module) -> nn.Module:
    """Return a detector with the test-time augmentation of a lazy config, if that is turned on.

    The test set's images are then not resized before it, so that every view is made of the
    original.
    """
    if not uses_tta(cfg):
        return model
    options = cfg.dataloader.test_aug
    cfg.dataloader.test.mapper.augmentations = []
    return DetectorWithTTA(model, instantiate(options.mapper), options.iou_threshold)


def refuse_tta(cfg: DictConfig, purpose: str) -> None:
    """Raise a ConfigError if a lazy config turns test-time augmentation on for another purpose."""
    if uses_tta(cfg):
        raise ConfigError(
            f"dataloader.test_aug is for evaluation and prediction, not for {purpose}: set "
            "dataloader.test_aug.enabled=False"
        )
