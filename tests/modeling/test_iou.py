import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from lite_detr.modeling.iou import generalized_iou


def random_boxes(count):
    return torch.cat([torch.rand(count, 2), 0.05 + 0.5 * torch.rand(count, 2)], dim=1).double()


def test_pairs_and_matrix_equal_torchvision():
    torch.manual_seed(0)
    boxes, others = random_boxes(6), random_boxes(6)
    expected = generalized_box_iou(*(box_convert(b, "cxcywh", "xyxy") for b in (boxes, others)))
    torch.testing.assert_close(generalized_iou(boxes[:, None], others), expected)
    torch.testing.assert_close(generalized_iou(boxes, others), expected.diagonal())


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_by_hand(eps):
    """Two 2x2 boxes that share a 1x1 corner: union 7, enclosing area 9."""
    boxes = torch.tensor([[1.0, 1.0, 2.0, 2.0]], dtype=torch.float64)
    others = torch.tensor([[2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    expected = 1 / (7 + eps) - 2 / (9 + eps)
    assert generalized_iou(boxes, others, eps).item() == pytest.approx(expected, rel=1e-12)


def test_boxes_apart():
    """Unit boxes four apart: no overlap, union 2, enclosing area 5."""
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0], [4.5, 0.5, 1.0, 1.0]])
    assert generalized_iou(boxes[0], boxes[1]).item() == pytest.approx(-0.6)


def test_epsilon_keeps_boxes_without_area_finite():
    point = torch.tensor([0.3, 0.3, 0.0, 0.0], requires_grad=True)
    iou = generalized_iou(point, torch.tensor([0.3, 0.3, 0.0, 0.0]), 1e-6)
    iou.backward()
    assert iou == 0 and point.grad.isfinite().all()
