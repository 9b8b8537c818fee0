import re

import pytest
import torch
from sampling_problems import DEVICES, move, needs_native, operator

# Two levels, 2 x 3 and 1 x 2 cells, so 8 tokens; 2 images, 3 queries, 2 heads of 4 channels.
VALID = {
    "query": torch.zeros(2, 3, 2, 4),
    "key": torch.zeros(2, 8, 2, 4),
    "value": torch.zeros(2, 8, 2, 4),
    "spatial_shapes": torch.tensor([[2, 3], [1, 2]]),
    "level_start_index": torch.tensor([0, 6]),
    "sampling_locations": torch.zeros(2, 3, 2, 2, 5, 2),
    "attention_weights": torch.zeros(2, 3, 2, 2, 5),
}
NAMES = {
    "ms_deform_attn": "value spatial_shapes level_start_index sampling_locations attention_weights",
    "key_aware_ms_deform_attn": (
        "query key value spatial_shapes level_start_index sampling_locations"
    ),
}
# The names of dtypes in C++.
DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
}


@pytest.fixture
def call(attention, form):
    def call(**changes):
        arguments = VALID | changes
        names = NAMES[attention].split()
        return operator(attention, form)(*(arguments[name] for name in names))

    return call


def plain(message):
    """Return a message in the words of all forms: dtypes as in Python, no brackets or commas."""
    for cpp, dtype in DTYPES.items():
        message = re.sub(rf"\b{cpp}\b", str(dtype), message)
    return " ".join(re.sub(r"[\[\](),]", " ", message).split())


def expect_error(call, error, parts, **changes):
    with pytest.raises(error) as raised:
        call(**changes)
    for part in parts:
        assert plain(part) in plain(str(raised.value))


def test_valid_arguments_pass(call):
    assert call().shape == (2, 3, 8)


@pytest.mark.parametrize("shape", [(2, 8, 8), (8, 2, 4), (2, 8, 2, 2, 2), (2, 8, 2, 0)])
def test_value_shape(call, shape):
    expect_error(call, ValueError, ["value", "[B, S, M, D]", str(shape)], value=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_value_dtype(call, dtype):
    parts = ["value", "float64", "float32", "float16", "bfloat16", str(dtype)]
    expect_error(call, TypeError, parts, value=VALID["value"].to(dtype))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 2), (0, 2)])
def test_spatial_shapes_shape(call, shape):
    tensor = torch.ones(shape, dtype=torch.int64)
    parts = ["spatial_shapes", "[L, 2]", str(shape)]
    expect_error(call, ValueError, parts, spatial_shapes=tensor)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_level_start_index_shape(call, shape):
    tensor = torch.zeros(shape, dtype=torch.int64)
    parts = ["level_start_index", "(2,)", str(shape)]
    expect_error(call, ValueError, parts, level_start_index=tensor)


@pytest.mark.parametrize("name", ["spatial_shapes", "level_start_index"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_integers_are_int64(call, name, dtype):
    expect_error(
        call, TypeError, [name, "torch.int64", str(dtype)], **{name: VALID[name].to(dtype)}
    )


@pytest.mark.parametrize("size", [[0, 2], [2, 0], [-1, 2], [-1, -2]])
def test_level_sizes_are_positive(call, form, size):
    given = f"{size[0]} x {size[1]} for level 1"
    if form == "pytorch":
        given = str([(2, 3), tuple(size)])
    shapes = torch.tensor([[2, 3], size])
    expect_error(call, ValueError, ["positive", given], spatial_shapes=shapes)


@pytest.mark.parametrize("starts, level", [([0, 5], 1), ([1, 6], 0), ([0, 0], 1), ([6, 0], 0)])
def test_level_start_index_fits_sizes(call, form, starts, level):
    parts = [f"level_start_index[{level}] must be {[0, 6][level]}", f"got {starts[level]}"]
    if form == "pytorch":
        parts = ["level_start_index", "[0, 6]", str(starts), "[(2, 3), (1, 2)]"]
    expect_error(call, ValueError, parts, level_start_index=torch.tensor(starts))


@pytest.mark.parametrize("tokens", [7, 9])
def test_levels_cover_all_tokens(call, form, tokens):
    value = torch.zeros(2, tokens, 2, 4)
    parts = [f"S = {tokens}", "8 tokens" if tokens == 9 or form == "pytorch" else "level 1"]
    expect_error(call, ValueError, parts, value=value, key=value)


@pytest.mark.parametrize(
    "size",
    [(2**31, 2**33), (2**33, 2**31), (2**62, 4), (2**63 - 1, 2), (3, 2**63 - 1), (2**32, 1)]
    + [(239075442, 77158673929), (77158673929, 239075442), (6, 715827883), (2, 2**31 + 1)],
)
def test_sizes_whose_product_overflows(call, size):
    """The last ones have 2**64 + 2 and 2**32 + 2 cells; overflow would leave 2, which fit."""
    sizes = torch.tensor([[2, 3], size])
    expect_error(call, ValueError, ["S = 8"], spatial_shapes=sizes)


def test_points_on_each_level(call):
    nothing = torch.zeros(2, 3, 2, 2, 0, 2)
    parts = ["sampling_locations", "at least one point", "(2, 3, 2, 2, 0, 2)"]
    changes = {"sampling_locations": nothing, "attention_weights": nothing[..., 0]}
    expect_error(call, ValueError, parts, **changes)


@pytest.mark.parametrize(
    "shape",
    [(2, 3, 2, 10, 2), (1, 3, 2, 2, 5, 2), (2, 3, 1, 2, 5, 2), (2, 3, 2, 1, 5, 2), (2, 3, 2, 2, 5)]
    + [(2, 3, 2, 2, 5, 3)],
)
def test_locations_shape(call, shape):
    parts = ["sampling_locations", "[B, Q, M, L, P, 2]", "B = 2, M = 2, L = 2", str(shape)]
    expect_error(call, ValueError, parts, sampling_locations=torch.zeros(shape))


@pytest.mark.parametrize(
    "value_dtype, locations_dtype",
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.int64),
    ],
)
def test_locations_dtype(call, value_dtype, locations_dtype):
    changes = {
        name: VALID[name].to(value_dtype) for name in ("query", "key", "value", "attention_weights")
    }
    changes["sampling_locations"] = VALID["sampling_locations"].to(locations_dtype)
    parts = ["sampling_locations", str(value_dtype), "torch.float32", str(locations_dtype)]
    expect_error(call, TypeError, parts, **changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("locations", ["same", "float32"])
def test_locations_take_the_values_dtype_or_float32(call, dtype, locations):
    arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in VALID.items()}
    if locations == "float32":
        arguments["sampling_locations"] = VALID["sampling_locations"]
    assert call(**arguments).dtype == dtype


OWN = [
    ("ms_deform_attn", "attention_weights"),
    ("key_aware_ms_deform_attn", "query"),
    ("key_aware_ms_deform_attn", "key"),
]


@pytest.mark.parametrize(
    "attention, name, layout, wrong",
    [
        (*OWN[0], "[B, Q, M, L, P]", (2, 3, 2, 10)),
        (*OWN[0], "[B, Q, M, L, P]", (2, 3, 2, 2, 4)),
        (*OWN[1], "[B, Q, M, D]", (2, 4, 2, 4)),
        (*OWN[1], "[B, Q, M, D]", (2, 3, 8)),
        (*OWN[2], "[B, S, M, D]", (2, 8, 2, 3)),
        (*OWN[2], "[B, S, M, D]", (2, 7, 2, 4)),
    ],
)
def test_shapes_that_follow_from_the_others(call, name, layout, wrong):
    parts = [name, layout, str(tuple(VALID[name].shape)), str(wrong)]
    expect_error(call, ValueError, parts, **{name: torch.zeros(wrong)})


@pytest.mark.parametrize("attention, name", OWN)
def test_dtypes_that_follow_from_the_values(call, name):
    parts = [name, "torch.float32", "torch.float16"]
    expect_error(call, TypeError, parts, **{name: VALID[name].half()})


BESIDE_VALUES = ("spatial_shapes", "level_start_index", "sampling_locations")


@pytest.mark.parametrize(
    "attention, name", OWN + [(attention, name) for attention in NAMES for name in BESIDE_VALUES]
)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_tensors_are_on_the_values_device(call, form, name, needs_grad):
    """If any tensor is on the meta device, PyTorch calls the functions that tell tracers shapes."""
    if form == "harness":
        pytest.skip("the harness has no operators for tensors of other devices")
    parts = [name, f"device {DEVICES[form]}", "meta"]
    value = VALID["value"].clone().requires_grad_(needs_grad)
    expect_error(call, ValueError, parts, value=value, **{name: VALID[name].to("meta")})


@pytest.mark.parametrize("form", ["pytorch", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("name", ["spatial_shapes", "level_start_index"])
def test_levels_without_numbers_are_refused(call, name):
    on_meta = {name: tensor.to("meta") for name, tensor in VALID.items()}
    on_meta |= {other: VALID[other] for other in BESIDE_VALUES[:2] if other != name}
    expect_error(call, ValueError, ["must hold numbers", "meta"], **on_meta)


@needs_native
@pytest.mark.parametrize(
    "change, error",
    [
        ({"spatial_shapes": torch.ones(2, 2, dtype=torch.int32)}, TypeError),
        ({"level_start_index": torch.ones(2)}, TypeError),
        ({"level_start_index": torch.tensor([0])}, ValueError),
        ({"spatial_shapes": torch.ones(1, 3, dtype=torch.int64)}, ValueError),
        ({"sampling_locations": torch.zeros(2, 3, 2, 2, 0, 2)}, ValueError),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
def test_tracers_check_all_but_the_numbers(attention, change, error):
    arguments = {name: tensor.to("meta") for name, tensor in (VALID | change).items()}
    function = getattr(torch.ops.lite_detr, attention)
    with pytest.raises(error):
        function(*(arguments[name] for name in NAMES[attention].split()))


@pytest.mark.parametrize("wrong", [(2, 3, 7), (2, 2, 8)])
def test_backward_checks_the_gradient(attention, native_form, wrong):
    arguments = backward_arguments(attention, native_form, grad_output=torch.zeros(wrong))
    with pytest.raises(ValueError, match=r"grad_output must be \[B, Q, M \* D\]"):
        getattr(torch.ops.lite_detr, f"{attention}_backward")(*arguments.values())


@pytest.mark.parametrize(
    "name, wrong, error",
    [
        ("output", torch.zeros(2, 3, 9), ValueError),
        ("output", torch.zeros(2, 3, 8).double(), TypeError),
        ("logsumexp", torch.zeros(2, 3, 1), ValueError),
        ("logsumexp", torch.zeros(2, 3, 2).double(), TypeError),
    ],
)
def test_backward_checks_what_the_forward_saved(native_form, name, wrong, error):
    attention = "key_aware_ms_deform_attn"
    arguments = backward_arguments(attention, native_form, **{name: wrong})
    with pytest.raises(error, match=f"{name} must"):
        torch.ops.lite_detr.key_aware_ms_deform_attn_backward(*arguments.values())


SAVED = {
    "ms_deform_attn": {},
    "key_aware_ms_deform_attn": {"output": (2, 3, 8), "logsumexp": (2, 3, 2)},
}


@pytest.mark.parametrize(
    "attention, name",
    [
        (attention, name)
        for attention, names in NAMES.items()
        for name in ("grad_output", *names.split(), *SAVED[attention])
    ],
)
def test_backward_checks_devices(attention, native_form, name):
    arguments = backward_arguments(attention, native_form)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match="must be on .*device"):
        getattr(torch.ops.lite_detr, f"{attention}_backward")(*arguments.values())


def backward_arguments(attention, form, **changes):
    arguments = {"grad_output": torch.zeros(2, 3, 8)}
    arguments |= {name: VALID[name] for name in NAMES[attention].split()}
    arguments |= {name: torch.zeros(shape) for name, shape in SAVED[attention].items()} | changes
    return {
        name: tensor if tensor.dtype == torch.int64 else move(tensor, DEVICES[form])
        for name, tensor in arguments.items()
    }
