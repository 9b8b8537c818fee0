"""The data flow that all detectors share: images -> tokens -> memory, and queries -> Instances."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from .attention import DeformableAttention
from .backbone.padding import batch_images
from .criterion import SetCriterion, count_objects
from .decoder import DeformableDecoder
from .heads import Predictions
from .inputs import check_images, check_objects
from .neck import MultiScaleNeck
from .position_encoding import SinePositionEncoding
from .postprocessing import detector_instances
from .scales import Scales, resize_mask
from .targets import Target


class Detector(nn.Module):
    """Base of the meta-architectures, with Detectron2's contract for models.

    Images pass the backbone and the neck; the tokens of all scales, high resolution first, pass the
    encoder; queries made from its memory pass the decoder, whose last layer predicts. A subclass
    says in :meth:`losses` how it is trained.

    Args:
        backbone: any Detectron2 backbone; its ``output_shape()`` sizes the neck.
        encoder: takes tokens ``[B, S, C]``, positions ``[B, S, C]`` and :class:`Scales`.
        queries: makes the decoder's queries from the memory, and proposals where it has two stages.
        decoder: predicts from the queries, layer by layer.
        criterion: turns predictions and targets into losses.
        embed_dim: channels ``C``.
        num_classes: foreground classes.
        num_levels: the number of scales ``L``.
        in_features: the backbone's maps to use; None takes those with strides 8, 16 and 32.
        position_encoding: of the tokens of a scale.
        pixel_mean, pixel_std: per channel, on the scale of the input's values (0 to 255).
        input_format: the order of the channels, which ``DefaultPredictor`` and demos ask for.
        score_thresh: detections scored lower are dropped.
        detections_per_image: at most so many are kept.

    Attributes:
        lazy_config: the config of the model zoo that a YAML config of the class starts from.

    Raises:
        ValueError: an attention is built for another number of scales than ``num_levels``.
    """

    lazy_config: ClassVar[str]

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: DeformableDecoder,
        criterion: SetCriterion,
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

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments that Detectron2's YAML config stands for, see :mod:`lite_detr.yacs`."""
        # The lazy configs that are read there import the detectors.
        from ..yacs.model import detector_arguments

        return detector_arguments(cfg, cls)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], num_objects: Tensor | None = None
    ) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """
        Args:
            batched_inputs: for each image a dict with ``image`` (``[3, H, W]``, ``input_format``);
                in training ``instances`` with ``gt_boxes`` and ``gt_classes``; in inference
                optionally ``height`` and ``width``, the size to give the boxes in.
            num_objects: in training, where the inputs are only a part of a batch, the number of its
                objects, see :func:`count_objects`; None counts those of the inputs.

        Returns:
            In training the losses by name, to be summed. In inference for each image
            ``{"instances": Instances}`` with ``pred_boxes``, ``scores`` and ``pred_classes``, best
            first.

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
        """The raw outputs of inference, for those who build on the model.

        Runs in evaluation mode and without gradients, whatever mode the model is in.

        Args:
            batched_inputs: see :meth:`forward`; only ``image`` is read.

        Returns:
            ``pred_logits [B, Q, num_classes]`` and ``pred_boxes [B, Q, 4]`` of the last decoder
            layer, boxes as normalised (cx, cy, w, h) of each image without its padding, and
            ``memory [B, S, C]``, the encoder's tokens.
        """
        with evaluating(self), torch.no_grad():
            memory, scales = self.encode(self.preprocess_images(batched_inputs))
            logits, boxes = self.predict(memory, scales)
        return {"pred_logits": logits, "pred_boxes": boxes, "memory": memory}

    def predict(self, memory: Tensor, scales: Scales) -> Predictions:
        """The last decoder layer's predictions in inference."""
        queries, _ = self.queries(memory, scales)
        return self.decoder(queries, memory, scales, last_only=True)[-1]

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """The weighted training losses by name, for ``num_objects`` in the batch."""
        raise NotImplementedError(f"{type(self).__name__} must say how it is trained")

    def preprocess_images(self, batched_inputs: list[dict]) -> ImageList:
        """Normalises the images and pads them at the bottom and right to one size."""
        check_images(batched_inputs, len(self.pixel_mean))
        images = [self.normalize(inputs["image"].to(self.device)) for inputs in batched_inputs]
        return batch_images(images, self.backbone)

    def normalize(self, image: Tensor) -> Tensor:
        """Pixels ``[..., 3, H, W]`` of 0 to 255 -> what the backbone takes, in the weights' dtype.

        As in the references in float32 and in units of 255: their weights see the same rounding.
        """
        mean, std = self.pixel_mean.float() / 255, self.pixel_std.float() / 255
        return ((image.float() / 255 - mean) / std).to(self.level_embed.dtype)

    def encode(self, images: ImageList) -> tuple[Tensor, Scales]:
        """Images -> memory ``[B, S, C]`` and the geometry of its tokens."""
        return self.encode_maps(self.neck(self.backbone(images.tensor)), images)

    def encode_maps(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, Scales]:
        """As :meth:`encode`, from the neck's maps ``[B, C, H_l, W_l]``."""
        pos, scales = self.locate_tokens(maps, images)
        return self.encode_tokens(maps, pos, scales), scales

    def encode_tokens(self, maps: list[Tensor], pos: Tensor, scales: Scales) -> Tensor:
        """Maps ``[B, C, H_l, W_l]`` and the positions of their cells ``[B, S, C]`` -> memory."""
        tokens = torch.cat([feature_map.flatten(2).transpose(1, 2) for feature_map in maps], dim=1)
        return self.encoder(tokens, pos, scales)

    def locate_tokens(self, maps: list[Tensor], images: ImageList) -> tuple[Tensor, Scales]:
        """Position and level encodings ``[B, S, C]`` of the maps' cells, and their geometry.

        Of the maps only shapes and dtype count.
        """
        mask, padded = padding_mask(images)
        masks = [resize_mask(mask, tuple(feature_map.shape[-2:])) for feature_map in maps]
        return self.locate_masked(masks, padded, maps[0].dtype)

    def locate_masked(
        self, masks: list[Tensor], padded: bool, dtype: torch.dtype
    ) -> tuple[Tensor, Scales]:
        """As :meth:`locate_tokens`, from the padding ``[B, H_l, W_l]`` of each map, True on it.

        Args:
            padded: whether there is any.
            dtype: of the encodings.
        """
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
        """Ground truth on the model's device, normalised by each image's own size."""
        # Before it is on a GPU, where it would say no more than that an assertion failed.
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
        """The best (query, class) pairs of each image, in the coordinates that it asks for."""
        output_sizes = [
            (inputs.get("height", height), inputs.get("width", width))
            for inputs, (height, width) in zip(batched_inputs, image_sizes)
        ]
        instances = detector_instances(
            predictions, image_sizes, output_sizes, self.score_thresh, self.detections_per_image
        )
        return [{"instances": image_instances} for image_instances in instances]


def check_levels(model: nn.Module, num_levels: int) -> None:
    """Raises a ValueError where an attention is built for another number of scales."""
    for name, module in model.named_modules():
        if isinstance(module, DeformableAttention) and module.num_levels != num_levels:
            raise ValueError(
                f"{name} is built for {module.num_levels} scales, the detector has num_levels "
                f"{num_levels}: make them agree"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with each module back in its own mode afterwards, also after an error."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def padding_mask(images: ImageList) -> tuple[Tensor, bool]:
    """``[B, H, W]`` bool, True on padding, and whether there is any (known without a device)."""
    batch, _, height, width = images.tensor.shape
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=images.tensor.device)
    for image_mask, (image_height, image_width) in zip(mask, images.image_sizes):
        image_mask[image_height:] = True
        image_mask[:, image_width:] = True
    # Images that are traced say nothing of those to come.
    padded = torch.jit.is_tracing() or any(
        size != (height, width) for size in map(tuple, images.image_sizes)
    )
    return mask, padded
