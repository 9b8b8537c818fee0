import math

import pytest
import torch

from lite_detr.modeling import ContrastiveDenoising
from lite_detr.modeling.criterion import Target

CLASSES = 7
CHANNELS = 6


def make_targets(counts, center=(0.4, 0.6), size=(0.05, 0.2)):
    """For each image so many objects; by default no noise of up to 1 leads them to a border."""

    def uniform(count, low, high):
        return low + (high - low) * torch.rand(count, 2, dtype=torch.float64)

    return [
        Target(
            torch.randint(CLASSES, (count,)),
            torch.cat([uniform(count, *center), uniform(count, *size)], dim=1),
        )
        for count in counts
    ]


def layout(counts, num_groups):
    """(image, slot, negative, object) in the order of the slots; no object on padding."""
    for image, count in enumerate(counts):
        slot = 0
        for _ in range(num_groups):
            for negative in (False, True):
                for index in range(max(counts)):
                    yield image, slot, negative, index if index < count else None
                    slot += 1


def corners(box):
    cx, cy, width, height = box.tolist()
    return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]


def moves(targets, denoising, negative):
    """``[n, 4]``: how far the corners of the positive or of the negative queries have moved, in
    half extents of their objects."""
    counts = [len(target.labels) for target in targets]
    found = []
    for image, slot, is_negative, index in layout(counts, denoising.num_groups):
        if index is not None and is_negative == negative:
            box = targets[image].boxes[index]
            half = (box[2:].repeat(2) / 2).tolist()
            after = corners(denoising.queries.reference[image, slot])
            found.append([(b - a) / h for a, b, h in zip(corners(box), after, half)])
    return torch.tensor(found, dtype=torch.float64)


def read_labels(num_queries, label_noise, counts):
    """The targets and, for each query, the class that its content shows."""
    denoising = ContrastiveDenoising(1, CLASSES, num_queries, label_noise)
    with torch.no_grad():
        denoising.label_embed.weight.copy_(torch.arange(1.0, CLASSES + 2)[:, None])
    targets = make_targets(counts)
    output = denoising(targets, 3)
    return targets, output, (output.queries.content[..., 0] - 1).round().long()


@pytest.mark.parametrize(
    "num_queries, counts, groups",
    [
        (100, [7], 14),
        (100, [3, 7, 0], 14),
        (100, [1], 100),
        (100, [50], 2),
        (100, [51], 1),
        (100, [101, 4], 1),
        (100, [300], 1),
        (8, [3, 2], 2),
    ],
)
def test_groups_fill_about_the_number_of_queries(num_queries, counts, groups):
    output = ContrastiveDenoising(CHANNELS, CLASSES, num_queries)(make_targets(counts), 5)
    queries = 2 * groups * max(counts)
    assert output.num_groups == groups
    assert output.queries.content.shape == (len(counts), queries, CHANNELS)
    assert output.queries.pos is None
    assert output.queries.reference.shape == (len(counts), queries, 4)
    assert output.attn_mask.shape == (queries + 5, queries + 5)


COUNTS = pytest.mark.parametrize("counts", [[3, 1, 2], [0, 4], [2, 0], [5]], ids=str)


@COUNTS
def test_slots_without_noise(counts):
    """Group by group positives and then negatives, each padded to the largest image's number."""
    denoising = ContrastiveDenoising(CHANNELS, CLASSES, 12, label_noise=0.0, box_noise=0.0)
    targets = make_targets(counts)
    output = denoising(targets, 5)
    slots = list(layout(counts, output.num_groups))
    assert output.queries.content.shape[:2].numel() == len(slots)
    assert output.queries.reference.dtype == torch.float64
    for image, slot, _, index in slots:
        content = output.queries.content[image, slot]
        reference = output.queries.reference[image, slot]
        if index is None:
            assert not content.any()
            assert (reference == 0.5).all()
        else:
            label = int(targets[image].labels[index])
            assert torch.equal(content, denoising.label_embed.weight[label])
            torch.testing.assert_close(reference, targets[image].boxes[index])


@COUNTS
def test_matches_pair_positives_with_their_objects(counts):
    output = ContrastiveDenoising(CHANNELS, CLASSES, 12)(make_targets(counts), 5)
    assert len(output.matches) == len(counts)
    for image, (queries, objects) in enumerate(output.matches):
        assert queries.dtype == objects.dtype == torch.int64
        assert queries.device == objects.device == torch.device("cpu")
        expected = {
            (slot, index)
            for other, slot, negative, index in layout(counts, output.num_groups)
            if other == image and not negative and index is not None
        }
        assert set(zip(queries.tolist(), objects.tolist(), strict=True)) == expected
        assert len(queries) == len(expected) == output.num_groups * counts[image]


@COUNTS
def test_noise_spares_padding(counts):
    output = ContrastiveDenoising(CHANNELS, CLASSES, 12)(make_targets(counts), 5)
    for image, slot, _, index in layout(counts, output.num_groups):
        if index is None:
            assert not output.queries.content[image, slot].any()
            assert (output.queries.reference[image, slot] == 0.5).all()


@pytest.mark.parametrize("box_noise", [0.1, 0.4])
@pytest.mark.parametrize("negative", [False, True])
def test_corners_move_on_their_own(box_noise, negative):
    """Uniformly by 0 to 1 times the noise, or 1 to 2 times, to either side."""
    targets = make_targets([10, 4, 0])
    denoising = ContrastiveDenoising(CHANNELS, CLASSES, 600, box_noise=box_noise)
    found = moves(targets, denoising(targets, 5), negative) / box_noise
    count = 60 * 14
    assert found.shape == (count, 4)
    low = 1.0 if negative else 0.0
    amount = found.abs()
    assert low - 1e-6 <= amount.min() < low + 0.05
    assert low + 0.95 < amount.max() <= low + 1 + 1e-6
    # Four standard deviations of means of uniform numbers, and of coins.
    tolerance = 4 / math.sqrt(count)
    expected = torch.full((4,), low + 0.5, dtype=torch.float64)
    torch.testing.assert_close(amount.mean(0), expected, rtol=0, atol=tolerance / math.sqrt(12))
    signs = found.sign().mean(0)
    torch.testing.assert_close(signs, torch.zeros_like(signs), rtol=0, atol=tolerance)
    for other in range(1, 4):
        for both in (found.sign(), amount - low - 0.5):
            spread = both.square().mean()
            assert (both[:, 0] * both[:, other]).mean().abs() < tolerance * spread


def test_full_noise_moves_positive_corners_by_half_the_size():
    targets = make_targets([10])
    denoising = ContrastiveDenoising(CHANNELS, CLASSES, 200, box_noise=1.0)
    amount = moves(targets, denoising(targets, 5), negative=False).abs()
    assert 0.95 < amount.max() <= 1 + 1e-6


def test_every_query_has_noise_of_its_own():
    targets = make_targets([2])
    output = ContrastiveDenoising(CHANNELS, CLASSES, 40, box_noise=0.4)(targets, 5)
    boxes = {tuple(box) for box in output.queries.reference[0].tolist()}
    assert len(boxes) == 2 * output.num_groups * 2 == 80


@pytest.mark.parametrize("box_noise", [1.0, 3.0])
def test_references_stay_in_the_image(box_noise):
    """Objects at the borders, noise beyond them, and corners that pass each other."""
    targets = make_targets([20, 3], center=(0.0, 1.0), size=(0.01, 0.9))
    output = ContrastiveDenoising(CHANNELS, CLASSES, 200, box_noise=box_noise)(targets, 5)
    reference = output.queries.reference
    center, size = reference.split(2, dim=-1)
    assert (size >= 0).all()
    assert (size == 0).any()
    assert (center - size / 2 >= -1e-12).all()
    assert (center + size / 2 <= 1 + 1e-12).all()
    assert ((reference >= 0) & (reference <= 1)).all()


@pytest.mark.parametrize("label_noise", [0.0, 0.5, 1.0])
def test_half_of_the_label_noise_gets_a_random_class(label_noise):
    """A random class may be the right one; positive and negative queries share one rate."""
    targets, output, labels = read_labels(4000, label_noise, [8])
    share = label_noise / 2 * (1 - 1 / CLASSES)
    for negative in (False, True):
        slots = [s for s in layout([8], output.num_groups) if s[2] == negative]
        flipped = [labels[0, slot] != targets[0].labels[index] for _, slot, _, index in slots]
        assert len(flipped) == 4000
        tolerance = 4 * math.sqrt(4000 * share * (1 - share))
        assert abs(sum(map(int, flipped)) - 4000 * share) <= tolerance


def test_random_classes_are_those_of_the_foreground():
    """Every class about as often; the last embedding, which has no class, is never used."""
    targets, output, labels = read_labels(4000, 2.0, [1])
    assert output.num_groups == 4000
    counts = torch.bincount(labels[0], minlength=CLASSES + 1).tolist()
    tolerance = 4 * math.sqrt(8000 / CLASSES)
    assert counts[CLASSES] == 0
    for count in counts[:CLASSES]:
        assert abs(count - 8000 / CLASSES) < tolerance


@pytest.mark.parametrize(
    "num_queries, counts, matching", [(6, [2, 1], 4), (1, [3], 2), (5, [1, 0], 1)], ids=str
)
def test_attention_mask_by_loop(num_queries, counts, matching):
    """A denoising query sees its group and the matching queries; these only see each other."""
    output = ContrastiveDenoising(CHANNELS, CLASSES, num_queries)(make_targets(counts), matching)
    total = output.queries.content.shape[1]
    group_size = 2 * max(counts)
    assert output.attn_mask.dtype == torch.bool
    for query in range(total + matching):
        for other in range(total + matching):
            visible = other >= total
            if query < total and other < total:
                visible = query // group_size == other // group_size
            assert output.attn_mask[query, other].item() is (not visible), (query, other)


@pytest.mark.parametrize("images", [1, 2])
def test_batch_without_objects(images):
    """No queries, but a gradient all the same: DistributedDataParallel waits for it."""
    denoising = ContrastiveDenoising(CHANNELS, CLASSES)
    output = denoising(make_targets([0] * images), 5)
    assert output.queries.content.shape == (images, 0, CHANNELS)
    assert output.queries.reference.shape == (images, 0, 4)
    assert [(len(queries), len(objects)) for queries, objects in output.matches] == [
        (0, 0)
    ] * images
    assert output.num_groups == 1
    assert not output.attn_mask.any()
    assert output.attn_mask.shape == (5, 5)
    output.queries.content.sum().backward()
    assert torch.equal(denoising.label_embed.weight.grad, torch.zeros(CLASSES + 1, CHANNELS))


def test_content_trains_the_classes_that_it_shows():
    denoising = ContrastiveDenoising(CHANNELS, CLASSES, 12, label_noise=0.0)
    targets = [Target(torch.tensor([2, 5]), torch.full((2, 4), 0.5)), *make_targets([0])]
    output = denoising([target._replace(boxes=target.boxes.float()) for target in targets], 5)
    output.queries.content.sum().backward()
    expected = torch.zeros(CLASSES + 1, CHANNELS)
    expected[[2, 5]] = 2.0 * output.num_groups
    assert torch.equal(denoising.label_embed.weight.grad, expected)
    assert not output.queries.reference.requires_grad
