"""Patch Detectron2 where it has no registry, for our detectors alone.

``DefaultTrainer``, ``DefaultPredictor`` and the programs in Detectron2's ``tools/`` build every
optimizer with ``build_optimizer``, which only knows SGD, and load all weights with
``DetectionCheckpointer``, which neither knows the names of other DETRs nor reports missing weights
as an error. With ``TEST.AUG`` they build ``GeneralizedRCNNWithTTA``, which refuses whatever is not
an R-CNN. Importing this module replaces all three for models that are a :class:`Detector`; nothing
changes for others.
"""

import functools

import detectron2.engine.defaults
import detectron2.solver.build
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNNWithTTA
from torch import nn
from torch.optim import Optimizer

from .checkpoint import DetrCheckpointer
from .inference.tta import DetectorWithTTA
from .modeling.detector import Detector
from .yacs import solver
from .yacs.datasets import check_classes

_build_optimizer = detectron2.solver.build.build_optimizer


def is_detector(model: nn.Module) -> bool:
    """Return whether a model, or the model in a data parallel wrapper, is one of our detectors."""
    return isinstance(getattr(model, "module", model), Detector)


@functools.wraps(_build_optimizer)
def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    if not is_detector(model):
        return _build_optimizer(cfg, model)
    # Before training, of which this is the first step that is given the config and the model.
    detector = getattr(model, "module", model)
    detector.class_names = check_classes(cfg, detector.num_classes)
    return solver.build_optimizer(cfg, model)


def new_checkpointer(cls: type, model: nn.Module, *args, **kwargs) -> DetectionCheckpointer:
    """Let ``DetectionCheckpointer(detector)`` make a :class:`DetrCheckpointer`."""
    if cls is DetectionCheckpointer and is_detector(model):
        cls = DetrCheckpointer
    return object.__new__(cls)


def new_tta(cls: type, cfg: CfgNode, model: nn.Module, tta_mapper=None, *args, **kwargs):
    """Let ``GeneralizedRCNNWithTTA(cfg, detector)`` make a :class:`DetectorWithTTA`."""
    if not is_detector(model):
        return object.__new__(cls)
    if tta_mapper is None:
        return DetectorWithTTA.from_config(cfg, model)
    return DetectorWithTTA(model, tta_mapper)


for module in (detectron2.solver.build, detectron2.solver, detectron2.engine.defaults):
    module.build_optimizer = build_optimizer
DetectionCheckpointer.__new__ = staticmethod(new_checkpointer)
GeneralizedRCNNWithTTA.__new__ = staticmethod(new_tta)
