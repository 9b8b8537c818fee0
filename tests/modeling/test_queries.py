import dataclasses
import math

import pytest
import torch

from lite_detr.modeling import LearnedQueries, TwoStageQueries
from lite_detr.modeling.queries import anchor_logits

CHANNELS = 16
SHAPES = ((6, 8), (3, 4))
PADDED = (SHAPES, ((4, 5), (2, 3)))


def logit(p):
    return math.log(p / (1 - p))


def test_anchors_by_hand(make_scales):
    """Squares around the centres, whose sides double with each scale."""
    anchors, usable = anchor_logits(make_scales(((2, 2), (1, 2), (1, 1))))
    boxes = [(x, y, 0.05) for y in (0.25, 0.75) for x in (0.25, 0.75)]
    boxes += [(0.25, 0.5, 0.1), (0.75, 0.5, 0.1), (0.5, 0.5, 0.2)]
    expected = [[logit(x), logit(y), logit(side), logit(side)] for x, y, side in boxes]
    torch.testing.assert_close(anchors, torch.tensor([expected], dtype=torch.float64))
    assert usable.shape == (1, 7, 1)
    assert usable.all()


def test_anchors_base_size(make_scales):
    anchors, _ = anchor_logits(make_scales(((1, 1), (1, 1))), base_size=0.3)
    expected = torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.5, 0.5, 0.6, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(anchors.sigmoid()[0], expected)


@pytest.mark.parametrize("columns, usable_ends", [(49, True), (51, False)])
@pytest.mark.parametrize("transpose", [False, True])
def test_anchors_keep_off_the_border(make_scales, columns, usable_ends, transpose):
    """The outermost centres are half a cell from the border: 1 % of the image at 50 cells."""
    shape = (columns, 1) if transpose else (1, columns)
    anchors, usable = anchor_logits(make_scales((shape,)))
    expected = torch.ones(columns, dtype=torch.bool)
    expected[[0, -1]] = usable_ends
    assert torch.equal(usable[0, :, 0], expected)
    assert torch.equal(anchors.isfinite().all(-1)[0], expected)
    assert (anchors[0, ~expected] == math.inf).all()


@pytest.mark.parametrize("rounding", [0.0, 1.2e-7, -1.2e-7])
def test_centres_on_the_limit_have_no_anchor_whichever_way_they_are_rounded(make_scales, rounding):
    """A runtime may divide by multiplying with a rounded reciprocal: 49.5 / 50 < 0.99 then."""
    for rows in range(1, 400):
        scales = make_scales(((rows, 1),), dtype=torch.float32)
        scales = dataclasses.replace(scales, centers=scales.centers * (1 + rounding))
        _, usable = anchor_logits(scales)
        # 0.01 < (row + 1/2) / rows < 0.99, in whole numbers.
        expected = [rows < 100 * row + 50 < 99 * rows for row in range(rows)]
        assert usable[0, :, 0].tolist() == expected, rows


def test_anchors_are_not_on_padding(make_scales):
    scales = make_scales(SHAPES, PADDED)
    anchors, usable = anchor_logits(scales)
    assert torch.equal(usable[..., 0], ~scales.padding_mask)
    assert (anchors[1, scales.padding_mask[1]] == math.inf).all()
    assert anchors[1, ~scales.padding_mask[1]].isfinite().all()
    # The first cell of 4 rows and 5 columns, in the image's own frame.
    expected = torch.tensor([0.1, 0.125, 0.05, 0.05], dtype=torch.float64)
    torch.testing.assert_close(anchors[1, 0].sigmoid(), expected, rtol=0, atol=1e-6)


def proposals_of(two_stage, memory, anchors):
    """Logits and boxes of one image, token by token."""
    logits, boxes = [], []
    for token, anchor in zip(memory, anchors):
        usable = bool(anchor.isfinite().all())
        features = two_stage.enc_output(token if usable else torch.zeros_like(token))
        features = two_stage.enc_output_norm(features)
        logits.append(two_stage.class_embed(features))
        box = (two_stage.bbox_embed(features) + anchor).sigmoid()
        boxes.append(box if usable else torch.ones_like(box))
    return torch.stack(logits), torch.stack(boxes)


@pytest.fixture
def two_stage(perturb):
    return perturb(TwoStageQueries(CHANNELS, num_classes=3, num_queries=6).double())


@pytest.fixture
def encoded(make_scales):
    scales = make_scales(SHAPES, PADDED)
    return torch.randn(2, 60, CHANNELS, dtype=torch.float64), scales


def test_proposals_by_loop(two_stage, encoded):
    memory, scales = encoded
    _, proposals = two_stage(memory, scales)
    anchors, _ = anchor_logits(scales)
    for image in range(2):
        logits, boxes = proposals_of(two_stage, memory[image], anchors[image])
        torch.testing.assert_close(proposals.logits[image], logits)
        torch.testing.assert_close(proposals.boxes[image], boxes)


def test_proposals_start_at_their_anchors(encoded):
    memory, scales = encoded
    _, proposals = TwoStageQueries(CHANNELS, 3, 6).double()(memory, scales)
    torch.testing.assert_close(proposals.boxes, anchor_logits(scales)[0].sigmoid())


def test_references_are_the_best_proposals_of_the_first_class_channel(two_stage, make_scales):
    memory = torch.randn(2, 60, CHANNELS, dtype=torch.float64)
    queries, proposals = two_stage(memory, make_scales(SHAPES, batch=2))
    rankings = []
    for image in range(2):
        for channel in range(3):
            scores = proposals.logits[image, :, channel].tolist()
            rankings.append(sorted(range(60), key=lambda token: -scores[token])[:6])
        best = rankings[3 * image]
        torch.testing.assert_close(queries.reference[image], proposals.boxes[image, best])
    assert len({tuple(ranking) for ranking in rankings}) == 6


def test_only_the_chosen_proposals_get_boxes_in_inference(two_stage, encoded):
    queries, proposals = two_stage(*encoded)
    with_boxes = []
    two_stage.bbox_embed.register_forward_pre_hook(
        lambda _, inputs: with_boxes.append(inputs[0].shape)
    )
    inference, chosen = two_stage.eval()(*encoded)
    assert with_boxes == [(2, 6, CHANNELS)]
    torch.testing.assert_close(inference.reference, queries.reference)
    torch.testing.assert_close(chosen.boxes, queries.reference)
    best = proposals.logits[..., 0].topk(6).indices
    for image in range(2):
        torch.testing.assert_close(chosen.logits[image], proposals.logits[image, best[image]])


def test_tokens_without_an_anchor_propose_a_corner_from_zero_features(two_stage, encoded):
    """As in the references they are ranked with the others, so their logits are part of parity."""
    memory, scales = encoded
    features = two_stage.enc_output_norm(two_stage.enc_output(torch.zeros(CHANNELS).double()))
    _, proposals = two_stage(memory, scales)
    padding = scales.padding_mask[1]
    assert padding.any()
    expected = two_stage.class_embed(features).expand(int(padding.sum()), -1)
    torch.testing.assert_close(proposals.logits[1][padding], expected)
    assert (proposals.boxes[1][padding] == 1).all()


def test_content_and_position_encode_the_references(two_stage, encoded):
    queries, _ = two_stage(*encoded)
    for image in range(2):
        for index in range(6):
            encoding = []
            for coordinate in queries.reference[image, index].tolist():
                for channel in range(CHANNELS // 2):
                    wavelength = 10000 ** (2 * (channel // 2) / (CHANNELS // 2))
                    wave = math.cos if channel % 2 else math.sin
                    encoding.append(wave(coordinate * 2 * math.pi / wavelength))
            encoding = torch.tensor(encoding, dtype=torch.float64)
            both = two_stage.encode_box.norm(two_stage.encode_box.linear(encoding))
            torch.testing.assert_close(queries.pos[image, index], both[:CHANNELS])
            torch.testing.assert_close(queries.content[image, index], both[CHANNELS:])


def test_no_gradient_flows_through_the_chosen_proposals(two_stage, encoded):
    memory, scales = encoded
    memory.requires_grad_()
    queries, proposals = two_stage(memory, scales)
    assert not queries.reference.requires_grad
    loss = queries.content.sum() + queries.pos.square().sum()
    names, parameters = zip(*two_stage.named_parameters())
    gradients = torch.autograd.grad(loss, (memory, *parameters), allow_unused=True)
    trained = {name for name, grad in zip(("memory", *names), gradients) if grad is not None}
    assert trained == {name for name in names if name.startswith("encode_box.")}
    loss = proposals.logits.sum() + proposals.boxes.sum()
    gradient = torch.autograd.grad(loss, memory)[0]
    assert gradient.isfinite().all()
    assert torch.equal(gradient.any(-1), ~scales.padding_mask)


@pytest.mark.parametrize("num_queries, expected", [(4, 4), (6, 6), (7, 6)])
def test_no_more_queries_than_tokens(make_scales, num_queries, expected):
    scales = make_scales(((2, 2), (1, 1), (1, 1)), dtype=torch.float32)
    two_stage = TwoStageQueries(CHANNELS, 3, num_queries)
    queries, proposals = two_stage(torch.randn(1, 6, CHANNELS), scales)
    assert queries.content.shape == queries.pos.shape == (1, expected, CHANNELS)
    assert queries.reference.shape == (1, expected, 4)
    assert proposals.logits.shape == (1, 6, 3)


def test_fewer_usable_tokens_than_queries_give_finite_queries(two_stage, make_scales):
    scales = make_scales(((2, 2), (1, 1)), (((2, 2), (1, 1)), ((1, 1), (1, 1))))
    queries, proposals = two_stage(torch.randn(2, 5, CHANNELS).double(), scales)
    assert all(tensor.isfinite().all() for tensor in (*queries, *proposals))


def test_learned_queries_are_the_same_for_every_image(encoded, perturb):
    memory, scales = encoded
    learned = perturb(LearnedQueries(CHANNELS, num_queries=7).double())
    queries, proposals = learned(memory, scales)
    assert proposals is None
    assert queries.content.shape == queries.pos.shape == (2, 7, CHANNELS)
    for image in range(2):
        assert torch.equal(queries.content[image], learned.content.weight)
        assert torch.equal(queries.pos[image], learned.pos.weight)
    weight, bias = learned.reference_points.weight, learned.reference_points.bias
    expected = 1 / (1 + torch.exp(-(learned.pos.weight @ weight.T + bias)))
    torch.testing.assert_close(queries.reference, expected.expand(2, 7, 2))


def test_learned_queries_train_by_every_image(encoded):
    learned = LearnedQueries(CHANNELS, num_queries=7).double()
    queries, _ = learned(*encoded)
    queries.content.sum().backward()
    torch.testing.assert_close(
        learned.content.weight.grad, torch.full((7, CHANNELS), 2.0, dtype=torch.float64)
    )


def test_learned_references_start_from_xavier_weights():
    learned = LearnedQueries(64, num_queries=5)
    bound = math.sqrt(6 / 66)
    assert not learned.reference_points.bias.any()
    assert 0.9 * bound < learned.reference_points.weight.abs().max() <= bound
