"""The exponential moving average of a model's weights, as a hook."""

from typing import Any

from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import DetrCheckpointer
from ..errors import ConfigError, SaveError, raised_in_all

# A file of weights beside model_final.pth.
FINAL = "model_final_ema"
# The end of a task's or a test set's name in the results of the average.
AVERAGED = "_ema"


class WeightsFile(DetrCheckpointer):
    """Saves weights alone, in a file from which no run is resumed."""

    def save(self, name: str, **kwargs: Any) -> None:
        """See :meth:`DetrCheckpointer.save`; an ``iteration`` would make it a checkpoint."""
        super().save(name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Leave the tag with the last checkpoint of the run."""


class EMA(HookBase):
    """Averages the weights after every iteration.

    The average starts as the weights after the first iteration, and its decay grows with the
    number ``n`` of iterations: ``min(decay, (1 + n) / (10 + n))``, so that it forgets them soon.
    Buffers are copied, as they are not weights. Register the hook before those that save or
    evaluate ``averaged``. After the last iteration the average is written to
    ``model_final_ema.pth``. The trainer must be ours, which may stop early.

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
        self.file = WeightsFile(self.averaged.module, output_dir)

    def after_step(self) -> None:
        n = int(self.averaged.n_averaged)
        self.averaged.multi_avg_fn = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        self.averaged.update_parameters(self.model)
        if self.trainer.iter + 1 == self.trainer.max_iter:
            self._save()

    def after_train(self) -> None:
        if self.trainer.stopped:
            self._save()

    def _save(self) -> None:
        # Only the main process writes.
        with raised_in_all(SaveError):
            self.file.save(FINAL)
