"""Padding to the same size, against timm's."""

import pytest
import torch

from lite_detr.export.same_padding import traceable_same_padding

timm_layers = pytest.importorskip("timm.layers")


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions_give_the_same(kernel, stride, dilation):
    torch.manual_seed(0)
    convolution = timm_layers.Conv2dSame(2, 3, kernel, stride=stride, dilation=dilation)
    for height, width in [(12, 17), (13, 16), (14, 15), (7, 5)]:
        image = torch.randn(1, 2, height, width)
        expected = convolution(image)
        with traceable_same_padding():
            assert torch.equal(convolution(image), expected)
        assert expected.shape[2:] == (-(-height // stride), -(-width // stride))


def test_sizes_stay_simple_formulas():
    convolutions = torch.nn.Sequential(*(timm_layers.Conv2dSame(1, 1, 3, stride=2) for _ in "abcd"))
    free = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    with traceable_same_padding():
        program = torch.export.export(
            convolutions, (torch.zeros(1, 1, 50, 70),), dynamic_shapes=free
        )
    (output,) = next(node for node in program.graph.nodes if node.op == "output").args[0]
    assert "Max" not in str(output.meta["val"].shape) and len(str(output.meta["val"].shape[2])) < 60
