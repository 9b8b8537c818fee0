"""COCO's evaluation, in which an unusable image counts as one without detections."""

import logging

from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm

logger = logging.getLogger("lite_detr")

NAMED = 5


class DetectionEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator``, told by :class:`DetectionMapper` which images are unusable.

    What a model finds on the black square that stands for such an image is thrown away, so that its
    objects count as missed: a broken file never makes a result better. A warning names the files
    and their number, which the results give as ``{"unusable": {"images": number}}``.
    """

    def reset(self):
        super().reset()
        self._unusable = []

    def process(self, inputs, outputs):
        kept = []
        for sample, output in zip(inputs, outputs):
            if "unusable" in sample:
                self._unusable.append((sample["file_name"], sample["unusable"]))
                output = output | {"instances": output["instances"][:0]}
            kept.append(output)
        super().process(inputs, kept)

    def evaluate(self, img_ids=None):
        unusable = comm.gather(self._unusable) if self._distributed else [self._unusable]
        results = super().evaluate(img_ids)
        # Only the main process has what the others gathered.
        unusable = sorted(entry for entries in unusable for entry in entries)
        if unusable:
            listed = [f"{name}: {reason}" for name, reason in unusable[:NAMED]]
            listed += ["..."] if len(unusable) > NAMED else []
            logger.warning(
                "%d image(s) are unusable and count as images without detections, whose objects "
                "are missed:%s",
                len(unusable),
                "".join(f"\n  {line}" for line in listed),
            )
            results["unusable"] = {"images": len(unusable)}
        return results
