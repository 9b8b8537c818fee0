import math

import pytest
import torch

from lite_detr.modeling import DinoQueries, HybridQueries, ReferencePosition
from lite_detr.modeling.queries import anchor_logits

CHANNELS = 16
SHAPES = ((6, 8), (3, 4))
PADDED = (SHAPES, ((4, 5), (2, 3)))
TOKENS = 60


@pytest.fixture
def dino(perturb):
    return perturb(DinoQueries(CHANNELS, num_classes=3, num_queries=4).double())


@pytest.fixture
def hybrid(perturb):
    return perturb(HybridQueries(CHANNELS, 3, num_queries=5, num_one_to_many=7).double())


@pytest.fixture
def encoded(make_scales):
    """Memory and scales of two images, the second one padded."""
    scales = make_scales(SHAPES, PADDED)
    return torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64), scales


def box_by_hand(queries, token, anchor):
    """The box that one token proposes."""
    if not anchor.isfinite().all():
        return torch.ones(4, dtype=torch.float64)
    features = queries.enc_output_norm(queries.enc_output(token))
    return 1 / (1 + torch.exp(-(queries.bbox_embed(features) + anchor)))


def answer_with(queries, logits):
    """Makes the class head say what it is told."""
    queries.class_embed.register_forward_hook(lambda *_: logits)


def waves(coordinates):
    """The sine encoding of some coordinates, number by number."""
    encoding = []
    for coordinate in coordinates:
        for channel in range(CHANNELS // 2):
            wavelength = 10000 ** (2 * (channel // 2) / (CHANNELS // 2))
            wave = math.cos if channel % 2 else math.sin
            encoding.append(wave(coordinate * 2 * math.pi / wavelength))
    return torch.tensor(encoding, dtype=torch.float64)


def test_dino_takes_the_tokens_with_the_best_class(dino, encoded):
    """The best class counts, not the first one and not the sum, and the best token is first."""
    memory, scales = encoded
    logits = torch.full((2, TOKENS, 3), -5.0, dtype=torch.float64)
    logits[:, 10:20] = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)  # the largest sums
    best = [[7, 33, 2, 50], [21, 0, 1, 59]]
    for image, tokens in enumerate(best):
        for rank, token in enumerate(tokens):
            logits[image, token, (image + rank) % 3] = 4.0 - rank
            logits[image, token, (image + rank + 1) % 3] = -9.0
    answer_with(dino, logits)
    queries, proposals = dino(memory, scales)
    anchors, _ = anchor_logits(scales)
    assert proposals.logits.shape == (2, 4, 3)
    for image, tokens in enumerate(best):
        assert torch.equal(proposals.logits[image], logits[image, tokens])
        for rank, token in enumerate(tokens):
            expected = box_by_hand(dino, memory[image, token], anchors[image, token])
            torch.testing.assert_close(proposals.boxes[image, rank], expected)
    assert torch.equal(queries.reference, proposals.boxes)


def test_dino_classifies_the_tokens_of_all_scales(dino, encoded):
    """The real class head: rank every token of an image by its best probability."""
    memory, scales = encoded
    _, usable = anchor_logits(scales)
    _, proposals = dino(memory, scales)
    for image in range(2):
        best = []
        for token, is_usable in zip(memory[image], usable[image]):
            features = dino.enc_output_norm(dino.enc_output(token * is_usable))
            best.append(
                max((features @ dino.class_embed.weight.T + dino.class_embed.bias).tolist())
            )
        expected = torch.tensor(sorted(best, reverse=True)[:4], dtype=torch.float64)
        torch.testing.assert_close(proposals.logits[image].amax(-1), expected)


def test_dino_makes_boxes_of_the_chosen_tokens_only(dino, encoded):
    rows = []
    dino.bbox_embed.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape)))
    queries, proposals = dino(*encoded)
    assert rows == [(2, 4, CHANNELS)]
    assert proposals.boxes.shape == queries.reference.shape == (2, 4, 4)
    assert queries.pos is None


def test_dino_trains_its_proposals_but_not_through_the_references(dino, encoded):
    memory, scales = encoded
    memory.requires_grad_()
    logits = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    answer_with(dino, logits)
    queries, proposals = dino(memory, scales)
    assert not queries.reference.requires_grad
    names, parameters = zip(*dino.named_parameters())
    gradients = torch.autograd.grad(
        proposals.boxes.sum(), (memory, *parameters), retain_graph=True, allow_unused=True
    )
    trained = {name for name, grad in zip(names, gradients[1:]) if grad is not None and grad.any()}
    parts = ("enc_output.", "enc_output_norm.", "bbox_embed.")
    assert trained == {name for name in names if name.startswith(parts)}
    # Only tokens that were chosen are trained, of those only the ones with an anchor.
    _, usable = anchor_logits(scales)
    for image in range(2):
        chosen = set(logits[image].amax(-1).topk(4).indices.tolist())
        expected = {token for token in chosen if usable[image, token]}
        assert set(gradients[0][image].any(-1).nonzero().flatten().tolist()) == expected


def test_dino_content_is_learned(dino, encoded):
    queries, _ = dino(*encoded)
    for image in range(2):
        assert torch.equal(queries.content[image], dino.content.weight)
    queries.content.sum().backward()
    trained = {name for name, p in dino.named_parameters() if p.grad is not None}
    assert trained == {"content.weight"}
    assert (dino.content.weight.grad == 2).all()


@pytest.mark.parametrize("num_queries, expected", [(4, 4), (6, 6), (9, 6)])
def test_dino_has_no_more_queries_than_tokens(make_scales, num_queries, expected):
    scales = make_scales(((2, 2), (1, 1), (1, 1)), dtype=torch.float32)
    dino = DinoQueries(CHANNELS, 3, num_queries)
    queries, proposals = dino(torch.randn(1, 6, CHANNELS), scales)
    assert torch.equal(queries.content[0], dino.content.weight[:expected])
    assert queries.reference.shape == proposals.boxes.shape == (1, expected, 4)
    assert proposals.logits.shape == (1, expected, 3)


def test_dino_is_finite_with_fewer_usable_tokens_than_queries(dino, make_scales):
    scales = make_scales(((2, 2), (1, 1)), (((2, 2), (1, 1)), ((1, 1), (1, 1))))
    memory = torch.randn(2, 5, CHANNELS, dtype=torch.float64, requires_grad=True)
    queries, proposals = dino(memory, scales)
    assert all(t.isfinite().all() for t in (queries.content, queries.reference, *proposals))
    (proposals.boxes.sum() + proposals.logits.sum()).backward()
    assert all(p.grad.isfinite().all() for p in dino.parameters() if p.grad is not None)
    assert memory.grad.isfinite().all()


@pytest.mark.parametrize("training, expected, proposed", [(True, 12, TOKENS), (False, 5, 5)])
def test_hybrid_queries_in_training_and_inference(hybrid, encoded, training, expected, proposed):
    queries, proposals = hybrid.train(training)(*encoded)
    assert queries.content.shape == queries.pos.shape == (2, expected, CHANNELS)
    for image in range(2):
        assert torch.equal(queries.content[image], hybrid.content.weight[:expected])
    assert queries.reference.shape == (2, expected, 4)
    assert proposals.logits.shape == (2, proposed, 3)
    assert proposals.boxes.shape == (2, proposed, 4)


def test_hybrid_references_are_ranked_by_the_first_class_channel(hybrid, encoded):
    """The one-to-one queries have the best ones, so that inference begins where they did."""
    logits = torch.randn(2, TOKENS, 3, dtype=torch.float64)
    answer_with(hybrid, logits)
    queries, proposals = hybrid(*encoded)
    for image in range(2):
        scores = logits[image, :, 0].tolist()
        best = sorted(range(TOKENS), key=lambda token: -scores[token])[:12]
        torch.testing.assert_close(queries.reference[image], proposals.boxes[image, best])
    inference, _ = hybrid.eval()(*encoded)
    for part, whole in zip(inference, queries):
        torch.testing.assert_close(part, whole[:, :5])


def test_hybrid_position_is_the_first_half_of_the_box_encoding(hybrid, encoded):
    queries, _ = hybrid(*encoded)
    assert not queries.reference.requires_grad
    for image in range(2):
        for index in range(12):
            encoding = waves(queries.reference[image, index].tolist())
            both = hybrid.encode_box.norm(hybrid.encode_box.linear(encoding))
            torch.testing.assert_close(queries.pos[image, index], both[:CHANNELS])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_queries, one_to_many", [(4, 3), (4, 2), (4, 1), (6, 2), (9, 5)])
def test_hybrid_has_no_more_queries_than_tokens(make_scales, training, num_queries, one_to_many):
    scales = make_scales(((2, 2), (1, 1), (1, 1)), dtype=torch.float32)
    hybrid = HybridQueries(CHANNELS, 3, num_queries, one_to_many).train(training)
    queries, _ = hybrid(torch.randn(1, 6, CHANNELS), scales)
    expected = min(6, num_queries + one_to_many * training)
    assert torch.equal(queries.content[0], hybrid.content.weight[:expected])
    assert queries.pos.shape == (1, expected, CHANNELS)
    assert queries.reference.shape == (1, expected, 4)


def test_reference_position_by_loop(perturb):
    """y before x, then width and height; their waves pass two linear layers."""
    position = perturb(ReferencePosition(CHANNELS).double())
    boxes = torch.rand(2, 3, 4, dtype=torch.float64)
    result = position(boxes)
    assert result.shape == (2, 3, CHANNELS)
    first, second = position.mlp[0], position.mlp[2]
    for image in range(2):
        for query in range(3):
            x, y, width, height = boxes[image, query].tolist()
            hidden = (first.weight @ waves([y, x, width, height]) + first.bias).clamp(min=0)
            expected = second.weight @ hidden + second.bias
            torch.testing.assert_close(result[image, query], expected)


def test_reference_position_starts_from_xavier_weights():
    position = ReferencePosition(64)
    for layer, inputs in ((position.mlp[0], 128), (position.mlp[2], 64)):
        assert layer.weight.shape == (64, inputs)
        bound = math.sqrt(6 / (64 + inputs))
        assert 0.9 * bound < layer.weight.abs().max() <= bound


def test_reference_position_has_the_dtype_of_its_weights():
    position = ReferencePosition(CHANNELS).bfloat16()
    assert position(torch.rand(1, 2, 4)).dtype == torch.bfloat16
