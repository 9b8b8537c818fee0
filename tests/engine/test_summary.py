"""The end of a run: its results, its weights, and commands that can be copied."""

import importlib
import shlex
import shutil
from types import SimpleNamespace

import pytest
from detectron2.data import MetadataCatalog
from omegaconf import OmegaConf

from lite_detr.engine.summary import results_table, summarize

AP = {"bbox/AP": (31.5, 8), "bbox/AP50": (50.25, 8), "bbox/AP-cat": (1.0, 8)}
OTHERS = {"total_loss": (2.0, 7), "bbox/APs": (0.5, 3)}


@pytest.fixture
def end():
    """The text at the end of a run of eight iterations, after changes to its parts."""
    MetadataCatalog.get("summary test").image_root = "my data/val"

    def text(best=None, stopped=False, output_dir="output/my run", names="summary test"):
        cfg = {"train": {"output_dir": output_dir}}
        cfg |= {"dataloader": {"test": {"dataset": {"names": names}}}}
        storage = SimpleNamespace(latest=lambda: AP | OTHERS)
        trainer = SimpleNamespace(stopped=stopped, max_iter=8, storage=storage)
        return summarize(OmegaConf.create(cfg), trainer, best)

    yield text
    MetadataCatalog.pop("summary test")


BEST = SimpleNamespace(
    metric="bbox/AP", best_metric=33.0, best_iter=5, summary=lambda: "stopped early at iteration 8"
)


def commands(text):
    return [shlex.split(line) for line in text.splitlines() if "--config-file" in line]


@pytest.mark.parametrize("installed", [True, False])
def test_the_commands_are_those_of_the_run_and_are_accepted(end, installed, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/lite-detr" if installed else None)
    found = commands(end())
    for words, name in zip(found, ("evaluate", "predict", "export"), strict=True):
        start = words.index(name)
        assert words[start - 1] == ("lite-detr" if installed else "lite_detr")
        args = importlib.import_module(f"lite_detr.commands.{name}").parse_args(words[start + 1 :])
        assert str(args.config_file) == "output/my run/config.yaml"
        assert str(args.weights) == "output/my run/model_final.pth"
    assert "my data/val" in found[1]


def test_the_best_weights_are_used_where_there_are_some(end):
    text = end(BEST)
    assert "Training is complete: 8 iterations" in text
    assert "Best bbox/AP: 33.000, at iteration 5" in text
    assert all("output/my run/model_best.pth" in words for words in commands(text))
    assert end(BEST, stopped=True).startswith("Training stopped early at iteration 8\n")
    nothing = SimpleNamespace(metric="bbox/AP", best_metric=None, best_iter=None)
    assert "model_best.pth" not in end(nothing)


def test_the_table_is_that_of_the_last_evaluation_without_single_classes():
    averaged = {f"bbox_ema/{name}": (40.0, 8) for name in ("AP", "AP50")}
    (table,) = results_table(AP | OTHERS | averaged)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    del rows[1]
    expected = [["", "AP", "AP50"], ["bbox", "31.500", "50.250"], ["bbox_ema", "40.000", "40.000"]]
    assert rows == expected
    assert results_table({"total_loss": (2.0, 7)}) == []
