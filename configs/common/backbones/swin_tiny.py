from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

backbone = L(SwinTransformer)(
    embed_dim=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    drop_path_rate=0.2,
    out_indices=[1, 2, 3],
)
# The Swin authors' release. The query is for Detectron2's own checkpointer, which matches names by
# their endings; lite_detr's knows them.
init_checkpoint = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_tiny_patch4_window7_224.pth?matching_heuristics=True"
)
