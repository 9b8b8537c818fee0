"""Fold frozen batch norms into the convolutions before them."""

from collections.abc import Callable, Mapping

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from ..errors import OptimizationError

Norm = nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d | TorchvisionFrozenBatchNorm2d
# The largest error that rounding explains, relative to the largest value of a map.
TOLERANCE = 1e-3


def fold_norms(module: nn.Module, run: Callable[[], Mapping[str, Tensor]]) -> int:
    """Fold each batch norm into the convolution whose output it normalises.

    Libraries nest and name modules in many ways, so a run shows which belong together. A
    convolution that runs more than once, or whose output several norms use, keeps its norms.

    Args:
        module: in evaluation mode; it is changed.
        run: calls the module on some image, and returns its maps.

    Returns:
        The number of norms that were folded.

    Raises:
        OptimizationError: the maps have changed, for example because something other than a module
            also uses a convolution's output.
    """
    with torch.no_grad():
        pairs, expected = match_norms(module, run)
        for convolution, norm in pairs.items():
            fold(convolution, norm)
        parents = {
            child: (parent, name)
            for parent in module.modules()
            for name, child in parent.named_children()
        }
        for norm in pairs.values():
            parent, name = parents[norm]
            setattr(parent, name, without_norm(norm))
        found = run()
    for name, feature_map in expected.items():
        error = (found[name] - feature_map).abs().max() / feature_map.abs().max()
        # Not "error > TOLERANCE", as the error may be NaN.
        if not error <= TOLERANCE:
            raise OptimizationError(
                f"with its batch norms folded into convolutions, {type(module).__name__} gives "
                f"another map {name} (by {error:.1g} of the largest value): this backbone cannot "
                "be optimized, use the detector as it is"
            )
    return len(pairs)


def match_norms(
    module: nn.Module, run: Callable[[], Mapping[str, Tensor]]
) -> tuple[dict[nn.Conv2d, Norm], Mapping[str, Tensor]]:
    """Return the norm of each convolution that has one to itself, and the maps of the run."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    calls: list[nn.Module] = []
    uses: list[tuple[nn.Conv2d, Norm]] = []

    def after_convolution(convolution: nn.Conv2d, _, output: Tensor) -> None:
        calls.append(convolution)
        # The tensor is kept so that no other one gets its id.
        outputs[id(output)] = convolution, output

    def before_norm(norm: Norm, args: tuple[Tensor]) -> None:
        calls.append(norm)
        if id(args[0]) in outputs:
            uses.append((outputs[id(args[0])][0], norm))

    handles, pairs = [], {}
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            own = getattr(part, "norm", None)
            if isinstance(own, Norm):
                # A Detectron2 convolution, which calls its norm itself.
                pairs[part] = own
            else:
                handles.append(part.register_forward_hook(after_convolution))
        elif isinstance(part, Norm):
            handles.append(part.register_forward_pre_hook(before_norm))
    try:
        maps = run()
    finally:
        for handle in handles:
            handle.remove()
    convolutions = [convolution for convolution, _ in uses]
    for convolution, norm in uses:
        once = calls.count(convolution) == calls.count(norm) == 1
        if once and convolutions.count(convolution) == 1:
            pairs[convolution] = norm
    return {conv: norm for conv, norm in pairs.items() if norm.running_mean is not None}, maps


def fold(convolution: nn.Conv2d, norm: Norm) -> None:
    """Scale the filters and move the bias, in float64 as rounding adds up over many layers."""
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


def without_norm(norm: Norm) -> nn.Module:
    """Return what a norm does besides normalising, to take the place of a folded one."""
    if hasattr(norm, "act") and hasattr(norm, "drop"):
        # timm's BatchNormAct2d
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()
