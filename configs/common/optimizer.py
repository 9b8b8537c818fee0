from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from lite_detr.optimizer import ClippedAdamW, LrFactors

# Deformable DETR, appendix A.4.3.
optimizer = L(ClippedAdamW)(
    params=L(get_default_optimizer_params)(
        # params.model is set to the model before the optimizer is instantiated.
        base_lr="${..lr}",
        lr_factor_func=L(LrFactors)(
            factors={"backbone.": 0.1, "reference_points": 0.1, "sampling_offsets": 0.1}
        ),
    ),
    lr=2e-4,
    weight_decay=1e-4,
    clip_norm=0.1,
)
