import pytest
import torch

from lite_detr.ops import key_aware_ms_deform_attn, ms_deform_attn

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


def call_ms_deform_attn(arguments):
    names = "value spatial_shapes level_start_index sampling_locations attention_weights".split()
    return ms_deform_attn(*(arguments[name] for name in names))


def call_key_aware(arguments):
    names = "query key value spatial_shapes level_start_index sampling_locations".split()
    return key_aware_ms_deform_attn(*(arguments[name] for name in names))


BOTH = pytest.mark.parametrize("call", [call_ms_deform_attn, call_key_aware])


def expect_error(call, error, parts, **changes):
    with pytest.raises(error) as raised:
        call(VALID | changes)
    for part in parts:
        assert part in str(raised.value)


@BOTH
def test_valid_arguments_pass(call):
    assert call(VALID).shape == (2, 3, 8)


@BOTH
@pytest.mark.parametrize("shape", [(2, 8, 8), (8, 2, 4), (2, 8, 2, 2, 2)])
def test_value_shape(call, shape):
    expect_error(call, ValueError, ["value", "[B, S, M, D]", str(shape)], value=torch.zeros(shape))


@BOTH
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_value_dtype(call, dtype):
    parts = ["value", "float64", "float32", "float16", "bfloat16", str(dtype)]
    expect_error(call, TypeError, parts, value=VALID["value"].to(dtype))


@BOTH
@pytest.mark.parametrize("shape", [(4,), (2, 3), (1, 2, 2), (0, 2)])
def test_spatial_shapes_shape(call, shape):
    tensor = torch.ones(shape, dtype=torch.int64)
    parts = ["spatial_shapes", "[L, 2]", str(shape)]
    expect_error(call, ValueError, parts, spatial_shapes=tensor)


@BOTH
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_level_start_index_shape(call, shape):
    tensor = torch.zeros(shape, dtype=torch.int64)
    parts = ["level_start_index", "(2,)", str(shape)]
    expect_error(call, ValueError, parts, level_start_index=tensor)


@BOTH
@pytest.mark.parametrize("name", ["spatial_shapes", "level_start_index"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_integers_are_int64(call, name, dtype):
    expect_error(
        call, TypeError, [name, "torch.int64", str(dtype)], **{name: VALID[name].to(dtype)}
    )


@BOTH
@pytest.mark.parametrize("size", [[0, 2], [2, 0], [-1, 2], [-1, -2]])
def test_level_sizes_are_positive(call, size):
    parts = ["positive", str([(2, 3), tuple(size)])]
    expect_error(call, ValueError, parts, spatial_shapes=torch.tensor([[2, 3], size]))


@BOTH
@pytest.mark.parametrize("starts", [[0, 5], [1, 6], [0, 0], [6, 0]])
def test_level_start_index_fits_sizes(call, starts):
    parts = ["level_start_index", "[0, 6]", str(starts), "[(2, 3), (1, 2)]"]
    expect_error(call, ValueError, parts, level_start_index=torch.tensor(starts))


@BOTH
@pytest.mark.parametrize("tokens", [7, 9])
def test_levels_cover_all_tokens(call, tokens):
    value = torch.zeros(2, tokens, 2, 4)
    parts = ["[(2, 3), (1, 2)]", "8 tokens", f"S = {tokens}"]
    expect_error(call, ValueError, parts, value=value, key=value)


@BOTH
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 2, 10, 2), (1, 3, 2, 2, 5, 2), (2, 3, 1, 2, 5, 2), (2, 3, 2, 1, 5, 2), (2, 3, 2, 2, 5)]
    + [(2, 3, 2, 2, 5, 3)],
)
def test_locations_shape(call, shape):
    parts = ["sampling_locations", "[B, Q, M, L, P, 2]", "B = 2, M = 2, L = 2", str(shape)]
    expect_error(call, ValueError, parts, sampling_locations=torch.zeros(shape))


@BOTH
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


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("locations", ["same", "float32"])
def test_locations_take_the_values_dtype_or_float32(call, dtype, locations):
    arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in VALID.items()}
    if locations == "float32":
        arguments["sampling_locations"] = VALID["sampling_locations"]
    assert call(arguments).dtype == dtype


@pytest.mark.parametrize(
    "call, name, layout, wrong",
    [
        (call_ms_deform_attn, "attention_weights", "[B, Q, M, L, P]", (2, 3, 2, 10)),
        (call_ms_deform_attn, "attention_weights", "[B, Q, M, L, P]", (2, 3, 2, 2, 4)),
        (call_key_aware, "query", "[B, Q, M, D]", (2, 4, 2, 4)),
        (call_key_aware, "query", "[B, Q, M, D]", (2, 3, 8)),
        (call_key_aware, "key", "[B, S, M, D]", (2, 8, 2, 3)),
        (call_key_aware, "key", "[B, S, M, D]", (2, 7, 2, 4)),
    ],
)
def test_shapes_that_follow_from_the_others(call, name, layout, wrong):
    parts = [name, layout, str(tuple(VALID[name].shape)), str(wrong)]
    expect_error(call, ValueError, parts, **{name: torch.zeros(wrong)})


@pytest.mark.parametrize(
    "call, name",
    [
        (call_ms_deform_attn, "attention_weights"),
        (call_key_aware, "query"),
        (call_key_aware, "key"),
    ],
)
def test_dtypes_that_follow_from_the_values(call, name):
    parts = [name, "torch.float32", "torch.float16"]
    expect_error(call, TypeError, parts, **{name: VALID[name].half()})


@pytest.mark.parametrize(
    "call, name",
    [
        (call_ms_deform_attn, "attention_weights"),
        (call_ms_deform_attn, "sampling_locations"),
        (call_key_aware, "query"),
        (call_key_aware, "key"),
        (call_key_aware, "sampling_locations"),
    ],
)
def test_tensors_are_on_the_values_device(call, name):
    parts = [name, "device cpu", "meta"]
    expect_error(call, ValueError, parts, **{name: VALID[name].to("meta")})
