"""The small detector of ``tests/helpers/configs/tiny.py``, where scripts in reports look for it."""

from ..helpers.configs.tiny import data, dataloader, lr_multiplier, model, optimizer, train

__all__ = ["data", "dataloader", "lr_multiplier", "model", "optimizer", "train"]
