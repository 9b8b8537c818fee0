"""Detectron2's YAML configs: ``MODEL.DETR``, and what a detector and its optimizer read of them."""

from .config import add_lite_detr_config

__all__ = ["add_lite_detr_config"]
