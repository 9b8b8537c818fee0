"""The reference detectors' optimizer: learning rates by parameter name, clipped gradients."""

from collections.abc import Callable, Mapping

import torch


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
