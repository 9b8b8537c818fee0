"""The parts of the detectors; configs compose them. Importing registers the meta-architectures."""

from .activation_checkpointing import CheckpointedEncoderLayer
from .attention import KeyAwareDeformableAttention, MultiScaleDeformableAttention
from .backbone import TimmBackbone, TorchvisionBackbone
from .criterion import SetCriterion
from .decoder import DecoderLayer, DeformableDecoder
from .deformable_detr import DeformableDETR
from .denoising import ContrastiveDenoising
from .dino import DINO
from .encoder import DeformableEncoder, EncoderLayer
from .feed_forward import FeedForward
from .h_detr import HDETR
from .heads import PredictionHeads
from .interleaved_encoder import InterleavedEncoder
from .matcher import HungarianMatcher
from .mixed_queries import DinoQueries, HybridQueries, ReferencePosition
from .neck import MultiScaleNeck
from .position_encoding import SinePositionEncoding
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
