"""The reference detectors' optimizer: learning rates by parameter name, clipped gradients."""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate

from .errors import ConfigError


class LrFactors:
    """Learning rate factors by parts of parameter names, for ``get_default_optimizer_params``.

    Args:
        factors: ``{part_of_name: factor}``; the first part found in a parameter's name counts, and
            the factor is 1 if none is.
    """

    def __init__(self, factors: Mapping[str, float]):
        self.factors = dict(factors)

    def __call__(self, name: str) -> float:
        return next((factor for part, factor in self.factors.items() if part in name), 1.0)


class LayerDecay(LrFactors):
    """Learning rate factors that fall block by block towards the input of a ViT or Swin backbone.

    The blocks are numbered as Detectron2 does for ViTs, over all stages of a Swin Transformer. What
    follows the last block, and the rest of a detector, has no such factor.

    Args:
        decay: the factor from one block to the block before it, above 0 and at most 1.
        depths: the number of blocks in each stage; a ViT has one stage.
        factors: see :class:`LrFactors`. They come on top, so ``backbone.`` is rarely among them.

    Raises:
        ConfigError: ``decay`` is out of its range; and when called, if the backbone is neither
            Detectron2's ViT nor its Swin Transformer, or has other depths.
    """

    BLOCK = re.compile(r"backbone\.(?:net\.)?(?:layers\.(\d+)\.)?(?:blocks\.(\d+)|downsample)\.")
    OTHER = re.compile(
        r"backbone\.(?:net\.)?(?:patch_embed|pos_embed|absolute_pos_embed|norm\d*|simfp_\d)\b"
    )

    def __init__(
        self, decay: float, depths: Sequence[int], factors: Mapping[str, float] | None = None
    ):
        super().__init__(factors or {})
        if not 0 < decay <= 1:
            raise ConfigError(f"LayerDecay needs a decay above 0 and at most 1, got {decay}")
        self.decay = decay
        self.depths = list(depths)

    def __call__(self, name: str) -> float:
        block = get_vit_lr_decay_rate(self.number_block(name), self.decay, sum(self.depths))
        return super().__call__(name) * block

    def number_block(self, name: str) -> str:
        """Return a parameter's name with its block's number over all stages."""
        found = self.BLOCK.match(name)
        if found is None:
            if name.startswith("backbone.") and not self.OTHER.match(name):
                raise ConfigError(
                    f"LayerDecay does not know the blocks of this backbone ({name}): use it with "
                    "Detectron2's ViT or SwinTransformer, or LrFactors"
                )
            return name.replace("absolute_pos_embed", "pos_embed")
        stage = int(found[1] or 0)
        depth = self.depths[stage] if stage < len(self.depths) else 0
        # Patches are merged after the last block of a stage.
        block = depth - 1 if found[2] is None else int(found[2])
        if not 0 <= block < depth:
            raise ConfigError(
                f"LayerDecay has depths {self.depths}, and the backbone has {name}: give the "
                "backbone's own depths"
            )
        return f"backbone.blocks.{sum(self.depths[:stage]) + block}."


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that first clips the gradient's norm over all parameters.

    As part of the optimizer, clipping also works in trainers that do not clip themselves, such as
    Detectron2's ``lazyconfig_train_net.py``; a gradient scaler unscales gradients first.

    Args:
        params, **options: see :class:`torch.optim.AdamW`; ``fused`` is on by default, which halves
            the time of a step on a CPU.
        clip_norm: the largest L2 norm of a step's gradient.

    Raises:
        FloatingPointError: in :meth:`step`, if the norm is not finite; weights and state are kept.
    """

    def __init__(self, params, clip_norm: float = 0.1, **options):
        super().__init__(params, **{"fused": True, **options})
        self.clip_norm = clip_norm
        # A gradient scaler leaves the division by its scale to a fused optimizer, but gradients are
        # clipped before. PyTorch has no public name for it.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        # A single NaN would reach every weight through the norm.
        if not norm.isfinite():
            raise FloatingPointError("the gradient is not finite")
        super().step()
        return loss
