"""Backbones beyond those that Detectron2 ships."""

from .timm_backbone import TimmBackbone

__all__ = ["TimmBackbone"]
