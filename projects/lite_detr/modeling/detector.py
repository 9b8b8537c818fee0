"""The data flow of all detectors: images -> tokens -> memory -> queries -> Instances."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from detectron2.config import configurable
from detectron2.modeling import Backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from .. import register
from ..errors import ConfigError
from .attention import DeformableAttention
from .criterion import SetCriterion, Target, count_objects
from .decoder import DeformableDecoder
from .heads import Predictions
from .inputs import batch_images, check_images, check_objects
from .layers import SinePositionEncoding
from .neck import MultiScaleNeck, extract_maps
from .postprocessing import detector_instances
from .scales import Scales, mask_from_sizes, resize_mask
from .supervision import CriteriaByOutput, check_mixed


class Detector(nn.Module):
    """Base of the meta-architectures, with Detectron2's contract for models.

    Images pass the backbone and the neck; the tokens of all scales, high resolution first, pass the
    encoder; queries made from its memory pass the decoder, whose last layer predicts. A subclass
    defines in :meth:`losses` how it is trained.

    Args:
        backbone: any Detectron2 backbone; its ``output_shape()`` sizes the neck.
        encoder: takes tokens ``[B, S, C]``, positions ``[B, S, C]`` and :class:`Scales`.
        queries: makes the decoder's queries from the memory, and proposals if it has two stages.
        decoder: predicts from the queries, layer by layer.
        criterion: turns predictions and targets into losses.
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_levels: the number of scales ``L``.
        in_features: names of the backbone's maps to use; None selects those with strides 8, 16 and
            32.
        position_encoding: encodes the tokens' positions within a scale.
        pixel_mean, pixel_std: per channel, on the scale of the input's values (0 to 255).
        input_format: the order of the channels, which ``DefaultPredictor`` and demos ask for.
        score_thresh: detections with a lower score are dropped.
        detections_per_image: the largest number of detections kept.

    Attributes:
        lazy_config: the model zoo's config that a YAML config of this class starts from.
        class_names: the names of the classes by number, which checkpoints hold; None if unknown.

    Raises:
        ConfigError: an attention is built for another number of scales than ``num_levels``, or the
            decoder and the criterion do not go together.
    """

    lazy_config: ClassVar[str]
    class_names: tuple[str, ...] | None = None

    # `from_config`, for Detectron2's YAML configs, is added in lite_detr.yacs.
    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: DeformableDecoder,
        criterion: SetCriterion | CriteriaByOutput,
        embed_dim: int = 256,
        num_classes: int = 80,
        num_levels: int = 4,
        in_features: Sequence[str] | None = None,
        position_encoding: SinePositionEncoding,
        pixel_mean: Sequence[float] = (123.675, 116.280, 103.530),
        pixel_std: Sequence[float] = (58.395, 57.120, 57.375),
        input_format: str = "RGB",
        score_thresh: float = 0.0,
        detections_per_image: int = 100,
    ):
        # Detectron2's optimizer and checkpointer now meet a detector of ours.
        register()
        super().__init__()
        self.backbone = backbone
        self.neck = MultiScaleNeck(backbone.output_shape(), in_features, embed_dim, num_levels)
        self.position_encoding = position_encoding
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        self.encoder = encoder
        self.queries = queries
        self.decoder = decoder
        self.criterion = criterion
        self.num_classes = num_classes
        self.input_format = input_format
        self.score_thresh = score_thresh
        self.detections_per_image = detections_per_image
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        check_levels(self, num_levels)
        check_mixed(decoder, criterion)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], num_objects: Tensor | None = None
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Compute the losses in training, and the detections in evaluation mode.

        Args:
            batched_inputs: a dict for each image, with ``image`` (``[3, H, W]``,
                ``input_format``); in training ``instances`` with ``gt_boxes`` and ``gt_classes``;
                in inference optionally ``height`` and ``width``, the size to scale the boxes to.
            num_objects: in training, the number of objects in the whole batch if the inputs are
                only a part of it, see :func:`count_objects`; None counts those of the inputs.

        Returns:
            In training, the losses by name, to be summed. In inference,
            ``{"instances": Instances}`` for each image, with ``pred_boxes``, ``scores`` and
            ``pred_classes``, best first.

        Raises:
            TypeError, ValueError: see :func:`check_images` and :func:`check_objects`.
            FloatingPointError: a detection's box is NaN or infinite.
        """
        images = self.preprocess_images(batched_inputs)
        memory, scales = self.encode(images)
        if self.training:
            targets = self.prepare_targets(batched_inputs, scales)
            if num_objects is None:
                num_objects = count_objects(batched_inputs, self.device)
            return self.losses(memory, scales, targets, num_objects)
        return self.postprocess(self.predict(memory, scales), batched_inputs, images.image_sizes)

    def forward_queries(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """Return the raw outputs of inference, for code that builds on the model.

        Runs in evaluation mode and without gradients, whatever mode the model is in.

        Args:
            batched_inputs: see :meth:`forward`; only ``image`` is read.

        Returns:
            ``pred_logits [B, Q, num_classes]`` and ``pred_boxes [B, Q, 4]`` of the last decoder
            layer, with boxes as normalised (cx, cy, w, h) in each image without its padding; and
            ``memory [B, S, C]``, the encoder's tokens.
        """
        with evaluating(self), torch.no_grad():
            memory, scales = self.encode(self.preprocess_images(batched_inputs))
            logits, boxes = self.predict(memory, scales)
        return {"pred_logits": logits, "pred_boxes": boxes, "memory": memory}

    def predict(self, memory: Tensor, scales: Scales) -> Predictions:
        """Return the last decoder layer's predictions."""
        queries, _ = self.queries(memory, scales)
        return self.decoder(queries, memory, scales, last_only=True)[-1]

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted training losses by name, for ``num_objects`` in the batch."""
        raise NotImplementedError(f"{type(self).__name__} must define `losses`")

    def independent_classes(self, predictions: Predictions) -> Predictions:
        """Return predictions whose logits rank by their sigmoids, as those of most detectors do."""
        return predictions

    def preprocess_images(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images and pad them at the bottom and right to one size."""
        check_images(batched_inputs, len(self.pixel_mean))
        images = [self.normalize(inputs["image"].to(self.device)) for inputs in batched_inputs]
        return batch_images(images, self.backbone)

    def normalize(self, image: Tensor) -> Tensor:
        """Normalise pixels ``[..., 3, H, W]`` of 0 to 255; the result has the weights' dtype.

        As in the references, in float32 and in units of 255: their weights see the same rounding.
        """
        mean, std = self.pixel_mean.float() / 255, self.pixel_std.float() / 255
        return ((image.float() / 255 - mean) / std).to(self.level_embed.dtype)

    def encode(self, images: ImageList) -> tuple[Tensor, Scales]:
        """Encode images: memory ``[B, S, C]`` and the geometry of its tokens."""
        tokens, pos, scales = self.make_tokens(images)
        return self.encoder(tokens, pos, scales), scales

    def make_tokens(self, images: ImageList) -> tuple[Tensor, Tensor, Scales]:
        """Return tokens and their position encodings, ``[B, S, C]`` each, and their geometry."""
        maps = extract_maps(self.backbone, self.neck, images.tensor)
        pos, scales = self.locate_tokens(maps, images)
        tokens = torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], dim=1)
        return tokens, pos, scales

    def locate_tokens(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, Scales]:
        """Return position and level encodings ``[B, S, C]`` of the maps' cells, and their geometry.

        Args:
            maps: ``[B, C, H_l, W_l]`` of each scale; only shapes and dtype matter.
            images: their sizes tell what is padding.
        """
        dtype = maps[0].dtype
        masks, padded = padding_masks(images, [feature_map.shape[-2:] for feature_map in maps])
        # Geometry stays exact in mixed precision: 16 bits cannot tell neighbouring cells apart.
        exact = dtype if dtype == torch.float64 else torch.float32
        scales = Scales.from_masks(masks, padded, exact)
        pos = torch.cat(
            [
                self.position_encoding(level_mask).to(dtype) + level_embed
                for level_mask, level_embed in zip(masks, self.level_embed)
            ],
            dim=1,
        )
        return pos, scales

    def prepare_targets(self, batched_inputs: list[dict], scales: Scales) -> list[Target]:
        """Return ground truth on the model's device, normalised by each image's own size."""
        # Checked on the host: a GPU would report no more than a failed assertion.
        for inputs in batched_inputs:
            check_objects(inputs, self.num_classes)
        return [
            Target.from_instances(inputs["instances"].to(self.device), scales.centers.dtype)
            for inputs in batched_inputs
        ]

    def postprocess(
        self,
        predictions: Predictions,
        batched_inputs: list[dict],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Instances]]:
        """Return the best (query, class) pairs of each image, in the coordinates it asks for."""
        output_sizes = [
            (inputs.get("height", height), inputs.get("width", width))
            for inputs, (height, width) in zip(batched_inputs, image_sizes)
        ]
        instances = detector_instances(
            self.independent_classes(predictions),
            image_sizes,
            output_sizes,
            self.score_thresh,
            self.detections_per_image,
        )
        return [{"instances": image_instances} for image_instances in instances]


def check_levels(model: nn.Module, num_levels: int) -> None:
    """Raise a ConfigError if an attention is built for another number of scales."""
    for name, module in model.named_modules():
        if isinstance(module, DeformableAttention) and module.num_levels != num_levels:
            raise ConfigError(
                f"{name} is built for {module.num_levels} scales, the detector has num_levels "
                f"{num_levels}: make them agree"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and each module back to its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def padding_masks(
    images: ImageList, shapes: Sequence[tuple[int, int]]
) -> tuple[list[Tensor], bool]:
    """Return the padding of maps of the images, and whether there is any.

    Args:
        images: their sizes are a list, or in exports a tensor ``[B, 2]``, which stays a variable.
        shapes: height and width of each map.

    Returns:
        ``[B, height, width]`` bool for each map, True on padding; and False if no image is padded.
    """
    if isinstance(images.image_sizes, Tensor):
        size = images.tensor.shape[-2:]
        return [mask_from_sizes(images.image_sizes, size, shape) for shape in shapes], True
    mask, padded = padding_mask(images)
    return [resize_mask(mask, tuple(shape)) for shape in shapes], padded


def padding_mask(images: ImageList) -> tuple[Tensor, bool]:
    """Return ``[B, H, W]`` bool, True on padding, and whether there is any (known on the host)."""
    batch, _, height, width = images.tensor.shape
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=images.tensor.device)
    for image_mask, (image_height, image_width) in zip(mask, images.image_sizes):
        image_mask[image_height:] = True
        image_mask[:, image_width:] = True
    # Traced images tell nothing about later ones.
    padded = torch.jit.is_tracing() or any(
        size != (height, width) for size in map(tuple, images.image_sizes)
    )
    return mask, padded
