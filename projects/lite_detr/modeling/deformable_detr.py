"""Deformable DETR: the meta-architecture."""

from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from .criterion import Target, class_agnostic
from .detector import Detector
from .heads import by_layer
from .scales import Scales


@META_ARCH_REGISTRY.register()
class DeformableDETR(Detector):
    """Deformable DETR (arXiv 2010.04159), with the full or an interleaved encoder.

    Its three forms are compositions. Single-stage has :class:`LearnedQueries`, and a decoder with
    shared heads that does not refine; iterative refinement has a decoder that refines, with
    separate heads for each layer; two-stage also has :class:`TwoStageQueries`. The arguments are
    those of :class:`Detector`.
    """

    lazy_config = "common/models/deformable_detr.py"

    def losses(
        self, memory: Tensor, scales: Scales, targets: list[Target], num_objects: Tensor
    ) -> dict[str, Tensor]:
        """Return ``loss_ce``, ``loss_bbox`` and ``loss_giou``.

        Those of earlier layers end in ``_0``, ``_1`` and so on, those of the proposals in ``_enc``.
        """
        queries, proposals = self.queries(memory, scales)
        outputs = by_layer(self.decoder(queries, memory, scales))
        losses = self.criterion(outputs, targets, num_objects)
        if proposals is not None:
            losses |= self.criterion({"_enc": proposals}, class_agnostic(targets), num_objects)
        return losses
