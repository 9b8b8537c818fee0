"""Put our sampling into a model of another project, in place and reversibly."""

import inspect
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnknownPartError
from ..ops import backend
from . import sampling

# The names by which projects call a function that samples, and ours of the same signature.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "deformable_attention_core_func": sampling.ms_deform_attn_core_pytorch,
    "deformable_attention_core_func_v2": sampling.multi_scale_deformable_attention_v2,
    "ms_deform_attn_core_pytorch": sampling.ms_deform_attn_core_pytorch,
    "multi_scale_deformable_attention": sampling.ms_deform_attn_core_pytorch,
    "multi_scale_deformable_attention_v2": sampling.multi_scale_deformable_attention_v2,
    "multi_scale_deformable_attn_pytorch": sampling.ms_deform_attn_core_pytorch,
}
# Autograd functions around compiled extensions, all with the same arguments of `apply`.
AUTOGRAD_FUNCTIONS = (
    "MSDeformAttnFunction",
    "MultiScaleDeformableAttentionFunction",
    "MultiScaleDeformableAttnFunction",
    "MultiScaleDeformableAttnFunction_fp16",
    "MultiScaleDeformableAttnFunction_fp32",
)
# The arguments of the module that only samples, in transformers.
SAMPLER_ARGUMENTS = (
    "value value_spatial_shapes value_spatial_shapes_list level_start_index sampling_locations "
    "attention_weights im2col_step"
).split()
# The largest difference of float32 outputs, of about 1, that counts as the same function.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Replacement:
    """A module that samples by our operators.

    Attributes:
        name: of the module in the model.
        kind: the name of its class.
        replaced: the functions that it called, by module and name.
        difference: the largest difference between their outputs and ours in a trial, float32 of
            about 1; None if a compiled extension is missing here, so that it could not be tried.
    """

    name: str
    kind: str
    replaced: tuple[str, ...]
    difference: float | None


class NativeAttention:
    """What :func:`use_native_attention` has replaced; as a context manager, until its end.

    Attributes:
        replacements: one for each module.
        skipped: modules that sample in a way that was not replaced, with the reason.
        operators: ``native``, or ``pytorch`` where the package was built without its operators.
    """

    def __init__(self, operators: str):
        self.operators = operators
        self.replacements: list[Replacement] = []
        self.skipped: dict[str, str] = {}
        self._undo: list[tuple[nn.Module, str, Any]] = []

    def replace(self, module: nn.Module, attribute: str, value: Any) -> None:
        """Set an attribute of a module, and remember what it was."""
        self._undo.append((module, attribute, vars(module).get(attribute)))
        setattr(module, attribute, value)

    def restore(self) -> None:
        """Make the model what it was; a second call does nothing."""
        while self._undo:
            module, attribute, before = self._undo.pop()
            if before is None:
                delattr(module, attribute)
            else:
                setattr(module, attribute, before)

    def __enter__(self) -> "NativeAttention":
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [
            f"{len(self.replacements)} modules sample by lite_detr's {self.operators} operators"
        ]
        groups = Counter((r.kind, r.replaced) for r in self.replacements)
        for (kind, replaced), count in groups.items():
            of_kind = [r for r in self.replacements if (r.kind, r.replaced) == (kind, replaced)]
            tried = [r.difference for r in of_kind if r.difference is not None]
            trial = f"largest difference in a trial {max(tried):.1e}" if tried else "not tried"
            lines.append(f"  {count} x {kind} instead of {', '.join(replaced)}: {trial}")
        lines += [f"  not {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def use_native_attention(model: nn.Module) -> NativeAttention:
    """Let the deformable attentions of a model sample by our operators, in place.

    It finds them by what their code calls, in Deformable-DETR, DINO, Mask2Former, Mask DINO,
    Grounding DINO, detrex, MMCV, BEVFormer and transformers, and in what is derived from these.
    Each function is tried beside ours first, and stays where results differ. Parameters, hooks and
    the state dict are untouched, and other models in the program also.

    Args:
        model: any module; ``transformers`` models among them.

    Returns:
        The report, to be printed. Its ``restore()`` undoes everything, and ``with`` undoes it at
        the end of the block.

    Raises:
        UnknownPartError: nothing in the model was replaced.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    report = NativeAttention(backend(device))
    trials = Trials()
    for name, module in model.named_modules():
        name = name or type(module).__name__
        try:
            changes = dict(find_changes(module, trials))
        except NotReplaced as reason:
            report.skipped[name] = str(reason)
            continue
        if not changes:
            continue
        for attribute, (value, _) in changes.items():
            report.replace(module, attribute, value)
        replaced = [function for _, found in changes.values() for function in found]
        differences = [d for d in map(trials.difference, replaced) if d is not None]
        report.replacements.append(
            Replacement(
                name,
                type(module).__name__,
                tuple(dict.fromkeys(f"{f.__module__}.{f.__qualname__}" for f in replaced)),
                max(differences, default=None),
            )
        )
    if not report.replacements:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped.items())
        raise UnknownPartError(
            f"no attention of {type(model).__name__} was replaced, "
            + (
                reasons
                or "as none of its modules calls a known function; known are "
                f"{', '.join([*FUNCTIONS, *AUTOGRAD_FUNCTIONS])}"
            )
        )
    return report


class NotReplaced(Exception):
    """The reason why a module keeps its sampling."""


def find_changes(
    module: nn.Module, trials: "Trials"
) -> Iterator[tuple[str, tuple[Any, list[Callable]]]]:
    """Yield the attributes to set in a module, with their values and the functions they replace.

    Raises:
        NotReplaced: the module samples, but in another way than ours.
    """
    if is_sampler(module):
        check_unchanged(module, "forward")
        trials.check(type(module))
        yield "forward", (native_sampler, [type(module)])
        return
    for attribute, value in vars(module).items():
        if (ours := our_function(value)) is not None:
            check_method(module)
            trials.check(value)
            yield attribute, (ours, [value])
    for attribute, function in methods(type(module)).items():
        found: list[Callable] = []
        rebuilt = rebuild(function, found)
        if found:
            check_method(module)
            check_unchanged(module, attribute)
            for sampler in found:
                trials.check(sampler)
            yield attribute, (types.MethodType(rebuilt, module), found)


def check_unchanged(module: nn.Module, attribute: str) -> None:
    if attribute in vars(module):
        raise NotReplaced(f"its {attribute} has been replaced already")


def check_method(module: nn.Module) -> None:
    # RT-DETRv2 and D-FINE call the same function for both of their methods.
    for name in ("method", "decoder_method"):
        if getattr(module, name, "default") == "discrete":
            raise NotReplaced("it samples the nearest cell, which is not deformable attention's")


def is_sampler(module: nn.Module) -> bool:
    """Return whether a module only samples, as transformers' modules have one inside."""
    if type(module).__name__ != "MultiScaleDeformableAttention":
        return False
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    return arguments == SAMPLER_ARGUMENTS and not any(True for _ in module.parameters())


def native_sampler(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """The ``forward`` of a module that only samples, on our operators."""
    return sampling.ms_deform_attn_core_pytorch(
        value, value_spatial_shapes_list, sampling_locations, attention_weights
    )


def our_function(value: Any) -> Any:
    """Return what takes the place of a function or an autograd function; None for others."""
    if isinstance(value, type):
        is_known = issubclass(value, torch.autograd.Function) and (
            value.__name__ in AUTOGRAD_FUNCTIONS
        )
        return sampling.MSDeformAttnFunction if is_known else None
    if isinstance(value, types.FunctionType) and value.__module__ != sampling.__name__:
        return FUNCTIONS.get(value.__name__)
    return None


def methods(kind: type) -> dict[str, types.FunctionType]:
    """Return the methods of a class that it does not have from PyTorch, by name."""
    found: dict[str, types.FunctionType] = {}
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins"):
            for name, value in vars(base).items():
                if isinstance(value, types.FunctionType):
                    found.setdefault(name, value)
    return found


def rebuild(function: types.FunctionType, found: list[Callable]) -> types.FunctionType:
    """Return a function that calls ours where it calls known ones; itself if it calls none.

    Its code stays, with other globals. So nothing changes for other users of its module. Functions
    that decorators have wrapped are in closures.

    Args:
        function: a method of a module.
        found: gets the functions that are replaced.
    """
    names = set(names_in(function.__code__))
    ours = {}
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if (replacement := our_function(value)) is not None:
            ours[name] = replacement
            found.append(value)
    cells = []
    for cell in function.__closure__ or ():
        content = cell_content(cell)
        if isinstance(content, types.FunctionType) and content is not function:
            inner = rebuild(content, found)
            cells.append(cell if inner is content else types.CellType(inner))
        else:
            cells.append(cell)
    if not ours and tuple(cells) == (function.__closure__ or ()):
        return function
    rebuilt = types.FunctionType(
        function.__code__,
        {**function.__globals__, **ours},
        function.__name__,
        function.__defaults__,
        tuple(cells) or None,
    )
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    # Signatures are read from it, through decorators as well.
    rebuilt.__dict__.update(function.__dict__)
    rebuilt.__doc__, rebuilt.__qualname__ = function.__doc__, function.__qualname__
    return rebuilt


def cell_content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that a code and those nested in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


class Trials:
    """Runs functions of other projects and ours on the same small problem, each once."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shapes = [(5, 7), (3, 4)]
        tokens, points = sum(h * w for h, w in self.shapes), 3
        self.value = torch.rand(2, tokens, 2, 4, generator=generator)
        # Some beside the maps, where projects could differ.
        self.locations = torch.rand(2, 6, 2, 2, points, 2, generator=generator) * 1.6 - 0.3
        self.weights = torch.rand(2, 6, 2, 2, points, generator=generator)
        self.points = [points] * len(self.shapes)
        self._results: dict[Callable, float | str | None] = {}

    def check(self, function: Callable) -> None:
        """Raise :class:`NotReplaced` if a function computes something else than ours."""
        if function not in self._results:
            self._results[function] = self._try(function)
        result = self._results[function]
        if isinstance(result, str):
            raise NotReplaced(result)

    def difference(self, function: Callable) -> float | None:
        """Return the largest difference that :meth:`check` has found; None if it could not run."""
        result = self._results[function]
        return None if isinstance(result, str) else result

    @torch.no_grad()
    def _try(self, function: Callable) -> float | str | None:
        expected = sampling.ms_deform_attn_core_pytorch(
            self.value, self.shapes, self.locations, self.weights
        )
        shapes = torch.tensor(self.shapes)
        starts = torch.tensor([0, self.shapes[0][0] * self.shapes[0][1]])
        rest = (self.locations, self.weights)
        try:
            if isinstance(function, type) and issubclass(function, nn.Module):
                output = function()(self.value, shapes, self.shapes, starts, *rest, 64)
            elif isinstance(function, type):
                output = function.apply(self.value, shapes, starts, *rest, 64)
            elif FUNCTIONS[function.__name__] is sampling.multi_scale_deformable_attention_v2:
                flat = (self.locations.flatten(3, 4), self.weights.flatten(3, 4))
                output = function(self.value, self.shapes, *flat, self.points)
            else:
                output = function(self.value, shapes, *rest)
        # Whatever another project's code raises, on a CPU or for want of its extension.
        except Exception as error:
            if isinstance(function, type):
                return None
            return f"{function.__name__} cannot be compared with ours: {error}"
        if output.shape != expected.shape:
            return (
                f"{function.__name__} returns {tuple(output.shape)}, ours {tuple(expected.shape)}"
            )
        difference = (output - expected).abs().max().item()
        if difference > TOLERANCE:
            return f"{function.__name__} differs from ours by up to {difference:.1e}"
        return difference
