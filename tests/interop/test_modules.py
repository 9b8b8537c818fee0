"""The modules and functions of other projects, against those that transformers has of them."""

import pytest
import torch

from lite_detr import interop
from lite_detr.errors import LevelsError

SHAPES = [(4, 6), (2, 3)]
STARTS = [0, 24]
TOKENS, QUERIES, CHANNELS, HEADS, POINTS = 30, 5, 16, 2, 3


def perturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.fixture
def problem():
    """A query, reference points and boxes, tokens, and a mask that pads the second image."""
    torch.manual_seed(0)
    mask = torch.zeros(2, TOKENS, dtype=torch.bool)
    mask[1, -4:] = True
    return {
        "query": torch.randn(2, QUERIES, CHANNELS),
        "points": torch.rand(2, QUERIES, 2, 2),
        "boxes": torch.rand(2, QUERIES, 2, 4),
        "tokens": torch.randn(2, TOKENS, CHANNELS),
        "mask": mask,
    }


@pytest.fixture
def theirs():
    """A module with the names and the formula of Deformable-DETR's ``MSDeformAttn``."""
    pytest.importorskip("transformers", reason="needs the transformers library")
    from transformers.models.mask2former import modeling_mask2former

    kind = modeling_mask2former.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention
    torch.manual_seed(1)
    return perturbed(kind(CHANNELS, HEADS, n_levels=2, n_points=POINTS))


def expected(theirs, problem, reference):
    return theirs(
        problem["query"],
        attention_mask=problem["mask"],
        encoder_hidden_states=problem["tokens"],
        reference_points=problem[reference],
        spatial_shapes_list=SHAPES,
    )[0]


@pytest.mark.parametrize("reference", ["points", "boxes"])
@pytest.mark.parametrize("kind", ["int64", "int32", "list"])
def test_the_references_attention_computes_the_same(kind, reference, theirs, problem):
    ours = interop.MSDeformAttn(d_model=CHANNELS, n_levels=2, n_heads=HEADS, n_points=POINTS)
    ours.load_state_dict(theirs.state_dict())
    # Optimizers number the states of parameters in their order.
    assert list(ours.state_dict()) == list(theirs.state_dict())
    shapes = SHAPES if kind == "list" else torch.tensor(SHAPES, dtype=getattr(torch, kind))
    starts = STARTS if kind == "list" else torch.tensor(STARTS, dtype=getattr(torch, kind))
    arguments = (problem["query"], problem[reference], problem["tokens"], shapes, starts)
    output = ours(*arguments, problem["mask"])
    torch.testing.assert_close(output, expected(theirs, problem, reference), rtol=0, atol=1e-5)
    ours._reset_parameters()
    assert not ours.attention_weights.weight.any()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    ("kind", "width", "options"),
    [
        (interop.DetrexDeformableAttention, "embed_dim", {"img2col_step": 32}),
        (interop.MMCVDeformableAttention, "embed_dims", {"im2col_step": 32, "norm_cfg": None}),
    ],
)
def test_detrex_and_mmcv_add_position_and_residual(
    kind, width, options, batch_first, theirs, problem
):
    ours = kind(
        **{width: CHANNELS},
        num_heads=HEADS,
        num_levels=2,
        num_points=POINTS,
        batch_first=batch_first,
        **options,
    ).eval()
    ours.load_state_dict(theirs.state_dict())

    def arrange(tensor):
        return tensor if batch_first else tensor.transpose(0, 1)

    position = torch.randn_like(problem["query"])
    output = ours(
        arrange(problem["query"] - position),
        value=arrange(problem["tokens"]),
        query_pos=arrange(position),
        key_padding_mask=problem["mask"],
        reference_points=problem["boxes"],
        spatial_shapes=torch.tensor(SHAPES),
        level_start_index=torch.tensor(STARTS),
    )
    added = expected(theirs, problem, "boxes") + problem["query"] - position
    torch.testing.assert_close(arrange(output), added, rtol=0, atol=1e-5)


def test_mmcvs_values_may_be_narrower():
    module = interop.MMCVDeformableAttention(CHANNELS, HEADS, value_proj_ratio=0.5)
    assert module.value_proj.out_features == module.output_proj.in_features == CHANNELS // 2
    assert not module.output_proj.bias.any()


def sampling_problem(dtype=torch.float32):
    torch.manual_seed(2)
    value = torch.randn(1, TOKENS, HEADS, 4, dtype=dtype)
    locations = torch.rand(1, QUERIES, HEADS, 2, POINTS, 2, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(1, QUERIES, HEADS, 2, POINTS, dtype=dtype)
    return value, locations, weights


@pytest.mark.parametrize(
    ("value_dtype", "other_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float32),
    ],
)
def test_mixed_dtypes_give_the_values(value_dtype, other_dtype):
    value, locations, weights = sampling_problem()
    exact = interop.ms_deform_attn_core_pytorch(value, SHAPES, locations, weights)
    output = interop.MSDeformAttnFunction.apply(
        value.to(value_dtype),
        torch.tensor(SHAPES, dtype=torch.int32),
        torch.tensor(STARTS, dtype=torch.int32),
        locations.to(other_dtype),
        weights.to(other_dtype),
        64,
    )
    assert output.dtype == value_dtype
    torch.testing.assert_close(output.float(), exact, rtol=0.02, atol=0.02)


def test_the_extensions_backward_is_the_gradient():
    problem = sampling_problem(torch.float64)
    value, locations, weights = (tensor.requires_grad_() for tensor in problem)
    shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)
    extension = interop.extension
    output = extension.ms_deform_attn_forward(value, shapes, starts, locations, weights, 64)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    arguments = (value, shapes, starts, locations, weights, gradient, 64)
    with torch.no_grad():
        found = extension.ms_deform_attn_backward(*arguments)
    for tensor, grad in zip((value, locations, weights), found, strict=True):
        torch.testing.assert_close(grad, tensor.grad)


def test_levels_may_have_different_numbers_of_points():
    value, locations, weights = sampling_problem()
    counts = [3, 1]
    flat = torch.cat([locations[:, :, :, 0], locations[:, :, :, 1, :1]], dim=3)
    flat_weights = torch.cat([weights[:, :, :, 0], weights[:, :, :, 1, :1]], dim=3)
    weights[:, :, :, 1, 1:] = 0
    plain = interop.ms_deform_attn_core_pytorch(value, SHAPES, locations, weights)
    output = interop.multi_scale_deformable_attention_v2(value, SHAPES, flat, flat_weights, counts)
    torch.testing.assert_close(output, plain)
    with pytest.raises(ValueError, match="'discrete'"):
        interop.multi_scale_deformable_attention_v2(
            value, SHAPES, flat, flat_weights, counts, "discrete"
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shapes": [(4, 6)]}, "built for 2 levels, got 1: 4x6"),
        ({"shapes": [(4, 6), (2, 2)]}, r"28 tokens, so the tokens must be \[B, 28, C\]"),
        ({"shapes": torch.tensor([24, 6])}, r"must be \[L, 2\].*got shape \(2,\)"),
        ({"mask": torch.zeros(2, 8, dtype=torch.bool)}, r"padding mask must be .* \(2, 30\)"),
        ({"points": torch.rand(2, QUERIES, 1, 2)}, r"reference_points must be \[B, Q, 2, 2 or 4\]"),
    ],
)
def test_levels_that_do_not_fit_are_named(change, words, problem):
    module = interop.KeyAwareDeformableAttention(CHANNELS, HEADS, num_levels=2)
    given = {"shapes": SHAPES} | problem | change
    with pytest.raises(LevelsError, match=words):
        module(
            given["query"], given["points"], given["tokens"], given["shapes"], None, given["mask"]
        )
