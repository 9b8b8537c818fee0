"""Experiment trackers, W&B and MLflow, as Detectron2's event writers.

They get what TensorBoard gets, scalars and pictures, and the config. A resumed run stays the same
run in the tracker: its name there is in ``trackers.json`` in ``train.output_dir``.
"""

import json
import re
import sys
import time
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils.events import EventWriter, get_event_storage
from omegaconf import DictConfig, OmegaConf

from ..errors import ConfigError, MissingPackageError
from .options import flatten

# Each tracker's package, and the option of ``train.trackers`` that turns it on.
TRACKERS = {"wandb": "project", "mlflow": "experiment"}
# Iterations that Detectron2's writers take medians over.
WINDOW = 20
RUNS = "trackers.json"


def check_trackers(train: DictConfig) -> None:
    """Refuse trackers that could not write, before a run begins.

    Raises:
        MissingPackageError: a tracker's package is not installed.
        ConfigError: ``train.output_dir`` is not on this machine.
    """
    for name in enabled_trackers(train):
        option = f"train.trackers.{name}.{TRACKERS[name]}"
        if find_spec(name) is None:
            raise MissingPackageError(
                f"{option} needs {name}, which is not installed: run `pip install "
                "'lite-detr[trackers]'`, or set it to null"
            )
        if "://" in str(train.output_dir):
            raise ConfigError(
                f"{option} keeps the run's name in train.output_dir, which is {train.output_dir}: "
                "give a folder on this machine, or set it to null"
            )


def enabled_trackers(train: DictConfig) -> list[str]:
    """Return the names of the trackers that the config turns on."""
    return [
        name
        for name, option in TRACKERS.items()
        if OmegaConf.select(train, f"trackers.{name}.{option}") is not None
    ]


def build_trackers(cfg: DictConfig) -> list[EventWriter]:
    """Return the writers of the trackers that ``cfg.train.trackers`` turns on.

    They must come before TensorBoard's, which clears the pictures. For the main process only.
    """
    folder = Path(cfg.train.output_dir)
    # Values that only Python has, such as classes, go as their names.
    options = dict(flatten(OmegaConf.to_container(cfg, resolve=False)))
    kinds = {"wandb": WandbWriter, "mlflow": MLflowWriter}
    return [
        kinds[name](folder, options, **cfg.train.trackers[name])
        for name in enabled_trackers(cfg.train)
    ]


class TrackerWriter(EventWriter):
    """Base of the trackers' writers: collects what is new since the last time."""

    def __init__(self) -> None:
        self.written = -1

    def write(self) -> None:
        """Send the scalars and pictures that are new."""
        storage = get_event_storage()
        scalars: dict[int, dict[str, float]] = {}
        for name, (value, iteration) in storage.latest_with_smoothing_hint(WINDOW).items():
            if iteration > self.written:
                scalars.setdefault(iteration, {})[name] = float(value)
        for iteration in sorted(scalars):
            self.send_scalars(scalars[iteration], iteration)
            self.written = iteration
        # There is no public name for the pictures; Detectron2's own writer also takes them there.
        for name, image, iteration in storage._vis_data:
            self.send_picture(name, np.ascontiguousarray(image.transpose(1, 2, 0)), iteration)

    def send_scalars(self, scalars: Mapping[str, float], iteration: int) -> None:
        raise NotImplementedError

    def send_picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Send an image ``[H, W, 3]``, uint8 in RGB."""
        raise NotImplementedError


class WandbWriter(TrackerWriter):
    """Writes a run to W&B.

    Args:
        folder: the run's ``output_dir``, where W&B also keeps its files.
        options: the config, flat.
        project: the project in W&B.
        mode: ``online``, ``offline`` (``wandb sync`` sends the run later) or None, which leaves it
            to W&B's settings.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, str], project: str, mode: str | None = None
    ):
        import wandb

        super().__init__()
        self.image_class = wandb.Image
        self.run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            id=recall_run(folder, "wandb") or remember_run(folder, "wandb", uuid.uuid4().hex),
            resume="allow",
            mode=mode,
            config=dict(options),
        )

    def send_scalars(self, scalars: Mapping[str, float], iteration: int) -> None:
        """See :class:`TrackerWriter`; W&B drops iterations that it has already."""
        self.run.log(dict(scalars), step=iteration)

    def send_picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """See :class:`TrackerWriter`."""
        self.run.log({name: self.image_class(image)}, step=iteration)

    def close(self) -> None:
        """Finish the run, as failed while an error passes."""
        self.run.finish(exit_code=int(sys.exc_info()[0] is not None))


class MLflowWriter(TrackerWriter):
    """Writes a run to MLflow.

    Args:
        folder: the run's ``output_dir``.
        options: the config, flat; MLflow gets ``config.yaml`` of the folder.
        experiment: the experiment in MLflow, which is created if there is none of the name.
        uri: the tracking store, ``sqlite:///FILE`` or a server's address; None leaves it to
            MLflow's settings.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, str], experiment: str, uri: str | None = None
    ):
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        super().__init__()
        self.metric_class = Metric
        self.client = MlflowClient(uri)
        self.run_id = recall_run(folder, "mlflow")
        if self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
            return
        found = self.client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self.client.create_experiment(experiment)
        run = self.client.create_run(number, run_name=folder.name)
        self.run_id = remember_run(folder, "mlflow", run.info.run_id)
        config = folder / "config.yaml"
        if config.is_file():
            self.client.log_artifact(self.run_id, str(config))

    def send_scalars(self, scalars: Mapping[str, float], iteration: int) -> None:
        """See :class:`TrackerWriter`."""
        now = int(time.time() * 1000)
        # MLflow refuses other characters, which names of classes may have.
        metrics = [
            self.metric_class(re.sub(r"[^\w\-. /]", "_", name), value, now, iteration)
            for name, value in scalars.items()
        ]
        self.client.log_batch(self.run_id, metrics=metrics)

    def send_picture(self, name: str, image: np.ndarray, iteration: int) -> None:
        """See :class:`TrackerWriter`."""
        self.client.log_image(self.run_id, image, f"{name}/{iteration:07d}.png")

    def close(self) -> None:
        """Finish the run, as failed while an error passes."""
        failed = sys.exc_info()[0] is not None
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def recall_run(folder: Path, tracker: str) -> str | None:
    """Return the run's name in a tracker, if it has one."""
    return read_runs(folder).get(tracker)


def remember_run(folder: Path, tracker: str, name: str) -> str:
    """Keep and return the run's name in a tracker."""
    (folder / RUNS).write_text(json.dumps(read_runs(folder) | {tracker: name}))
    return name


def read_runs(folder: Path) -> dict[str, Any]:
    file = folder / RUNS
    return json.loads(file.read_text()) if file.is_file() else {}
