"""Predictions for folders of images, by a small detector."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image
from small_detectors import small_detector

from lite_detr.data.mapper import DetectionMapper
from lite_detr.inference.predictor import BatchPredictor, split_batch

# Width and height; resized to 64 pixels at the shortest side, some have one shape.
SIZES = [(90, 60), (60, 90), (180, 120), (60, 240), (92, 60), (60, 90), (96, 64), (90, 60)]


@pytest.fixture(scope="module")
def model():
    return small_detector("dino").eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An image of each size, of which the names are not in the order."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for index, (width, height) in enumerate(SIZES):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(folder / f"{(7 * index) % 10}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture
def make_predictor(model):
    def make(**options):
        return BatchPredictor(model, [ResizeShortestEdge(64, 320)], "RGB", **options)

    return make


@pytest.fixture
def batches(model):
    """The inputs of each call of the model."""
    calls = []
    handle = model.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    yield calls
    handle.remove()


def assert_same(ours, theirs):
    assert ours.image_size == theirs.image_size and len(ours) == len(theirs) > 0
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_classes, theirs.pred_classes)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_at_a_time_as_the_model_does_with_the_test_sets_mapper(
    make_predictor, model, files, num_workers
):
    mapper = DetectionMapper(False, augmentations=[ResizeShortestEdge(64, 320)], image_format="RGB")
    predictions = list(make_predictor(num_workers=num_workers)(files))
    assert [prediction.path for prediction in predictions] == files
    for path, size, prediction in zip(files, SIZES, predictions):
        with torch.no_grad():
            expected = model([mapper({"file_name": str(path)})])[0]["instances"]
        assert prediction.problem is None
        assert prediction.instances.image_size == size[::-1]
        assert_same(prediction.instances, expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_of_one_size_and_their_results_in_order(
    make_predictor, model, files, batches, num_workers
):
    predictions = list(make_predictor(batch_size=3, num_workers=num_workers)(map(str, files)))
    assert [prediction.path for prediction in predictions] == files
    found = [[Path(inputs["file_name"]) for inputs in batch] for batch in batches]
    assert found == [[files[i] for i in batch] for batch in ([0, 2, 6], [1, 5], [3], [4], [7])]

    for batch in list(batches):
        with torch.no_grad():
            outputs = model(batch)
        for inputs, output in zip(batch, outputs):
            prediction = predictions[files.index(Path(inputs["file_name"]))]
            assert_same(prediction.instances, output["instances"])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_unusable_files_among_good_ones(make_predictor, files, tmp_path, num_workers, batch_size):
    text, cut, absent = tmp_path / "text.jpg", tmp_path / "cut.png", tmp_path / "absent.png"
    text.write_text("no image")
    cut.write_bytes(files[0].read_bytes()[:1000])
    given = [text, files[0], cut, files[1], files[2], absent]
    predictions = list(make_predictor(batch_size=batch_size, num_workers=num_workers)(given))
    assert [prediction.path for prediction in predictions] == given
    for prediction in predictions:
        good = prediction.path in files
        assert (prediction.instances is None) is not good
        assert (prediction.problem is None) is good
    assert "not an image of the formats" in predictions[0].problem
    assert "truncated" in predictions[2].problem
    assert "No such file" in predictions[5].problem


def test_only_unusable_files(make_predictor, tmp_path, batches):
    (prediction,) = make_predictor()([tmp_path / "absent.png"])
    assert prediction.problem and not batches


def test_no_files(make_predictor, batches):
    assert list(make_predictor(num_workers=2)([])) == [] and not batches


def test_results_come_before_all_images_are_read(make_predictor, files, batches):
    results = make_predictor(batch_size=2)(files * 3)
    assert next(results).path == files[0]
    assert len(batches) == 1  # of 6 or more


def test_the_callers_own_gradients_stay_on(make_predictor, files):
    for prediction in make_predictor()(files[:2]):
        assert torch.is_grad_enabled()
        assert not prediction.instances.scores.requires_grad


def test_a_model_in_training_is_put_into_evaluation(model, make_predictor):
    model.train()
    assert not make_predictor().model.training


def test_a_single_path_is_no_list(make_predictor, files):
    with pytest.raises(TypeError, match=r"takes a list of files, got '.*png': give \['"):
        make_predictor()(str(files[0]))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"num_workers": -1}])
def test_bad_numbers(make_predictor, options):
    ((name, number),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {number}, accepted are numbers from"):
        make_predictor(**options)


def test_the_results_of_a_batch_are_those_of_single_images(make_predictor, files, batches):
    given = [files[0], files[2], files[7]]
    predictions = make_predictor(batch_size=3)(given)
    for path, together in zip(given, list(predictions)):
        (alone,) = make_predictor()([path])
        ours, theirs = together.instances, alone.instances
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-5)
        boxes = (ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
        torch.testing.assert_close(*boxes, rtol=1e-5, atol=1e-5)
    assert [len(batch) for batch in batches] == [3, 1, 1, 1]


def test_a_batch_is_the_oldest_and_those_of_its_size():
    sizes = [(80, 100), (100, 80), (80, 104), (80, 100), (80, 100)]
    waiting = [{"image": torch.empty(3, *size), "id": i} for i, size in enumerate(sizes)]
    for batch_size, expected in ((2, [0, 3]), (3, [0, 3, 4]), (8, [0, 3, 4]), (1, [0])):
        batch, rest = split_batch(waiting, batch_size)
        assert [sample["id"] for sample in batch] == expected
        assert [sample["id"] for sample in rest] == [i for i in range(5) if i not in expected]
