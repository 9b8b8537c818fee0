"""Python in the pages: it compiles, imports what exists, and runs.

The blocks of a page run in order in one namespace, as a reader would type them, in an empty folder.
Those whose title says what they need are not run.
"""

import ast
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.config import defaults as d2_defaults
from detectron2.modeling import build_model
from omegaconf import DictConfig
from page_commands import Block, blocks, pages
from PIL import Image
from programs import ROOT
from torch.optim.swa_utils import AveragedModel

from lite_detr import add_lite_detr_config, model_zoo
from lite_detr.checkpoint.release_file import write_release
from lite_detr.inference.released import release_config

OURS = ("detectron2", "lite_detr")


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page.read_text()) if block.language == "python"]


PAGES = [page for page in pages() if python_blocks(page)]
page_names = pytest.mark.parametrize(
    "page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES]
)


def shrink(model: DictConfig) -> None:
    """Makes a detector as narrow as it gets: its graph and its options stay what they are."""
    model.embed_dim = 32
    model.encoder.layer.ffn.hidden_dim = 32
    if "stages" in model.backbone:
        model.backbone.stages.depth = 18
        model.backbone.stages.pop("stride_in_1x1", None)  # basic blocks have no 1x1 convolution


def get_small_config(name: str) -> DictConfig:
    config = LazyConfig.load(model_zoo.get_lazy_config_file(name))
    if "encoder" in config.get("model", {}):
        shrink(config.model)
    return config


def get_small_yaml_config(name: str) -> CfgNode:
    config = get_cfg()
    add_lite_detr_config(config)
    config.merge_from_file(model_zoo.get_config_file(name))
    config.MODEL.RESNETS.DEPTH = 18
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return config


def small_detector() -> torch.nn.Module:
    config = get_small_config("deformable_detr/deformable_detr_r50_two_stage_50ep.py")
    return instantiate(config.model).eval()


def dino() -> dict[str, Any]:
    return dict(model_zoo.get_config("dino/dino_r50_4scale_36ep.py"))


def write_averaged_checkpoint() -> dict[str, Any]:
    """As a training with ``train.ema`` leaves it."""
    path = Path("output/lite/model_0004999.pth")
    path.parent.mkdir(parents=True)
    averaged = AveragedModel(torch.nn.Linear(1, 1))
    torch.save({"model": averaged.module.state_dict(), "ema": averaged.state_dict()}, path)
    return {}


def write_released_detector() -> dict[str, Any]:
    """As ``tools/convert_checkpoint.py`` writes it."""
    config = get_small_config("digits/lite_dino_efficientnet_lite0.py")
    weights = instantiate(config.model).state_dict()
    path, digits = "output/demo/model.safetensors", list("0123456789")
    write_release(path, weights, release_config(config), digits)
    return {}


# What a page takes for granted, at the block that holds a text.
GIVEN: tuple[tuple[str, str, Callable[[], dict[str, Any]]], ...] = (
    (
        "attention_maps.md",
        "record_attention",
        lambda: {"model": small_detector(), "inputs": [{"image": torch.zeros(3, 64, 96)}]},
    ),
    ("backbones.md", "common/backbones/swin_tiny.py", dino),
    ("share.md", "from_pretrained", write_released_detector),
    ("training.md", 'checkpoint["ema"]', write_averaged_checkpoint),
)

# The models whose weights a page takes for granted, by the file's name.
WEIGHTS: dict[str, Callable[[], torch.nn.Module]] = {
    "output/lite/model_final.pth": lambda: build_model(
        model_zoo.get_yaml_config("dino/lite_dino_r50_h3l1_2p1x3_36ep.yaml")
    ),
    "output/first/model_final.pth": lambda: instantiate(
        model_zoo.get_config("digits/lite_dino_efficientnet_lite0.py").model
    ),
}


def write_files(text: str) -> None:
    """Writes the pictures and weights that a block names, as stand-ins."""
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            continue
        path = Path(node.value)
        if path.suffix in (".jpg", ".png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (96, 64)).save(path)
        elif node.value in WEIGHTS:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"model": WEIGHTS[node.value]().state_dict()}, path)


def unknown_imports(text: str) -> list[str]:
    """What a block imports of Detectron2 or this package that they do not have."""
    unknown = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        unknown += [
            f"{module}.{name}" if name else module
            for module, name in names
            if module.split(".")[0] in OURS and not exists(module, name)
        ]
    return unknown


def exists(module: str, name: str | None) -> bool:
    try:
        found = importlib.import_module(module)
        if name and not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
    except ModuleNotFoundError:
        return False
    return True


def is_config(text: str) -> bool:
    """Whether a block is a config file beside those of the package, which it imports from."""
    nodes = ast.walk(ast.parse(text))
    return any(isinstance(node, ast.ImportFrom) and node.level for node in nodes)


def load_config(text: str, folder: Path) -> DictConfig:
    """Loads a block as a config file beside the one that it imports from."""
    copy = Path(shutil.copytree(model_zoo.CONFIG_ROOT, folder / "configs", dirs_exist_ok=True))
    imports = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom))
    sibling = next(node.module for node in imports if node.level == 1)
    (beside,) = copy.glob(f"*/{sibling}.py")
    file = beside.with_name("block.py")
    file.write_text(text)
    return LazyConfig.load(str(file))


@pytest.fixture
def readers_machine(tmp_path, monkeypatch):
    """An empty folder, Detectron2's defaults as after a fresh start, no GPU and narrow models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_zoo, "get_config", get_small_config)
    monkeypatch.setattr(model_zoo, "get_yaml_config", get_small_yaml_config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(d2_defaults, "_C", d2_defaults._C.clone())
    monkeypatch.delitem(sys.modules, "lite_detr.yacs.defaults", raising=False)
    return tmp_path


@page_names
def test_snippets_compile_and_import_what_exists(page, readers_machine):
    for block in python_blocks(page):
        assert unknown_imports(block.text) == [], f"{page}:{block.line}"


@page_names
def test_snippets_run(page, readers_machine):
    namespace: dict[str, Any] = {}
    for block in python_blocks(page):
        if block.title.startswith("needs "):
            continue
        if is_config(block.text):
            namespace |= load_config(block.text, readers_machine)
            continue
        write_files(block.text)
        for name, text, given in GIVEN:
            if page.name == name and text in block.text:
                namespace |= given()
        # Tracebacks then name the page's own lines.
        exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


def test_what_is_taken_for_granted_is_still_on_its_page():
    for name, text, _ in GIVEN:
        (page,) = (page for page in PAGES if page.name == name)
        assert any(text in block.text for block in python_blocks(page)), (name, text)
    written = "".join(block.text for page in PAGES for block in python_blocks(page))
    assert [name for name in WEIGHTS if name not in written] == []


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("from lite_detr import model_zoo\nimport detectron2.config\nimport nothing", []),
        ("from lite_detr.modeling import DINO, Dino", ["lite_detr.modeling.Dino"]),
        ("import lite_detr.modelling", ["lite_detr.modelling"]),
        ("def later():\n    from detectron2.engine import Nobody", ["detectron2.engine.Nobody"]),
    ],
)
def test_an_import_of_what_does_not_exist_is_found(text, unknown):
    assert unknown_imports(text) == unknown
