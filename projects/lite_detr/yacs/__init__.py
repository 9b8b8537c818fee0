"""Build detectors and their optimizers from Detectron2's YAML configs with ``MODEL.DETR``."""

from ..model_zoo import add_lite_detr_config
from ..modeling.detector import Detector
from .model import detector_arguments

# Detectron2's `@configurable` calls this with a config; the classes themselves know no YAML.
Detector.from_config = classmethod(detector_arguments)

__all__ = ["add_lite_detr_config"]
