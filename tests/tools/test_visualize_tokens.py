"""The picture of tokens counts what the detectors really do."""

import importlib.util

import numpy as np
import pytest
from detectron2.config import instantiate
from omegaconf import OmegaConf
from PIL import Image
from programs import ROOT, TINY

from lite_detr import model_zoo
from lite_detr.analysis import figures


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        path = ROOT / "tools" / "visualize_tokens.py"
        spec = importlib.util.spec_from_file_location("visualize_tokens", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "encoder", "counts"),
    [
        ("deformable_detr/deformable_detr_r50_single_stage_50ep.py", "full encoder", (6, 6, 6, 6)),
        ("dino/lite_dino_r50_h3l1_2p1x3_36ep.py", "H3L1-(2+1)x3", (3, 6, 6, 6)),
        ("dino/lite_dino_r50_h2l2_2p1x3_36ep.py", "H2L2-(2+1)x3", (3, 3, 6, 6)),
        ("dino/lite_dino_r50_h3l1_6p1x1_36ep.py", "H3L1-(6+1)x1", (1, 6, 6, 6)),
    ],
)
def test_updates_are_those_of_the_papers_encoders(tool, name, encoder, counts):
    cfg = model_zoo.get_config(name)
    cfg.model.embed_dim = 32
    updates = tool.count_updates(instantiate(cfg.model.encoder))
    assert (updates.name, updates.counts) == (encoder, counts)


def test_the_share_counts_each_token_as_often_as_it_is_updated():
    encoder = figures.EncoderUpdates("H3L1-(2+1)x3", (3, 6, 6, 6))
    assert encoder.share([750, 190, 48, 12]) == pytest.approx((3 * 750 + 6 * 250) / 6000)


def test_grids_are_the_maps_of_the_resized_image(tool, image):
    """Resized from 100 x 64 to 200 x 128 pixels, of which a cell of stride 8 covers 4 x 4."""
    cfg = model_zoo.get_config(str(TINY))
    cfg.dataloader.test.mapper.augmentations = OmegaConf.create(
        [{"_target_": "detectron2.data.transforms.ResizeShortestEdge", "short_edge_length": 128}]
    )
    grids = tool.Tokenizer(cfg).grids(image)
    assert [grid.stride for grid in grids] == [8, 16, 32, 64]
    assert [grid.shape for grid in grids] == [(16, 25), (8, 13), (4, 7), (2, 4)]
    assert [grid.tokens for grid in grids] == [400, 104, 28, 8]
    assert grids[0].cell == (4, 4) and grids[3].cell == (32, 32)


def test_bars_are_as_wide_as_shares_and_as_high_as_updates():
    grids = [
        figures.TokenGrid(8, (4, 15), (8, 8)),
        figures.TokenGrid(16, (2, 10), (16, 16)),
    ]
    encoder = figures.EncoderUpdates("lite", (1, 4))
    figure = figures.draw_tokens(np.zeros((32, 120, 3), np.uint8), grids, [encoder])
    above, below = figure.subfigs
    titles = [axis.get_title() for axis in above.axes]
    assert titles == ["S3, stride 8\n4 × 15 = 60 tokens", "S4, stride 16\n2 × 10 = 20 tokens"]
    shares, chart = below.axes
    assert [bar.get_width() for bar in shares.patches] == [75, 25]
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in chart.patches]
    assert bars == [(0, 75, 1), (75, 25, 4)]
    assert chart.get_title() == "lite\n44 % of the updates"


def test_an_image_becomes_a_png_and_a_pdf(tool, image, tmp_path, capsys):
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    given = ["--config-file", TINY, "--output", tmp_path / "out", "--input", image, broken, "*.gif"]
    assert tool.main(list(map(str, given))) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.pdf", "a.png"]
    output = capsys.readouterr()
    assert f"{broken}: skipped: unreadable image: " in output.err
    assert "*.gif: skipped, as it names no image" in output.err
    assert output.out == f"figures: 1, failures: 2; they are in {tmp_path / 'out'}\n"


def test_configs_are_compared_on_one_number_of_scales(tool, image, tmp_path, capsys):
    given = ["--config-file", TINY, "--config-file", "dino/dino_r50_3scale_36ep.py"]
    given += ["--output", tmp_path / "out", "--input", image]
    with pytest.raises(SystemExit):
        tool.main(list(map(str, given)))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: config dino/dino_r50_3scale_36ep.py has 3 scales and ")


def test_default_configs_are_in_the_zoo_and_agree(tool):
    assert set(tool.CONFIGS) <= set(model_zoo.list_configs())
    assert len(tool.load_configs(tool.CONFIGS, ["train.device=cpu"])) == len(tool.CONFIGS)
