"""Build the optimizer of the lazy configs from ``SOLVER``."""

from detectron2.config import CfgNode, instantiate
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim import AdamW, Optimizer

from .. import model_zoo
from ..errors import ConfigError


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build the optimizer of ``configs/common/optimizer.py`` with the values of ``cfg.SOLVER``.

    Args:
        cfg: the keys used are ``SOLVER.BASE_LR``, ``WEIGHT_DECAY`` and its variants for norms and
            biases, ``BIAS_LR_FACTOR``, ``LR_FACTORS`` and ``CLIP_GRADIENTS``. The ``CLIP_TYPE``
            ``full_model`` clips the norm over all parameters, as the lazy configs do; ``value``
            and ``norm`` are Detectron2's and clip each parameter separately.
        model: the detector, or its DDP wrapper.

    Raises:
        ConfigError: ``full_model`` is combined with another norm than L2.
    """
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    lazy = model_zoo.get_config("common/optimizer.py").optimizer
    lazy.lr = solver.BASE_LR
    lazy.weight_decay = solver.WEIGHT_DECAY
    lazy.params.model = model
    if solver.LR_FACTORS is not None:
        lazy.params.lr_factor_func.factors = dict(solver.LR_FACTORS)
    # Detectron2 groups parameters by their options: an option with its default value would split
    # a group.
    if solver.WEIGHT_DECAY_NORM != solver.WEIGHT_DECAY:
        lazy.params.weight_decay_norm = solver.WEIGHT_DECAY_NORM
    if solver.WEIGHT_DECAY_BIAS not in (None, solver.WEIGHT_DECAY):
        lazy.params.weight_decay_bias = solver.WEIGHT_DECAY_BIAS
    if solver.BIAS_LR_FACTOR != 1.0:
        lazy.params.bias_lr_factor = solver.BIAS_LR_FACTOR

    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        if clip.NORM_TYPE != 2.0:
            raise ConfigError(
                f"SOLVER.CLIP_GRADIENTS.NORM_TYPE is {clip.NORM_TYPE}; CLIP_TYPE full_model "
                "accepts 2.0"
            )
        lazy.clip_norm = clip.CLIP_VALUE
        return instantiate(lazy)
    del lazy.clip_norm
    lazy._target_ = AdamW
    return maybe_add_gradient_clipping(cfg, instantiate(lazy))
