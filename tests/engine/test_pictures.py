"""Pictures for TensorBoard, of a stand-in for a detector whose predictions the tests choose."""

import io
import logging
import random

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import TrainerBase, hooks
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.events import TensorboardXWriter
from omegaconf import OmegaConf
from PIL import Image, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lite_detr import model_zoo
from lite_detr.engine import pictures
from lite_detr.engine.pictures import PicturesHook, build_pictures_hook
from lite_detr.random_states import get_random_states

# Matplotlib would take the second for a formula, and fail.
NAMES = ["cat", "dog for $5 or $_"]
WIDTH, HEIGHT = 160, 120
LEFT_BOX, RIGHT_BOX, WEAK_BOX = (10, 50, 50, 90), (60, 50, 100, 90), (110, 50, 150, 90)


class Detector(nn.Module):
    """Finds the same in every image, and draws random numbers meanwhile."""

    def __init__(self, boxes=(RIGHT_BOX, WEAK_BOX), scores=(0.8, 0.2)):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.boxes, self.scores = boxes, scores
        self.modes = []

    def forward(self, batch):
        self.modes.append(self.training)
        _ = random.random(), np.random.rand(), torch.rand(1)
        return [{"instances": self.find(inputs)} for inputs in batch]

    def find(self, inputs):
        instances = Instances((inputs["height"], inputs["width"]))
        instances.pred_boxes = Boxes(torch.tensor(self.boxes).reshape(-1, 4).float())
        instances.scores = torch.tensor(self.scores)
        instances.pred_classes = torch.arange(len(self.scores)) % len(NAMES)
        return instances


class Trainer(TrainerBase):
    """Trains nothing; fails in an iteration, if one is given."""

    def __init__(self, fail_in=None):
        super().__init__()
        self.fail_in = fail_in

    def run_step(self):
        if self.iter == self.fail_in:
            raise ZeroDivisionError


@pytest.fixture
def make_record(tmp_path):
    """Writes a white image and returns its record."""

    def make(name="image.png", size=(WIDTH, HEIGHT), boxes=(LEFT_BOX,), **annotation):
        Image.new("RGB", size, (255, 255, 255)).save(tmp_path / name)
        annotation = {"category_id": 0, "bbox_mode": BoxMode.XYXY_ABS} | annotation
        return {
            "file_name": str(tmp_path / name),
            "width": size[0],
            "height": size[1],
            "annotations": [annotation | {"bbox": list(box)} for box in boxes],
        }

    return make


@pytest.fixture
def dataset(make_record):
    """The name of a registered dataset of ten images."""
    records = [make_record(f"{number}.png") for number in range(10)]
    DatasetCatalog.register("ten_images", lambda: records)
    MetadataCatalog.get("ten_images").thing_classes = NAMES
    yield "ten_images"
    DatasetCatalog.pop("ten_images")
    MetadataCatalog.pop("ten_images")


@pytest.fixture
def config(dataset):
    cfg = OmegaConf.create({"train": model_zoo.get_config("common/train.py").train})
    cfg.dataloader = model_zoo.get_config("common/data/coco.py").dataloader
    cfg.dataloader.test.dataset.names = dataset
    return cfg


def make_hook(*records, model=None, eval_period=2):
    return PicturesHook(
        model or Detector(), records, to_input, NAMES, eval_period, confidence_threshold=0.5
    )


def to_input(record):
    return {"image": torch.zeros(3, 8, 8), "height": record["height"], "width": record["width"]}


def train(hook, folder, max_iter=4, fail_in=None):
    """Trains with evaluations; returns how many there were, and what TensorBoard has."""
    trainer, evaluations = Trainer(fail_in), []
    writer = hooks.PeriodicWriter([TensorboardXWriter(str(folder))], period=1)
    evaluation = hooks.EvalHook(hook.eval_period, lambda: evaluations.append(trainer.iter))
    trainer.register_hooks([evaluation, hook, writer])
    trainer.train(0, max_iter)
    return len(evaluations), read_events(folder)


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    return events.Reload()


def read_picture(event):
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


def draws_at(half, box):
    """Whether an edge of the box, given in pixels of the file, is drawn on a half of a picture."""
    scale = pictures.HALF_WIDTH / WIDTH
    x = round(scale * box[0])
    y = round(scale * (box[1] + box[3]) / 2) + pictures.CAPTION_HEIGHT
    return bool((half[y, x - 3 : x + 4] < 200).any())


@pytest.mark.parametrize(
    "eval_period, steps", [(1, [0, 1, 2, 4]), (2, [1, 4]), (3, [2, 4]), (0, [4])]
)
def test_each_evaluation_has_its_pictures_once(make_record, tmp_path, eval_period, steps):
    hook = make_hook(make_record("a.png"), make_record("b.png"), eval_period=eval_period)
    evaluations, events = train(hook, tmp_path / "events")
    assert evaluations == len(steps)
    assert events.Tags()["images"] == ["validation/1", "validation/2"]
    for tag in events.Tags()["images"]:
        assert [event.step for event in events.Images(tag)] == steps


def test_a_training_that_fails_ends_without_pictures(make_record, tmp_path):
    hook = make_hook(make_record())
    with pytest.raises(ZeroDivisionError):
        train(hook, tmp_path / "events", fail_in=2)
    events = read_events(tmp_path / "events")
    assert [event.step for event in events.Images("validation/1")] == [1]


def test_ground_truth_is_on_the_left_and_what_scores_enough_on_the_right(make_record, tmp_path):
    _, events = train(make_hook(make_record()), tmp_path / "events")
    picture = read_picture(events.Images("validation/1")[0])
    left, right = picture[:, : pictures.HALF_WIDTH], picture[:, -pictures.HALF_WIDTH :]
    assert [draws_at(left, box) for box in (LEFT_BOX, RIGHT_BOX, WEAK_BOX)] == [True, False, False]
    assert [draws_at(right, box) for box in (LEFT_BOX, RIGHT_BOX, WEAK_BOX)] == [False, True, False]


def test_a_class_has_one_colour_on_both_sides(make_record):
    hook = make_hook(make_record(boxes=[RIGHT_BOX]))
    picture = put_pictures(hook)[0]
    left, right = picture[:, : pictures.HALF_WIDTH], picture[:, -pictures.HALF_WIDTH :]
    scale = pictures.HALF_WIDTH / WIDTH
    row = round(scale * (RIGHT_BOX[1] + RIGHT_BOX[3]) / 2) + pictures.CAPTION_HEIGHT
    assert (left[row] < 255).any()
    assert (left[row] == right[row]).all()


def put_pictures(hook):
    """What the hook puts into the storage, each ``[H, W, 3]``."""
    trainer = Trainer()
    put = []
    reader = hooks.CallbackHook(
        after_train=lambda t: put.extend(image for _, image, _ in t.storage._vis_data)
    )
    trainer.register_hooks([hook, reader])
    trainer.train(0, 1)
    return [image.transpose(1, 2, 0) for image in put]


@pytest.mark.parametrize("size", [(2000, 500), (300, 900), (30, 2000), (40, 30), (640, 480)])
def test_a_picture_fits_on_the_page_whatever_the_image(make_record, size):
    (picture,) = put_pictures(make_hook(make_record(size=size)))
    height, width, channels = picture.shape
    assert channels == 3
    assert 2 * pictures.LEAST_WIDTH <= width <= 2 * pictures.HALF_WIDTH + pictures.GAP
    assert height <= pictures.MOST_HEIGHT + 2 * pictures.CAPTION_HEIGHT


def test_captions_count_objects_and_tell_the_best_score(make_record, monkeypatch):
    captions = []
    monkeypatch.setattr(
        pictures, "side_by_side", lambda title, *halves: captions.append([title, *halves])
    )
    hook = make_hook(make_record("street.png"))
    scene = hook.scenes[0]
    hook.draw(scene, hook.model.find(scene.inputs))
    hook.draw(scene, hook.model.find(scene.inputs)[:0])
    assert [[title, left[0], right[0]] for title, left, right in captions] == [
        ["street.png", "ground truth: 1", "predictions that score 0.5 or more: 1 (best: 0.80)"],
        ["street.png", "ground truth: 1", "predictions that score 0.5 or more: 0"],
    ]


def test_a_caption_fits_above_a_narrow_image():
    font = ImageFont.load_default(pictures.CAPTION_FONT)
    caption = "predictions that score 0.25 or more: 300 (best: 0.88)"
    assert pictures.shorten(caption, font, pictures.LEAST_WIDTH) == caption
    cut = pictures.shorten("a/long/name.jpg", font, 80)
    assert cut.startswith("...") and cut.endswith("name.jpg") and font.getlength(cut) <= 80


def test_labels_name_classes_crowds_and_scores(make_record):
    truth = make_hook(make_record(iscrowd=1)).scenes[0].truth
    assert truth.labels == ["cat (crowd)"]
    instances = Detector().find({"height": HEIGHT, "width": WIDTH})
    assert pictures.predicted_objects(instances, ["cat", "dog"]).labels == ["cat 80%", "dog 20%"]
    assert pictures.predicted_objects(instances, None).labels == ["0 80%", "1 20%"]


def test_images_without_objects_and_without_annotations_are_drawn(make_record):
    empty, unlabelled = make_record("a.png", boxes=()), make_record("b.png")
    del unlabelled["annotations"]
    hook = make_hook(empty, unlabelled, model=Detector(boxes=(), scores=()))
    assert len(put_pictures(hook)) == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_and_the_random_states_stay(make_record, training):
    model = Detector().train(training)
    before = get_random_states()
    hook = make_hook(make_record(), model=model)
    assert len(put_pictures(hook)) == 1
    assert model.training is training
    assert model.modes == [False]
    after = get_random_states()
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    assert after == before


def test_unusable_images_are_left_out_with_one_warning(make_record, tmp_path, caplog):
    records = [make_record(f"{name}.png") for name in "abcd"]
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "c.png").unlink()
    with caplog.at_level(logging.WARNING, "lite_detr"):
        hook = make_hook(*records)
        put_pictures(hook)
        put_pictures(hook)
    (warning,) = caplog.messages
    assert "2 of the 4 images" in warning
    assert "a.png" in warning and "c.png" in warning and "b.png" not in warning
    # What is left keeps its name in TensorBoard.
    assert [scene.tag for scene in hook.scenes] == ["validation/2", "validation/4"]


def test_images_are_picked_from_all_over_the_validation_set_and_stay_the_same(config):
    files = [
        [scene.file_name for scene in build_pictures_hook(config, Detector()).scenes]
        for _ in range(2)
    ]
    assert files == [["1.png", "3.png", "6.png", "8.png"]] * 2
    config.train.pictures.num_images = 99
    hook = build_pictures_hook(config, Detector())
    assert [scene.file_name for scene in hook.scenes] == [f"{number}.png" for number in range(10)]
    assert hook.class_names == NAMES


@pytest.mark.parametrize("change", ["no images", "no setting", "no validation set", "no names"])
def test_there_is_no_hook_where_nothing_is_to_be_drawn(config, change):
    if change == "no images":
        config.train.pictures.num_images = 0
    elif change == "no setting":
        del config.train.pictures
    elif change == "no validation set":
        del config.dataloader.test
    else:
        config.dataloader.test.dataset = L(list)()
    assert build_pictures_hook(config, Detector()) is None


def test_the_main_process_alone_draws(config, monkeypatch):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert build_pictures_hook(config, Detector()) is None


def test_drawing_waits_for_no_other_process(make_record, monkeypatch):
    def wait(*args, **kwargs):
        raise AssertionError("the other processes are not there")

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(Detector())
        for name in ("all_reduce", "all_gather", "barrier", "broadcast"):
            monkeypatch.setattr(torch.distributed, name, wait)
        monkeypatch.setattr(DistributedDataParallel, "forward", wait)
        assert len(put_pictures(make_hook(make_record(), model=model))) == 1
        assert model.training
    finally:
        torch.distributed.destroy_process_group()
