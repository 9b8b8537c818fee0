"""Folds frozen batch norms into the convolutions before them."""

from collections.abc import Callable, Mapping

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from ..errors import OptimizationError

Norm = _BatchNorm | FrozenBatchNorm2d | TorchvisionFrozenBatchNorm2d
# The largest error of a map, relative to its largest value, that rounding explains.
TOLERANCE = 1e-3


def fold_norms(module: nn.Module, run: Callable[[], Mapping[str, Tensor]]) -> int:
    """Makes each batch norm a part of the convolution whose output it takes.

    Which one that is shows in a run: libraries nest and name them in many ways. A convolution that
    is called more often than once, or by another norm as well, keeps its norms.

    Args:
        module: in evaluation mode; it is changed.
        run: calls the module on some image, and returns its maps.

    Returns:
        The number of norms that are gone.

    Raises:
        OptimizationError: the maps have changed, as when a convolution's output has another use
            that is no module's.
    """
    with torch.no_grad():
        pairs, expected = pair_up(module, run)
        for convolution, norm in pairs.items():
            fold(convolution, norm)
        parents = {
            child: (parent, name)
            for parent in module.modules()
            for name, child in parent.named_children()
        }
        for norm in pairs.values():
            parent, name = parents[norm]
            setattr(parent, name, what_is_left(norm))
        found = run()
    for name, feature_map in expected.items():
        error = (found[name] - feature_map).abs().max() / feature_map.abs().max()
        # Not the other way round, as it may be NaN.
        if not error <= TOLERANCE:
            raise OptimizationError(
                f"with its batch norms folded into convolutions, {type(module).__name__} gives "
                f"another map {name} (by {error:.1g} of the largest value): this backbone cannot "
                "be optimized, use the detector as it is"
            )
    return len(pairs)


def pair_up(
    module: nn.Module, run: Callable[[], Mapping[str, Tensor]]
) -> tuple[dict[nn.Conv2d, Norm], Mapping[str, Tensor]]:
    """The norm of each convolution that has one of its own, and the maps of the run."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    calls: list[nn.Module] = []
    takers: list[tuple[nn.Conv2d, Norm]] = []

    def made(convolution: nn.Conv2d, _, output: Tensor) -> None:
        calls.append(convolution)
        # The tensor is kept, so that no other one gets its id.
        outputs[id(output)] = convolution, output

    def taken(norm: Norm, args: tuple[Tensor]) -> None:
        calls.append(norm)
        if id(args[0]) in outputs:
            takers.append((outputs[id(args[0])][0], norm))

    handles, pairs = [], {}
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            own = getattr(part, "norm", None)
            if isinstance(own, Norm):
                # Detectron2's, which calls its norm itself.
                pairs[part] = own
            else:
                handles.append(part.register_forward_hook(made))
        elif isinstance(part, Norm):
            handles.append(part.register_forward_pre_hook(taken))
    try:
        maps = run()
    finally:
        for handle in handles:
            handle.remove()
    convolutions = [convolution for convolution, _ in takers]
    for convolution, norm in takers:
        once = calls.count(convolution) == calls.count(norm) == 1
        if once and convolutions.count(convolution) == 1:
            pairs[convolution] = norm
    return {conv: norm for conv, norm in pairs.items() if norm.running_mean is not None}, maps


def fold(convolution: nn.Conv2d, norm: Norm) -> None:
    """Scales the filters and moves the bias, in float64 as rounding adds up over many layers."""
    dtype = convolution.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double()
    if convolution.bias is not None:
        bias = bias + convolution.bias.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = convolution.weight.double() * scale.view(-1, 1, 1, 1)
    convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def what_is_left(norm: Norm) -> nn.Module:
    """What stands in place of a norm that is folded."""
    if hasattr(norm, "act") and hasattr(norm, "drop"):
        # timm's BatchNormAct2d
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()
