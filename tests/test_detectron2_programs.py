"""Detectron2's own programs, each in a process of its own, run with our configs.

They are those beside the installed package: in its redistribution, or in a checkout of upstream,
which also has the demo. Nothing in them is changed but one line at their top, which those need that
read YAML: ``import lite_detr.yacs.defaults``.
"""

import json
import os
from pathlib import Path

import detectron2.data.build
import pytest
import torch
from programs import ROOT, data_options, run_program

from lite_detr.data.digits import write_digits_dataset

DETECTRON2 = Path(detectron2.__file__).parents[1]
YAML, LAZY = "tests/helpers/configs/tiny.yaml", "tests/helpers/configs/tiny.py"


class Programs:
    """Runs programs on a small dataset in a folder."""

    def __init__(self, folder):
        self.folder = folder
        write_digits_dataset(folder / "datasets" / "digits", num_train=4, num_val=2)

    def run(self, name, *arguments, register=True):
        source = DETECTRON2 / name
        if not source.is_file():
            pytest.skip(f"this Detectron2 comes without {name}")
        program = self.folder / source.name
        line = "import lite_detr.yacs.defaults\n" if register else ""
        program.write_text(line + source.read_text())
        return self.run_file(program, *arguments)

    def run_file(self, program, *arguments):
        run = run_program(
            *(program, *arguments),
            cwd=ROOT,
            PYTHONPATH=os.pathsep.join([str(ROOT / "projects"), str(DETECTRON2)]),
            DETECTRON2_DATASETS=str(self.folder / "datasets"),
        )
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
        return run.stdout + run.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return Programs(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def trained(programs):
    """The output folder of ``tools/train_net.py`` after two iterations."""
    output = programs.folder / "trained"
    text = programs.run("tools/train_net.py", "--config-file", YAML, "OUTPUT_DIR", output)
    assert "Evaluation results for digits_val" in text
    return output


def losses(output):
    """The losses of the last iteration."""
    records = map(json.loads, (output / "metrics.json").read_text().splitlines())
    record = [record for record in records if "total_loss" in record][-1]
    return {key: value for key, value in record.items() if "loss" in key}


def test_train_net_trains_as_ours_does_from_the_lazy_config(programs, trained):
    """The losses of the second iteration, so after a step of the same optimizer."""
    output = programs.folder / "ours"
    digits = programs.folder / "datasets" / "digits"
    programs.run_file(
        ROOT / "train_net.py",
        *("--config-file", LAZY, f"train.output_dir={output}"),
        *data_options(digits),
    )
    expected = losses(output)
    assert len(expected) == 10
    assert losses(trained).keys() == expected.keys()
    # Upstream seeds the order of the images in YAML configs otherwise than in lazy ones.
    if "seed=cfg.SEED" not in Path(detectron2.data.build.__file__).read_text():
        assert losses(trained) == expected


def test_train_net_evaluates_what_it_trained(programs, trained):
    text = programs.run(
        "tools/train_net.py",
        *("--config-file", YAML, "--eval-only"),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", programs.folder / "eval"),
        *("TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64, 96)"),
    )
    assert text.count("Task: bbox") == 2 and "with test-time augmentation" in text
    assert (programs.folder / "eval" / "inference_TTA" / "coco_instances_results.json").is_file()
    predictions = [
        json.loads((folder / "inference" / "coco_instances_results.json").read_text())
        for folder in (trained, programs.folder / "eval")
    ]
    assert predictions[0] == predictions[1]


def test_plain_train_net_trains(programs):
    output = programs.folder / "plain"
    programs.run("tools/plain_train_net.py", "--config-file", YAML, "OUTPUT_DIR", output)
    groups = torch.load(output / "model_final.pth", weights_only=True)["optimizer"]["param_groups"]
    assert [round(group["lr"], 9) for group in groups] == [2e-4, 2e-5]


def test_lazyconfig_train_net_needs_no_line(programs):
    output = programs.folder / "lazy"
    programs.run(
        "tools/lazyconfig_train_net.py",
        *("--config-file", LAZY, f"train.output_dir={output}", "model.num_classes=10"),
        *(
            "dataloader.train.dataset.names=digits_train",
            "dataloader.test.dataset.names=digits_val",
        ),
        register=False,
    )
    assert (output / "model_final.pth").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--config-file", YAML),
        ("--config-file", LAZY, "dataloader.test.dataset.names=digits_val"),
    ],
    ids=["yaml", "lazy"],
)
def test_analyze_model_counts(programs, arguments):
    tasks = ("--tasks", "flop", "activation", "parameter", "structure", "-n", "2")
    text = programs.run("tools/analyze_model.py", *tasks, *arguments)
    assert "Total GFlops" in text
    assert "encoder.low_level_ffns" in text and "KeyAwareDeformableAttention" in text


def test_visualize_data_draws_what_is_trained_on(programs):
    output = programs.folder / "data"
    programs.run(
        "tools/visualize_data.py",
        *("--source", "annotation", "--config-file", YAML, "--output-dir", output),
    )
    assert len(list(output.glob("*.jpg"))) == 4


def test_visualize_json_results_draws_what_was_found(programs, trained):
    output = programs.folder / "results"
    programs.run(
        "tools/visualize_json_results.py",
        *("--input", trained / "inference" / "coco_instances_results.json"),
        *("--dataset", "digits_val", "--output", output),
    )
    assert len(list(output.glob("*.jpg"))) == 2


def test_export_model_traces(programs):
    """Upstream's alone has it; the redistribution comes without ``tools/deploy``."""
    output = programs.folder / "traced"
    image = next((programs.folder / "datasets" / "digits" / "val").glob("*.jpg"))
    programs.run(
        "tools/deploy/export_model.py",
        *("--config-file", YAML, "--sample-image", image, "--output", output),
        *("--export-method", "tracing", "--format", "torchscript"),
    )
    assert (output / "model.ts").is_file()


def test_the_demo_draws(programs, trained):
    """Upstream's demo imports its predictor by the name that it has inside its makers' house."""
    output = programs.folder / "demo"
    output.mkdir()
    house = programs.folder / "vision" / "fair" / "detectron2"
    if (DETECTRON2 / "demo").is_dir():
        house.mkdir(parents=True)
        (house / "demo").symlink_to(DETECTRON2 / "demo")
        (programs.folder / "predictor.py").symlink_to(DETECTRON2 / "demo" / "predictor.py")
    text = programs.run(
        "demo/demo.py",
        *("--config-file", YAML, "--output", output, "--input"),
        *(programs.folder / "datasets" / "digits" / "val").glob("*.jpg"),
        *("--opts", "MODEL.WEIGHTS", trained / "model_final.pth"),
        *("MODEL.DETR.SCORE_THRESH_TEST", "0.03"),
    )
    assert "detected" in text and len(list(output.glob("*.jpg"))) == 2
