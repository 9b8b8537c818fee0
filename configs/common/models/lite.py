from detectron2.config import LazyCall as L

from lite_detr.modeling import InterleavedEncoder, KeyAwareDeformableAttention
from lite_detr.modeling.interleaved_encoder import parse_notation


def make_lite(model, variant):
    """Make a detector a Lite one: interleaved encoder, key-aware attention (arXiv 2303.07335).

    ``variant`` is in the paper's notation: H3L1-(2+1)x3 has 3 high-level scales, 1 low-level scale
    and 3 blocks of 2 updates.
    """
    model.num_levels, options = parse_notation(variant)
    model.encoder = L(InterleavedEncoder)(layer=model.encoder.layer, **options)
    model.encoder.layer.attention._target_ = KeyAwareDeformableAttention
