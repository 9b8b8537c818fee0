"""Add our keys to the defaults of Detectron2's ``get_cfg()``.

Import this in programs that do not call :func:`add_lite_detr_config`, such as Detectron2's own.
"""

from detectron2.config.defaults import _C

from ..model_zoo import add_lite_detr_config

add_lite_detr_config(_C)
