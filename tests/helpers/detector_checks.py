"""What the tests of every detector that extends Deformable DETR ask of it."""

import pytest
import torch

ENCODERS = pytest.mark.parametrize("encoder", ["full", "interleaved"])
ATTENTIONS = pytest.mark.parametrize("attention", ["msda", "kda"])


def loss_names(*suffixes):
    return {f"loss_{part}{suffix}" for part in ("ce", "bbox", "giou") for suffix in suffixes}


def count(targets):
    """The number of objects, as criteria take it."""
    return torch.tensor(float(sum(len(target.labels) for target in targets)))


def record(module):
    """The outputs of every later call of a module."""
    outputs = []
    module.register_forward_hook(lambda _, args, output: outputs.append(output))
    return outputs


def assert_trains(model, batch, names):
    """Losses of every prediction, and a gradient for every parameter."""
    losses = model(batch)
    assert set(losses) == names
    assert all(loss.dim() == 0 and loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def assert_every_gradient(model):
    """A finite one for each parameter that trains."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # A parameter without one makes DistributedDataParallel wait in vain.
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def assert_infers(model, make_input, num_queries, num_classes):
    """Best first, in the coordinates asked for."""
    model.eval()
    inputs = [make_input(64, 96) | {"height": 32, "width": 480}, {"image": torch.zeros(3, 80, 64)}]
    raw = model.forward_queries(inputs)
    assert raw["pred_logits"].shape == (2, num_queries, num_classes)
    assert raw["pred_boxes"].shape == (2, num_queries, 4)
    for index, (output, size) in enumerate(zip(model(inputs), [(32, 480), (80, 64)], strict=True)):
        instances = output["instances"]
        assert instances.image_size == size
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        scores = raw["pred_logits"][index].sigmoid()
        torch.testing.assert_close(instances.scores, scores.flatten().sort(descending=True).values)
        query = int(scores.amax(1).argmax())
        assert instances.pred_classes[0] == scores[query].argmax()
        cx, cy, w, h = raw["pred_boxes"][index, query].tolist()
        xs = [min(max(x, 0), 1) * size[1] for x in (cx - w / 2, cx + w / 2)]
        ys = [min(max(y, 0), 1) * size[0] for y in (cy - h / 2, cy + h / 2)]
        expected = torch.tensor([xs[0], ys[0], xs[1], ys[1]])
        torch.testing.assert_close(instances.pred_boxes.tensor[0], expected, rtol=1e-4, atol=1e-3)
