"""The interleaved encoder in a module of one's own."""

import subprocess
import sys

import pytest
import torch
from programs import ROOT

from lite_detr import modeling
from lite_detr.errors import LevelsError
from lite_detr.interop import InterleavedEncoder, flatten_maps, split_tokens
from lite_detr.modeling.scales import Scales

SHAPES = [(4, 6), (2, 3), (1, 2)]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    encoder = InterleavedEncoder(16, "H2L1-(2+1)x1", num_heads=2, num_points=2, ffn_dim=24)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return encoder.eval()


def test_tokens_sizes_and_padding_give_what_scales_give(encoder):
    torch.manual_seed(1)
    tokens = torch.randn(2, 32, 16)
    masks = [torch.zeros(2, *shape, dtype=torch.bool) for shape in SHAPES]
    for mask in masks:
        mask[1, :, mask.shape[2] // 2 :] = True
    pos = torch.cat(
        [
            modeling.SinePositionEncoding(16)(mask) + embed
            for mask, embed in zip(masks, encoder.level_embed)
        ],
        dim=1,
    )
    scales = Scales.from_masks(masks, padded=True, dtype=torch.float32)
    expected = modeling.InterleavedEncoder.forward(encoder, tokens, pos, scales)
    padding = torch.cat([mask.flatten(1) for mask in masks], dim=1)
    shapes = torch.tensor(SHAPES, dtype=torch.int32)
    torch.testing.assert_close(encoder(tokens, shapes, padding), expected)
    own = torch.randn_like(tokens)
    assert not torch.allclose(encoder(tokens, shapes, padding, own), expected, atol=1e-2)
    # Each image alone, without its padding, is what it is in the batch.
    maps = [m[1:, :, :, : m.shape[3] // 2] for m in split_tokens(tokens, SHAPES)]
    alone = split_tokens(encoder(*flatten_maps(maps)), [m.shape[2:] for m in maps])
    for found, padded in zip(alone, split_tokens(expected, SHAPES)):
        torch.testing.assert_close(found[0], padded[1, :, :, : found.shape[3]])


def test_levels_from_coarse_to_fine_are_refused(encoder):
    with pytest.raises(LevelsError, match="from fine to coarse.*got 1x2, 2x3, 4x6"):
        encoder(torch.zeros(1, 32, 16), SHAPES[::-1])
    # A detector's encoder as well, which takes scales.
    masks = [torch.zeros(1, *shape, dtype=torch.bool) for shape in SHAPES]
    for given, words in [(masks[::-1], "from fine to coarse"), (masks[:2], "3 levels, got 2: 4x6")]:
        scales = Scales.from_masks(given, padded=False, dtype=torch.float32)
        tokens = torch.zeros(1, scales.num_tokens, 16)
        with pytest.raises(LevelsError, match=words):
            modeling.InterleavedEncoder.forward(encoder, tokens, tokens, scales)


def test_all_of_it_works_without_detectron2():
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'detectron2':\n"
        "            raise ModuleNotFoundError('no detectron2', name='detectron2')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import torch\n"
        "from lite_detr.interop import InterleavedEncoder\n"
        "encoder = InterleavedEncoder(16, 'H2L1-(1+1)x1', num_heads=2)\n"
        "print(encoder(torch.zeros(1, 21, 16), [(4, 4), (2, 2), (1, 1)]).shape)\n"
        "import lite_detr.modeling\n"
        "lite_detr.modeling.DINO\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"PYTHONPATH": str(ROOT / "projects"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout == "torch.Size([1, 21, 16])\n", run.stderr
    assert "MissingPackageError: lite_detr needs Detectron2" in run.stderr
