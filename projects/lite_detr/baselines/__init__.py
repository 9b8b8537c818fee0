"""The detectors that Lite DETR is compared with; importing registers the meta-architectures."""

from .anchor_detr import (
    AnchorDETR,
    AnchorPoints,
    AxisDecoderLayer,
    AxisEncoderLayer,
    AxisEncoding,
    RowColumnAttention,
)
from .conditional_detr import (
    ConditionalAttention,
    ConditionalDecoder,
    ConditionalDecoderLayer,
    ConditionalDETR,
    PointQueries,
    SplitSelfAttention,
)
from .dab_detr import DABDETR, AnchorBoxes, AnchorDecoder, PReLUFeedForward, ScaledEncoder
from .detr import DETR, NoObjectHeads, PositionQueries, SoftmaxCriterion, SoftmaxMatcher
from .dn_detr import DNDETR, LabelledAnchors, QueryDenoising
from .imfa_detr import IMFADETR, FeatureSampler, SplitEncoderLayer
from .pnp_detr import PnPDETR, TokenSampler
from .single_scale import (
    DenseCrossAttention,
    DenseSelfAttention,
    SingleScaleDetector,
    dilated_stages,
)
from .sparse_detr import MemoryQueries, SparseDETR, SparseDINO, SparseHDETR
from .sparse_encoder import SparseEncoder, SparseTraining
from .sparse_interleaved_encoder import SparseInterleavedEncoder

__all__ = [
    "AnchorBoxes",
    "AnchorDETR",
    "AnchorDecoder",
    "AnchorPoints",
    "AxisDecoderLayer",
    "AxisEncoderLayer",
    "AxisEncoding",
    "ConditionalAttention",
    "ConditionalDETR",
    "ConditionalDecoder",
    "ConditionalDecoderLayer",
    "DABDETR",
    "DETR",
    "DNDETR",
    "DenseCrossAttention",
    "DenseSelfAttention",
    "FeatureSampler",
    "IMFADETR",
    "LabelledAnchors",
    "MemoryQueries",
    "NoObjectHeads",
    "PReLUFeedForward",
    "PnPDETR",
    "PointQueries",
    "PositionQueries",
    "QueryDenoising",
    "RowColumnAttention",
    "ScaledEncoder",
    "SingleScaleDetector",
    "SoftmaxCriterion",
    "SoftmaxMatcher",
    "SparseDETR",
    "SparseDINO",
    "SparseEncoder",
    "SparseHDETR",
    "SparseInterleavedEncoder",
    "SparseTraining",
    "SplitEncoderLayer",
    "SplitSelfAttention",
    "TokenSampler",
    "dilated_stages",
]
