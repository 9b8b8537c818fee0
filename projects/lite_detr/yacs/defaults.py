"""``import lite_detr.yacs.defaults`` lets Detectron2's own ``get_cfg()`` know our keys.

For programs that do not call :func:`add_lite_detr_config`, such as Detectron2's own.
"""

from detectron2.config.defaults import _C

from .config import add_lite_detr_config

add_lite_detr_config(_C)
