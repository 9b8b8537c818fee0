"""The exponential moving average of a model's weights, as a hook."""

import os

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint.files import AtomicFiles
from ..errors import ConfigError, SaveError, raised_in_all

# A file of weights beside model_final.pth.
FINAL = "model_final_ema.pth"


class EMA(HookBase):
    """Averages the weights after every iteration.

    The average starts as the weights after the first iteration, and its decay grows with the
    number ``n`` of iterations: ``min(decay, (1 + n) / (10 + n))``, so that it forgets them soon.
    Buffers are copied, as they are not weights. Register the hook before those that save or
    evaluate ``averaged``. After the last iteration the average is written to
    ``model_final_ema.pth``.

    Args:
        model: a detector, or its DDP wrapper.
        decay: the share of the average that an iteration keeps in the long run, 0 to 1.
        output_dir: the folder where the main process writes.

    Attributes:
        averaged: PyTorch's averaged model; ``averaged.module`` is a copy of the detector.

    Raises:
        ConfigError: ``decay`` is out of its range.
    """

    def __init__(self, model: nn.Module, decay: float, output_dir: str):
        if not 0 <= decay <= 1:
            raise ConfigError(f"train.ema.decay must be from 0 to 1, got {decay}")
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.averaged = AveragedModel(self.model).eval().requires_grad_(False)
        self.decay = decay
        self.output_dir = output_dir

    def after_step(self) -> None:
        n = int(self.averaged.n_averaged)
        self.averaged.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        self.averaged.update_parameters(self.model)
        if self.trainer.iter + 1 == self.trainer.max_iter:
            with raised_in_all(SaveError):
                self._save()

    def _save(self) -> None:
        if comm.is_main_process():
            path = os.path.join(self.output_dir, FINAL)
            with AtomicFiles(PathManager).open(path, "wb") as file:
                torch.save({"model": self.averaged.module.state_dict()}, file)
