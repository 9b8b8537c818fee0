"""Deformable DETR: the meta-architecture."""

from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from .criterion import SetCriterion
from .decoder import DeformableDecoder
from .detector import Detector
from .heads import Predictions
from .scales import Scales
from .targets import Target


@META_ARCH_REGISTRY.register()
class DeformableDETR(Detector):
    """Deformable DETR (arXiv 2010.04159), with the full or an interleaved encoder.

    Its three forms are compositions: single-stage is :class:`LearnedQueries` and a decoder with
    shared heads that does not refine; iterative refinement turns that on, with heads of their own
    for each layer; two-stage takes :class:`TwoStageQueries` besides.

    Args:
        queries: makes the decoder's queries from the memory, and proposals where it has two stages.
        decoder: predicts from the queries, layer by layer.
        criterion: turns predictions and targets into losses.
        **detector: see :class:`Detector`.
    """

    def __init__(
        self,
        *,
        queries: nn.Module,
        decoder: DeformableDecoder,
        criterion: SetCriterion,
        **detector,
    ):
        super().__init__(**detector)
        self.queries = queries
        self.decoder = decoder
        self.criterion = criterion

    def predict(self, memory: Tensor, scales: Scales) -> Predictions:
        queries, _ = self.queries(memory, scales)
        return self.decoder(queries, memory, scales)[-1]

    def losses(self, memory: Tensor, scales: Scales, targets: list[Target]) -> dict[str, Tensor]:
        queries, proposals = self.queries(memory, scales)
        *auxiliary, last = self.decoder(queries, memory, scales)
        outputs = {"": last} | {f"_{layer}": layer_out for layer, layer_out in enumerate(auxiliary)}
        losses = self.criterion(outputs, targets)
        if proposals is not None:
            # Proposals only tell objects from background: all objects are of the first class.
            agnostic = [target._replace(labels=target.labels * 0) for target in targets]
            losses |= self.criterion({"_enc": proposals}, agnostic)
        return losses
