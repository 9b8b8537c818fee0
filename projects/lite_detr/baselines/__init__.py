"""The detectors that Lite DETR is compared with; importing registers the meta-architectures."""

from .conditional_detr import (
    ConditionalAttention,
    ConditionalDecoder,
    ConditionalDecoderLayer,
    ConditionalDETR,
    PointQueries,
)
from .dab_detr import DABDETR, AnchorBoxes, AnchorDecoder, PReLUFeedForward, ScaledEncoder
from .detr import DETR, NoObjectHeads, PositionQueries, SoftmaxCriterion, SoftmaxMatcher
from .dn_detr import DNDETR, LabelledAnchors, QueryDenoising
from .single_scale import (
    DenseCrossAttention,
    DenseSelfAttention,
    SingleScaleDetector,
    dilated_stages,
)

__all__ = [
    "AnchorBoxes",
    "AnchorDecoder",
    "ConditionalAttention",
    "ConditionalDETR",
    "ConditionalDecoder",
    "ConditionalDecoderLayer",
    "DABDETR",
    "DETR",
    "DNDETR",
    "DenseCrossAttention",
    "DenseSelfAttention",
    "LabelledAnchors",
    "NoObjectHeads",
    "PReLUFeedForward",
    "PointQueries",
    "PositionQueries",
    "QueryDenoising",
    "ScaledEncoder",
    "SingleScaleDetector",
    "SoftmaxCriterion",
    "SoftmaxMatcher",
    "dilated_stages",
]
