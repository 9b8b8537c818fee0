"""The best weights of a training run, and its end once they get no better."""

import logging
import math
from typing import Any

from detectron2.engine import hooks
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..data.catalog import dataset_names, uses_coco_metrics
from ..errors import ConfigError, SaveError, raised_in_all
from .ema import AVERAGED, EMA, WeightsFile

logger = logging.getLogger("lite_detr")

BEST = "model_best"
# Of an evaluation of boxes, and "AP-" with the name of a class.
COCO_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's ``BestCheckpointer``, which may end training, and is exact across restarts.

    It runs in all processes, which stop together. The state that a checkpoint holds is that of
    before an evaluation; a run that goes on from there evaluates again, and so decides again.
    Register it after ``EvalHook`` and after the hook that saves checkpoints.

    Args:
        model: what the metric measures: the detector, its DDP wrapper, or the averaged detector.
        output_dir: the folder for ``model_best.pth``, a file of weights.
        metric: a name in the records, such as ``bbox/AP``; more is better. An evaluation in which
            it is missing, NaN or infinite counts as one that is not better.
        eval_period: the period of ``EvalHook``.
        patience: the number of evaluations in a row without a better one that ends training; 0
            never ends it.

    Raises:
        ConfigError: the first evaluation does not measure the metric; raised in all processes.
    """

    def __init__(
        self, model: nn.Module, output_dir: str, metric: str, eval_period: int, patience: int
    ):
        super().__init__(eval_period, WeightsFile(model, output_dir), metric, file_prefix=BEST)
        self.metric = metric
        self.patience = patience
        # The evaluations since the best one.
        self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "best_metric": self.best_metric,
            "best_iter": self.best_iter,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["metric"] != self.metric:
            logger.warning(
                "train.best.metric was %s and is %s: the best starts over",
                state["metric"],
                self.metric,
            )
            return
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]
        self.waited = state["waited"]

    def _best_checking(self) -> None:
        """Compare the evaluation of this iteration; Detectron2's hook calls this when it is due."""
        improved = False
        with raised_in_all(ConfigError, SaveError):
            if comm.is_main_process() and self._is_measured():
                super()._best_checking()
                improved = self.best_iter == self.trainer.storage.iter
        # Only the main process has results.
        improved, self.best_metric, self.best_iter = comm.all_gather(
            (improved, self.best_metric, self.best_iter)
        )[0]
        if improved:
            self.waited = 0
        elif 0 < self.patience <= self.waited + 1 and self.trainer.iter < self.trainer.max_iter:
            # This evaluation is not counted: a run that is resumed here evaluates again.
            logger.info("%s; a larger train.early_stopping.patience goes on", self.summary())
            self.trainer.stop()
        else:
            self.waited += 1

    def summary(self) -> str:
        """Return why training has been stopped, in a phrase."""
        best = "never finite"
        if self.best_metric is not None:
            best = f"best at iteration {self.best_iter}"
        return (
            f"stopped early at iteration {self.trainer.iter}: {self.metric} was {best}, and the "
            f"last {self.patience} evaluations were not better"
        )

    def _is_measured(self) -> bool:
        """Tell whether the evaluation of this iteration has a finite value of the metric."""
        now = self.trainer.storage.iter
        latest = self.trainer.storage.latest()
        value, iteration = latest.get(self.metric, (math.nan, -1))
        measured = sorted(name for name, (_, at) in latest.items() if at == now and "/" in name)
        if iteration < 0 and measured:
            accepted = ", ".join(name for name in measured if "-" not in name)
            raise ConfigError(
                f"train.best.metric={self.metric}: the evaluation does not measure it, but "
                f"{accepted}. Give one of these, and continue with --resume"
            )
        if iteration == now and math.isfinite(value):
            return True
        logger.warning("%s has no finite value in this evaluation", self.metric)
        return False


def check_best(cfg: DictConfig) -> None:
    """Refuse options of ``train.best`` and ``train.early_stopping`` that cannot do what they say.

    Raises:
        ConfigError: the metric does not exist, or nothing is evaluated before the end.
    """
    metric = OmegaConf.select(cfg, "train.best.metric")
    patience = OmegaConf.select(cfg, "train.early_stopping.patience")
    if patience and not metric:
        raise ConfigError(
            f"train.early_stopping.patience={patience}: the metric that must become better is "
            "missing, such as train.best.metric=bbox/AP"
        )
    if patience and not cfg.train.eval_period:
        raise ConfigError(
            f"train.early_stopping.patience={patience}: nothing is evaluated before the end, as "
            "train.eval_period is 0: set it to a number of iterations"
        )
    if metric and uses_coco_metrics(cfg):
        _check_metric(str(metric), dataset_names(cfg, "test"), cfg.train.ema.enabled)


def _check_metric(metric: str, test_sets: list[str], averaged: bool) -> None:
    tasks = [f"{name}{{}}/bbox" for name in test_sets] if len(test_sets) > 1 else ["bbox{}"]
    endings = ("", AVERAGED) if averaged else ("",)
    tasks = [task.format(ending) for task in tasks for ending in endings]
    for task in tasks:
        name = metric.removeprefix(f"{task}/")
        if name != metric and (name in COCO_METRICS or name.startswith("AP-")):
            return
    hint = "" if averaged else f"; with train.ema.enabled=True also those of bbox{AVERAGED}"
    raise ConfigError(
        f"train.best.metric={metric}: accepted are {', '.join(f'{task}/AP' for task in tasks)}, "
        f"with {', '.join(COCO_METRICS)} or AP-CLASS at the end{hint}"
    )


def build_best_checkpointer(
    cfg: DictConfig, model: nn.Module, ema: EMA | None
) -> BestCheckpointer | None:
    """Build the hook of ``train.best`` and ``train.early_stopping``; None if both are off.

    A metric of the moving average, such as ``bbox_ema/AP``, keeps the average.
    """
    metric = OmegaConf.select(cfg, "train.best.metric")
    if not metric:
        return None
    if ema is not None and metric.partition("/")[0].endswith(AVERAGED):
        model = ema.averaged.module
    patience = OmegaConf.select(cfg, "train.early_stopping.patience") or 0
    return BestCheckpointer(model, cfg.train.output_dir, metric, cfg.train.eval_period, patience)
