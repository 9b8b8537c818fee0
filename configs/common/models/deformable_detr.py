from detectron2.config import LazyCall as L

from lite_detr.modeling import (
    DecoderLayer,
    DeformableDecoder,
    DeformableDETR,
    DeformableEncoder,
    EncoderLayer,
    FeedForward,
    HungarianMatcher,
    MultiScaleDeformableAttention,
    PredictionHeads,
    SetCriterion,
    SinePositionEncoding,
    TwoStageQueries,
)

from ..backbones.resnet50 import backbone

# Two-stage Deformable DETR. The decoder's layers are built as the encoder's are: an override of
# model.encoder.layer.attention changes both.
model = L(DeformableDETR)(
    backbone=backbone,
    embed_dim=256,
    num_classes=80,
    num_levels=4,
    position_encoding=L(SinePositionEncoding)(embed_dim="${..embed_dim}"),
    encoder=L(DeformableEncoder)(
        layer=L(EncoderLayer)(
            attention=L(MultiScaleDeformableAttention)(
                embed_dim="${....embed_dim}",
                num_heads=8,
                num_levels="${....num_levels}",
                num_points=4,
            ),
            ffn=L(FeedForward)(
                embed_dim="${....embed_dim}", hidden_dim=1024, dropout="${..dropout}"
            ),
            dropout=0.1,
        ),
        num_layers=6,
    ),
    queries=L(TwoStageQueries)(
        embed_dim="${..embed_dim}", num_classes="${..num_classes}", num_queries=300
    ),
    decoder=L(DeformableDecoder)(
        layer=L(DecoderLayer)(
            attention="${...encoder.layer.attention}",
            ffn="${...encoder.layer.ffn}",
            dropout="${...encoder.layer.dropout}",
        ),
        heads=L(PredictionHeads)(
            embed_dim="${...embed_dim}", num_classes="${...num_classes}", num_layers=6
        ),
        refine=True,
    ),
    criterion=L(SetCriterion)(matcher=L(HungarianMatcher)()),
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
    input_format="RGB",
    score_thresh=0.0,
    detections_per_image=100,
)
