"""Options are checked before a run begins, and compared with the checkpoint's where it goes on."""

import os
import shutil
from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf
from programs import ONE_PROCESS, TINY, TRAIN_NET, data_options, run_python
from training_runs import batch_of, make_trainer

from lite_detr.checkpoint import DetrCheckpointer, WeightsError
from lite_detr.data.digits import write_digits_dataset
from lite_detr.engine.best import check_best
from lite_detr.engine.ema import EMA
from lite_detr.engine.options import RunOptions, check_folder, check_options, check_resumed
from lite_detr.errors import ConfigError, SaveError, user_message
from lite_detr.overrides import load_config

TRAIN = {
    "output_dir": "out",
    "max_iter": 4,
    "eval_period": 0,
    "log_period": 1,
    "accumulation": 1,
    "max_bad_batches": 0,
    "checkpointer": {"period": 1, "max_to_keep": None},
    "pictures": {"num_images": 0},
    "early_stopping": {"patience": 0},
}


def train_options(folder, **changes):
    train = OmegaConf.create(TRAIN | {"output_dir": str(folder)})
    for key, value in changes.items():
        OmegaConf.update(train, key.replace("__", "."), value)
    return train


def test_options_in_range_are_accepted(tmp_path):
    check_options(train_options(tmp_path / "new" / "folder"))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_iter", 0),
        ("max_iter", 10.0),
        ("max_iter", "many"),
        ("eval_period", -1),
        ("log_period", 0),
        ("accumulation", 0),
        ("max_bad_batches", -1),
        ("checkpointer__period", 0),
        ("checkpointer__period", True),
        ("checkpointer__max_to_keep", 0),
        ("pictures__num_images", -1),
        ("early_stopping__patience", -1),
    ],
)
def test_options_out_of_range_are_named(name, value, tmp_path):
    with pytest.raises(ConfigError, match="accepted are whole numbers from") as error:
        check_options(train_options(tmp_path, **{name: value}))
    assert f"train.{name.replace('__', '.')}={value}" in str(error.value)


@pytest.mark.parametrize(
    "folder, reason",
    [
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("/proc/none", "No such file"),
        ("a\0b", "null"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named(folder, reason, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="train.output_dir=.*a folder that can be") as error:
        check_options(train_options(os.path.join(tmp_path, folder)))
    assert reason in str(error.value) and "\n" not in str(error.value)


RUNS = {
    "checkpoint": ["model_0004999.pth"],
    "weights": ["model_best.pth"],
    "records": ["metrics.json"],
    "TensorBoard": ["events.out.tfevents.1.host"],
    "all": ["last_checkpoint", "metrics.json", "model_final.pth", "log.txt"],
}


def folder_with(folder, names):
    for name in names:
        (folder / name).write_text("x")
    return str(folder)


@pytest.mark.parametrize("case", RUNS)
def test_a_run_into_the_folder_of_another_is_refused_with_the_two_ways_out(case, tmp_path):
    folder = folder_with(tmp_path, RUNS[case])
    with pytest.raises(ConfigError) as error:
        check_folder(folder, resume=False)
    for part in (f"train.output_dir={folder} holds a run", RUNS[case][0], "--resume", "another"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert check_folder(folder, resume=True)


def test_other_folders_are_free(tmp_path):
    assert not check_folder(str(tmp_path / "new"), resume=False)
    # Of a run that was refused or has failed early, and a user's own files.
    folder = folder_with(tmp_path, ["log.txt", "config.yaml", "pretrained.pth", "notes.json"])
    (tmp_path / "metrics.json").touch()
    assert not check_folder(folder, resume=False)


def test_a_job_that_torchrun_starts_again_begins_again_if_it_has_saved_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    # As with --resume, which moves the records of the first start away.
    assert check_folder(folder_with(tmp_path, ["metrics.json"]), resume=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(ConfigError, match="holds a run"):
        check_folder(str(tmp_path), resume=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match="holds a run"):
        check_folder(folder_with(tmp_path, ["model_0000099.pth"]), resume=False)


METRICS = {
    # metric, further options: part of the error, or "" if they are accepted.
    ("bbox/AP", ""): "",
    ("bbox/AP50", "train.early_stopping.patience=3"): "",
    ("bbox/AP-3", ""): "",
    ("bbox_ema/AP", "train.ema.enabled=True"): "",
    ("bbox_ema/AP", ""): "accepted are bbox/AP, with AP, AP50, .* train.ema.enabled=True",
    ("bbox/ap", ""): "train.best.metric=bbox/ap: accepted are bbox/AP",
    ("AP", ""): "accepted are bbox/AP",
    ("null", "train.early_stopping.patience=3"): "such as train.best.metric=bbox/AP",
    ("bbox/AP", "train.early_stopping.patience=3 train.eval_period=0"): "train.eval_period is 0",
    ("bbox/AP", "dataloader.test.dataset.names=[a,b]"): "accepted are a/bbox/AP, b/bbox/AP, with",
    ("b/bbox/AP", "dataloader.test.dataset.names=[a,b]"): "",
}


@pytest.mark.parametrize("metric, more", METRICS)
def test_a_metric_that_no_evaluation_measures_is_refused_before_training(metric, more):
    cfg = load_config(str(TINY), [f"train.best.metric={metric}", *more.split()])
    expected = METRICS[metric, more]
    with pytest.raises(ConfigError, match=expected) if expected else nullcontext():
        check_best(cfg)


def resume(checkpointer):
    checkpointer.resume_or_load("", resume=True)
    assert checkpointer.resumed


def trained(folder, frozen=(), optimizer=None, **options):
    """A checkpointer of a toy run of one iteration, and its trainer."""
    trainer = make_trainer([batch_of(1.0)], **options)
    model = trainer.model
    model.decoder = torch.nn.Linear(2, 2)
    parameters = [p for name, p in model.named_parameters() if name not in frozen]
    trainer.optimizer = (optimizer or torch.optim.AdamW)(parameters, lr=0.1)
    return DetrCheckpointer(model, str(folder), trainer=trainer), trainer


@pytest.mark.parametrize(
    "before, after, words",
    [
        (
            {},
            {"frozen": ["decoder.bias"]},
            ["1 of its parameters, such as decoder.bias, are frozen"],
        ),
        ({"frozen": ["decoder.bias"]}, {}, ["1, such as decoder.bias, were frozen in it"]),
        ({}, {"optimizer": torch.optim.SGD}, ["its optimizer is AdamW, and this one SGD"]),
        (
            {"frozen": ["decoder.bias"]},
            {"frozen": ["weight"]},
            ["such as weight, are frozen and 1, such as decoder.bias, were frozen"],
        ),
    ],
)
def test_an_optimizer_of_other_parameters_is_refused(before, after, words, tmp_path):
    checkpointer, trainer = trained(tmp_path, **before)
    trainer.train(0, 1)
    checkpointer.save("a", iteration=0)
    with pytest.raises(WeightsError, match="cannot be resumed with these options") as error:
        resume(trained(tmp_path, **after)[0])
    for word in words:
        assert word in str(error.value)
    resume(trained(tmp_path, **before)[0])


def test_an_older_checkpoint_without_names_is_compared_by_its_groups(tmp_path):
    checkpointer, trainer = trained(tmp_path)
    trainer.train(0, 1)
    checkpointer.save("a", iteration=0)
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    del content["trainer"]["parameter_groups"], content["trainer"]["optimizer_class"]
    torch.save(content, tmp_path / "a.pth")
    resume(trained(tmp_path)[0])
    with pytest.raises(WeightsError, match="1 groups of parameters, and this one 1 groups, or"):
        resume(trained(tmp_path, frozen=["decoder.bias"])[0])


@pytest.mark.parametrize("state", [3, None, [], {}, {"optimizer": 3}, {"optimizer": {}}])
def test_a_state_that_is_not_a_trainers_is_one_line(state, tmp_path):
    checkpointer, _ = trained(tmp_path)
    checkpointer.save("a", iteration=0)
    content = torch.load(tmp_path / "a.pth", weights_only=True) | {"trainer": state}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="hold a state of trainer that does not fit"):
        resume(trained(tmp_path)[0])


def test_options_that_differ_are_named_in_one_warning(caplog):
    cfg = {"model": {"a": 1, "f": torch.nn.ReLU}, "optimizer": {"lr": 0.1}, "train": TRAIN}
    saved = RunOptions(OmegaConf.create(cfg, flags={"allow_objects": True})).state_dict()
    assert saved["model.f"].endswith("ReLU") and "train.output_dir" not in saved
    changed = {"model": {"a": 2}, "optimizer": {"lr": 0.2}, "train": TRAIN | {"output_dir": "b"}}
    with caplog.at_level("WARNING", "lite_detr"):
        RunOptions(OmegaConf.create(cfg, flags={"allow_objects": True})).load_state_dict(saved)
        assert not caplog.messages
        RunOptions(OmegaConf.create(changed)).load_state_dict(saved)
    [message] = caplog.messages
    for part in ("3 options differ", "model.a=2 (was 1)", "optimizer.lr=0.2 (was 0.1)"):
        assert part in message
    assert "model.f=not set" in message


def test_a_run_that_would_do_less_than_it_has_done_is_refused(tmp_path):
    check_resumed({}, 3, train_options(tmp_path))
    with pytest.raises(ConfigError, match="train.max_iter=4.* has 5 iterations already"):
        check_resumed({}, 4, train_options(tmp_path))


def test_an_average_that_would_be_dropped_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="train.ema.enabled=False.* moving average"):
        check_resumed({"ema": {}}, 3, train_options(tmp_path))


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_trainer([], accumulation=0),
        lambda: make_trainer([], precision="fp16"),
        lambda: EMA(torch.nn.Linear(1, 1), 2, ""),
    ],
)
def test_what_is_out_of_range_is_an_error_of_the_user(make):
    with pytest.raises(ConfigError) as error:
        make()
    assert user_message(error.value)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """``run(*options)``: a program that ends, with its last line; a checkpoint is in ``folder``."""
    root = tmp_path_factory.mktemp("data")
    write_digits_dataset(root, num_train=3, num_val=1)

    def start(*options):
        common = [*data_options(root), "train.eval_period=0", "train.pictures.num_images=0"]
        flags = [option for option in options if "=" not in option]
        changes = [option for option in options if "=" in option]
        return run_python(TRAIN_NET, *ONE_PROCESS, "--config-file", TINY, *flags, *common, *changes)

    start.folder = tmp_path_factory.mktemp("run") / "out"
    first = start(f"train.output_dir={start.folder}", "train.ema.enabled=True")
    assert first.returncode == 0, first.stderr[-3000:]
    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, words",
    [
        (["train.max_iter=1"], ["train.max_iter=1", "2 iterations"]),
        (["train.max_iter=4"], ["train.ema.enabled=False"]),
        (["train.max_iter=4", "model.backbone.freeze_at=5"], ["are frozen"]),
        (["train.max_iter=4", "model.decoder.heads.num_layers=1"], ["no place for"]),
        (["train.max_iter=4", "model.decoder.heads.num_layers=3"], ["lack"]),
        (["train.max_iter=4", "model.embed_dim=64"], ["do not fit the config"]),
        (["train.checkpointer.period=0"], ["train.checkpointer.period=0"]),
    ],
)
def test_resuming_with_other_options_is_one_line(options, words, run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    result = run("--resume", f"train.output_dir={folder}", *options)
    assert result.returncode == 1 and "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr.strip().splitlines()[-1]
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before


@pytest.mark.slow
def test_fewer_layers_are_refused_in_evaluation(run):
    weights = f"train.init_checkpoint={run.folder}/model_final.pth"
    result = run("--eval-only", weights, "model.decoder.heads.num_layers=1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "no place for" in result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_other_precision_is_said_and_garbage_in_the_records_is_no_obstacle(run, tmp_path):
    folder = shutil.copytree(run.folder, tmp_path / "copy")
    (folder / "metrics.json").write_bytes(b"\xff\x00garbage\n{]\n" + b"[" * 5000)
    (folder / "last_checkpoint").unlink()
    options = ["train.ema.enabled=True", "train.amp.enabled=True", "train.max_iter=3"]
    result = run("--resume", f"train.output_dir={folder}", *options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "train.amp.enabled=True (was False)" in result.stdout
    assert f"there is no {folder}/last_checkpoint. Going on from" in result.stdout
    assert (folder / "model_0000002.pth").exists() or (folder / "model_final.pth").exists()
