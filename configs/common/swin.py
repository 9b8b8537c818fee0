from detectron2.config import LazyCall as L
from detectron2.modeling import SwinTransformer

# embed_dim, depth of the third stage, heads of the first stage, and the side of the windows for
# weights of the size of images that they were trained on.
SIZES = {"t": (96, 6, 3), "s": (96, 18, 3), "b": (128, 18, 4), "l": (192, 18, 6)}
WINDOWS = {224: 7, 384: 12}
# The Swin authors' releases.
RELEASES = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"


def swin(size, images=224, drop_path_rate=0.2, stride_4=False):
    """A Swin Transformer, trained on ``images`` of 224 or 384 pixels a side."""
    embed_dim, depth, heads = SIZES[size]
    return L(SwinTransformer)(
        pretrain_img_size=images,
        embed_dim=embed_dim,
        depths=[2, 2, depth, 2],
        num_heads=[heads, 2 * heads, 4 * heads, 8 * heads],
        window_size=WINDOWS[images],
        drop_path_rate=drop_path_rate,
        out_indices=[0, 1, 2, 3] if stride_4 else [1, 2, 3],
    )


def swin_checkpoint(name):
    """The address of a release, with the query for Detectron2's own checkpointer."""
    return f"{RELEASES}{name}.pth?matching_heuristics=True"
