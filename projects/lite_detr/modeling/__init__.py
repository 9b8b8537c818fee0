"""The parts that configs compose into detectors; importing registers the meta-architectures.

Without Detectron2 there are only the parts that are plain PyTorch, for :mod:`lite_detr.interop`.
"""

from typing import Any

from .. import has_detectron2, register
from .attention import KeyAwareDeformableAttention, MultiScaleDeformableAttention
from .encoder import CheckpointedEncoderLayer, DeformableEncoder, EncoderLayer
from .interleaved_encoder import InterleavedEncoder
from .layers import FeedForward, SinePositionEncoding
from .scales import Scales

__all__ = [
    "CheckpointedEncoderLayer",
    "DeformableEncoder",
    "EncoderLayer",
    "FeedForward",
    "InterleavedEncoder",
    "KeyAwareDeformableAttention",
    "MultiScaleDeformableAttention",
    "Scales",
    "SinePositionEncoding",
]

if has_detectron2():
    from .backbone import TimmBackbone, TorchvisionBackbone
    from .criterion import FocalLoss, HungarianMatcher, SetCriterion
    from .decoder import DecoderLayer, DeformableDecoder, MixedDecoderLayer
    from .deformable_detr import DeformableDETR
    from .dino import DINO, ContrastiveDenoising, DinoQueries, ReferencePosition
    from .h_detr import HDETR, HybridQueries
    from .heads import PredictionHeads
    from .matching import (
        HighOrderMatcher,
        MixedMatcher,
        OneToManyMatcher,
        PositionModulatedMatcher,
    )
    from .neck import MultiScaleNeck
    from .quality_losses import (
        GIoUAwareLoss,
        IoUAwareLoss,
        MatchabilityLoss,
        PositionSupervisedLoss,
        VarifocalLoss,
    )
    from .queries import LearnedQueries, TwoStageQueries
    from .supervision import CriteriaByOutput, OneToManyCriterion, UnionCriterion

    __all__ += [
        "ContrastiveDenoising",
        "CriteriaByOutput",
        "DINO",
        "DecoderLayer",
        "DeformableDETR",
        "DeformableDecoder",
        "DinoQueries",
        "FocalLoss",
        "GIoUAwareLoss",
        "HDETR",
        "HighOrderMatcher",
        "HungarianMatcher",
        "HybridQueries",
        "IoUAwareLoss",
        "LearnedQueries",
        "MatchabilityLoss",
        "MixedDecoderLayer",
        "MixedMatcher",
        "MultiScaleNeck",
        "OneToManyCriterion",
        "OneToManyMatcher",
        "PositionModulatedMatcher",
        "PositionSupervisedLoss",
        "PredictionHeads",
        "ReferencePosition",
        "SetCriterion",
        "TimmBackbone",
        "TorchvisionBackbone",
        "TwoStageQueries",
        "UnionCriterion",
        "VarifocalLoss",
    ]
else:

    def __getattr__(name: str) -> Any:
        if name[:1].isupper():
            # Raises the error that says how to install Detectron2.
            register()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
