"""The end of a training run: its results, its weights, and the commands that use them."""

import os
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig
from tabulate import tabulate

from ..data.catalog import dataset_names
from .best import BEST, BestCheckpointer
from .trainer import Trainer

# Of the results of one evaluation, in columns.
MAX_COLUMNS = 8


def summarize(cfg: DictConfig, trainer: Trainer, best: BestCheckpointer | None) -> str:
    """Return the last evaluation as a table, the files of weights, and three commands to go on.

    Args:
        cfg: the config of the run.
        trainer: the trainer, after its run.
        best: the hook that kept the best weights.
    """
    if trainer.stopped:
        lines = [f"Training {best.summary()}"]
    else:
        lines = [f"Training is complete: {trainer.max_iter} iterations"]
    lines += results_table(trainer.storage.latest())
    folder = str(cfg.train.output_dir)
    weights = os.path.join(folder, "model_final.pth")
    if best is not None and best.best_metric is not None:
        last, weights = weights, os.path.join(folder, f"{BEST}.pth")
        lines.append(f"Best {best.metric}: {best.best_metric:.3f}, at iteration {best.best_iter}")
        lines.append(f"Weights: {weights}; those of the last iteration: {last}")
    else:
        lines.append(f"Weights: {weights}")
    lines.append("Next, evaluate them again, look at predictions, and export:")
    lines += [f"  {command}" for command in next_commands(cfg, folder, weights)]
    return "\n".join(lines)


def results_table(latest: Mapping[str, tuple[float, int]]) -> list[str]:
    """Return the lines of a table of the last evaluation; none if nothing was evaluated.

    Args:
        latest: ``{"bbox/AP": (value, iteration), ...}``, the scalars of Detectron2's storage.
    """
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    last = max((at for name, (_, at) in latest.items() if "/" in name), default=None)
    for name, (value, iteration) in latest.items():
        task, _, metric = name.rpartition("/")
        # Results of single classes stand in the log.
        if task and iteration == last and "-" not in name:
            rows[task][metric] = value
    tables = defaultdict(list)
    for task, row in rows.items():
        tables[tuple(row)[:MAX_COLUMNS]].append((task, *list(row.values())[:MAX_COLUMNS]))
    return [
        tabulate(table, ("", *metrics), tablefmt="pipe", floatfmt=".3f", numalign="right")
        for metrics, table in tables.items()
    ]


def next_commands(cfg: DictConfig, folder: str, weights: str) -> list[str]:
    """Return three commands, which find all options of the run in its ``config.yaml``."""
    config = ["--config-file", os.path.join(folder, "config.yaml"), "--weights", weights]
    roots = [MetadataCatalog.get(name).get("image_root") for name in dataset_names(cfg, "test")]
    images = next(filter(None, roots), "IMAGES")
    evaluation, pictures, file = (
        os.path.join(folder, name) for name in ("eval", "predictions", "detector.onnx")
    )
    commands = [
        ["evaluate", *config, f"train.output_dir={evaluation}"],
        ["predict", *config, "--input", images, "--output", pictures],
        ["export", *config, "--format", "onnx", "--output", file],
    ]
    return [shlex.join([*program(), *command]) for command in commands]


def program() -> list[str]:
    """Return the beginning of a command that starts this package's programs from here."""
    if shutil.which("lite-detr"):
        return ["lite-detr"]
    python = Path(sys.executable)
    if python.is_relative_to(os.getcwd()):
        python = python.relative_to(os.getcwd())
    return [str(python), "-m", "lite_detr"]
