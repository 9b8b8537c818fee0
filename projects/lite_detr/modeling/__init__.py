"""The parts that configs compose into detectors; importing registers the meta-architectures."""

from .attention import KeyAwareDeformableAttention, MultiScaleDeformableAttention
from .backbone import TimmBackbone, TorchvisionBackbone
from .criterion import HungarianMatcher, SetCriterion
from .decoder import DecoderLayer, DeformableDecoder
from .deformable_detr import DeformableDETR
from .dino import DINO, ContrastiveDenoising, DinoQueries, ReferencePosition
from .encoder import CheckpointedEncoderLayer, DeformableEncoder, EncoderLayer
from .h_detr import HDETR, HybridQueries
from .heads import PredictionHeads
from .interleaved_encoder import InterleavedEncoder
from .layers import FeedForward, SinePositionEncoding
from .neck import MultiScaleNeck
from .queries import LearnedQueries, TwoStageQueries
from .scales import Scales

__all__ = [
    "CheckpointedEncoderLayer",
    "ContrastiveDenoising",
    "DINO",
    "DecoderLayer",
    "DeformableDETR",
    "DeformableDecoder",
    "DeformableEncoder",
    "DinoQueries",
    "EncoderLayer",
    "FeedForward",
    "HDETR",
    "HungarianMatcher",
    "HybridQueries",
    "InterleavedEncoder",
    "KeyAwareDeformableAttention",
    "LearnedQueries",
    "MultiScaleDeformableAttention",
    "MultiScaleNeck",
    "PredictionHeads",
    "ReferencePosition",
    "Scales",
    "SetCriterion",
    "SinePositionEncoding",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TwoStageQueries",
]
