"""Backbones from timm and torchvision; importing registers them with Detectron2."""

from .timm_backbone import TimmBackbone
from .torchvision_backbone import TorchvisionBackbone

__all__ = ["TimmBackbone", "TorchvisionBackbone"]
