"""Counts of a model's cost against closed forms, and the tool that prints them."""

import json

import analyze_model
import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, instantiate
from programs import CONFIGS, ROOT

from lite_detr import model_zoo
from lite_detr.analysis import flops
from lite_detr.analysis.markdown_page import BEGIN, END
from lite_detr.modeling import (
    DeformableEncoder,
    KeyAwareDeformableAttention,
    MultiScaleDeformableAttention,
)

HEIGHT, WIDTH = 64, 96
TOKENS = (8 * 12, 4 * 6, 2 * 3, 1 * 2)
ATTENTIONS = {"msda": MultiScaleDeformableAttention, "kda": KeyAwareDeformableAttention}
# Of tests/helpers/configs/tiny.py.
C, HIDDEN, HEADS, LEVELS, POINTS, QUERIES, CLASSES = 32, 48, 4, 4, 4, 10, 80
BOTH = pytest.mark.parametrize(
    "encoder, kind", [(e, kind) for e in ("full", "interleaved") for kind in ATTENTIONS]
)


@pytest.fixture
def make_tiny():
    """``make_tiny(encoder, kind)``: the tiny model, with two encoder layers."""

    def make(encoder="interleaved", kind="kda"):
        config = LazyConfig.load(str(CONFIGS / "tiny.py")).model
        config.encoder.layer.attention._target_ = ATTENTIONS[kind]
        if encoder == "full":
            config.encoder = LazyCall(DeformableEncoder)(layer=config.encoder.layer, num_layers=2)
        return instantiate(config)

    return make


def linear(rows, inputs, outputs):
    return rows * inputs * outputs


def layer_norm(rows):
    """fvcore's estimate: five operations for each number."""
    return 5 * rows * C


def deformable_attention(kind, queries, tokens):
    """The projections of queries and tokens; of sampling only the dot products with keys."""
    points = HEADS * LEVELS * POINTS
    count = linear(queries, C, 2 * points)  # offsets
    count += linear(tokens, C, C) + linear(queries, C, C)  # values and output
    if kind == "msda":
        return count + linear(queries, C, points)  # weights
    head_dim = C // HEADS
    return count + linear(queries, C, C) + 2 * queries * points * head_dim


def feed_forward(rows, hidden):
    return linear(rows, C, hidden) + linear(rows, hidden, C) + layer_norm(rows)


def encoder_by_hand(encoder, kind):
    every, high = sum(TOKENS), sum(TOKENS[1:])
    low = every - high
    whole_layer = deformable_attention(kind, every, every) + layer_norm(every)
    if encoder == "full":
        return 2 * (whole_layer + feed_forward(every, HIDDEN))
    # A block of two updates: the high-level tokens alone, then all tokens; the low-level ones pass
    # a feed-forward network of hidden width C.
    first = deformable_attention(kind, high, every) + layer_norm(high) + feed_forward(high, HIDDEN)
    return first + whole_layer + feed_forward(high, HIDDEN) + feed_forward(low, C)


def decoder_by_hand(kind):
    """Of the first layer's predictions only the boxes are counted: nothing in inference needs its
    classes, and tracing leaves out what nothing needs."""
    layer = 4 * linear(QUERIES, C, C) + 2 * QUERIES * QUERIES * C + layer_norm(QUERIES)
    layer += deformable_attention(kind, QUERIES, sum(TOKENS)) + layer_norm(QUERIES)
    layer += feed_forward(QUERIES, HIDDEN)
    box_head = 2 * linear(QUERIES, C, C) + linear(QUERIES, C, 4)
    return 2 * (layer + box_head) + linear(QUERIES, C, CLASSES)


@BOTH
def test_encoder_by_closed_form(make_tiny, encoder, kind):
    cost = flops.count_cost(make_tiny(encoder, kind), HEIGHT, WIDTH)
    assert cost.flops["encoder"] == encoder_by_hand(encoder, kind)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_decoder_by_closed_form(make_tiny, kind):
    cost = flops.count_cost(make_tiny(kind=kind), HEIGHT, WIDTH)
    assert cost.flops["decoder"] == decoder_by_hand(kind)


def test_the_rest_is_neck_and_proposals(make_tiny):
    """The total less the parts: the neck, the resized padding mask and the two-stage queries."""
    every = sum(TOKENS)
    neck = linear(TOKENS[0], 128, C) + linear(TOKENS[1], 256, C) + linear(TOKENS[2], 512, C)
    neck += linear(TOKENS[3], 9 * 512, C) + layer_norm(every)
    mask = every
    proposals = linear(every, C, C) + layer_norm(every) + linear(every, C, CLASSES)
    proposals += 2 * linear(QUERIES, C, C) + linear(QUERIES, C, 4)
    encoding = linear(QUERIES, 2 * C, 2 * C) + 2 * layer_norm(QUERIES)
    count = flops.count_cost(make_tiny(), HEIGHT, WIDTH).flops
    assert set(count) == {"total", "backbone", "encoder", "decoder"}
    rest = count["total"] - count["backbone"] - count["encoder"] - count["decoder"]
    assert rest == neck + mask + proposals + encoding


def convolution(cells, size, inputs, outputs):
    """With the frozen norm behind it: a factor and a summand for each number."""
    return linear(cells, size * size * inputs, outputs) + 2 * cells * outputs


def test_backbone_by_closed_form(make_tiny):
    """The convolutions of a ResNet-18: two basic blocks a stage."""
    expected = convolution(32 * 48, 7, 3, 64)
    cells, inputs = 16 * 24, 64
    for outputs in (64, 128, 256, 512):
        if outputs != inputs:
            cells //= 4
            expected += convolution(cells, 1, inputs, outputs)  # shortcut
        expected += convolution(cells, 3, inputs, outputs)
        expected += 3 * convolution(cells, 3, outputs, outputs)
        inputs = outputs
    assert flops.count_cost(make_tiny(), HEIGHT, WIDTH).flops["backbone"] == expected


@pytest.mark.parametrize("height, width", [(64, 96), (50, 70), (1, 1)])
def test_tokens_and_parameters(make_tiny, height, width):
    model = make_tiny()
    cost = flops.count_cost(model, height, width)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in (8, 16, 32, 64)]
    assert cost.tokens == tuple(h * w for h, w in shapes)
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.parameters > sum(p.numel() for p in model.parameters() if p.requires_grad)


def slower(operator):
    """The same result after a product of matrices that fvcore would count."""

    def run(*args):
        large = torch.ones(64, 64) @ torch.ones(64, 64)
        return operator(*args) + 0 * large[0, 0]

    return run


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_counts_do_not_depend_on_the_operators(make_tiny, monkeypatch, kind):
    model = make_tiny(kind=kind)
    expected = flops.count_cost(model, HEIGHT, WIDTH)
    attention = ATTENTIONS[kind]
    other = slower(attention.operator)
    monkeypatch.setattr(attention, "operator", staticmethod(other))
    assert flops.count_cost(model, HEIGHT, WIDTH) == expected
    modules = [module for module in model.modules() if isinstance(module, attention)]
    assert modules and all(module.operator is other for module in modules)  # put back


@pytest.fixture(scope="module")
def tool():
    return analyze_model


TWO_STAGE = "deformable_detr/deformable_detr_r50_two_stage_50ep.py"
DINO_3_SCALE = "dino/dino_r50_3scale_36ep.py"
COST = flops.ModelCost(
    {"total": 12.34e9, "backbone": 5.0e9, "encoder": 6.06e9, "decoder": 0.04e9},
    41_160_000,
    (75, 20, 4, 1),
)
OURS = ["12.3", "5.0", "6.1", "0.0", "41.16"]


def test_text_table(tool):
    lines = tool.text_table({"a.py": COST, "longer/name.py": COST}).splitlines()
    assert len(lines) == 3
    cells = [line.split("  ") for line in lines]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in cells]
    title = "config, GFLOPs, backbone, encoder, decoder, params (M), tokens of each scale"
    assert cells[0] == title.split(", ")
    share = "75 (75.0%), 20 (20.0%), 4 (4.0%), 1 (1.0%)"
    assert cells[1:] == [["a.py", *OURS, share], ["longer/name.py", *OURS, share]]
    starts = {line.index("12.3") for line in lines[1:]} | {lines[0].index("GFLOPs")}
    assert len(starts) == 1


def rows_of(tables):
    """The cells of each config in markdown tables."""
    lines = [line for line in tables.splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}


def test_markdown_tables(tool):
    names = [TWO_STAGE, "dino/dino_r50_4scale_36ep.py", "dino/dino_r50_4scale_12ep.py"]
    tables = tool.markdown_tables(dict.fromkeys([*names, "h_detr/own.py"], COST), "10x10")
    rows = rows_of(tables)
    assert rows == {
        "deformable_detr_r50_two_stage_50ep.py": [*OURS[::2], "177", "90", "46.8"],
        "dino_r50_4scale_36ep.py": [*OURS[::2], "235", "137", "50.7"],
        "dino_r50_4scale_12ep.py": [*OURS[::2], "–", "–", "–"],
        "own.py": [*OURS[::2], "–", "–", "–"],
    }
    for title in ("Deformable DETR", "DINO", "H-DETR"):
        assert f"### {title}\n\n| config in `" in tables
    columns = {line.count("|") for line in tables.splitlines() if line.startswith("|")}
    assert columns == {8}
    assert tables.endswith(
        "At 10x10, 4 scales have 75 (75.0%), 20 (20.0%), 4 (4.0%), 1 (1.0%) tokens."
    )


def test_markdown_without_a_model_of_four_scales(tool):
    cost = flops.ModelCost(COST.flops, COST.parameters, (20, 4, 1))
    rows = rows_of(tool.markdown_tables({DINO_3_SCALE: cost}, "10x10"))
    assert list(rows) == ["dino_r50_3scale_36ep.py"]


def test_reported_figures_are_of_configs_of_the_zoo():
    rows = json.loads((ROOT / "tools" / "reported.json").read_text())["rows"]
    fields = set("model backbone AP GFLOPs encoder_GFLOPs params_M".split())
    named = [row for row in rows if "config" in row]
    names = [row["config"] for row in named]
    assert len(set(names)) == len(names) > 0
    assert set(names) <= set(model_zoo.list_configs())
    for row in named:
        assert set(row) == fields | {"config"}
        backbone = "swin_t" if "swin_t" in row["config"] else "r50"
        assert row["backbone"].lower().replace("-", "_") == backbone
        assert row["model"].startswith("Lite-") == ("/lite_" in row["config"])
    # Detectors of the paper's tables that the zoo lacks.
    models = {row["model"] for row in named}
    for row in rows[len(named) :]:
        assert set(row) == fields and row["model"] not in models and row["AP"]


def run_main(tool, *arguments):
    tool.main(list(map(str, arguments)))


def test_main_prints_what_it_counts(tool, capsys):
    run_main(tool, TWO_STAGE, "--size", f"{HEIGHT}x{WIDTH}")
    header, line = capsys.readouterr().out.splitlines()
    assert header.startswith("config ")
    cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
    cost = flops.count_cost(instantiate(model_zoo.get_config(TWO_STAGE).model), HEIGHT, WIDTH)
    figures = [cost.flops[part] / 1e9 for part in ("total", "backbone", "encoder", "decoder")]
    assert all(figure > 0 for figure in figures)
    assert sum(figures[1:]) < figures[0]
    assert cells[:6] == [TWO_STAGE, *(f"{figure:.1f}" for figure in figures), "41.16"]
    assert cells[6] == "96 (75.0%), 24 (18.8%), 6 (4.7%), 2 (1.6%)"


def test_main_counts_all_of_the_papers_configs(tool, monkeypatch, tmp_path):
    counted = []
    monkeypatch.setattr(tool, "analyze", lambda name, *size: counted.append((name, size)) or COST)
    path = tmp_path / "zoo.md"
    path.write_text(f"{BEGIN}\n{END}\n")
    run_main(tool, "--all", "--markdown", path)
    families = [n for n in model_zoo.list_configs() if n.split("/")[0] in tool.FAMILIES]
    expected = [n for n in families if not n.split("/")[1].startswith(("detrex_", "mmdet_"))]
    assert counted == [(name, (800, 1066)) for name in expected]
    assert set(rows_of(path.read_text())) == {name.split("/")[1] for name in expected}
    assert "At 800x1066, 4 scales have" in path.read_text()


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ([], "name configs, or give --all"),
        ([TWO_STAGE, "--size", "64"], "accepted is HEIGHTxWIDTH"),
    ],
)
def test_main_says_how_it_is_used(tool, capsys, arguments, problem):
    with pytest.raises(SystemExit) as error:
        run_main(tool, *arguments)
    assert error.value.code == 2
    assert problem in capsys.readouterr().err


def test_main_names_the_nearest_config(tool, capsys):
    with pytest.raises(SystemExit):
        run_main(tool, TWO_STAGE.replace("two_stage", "twostage"))
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"did you mean {TWO_STAGE}" in error
