"""What those who run an ONNX file have to know and the graph does not say."""

import json

from detectron2.config import instantiate
from detectron2.data.transforms import ResizeShortestEdge
from omegaconf import DictConfig
from PIL import Image

from ..data.coco import class_metadata
from ..errors import ExportError
from ..version import __version__

CHANNEL_ORDERS = ("RGB", "BGR")


def describe(cfg: DictConfig, config_name: str) -> dict[str, str]:
    """The metadata of a lazy config's detector, as ONNX has it: texts, by name.

    ``class_names`` is a list in JSON, empty where the test set's metadata does not name as many as
    the detector has. ``preprocessing`` is an object in JSON: ``channels`` ("RGB" or "BGR"), and
    ``resize``, which is null or has ``short_side`` and ``max_size`` in pixels.

    Args:
        cfg: the config.
        config_name: how it was given.

    Raises:
        ExportError: the test set's images are changed otherwise than by one ``ResizeShortestEdge``,
            or their channels are neither RGB nor BGR.
    """
    mapper = cfg.dataloader.test.mapper
    if mapper.image_format not in CHANNEL_ORDERS:
        raise ExportError(
            f"dataloader.test.mapper.image_format is {mapper.image_format}; an ONNX file's images "
            f"are {' or '.join(CHANNEL_ORDERS)}"
        )
    return {
        "class_names": json.dumps(class_names(cfg), ensure_ascii=False),
        "preprocessing": json.dumps(
            {"channels": mapper.image_format, "resize": resizing(mapper.augmentations)}
        ),
        "config": config_name,
        "lite_detr_version": __version__,
    }


def class_names(cfg: DictConfig) -> list[str]:
    metadata = class_metadata(cfg)
    return list(metadata.thing_classes) if metadata else []


def resizing(augmentations: list[DictConfig]) -> dict[str, int] | None:
    found = [instantiate(augmentation) for augmentation in augmentations]
    if not found:
        return None
    [resize] = found if len(found) == 1 else [None]
    if (
        not isinstance(resize, ResizeShortestEdge)
        or resize.interp != Image.BILINEAR
        or len(set(resize.short_edge_length)) != 1
    ):
        raise ExportError(
            "dataloader.test.mapper.augmentations holds "
            f"{', '.join(type(augmentation).__name__ for augmentation in found)}; an ONNX file "
            "can say no more of how images are prepared than one ResizeShortestEdge of one "
            "length, bilinear, or nothing"
        )
    return {"short_side": resize.short_edge_length[0], "max_size": resize.max_size}
