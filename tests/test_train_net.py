"""train_net.py end to end on a tiny model and dataset."""

import json

import pytest
import torch
from programs import ONE_PROCESS, TINY, TRAIN_NET, data_options, run_program
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lite_detr import hub, ops
from lite_detr.checkpoint.release_file import read_release
from lite_detr.data.digits import write_digits_dataset


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits_dataset(root, num_train=4, num_val=2)
    return root


def train_net(*arguments, config=TINY):
    return run_program(TRAIN_NET, *ONE_PROCESS, "--config-file", config, *arguments)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The output folder of a finished training of two iterations."""
    output = tmp_path_factory.mktemp("trained")
    options = ["train.safetensors=True", f"train.output_dir={output}"]
    run = train_net(*data_options(digits), *options)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "AP50" in run.stdout
    # Slow operators are to be seen in a log.
    assert f"{ops.backend('cpu')} operators run on cpu" in run.stdout
    return output


def records(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_training_writes_losses_evaluation_and_weights(trained):
    losses = [record["total_loss"] for record in records(trained) if "total_loss" in record]
    assert len(losses) == 2
    assert all(0 < loss < 1e3 for loss in losses)
    assert any("bbox/AP50" in record for record in records(trained))
    weights = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    # The class count is that of the dataset's categories, not the config's 80.
    assert weights["decoder.heads.class_embed.0.weight"].shape == (10, 32)


def test_a_safetensors_file_is_written_and_read_on_request(trained, digits):
    path = trained / "model_final.safetensors"
    assert read_release(str(path)).class_names == [str(digit) for digit in range(10)]
    weights = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    loaded = hub.load(str(path), device="cpu").state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in weights.items())


def pictures(output):
    """The iterations of which TensorBoard has pictures, by name."""
    events = EventAccumulator(str(output), size_guidance={"images": 0}).Reload()
    names = events.Tags()["images"]
    return {name: [picture.step for picture in events.Images(name)] for name in names}


def test_training_ends_with_pictures_of_the_validation_images(trained):
    # Four are wanted, and there are two.
    assert pictures(trained) == {"validation/1": [2], "validation/2": [2]}


@pytest.mark.parametrize("optimize", [[], ["--optimize", "float32"]])
def test_evaluation_of_the_trained_weights_repeats_its_result(trained, digits, optimize):
    run = train_net(
        "--eval-only",
        *optimize,
        *data_options(digits, "val"),
        f"train.init_checkpoint={trained}/model_final.pth",
        f"train.output_dir={trained}/eval",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    last = [line for line in run.stdout.splitlines() if "copypaste" in line][-1]
    final = next(record for record in reversed(records(trained)) if "bbox/AP50" in record)
    assert float(last.rsplit(" ", 1)[1].split(",")[1]) == pytest.approx(
        final["bbox/AP50"], abs=1e-4
    )


def test_resume_goes_on_behind_the_last_iteration(trained, digits):
    run = train_net(
        "--resume", *data_options(digits), f"train.output_dir={trained}", "train.max_iter=3"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    iterations = [r["iteration"] for r in records(trained) if "total_loss" in r]
    assert iterations == [0, 1, 2]


def test_two_processes_train_and_evaluate(digits, tmp_path):
    run = train_net(
        "--num-gpus", "2", *data_options(digits), f"train.output_dir={tmp_path}", "train.max_iter=1"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert any("bbox/AP50" in record for record in records(tmp_path))
    assert pictures(tmp_path) == {"validation/1": [1], "validation/2": [1]}


def test_fine_tuning_with_other_classes_keeps_the_body(trained, tmp_path, digits):
    annotations = {}
    for split in ("train", "val"):
        content = json.loads((digits / f"{split}.json").read_text())
        content["categories"] = [{"id": 1, "name": "digit"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        annotations[split] = tmp_path / f"{split}.json"
        annotations[split].write_text(json.dumps(content))
    run = train_net(
        *data_options(digits),
        f"data.train_json={annotations['train']}",
        f"data.val_json={annotations['val']}",
        f"train.init_checkpoint={trained}/model_final.pth",
        f"train.output_dir={tmp_path}/out",
        "optimizer.lr=0",
        "train.max_iter=1",
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "for 10 classes, the model has 1: its class heads are re-initialised" in run.stdout
    before = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    after = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    name = "encoder.layers.0.self_attn.value_proj.weight"
    # Without a learning rate AdamW still multiplies by 1 - 0 * weight_decay, which is 1.
    assert torch.equal(before[name], after[name])


ERRORS = {
    "missing config": (["x=1"], "no_such_config.py", ["no_such_config.py", "model zoo"]),
    "misspelt key": (["train.max_itr=1"], TINY, ["train.max_itr", "did you mean train.max_iter?"]),
    "unregistered dataset": (
        ["dataloader.train.dataset.names=coco_2017_trian"],
        TINY,
        ["coco_2017_trian", "coco_2017_train"],
    ),
    "dataset not there": (
        ["dataloader.train.dataset.names=digits_train", "model.num_classes=10"],
        TINY,
        ["digits_train", "train.json", "DETECTRON2_DATASETS"],
    ),
    "half of a dataset": (["data.train_json=a.json"], TINY, ["data.val_json"]),
    "augmentation of tests in training": (
        ["dataloader.test_aug.enabled=True"],
        TINY,
        ["not for training", "dataloader.test_aug.enabled=False"],
    ),
    "evaluation without weights": (None, TINY, ["needs weights", "train.init_checkpoint"]),
    "weights that are not there": (
        ["train.init_checkpoint=no_such.pth"],
        TINY,
        ["no_such.pth"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_gets_one_clear_line(case, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    options, config, words = ERRORS[case]
    if case.startswith("weights"):
        options = [*data_options(digits), *options]
    if options is None:
        options = ["--eval-only", *data_options(digits)]
    run = train_net(*options, f"train.output_dir={tmp_path}/out", config=config)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    line = run.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_weights_for_other_classes_are_refused_in_evaluation(trained, digits, tmp_path):
    content = json.loads((digits / "val.json").read_text())
    content["categories"].append({"id": 11, "name": "ten"})
    (tmp_path / "val.json").write_text(json.dumps(content))
    run = train_net(
        "--eval-only",
        *data_options(digits, "val"),
        f"data.val_json={tmp_path}/val.json",
        f"train.init_checkpoint={trained}/model_final.pth",
        f"train.output_dir={tmp_path}/out",
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1] == (
        f"error: weights {trained}/model_final.pth are for 10 classes, the model has 11: "
        "set model.num_classes=10"
    )
