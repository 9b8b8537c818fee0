"""W&B and MLflow, offline. Their tests are skipped where they are not installed."""

import json

import numpy as np
import pytest
from detectron2.utils.events import EventStorage
from omegaconf import OmegaConf

from lite_detr import model_zoo
from lite_detr.engine import trackers
from lite_detr.errors import ConfigError, MissingPackageError

PICTURE = np.zeros((3, 8, 6), dtype=np.uint8)
PICTURE[0] = 255


class Recorder(trackers.TrackerWriter):
    def __init__(self):
        super().__init__()
        self.sent = []

    def send_scalars(self, scalars, iteration):
        self.sent.append((iteration, dict(scalars)))

    def send_picture(self, name, image, iteration):
        self.sent.append((iteration, name, image.shape, image[0, 0].tolist()))


def train(writer, start=0):
    """Three iterations, an evaluation in the second, and a picture."""
    with EventStorage(start) as storage:
        for iteration in range(start, start + 3):
            storage.iter = iteration
            storage.put_scalar("loss_ce", float(iteration))
            if iteration == start + 1:
                storage.put_scalar("bbox/AP-50% (crowd)", 0.5, smoothing_hint=False)
                storage.put_image("validation/1", PICTURE)
            writer.write()
            storage.clear_images()


def make_config(folder, **options):
    config = OmegaConf.create({"train": model_zoo.get_config("common/train.py").train})
    config.train.output_dir = str(folder)
    OmegaConf.save(config, folder / "config.yaml")
    for name, value in options.items():
        OmegaConf.update(config, f"train.trackers.{name}", value)
    return config


def test_each_value_is_sent_once_with_its_iteration():
    writer = Recorder()
    train(writer)
    assert writer.sent == [
        (0, {"loss_ce": 0.0}),
        (1, {"loss_ce": 0.5, "bbox/AP-50% (crowd)": 0.5}),
        (1, "validation/1", (8, 6, 3), [255, 0, 0]),
        (2, {"loss_ce": 1.0}),
    ]


def test_nothing_is_tracked_by_default(tmp_path):
    assert trackers.build_trackers(make_config(tmp_path)) == []


def test_a_missing_package_and_a_folder_elsewhere_are_refused(tmp_path, monkeypatch):
    config = make_config(tmp_path, wandb={"project": "digits"})
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"train.trackers.wandb.project needs wandb"):
        trackers.check_trackers(config.train)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    trackers.check_trackers(config.train)
    config.train.output_dir = "s3://bucket/run"
    with pytest.raises(ConfigError, match="a folder on this machine"):
        trackers.check_trackers(config.train)


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="W&B is not installed")
    config = make_config(tmp_path, wandb={"project": "digits", "mode": "offline"})
    for start in (0, 3):
        (writer,) = trackers.build_trackers(config)
        train(writer, start)
        writer.close()
    name = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    files = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    content = b"".join(file.read_bytes() for file in files)
    for text in (b"loss_ce", b"bbox/AP-50% (crowd)", b"train.ema.decay", b"digits"):
        assert text in content, text
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/validation/*.png"))


def test_mlflow_in_a_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")
    pytest.importorskip("sqlalchemy", reason="mlflow-skinny alone keeps no runs in files")
    monkeypatch.chdir(tmp_path)  # where MLflow puts pictures
    uri = "sqlite:///mlflow.db"
    config = make_config(tmp_path, mlflow={"experiment": "digits", "uri": uri})
    for start in (0, 3):
        (writer,) = trackers.build_trackers(config)
        train(writer, start)
        writer.close()
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("digits").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    history = client.get_metric_history(run.info.run_id, "loss_ce")
    assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == [
        (0, 0.0),
        (1, 0.5),
        (2, 1.0),
        (3, 3.0),
        (4, 3.5),
        (5, 4.0),
    ]
    assert run.data.metrics["bbox/AP-50_ _crowd_"] == 0.5
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "config.yaml",
        "validation",
    }
