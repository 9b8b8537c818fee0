"""The keys that the detectors add to Detectron2's yacs config."""

from detectron2.config import CfgNode


def add_lite_detr_config(cfg: CfgNode) -> None:
    """Adds ``MODEL.DETR``, the options of our backbones and ``SOLVER.LR_FACTORS`` to a config.

    Nothing else changes. None and empty stand for what the lazy configs say, so that each default
    is written there alone. A second call does nothing.

    Raises:
        ValueError: the config has a ``MODEL.DETR`` of another project.
    """
    if "DETR" in cfg.MODEL:
        if "ENCODER" in cfg.MODEL.DETR:
            return
        raise ValueError(
            f"the config has a MODEL.DETR of another project, with {list(cfg.MODEL.DETR)}: call "
            "add_lite_detr_config on a config without it, such as a fresh get_cfg()"
        )

    cfg.MODEL.DETR = CfgNode()
    # The lazy config whose `model` the detector is, a file or a name of the model zoo; empty for
    # that of MODEL.META_ARCHITECTURE, which is DeformableDETR, DINO or HDETR.
    cfg.MODEL.DETR.DETECTOR = ""
    # "full", or an interleaved encoder in the paper's notation, such as "H3L1-(2+1)x3".
    cfg.MODEL.DETR.ENCODER = ""
    # "deformable" or "key_aware", in the encoder and in the decoder.
    cfg.MODEL.DETR.ATTENTION = ""
    cfg.MODEL.DETR.NUM_CLASSES = None
    cfg.MODEL.DETR.NUM_QUERIES = None
    # The number of scales.
    cfg.MODEL.DETR.NUM_LEVELS = None
    # The backbone's maps, fine to coarse; None for those with strides 8, 16 and 32.
    cfg.MODEL.DETR.IN_FEATURES = None
    # Detections scored lower are dropped.
    cfg.MODEL.DETR.SCORE_THRESH_TEST = None
    # None for TEST.DETECTIONS_PER_IMAGE.
    cfg.MODEL.DETR.DETECTIONS_PER_IMAGE = None

    # The arguments of TimmBackbone and TorchvisionBackbone, where MODEL.BACKBONE.NAME is one.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.MODEL_NAME = None
    cfg.MODEL.TIMM.OUT_STRIDES = None
    cfg.MODEL.TIMM.PRETRAINED = None
    cfg.MODEL.TIMM.WEIGHTS = None
    cfg.MODEL.TIMM.FROZEN_NORM = None
    cfg.MODEL.TIMM.FROZEN_STRIDE = None
    cfg.MODEL.TIMM.SIZE_DIVISIBILITY = None
    cfg.MODEL.TIMM.OPTIONS = CfgNode(new_allowed=True)
    cfg.MODEL.TORCHVISION = CfgNode()
    cfg.MODEL.TORCHVISION.MODEL_NAME = None
    cfg.MODEL.TORCHVISION.OUT_STRIDES = None
    cfg.MODEL.TORCHVISION.WEIGHTS = None
    cfg.MODEL.TORCHVISION.RETURN_NODES = None
    cfg.MODEL.TORCHVISION.FROZEN_NORM = None
    cfg.MODEL.TORCHVISION.FROZEN_STRIDE = None
    cfg.MODEL.TORCHVISION.SIZE_DIVISIBILITY = None

    # Pairs of a part of parameter names and the factor of their learning rate, of which the first
    # that fits counts; None for those of configs/common/optimizer.py.
    cfg.SOLVER.LR_FACTORS = None
