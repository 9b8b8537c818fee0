from detectron2.config import LazyCall as L

from lite_detr.baselines import MemoryQueries, SparseDETR, SparseDINO, SparseEncoder, SparseHDETR
from lite_detr.modeling import DINO, HDETR

from .deformable_detr import model

ARCHITECTURES = {DINO: SparseDINO, HDETR: SparseHDETR}


def make_sparse(model, keep_ratio):
    """Let the encoder of DINO or H-DETR update the best-scored share of the tokens alone."""
    model._target_ = ARCHITECTURES.get(model._target_, model._target_)
    model.encoder = L(SparseEncoder)(layer=model.encoder.layer, num_layers=6, keep_ratio=keep_ratio)


model._target_ = SparseDETR
make_sparse(model, keep_ratio=0.3)
model.queries = L(MemoryQueries)(
    embed_dim="${..embed_dim}", num_classes="${..num_classes}", num_queries=300
)
