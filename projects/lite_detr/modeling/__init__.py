"""The parts of the detectors; configs compose them. Importing registers the meta-architectures."""

from .attention import KeyAwareDeformableAttention, MultiScaleDeformableAttention
from .backbone import TimmBackbone
from .criterion import SetCriterion
from .decoder import DecoderLayer, DeformableDecoder
from .deformable_detr import DeformableDETR
from .encoder import DeformableEncoder, EncoderLayer
from .feed_forward import FeedForward
from .heads import PredictionHeads
from .interleaved_encoder import InterleavedEncoder
from .matcher import HungarianMatcher
from .neck import MultiScaleNeck
from .position_encoding import SinePositionEncoding
from .queries import LearnedQueries, TwoStageQueries
from .scales import Scales

__all__ = [
    "DecoderLayer",
    "DeformableDETR",
    "DeformableDecoder",
    "DeformableEncoder",
    "EncoderLayer",
    "FeedForward",
    "HungarianMatcher",
    "InterleavedEncoder",
    "KeyAwareDeformableAttention",
    "LearnedQueries",
    "MultiScaleDeformableAttention",
    "MultiScaleNeck",
    "PredictionHeads",
    "Scales",
    "SetCriterion",
    "SinePositionEncoding",
    "TimmBackbone",
    "TwoStageQueries",
]
