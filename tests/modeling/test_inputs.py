"""What detectors say of images and ground truth that they cannot take."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes


@pytest.mark.parametrize(
    "inputs, error, problem",
    [
        ([], ValueError, "at least one image, got an empty list"),
        (torch.zeros(1, 3, 64, 64), TypeError, r"list with a dict for each image.*got Tensor"),
        ({"image": torch.zeros(3, 64, 64)}, TypeError, "got dict"),
        ([torch.zeros(3, 64, 64)], TypeError, "got list of Tensor"),
        ([{"file_name": "a.jpg", "height": 64}], ValueError, "a.jpg has no `image`, only file_n.*"),
        ([{"image": np.zeros((3, 64, 64))}], TypeError, "got ndarray: torch.as_tensor"),
        ([{"image": torch.zeros(64, 48, 3)}], ValueError, r"\[3, H, W\], .* got \(64, 48, 3\)"),
        ([{"image": torch.zeros(1, 3, 64, 64)}], ValueError, r"one image.*\(1, 3, 64, 64\)"),
        ([{"image": torch.zeros(1, 64, 64)}], ValueError, r"got \(1, 64, 64\)"),
        ([{"image": torch.zeros(3, 0, 64)}], ValueError, r"one pixel, got \(3, 0, 64\)"),
    ],
)
def test_inputs_that_are_no_images_are_named_with_what_is_accepted(
    make_detector, make_input, inputs, error, problem
):
    model = make_detector()
    if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
        # A whole one before it does not hide it.
        inputs = [make_input(64, 64), *inputs]
    for run in (model, model.forward_queries):
        with pytest.raises(error, match=problem):
            run(inputs)


@pytest.mark.parametrize(
    "field, value, error, problem",
    [
        ("gt_classes", torch.tensor([1], dtype=torch.uint8), TypeError, "int64, got torch.uint8"),
        (
            "gt_boxes",
            Boxes(torch.tensor([[1.0, 2.0, float("nan"), 9.0]])),
            ValueError,
            r"b.jpg has boxes that are NaN or infinite, such as \[1.0, 2.0, nan, 9.0\]",
        ),
        (
            "gt_boxes",
            Boxes(torch.tensor([[1.0, 2.0, 8.0, float("inf")]])),
            ValueError,
            "boxes that are NaN or infinite",
        ),
    ],
)
def test_ground_truth_that_cannot_be_learned_is_named(
    make_detector, make_input, field, value, error, problem
):
    inputs = make_input(64, 64, 1) | {"file_name": "b.jpg"}
    inputs["instances"].set(field, value)
    with pytest.raises(error, match=problem):
        make_detector()([inputs])
