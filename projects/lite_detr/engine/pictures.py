"""Pictures in TensorBoard: ground truth beside predictions, at every evaluation."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.image_files import ImageError, read_record
from ..inference.pictures import draw_objects
from ..labels import class_label, printable, shorten
from ..random_states import same_random_states

logger = logging.getLogger("lite_detr")

# In pixels. TensorBoard shows pictures about 1000 wide; tall ones are narrower.
HALF_WIDTH, MOST_HEIGHT, LEAST_WIDTH = 512, 768, 352
GAP = 8
CAPTION_HEIGHT = 24
CAPTION_FONT = 15

PAPER_COLOUR, INK_COLOUR = (255, 255, 255), (0, 0, 0)


@dataclass(frozen=True)
class Objects:
    """The objects in one half of a picture.

    Attributes:
        boxes: ``[N, 4]``, corners in pixels of the image file.
        classes: ``N`` class numbers.
        labels: ``N`` texts.
    """

    boxes: Boxes
    classes: list[int]
    labels: list[str]


@dataclass(frozen=True, eq=False)
class Scene:
    """One validation image.

    Attributes:
        tag: the name of its pictures in TensorBoard.
        file_name: the name of the image file.
        image: the image in RGB, in the size in which it is shown.
        scale: horizontal and vertical, from the image file to the shown image.
        inputs: the model's input.
        truth: the annotated objects.
    """

    tag: str
    file_name: str
    image: Image.Image
    scale: tuple[float, float]
    inputs: dict
    truth: Objects


class PicturesHook(HookBase):
    """Puts pictures into Detectron2's event storage after each evaluation.

    Each shows ground truth on the left and predictions on the right. ``TensorboardXWriter`` takes
    them from the storage. The hook is for the main process only, as it waits for no other one.
    Register it after ``EvalHook`` and before ``PeriodicWriter``. It leaves the model's mode and the
    states of the random generators as they were.

    Args:
        model: the detector, or the ``DistributedDataParallel`` around it.
        records: the images' records in Detectron2's dataset format. Unusable images are omitted,
            with a warning.
        mapper: makes the model's input from a record, as in evaluation.
        class_names: the dataset's class names; None to show class numbers.
        eval_period: the period of ``EvalHook``; 0 means the end of training only.
        confidence_threshold: the lowest score of the predictions to draw.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        class_names: Sequence[str] | None,
        eval_period: int,
        confidence_threshold: float,
    ):
        # The wrapper's forward pass may wait for other processes; the module's own does not.
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.class_names = class_names
        self.eval_period = eval_period
        self.confidence_threshold = confidence_threshold
        # A test set's mapper may be random also.
        with same_random_states():
            self.scenes = read_scenes(records, mapper, class_names)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # As in EvalHook, the last iteration is left to after_train().
        periodic = self.eval_period > 0 and done % self.eval_period == 0
        if periodic and done != self.trainer.max_iter:
            self.put_pictures()

    def after_train(self) -> None:
        # Not after a run that failed.
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self.put_pictures()

    def put_pictures(self) -> None:
        with same_random_states(), inference_context(self.model), torch.no_grad():
            for scene in self.scenes:
                instances = self.model([scene.inputs])[0]["instances"].to("cpu")
                picture = self.draw(scene, instances)
                self.trainer.storage.put_image(scene.tag, np.asarray(picture).transpose(2, 0, 1))

    def draw(self, scene: Scene, instances: Instances) -> Image.Image:
        """Draw ground truth and the predictions that score enough, with captions."""
        found = instances[instances.scores >= self.confidence_threshold]
        best = f" (best: {instances.scores.max():.2f})" if len(instances) else ""
        return side_by_side(
            scene.file_name,
            (f"ground truth: {len(scene.truth.labels)}", draw_scene(scene, scene.truth)),
            (
                f"predictions that score {self.confidence_threshold:g} or more: {len(found)}{best}",
                draw_scene(scene, predicted_objects(found, self.class_names)),
            ),
        )


def build_pictures_hook(cfg: DictConfig, model: nn.Module) -> PicturesHook | None:
    """Build the hook of ``cfg.train.pictures``, with images from all over the validation set.

    Returns:
        None in all processes but the main one, without a validation set, and if
        ``cfg.train.pictures`` is missing or asks for no images.
    """
    wanted = cfg.train.get("pictures") or {}
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    if not (comm.is_main_process() and names and wanted.get("num_images", 0) > 0):
        return None
    records = instantiate(cfg.dataloader.test.dataset)
    # Only now: Detectron2 reads the class names of COCO files with the annotations.
    metadata = MetadataCatalog.get(names if isinstance(names, str) else names[0])
    return PicturesHook(
        model,
        pick_evenly(records, wanted.num_images),
        instantiate(cfg.dataloader.test.mapper),
        metadata.get("thing_classes"),
        cfg.train.eval_period,
        wanted.confidence_threshold,
    )


def pick_evenly(records: Sequence[dict], count: int) -> list[dict]:
    """Return ``count`` of the records, or all: the middle ones of equal parts."""
    count = min(count, len(records))
    return [records[(2 * part + 1) * len(records) // (2 * count)] for part in range(count)]


def read_scenes(
    records: Sequence[dict],
    mapper: Callable[[dict], dict],
    class_names: Sequence[str] | None,
) -> list[Scene]:
    """Read the images of records, without unusable ones, which a warning names."""
    scenes, failures = [], []
    for number, record in enumerate(records, start=1):
        try:
            image = Image.fromarray(read_record(record, "RGB"))
        except ImageError as error:
            failures.append(f"{printable(record['file_name'])} ({error})")
            continue
        ratio = min(HALF_WIDTH / image.width, MOST_HEIGHT / image.height)
        width, height = (max(1, round(ratio * side)) for side in image.size)
        scenes.append(
            Scene(
                tag=f"validation/{number}",
                file_name=Path(record["file_name"]).name,
                image=image.resize((width, height), Image.Resampling.BICUBIC),
                scale=(width / image.width, height / image.height),
                inputs=mapper(record),
                truth=true_objects(record, class_names),
            )
        )
    if failures:
        logger.warning(
            "%d of the %d images for pictures in TensorBoard cannot be used and are omitted: %s",
            len(failures),
            len(records),
            ", ".join(failures),
        )
    return scenes


def true_objects(record: dict, class_names: Sequence[str] | None) -> Objects:
    annotations = record.get("annotations", [])
    boxes = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in annotations
    ]
    classes = [annotation["category_id"] for annotation in annotations]
    crowds = [" (crowd)" if annotation.get("iscrowd") else "" for annotation in annotations]
    labels = [f"{class_label(c, class_names)}{crowd}" for c, crowd in zip(classes, crowds)]
    return Objects(Boxes(boxes), classes, labels)


def predicted_objects(instances: Instances, class_names: Sequence[str] | None) -> Objects:
    classes = instances.pred_classes.tolist()
    labels = [
        f"{class_label(c, class_names)} {score:.0%}"
        for c, score in zip(classes, instances.scores.tolist())
    ]
    return Objects(instances.pred_boxes, classes, labels)


def draw_scene(scene: Scene, objects: Objects) -> Image.Image:
    """Return the scene's image with objects drawn in it."""
    boxes = objects.boxes.clone()
    boxes.scale(*scene.scale)
    image = np.asarray(scene.image)
    return Image.fromarray(draw_objects(image, boxes, objects.classes, objects.labels))


def side_by_side(title: str, *halves: tuple[str, Image.Image]) -> Image.Image:
    """Join images of one height, with captions above them and a title below all."""
    font = ImageFont.load_default(CAPTION_FONT)
    widths = [max(LEAST_WIDTH, image.width) for _, image in halves]
    height = max(image.height for _, image in halves)
    total = sum(widths) + GAP * (len(halves) - 1)
    picture = Image.new("RGB", (total, height + 2 * CAPTION_HEIGHT), PAPER_COLOUR)
    draw = ImageDraw.Draw(picture)

    def write(text: str, left: int, top: int, width: int) -> None:
        middle = (left + width / 2, top + CAPTION_HEIGHT / 2)
        draw.text(middle, shorten(text, font, width), INK_COLOUR, font, anchor="mm")

    left = 0
    for width, (caption, image) in zip(widths, halves):
        write(caption, left, 0, width)
        picture.paste(image, (left + (width - image.width) // 2, CAPTION_HEIGHT))
        left += width + GAP
    write(title, 0, CAPTION_HEIGHT + height, total)
    return picture
