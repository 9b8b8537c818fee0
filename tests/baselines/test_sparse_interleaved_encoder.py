"""The experiment: Lite DETR's encoder whose low-level updates take the best-scored tokens only."""

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from small_detectors import TinyBackbone, shrink

from lite_detr import model_zoo
from lite_detr.modeling import InterleavedEncoder

NAME = "baselines/experiment_sparse_lite_dino_r50_h3l1_2p1x3_36ep.py"


@pytest.fixture(scope="module")
def batch():
    """The model, and a padded batch of tokens with their positions and geometry."""
    config = shrink(model_zoo.get_config(NAME).model)
    config.backbone = L(TinyBackbone)()
    config.encoder.num_blocks = 2
    torch.manual_seed(0)
    model = instantiate(config).double().eval()
    inputs = [{"image": torch.rand(3, *size) * 255} for size in ((64, 96), (40, 64))]
    with torch.no_grad():
        return model.encoder, model.make_tokens(model.preprocess_images(inputs))


@torch.no_grad()
def test_with_all_tokens_chosen_it_is_the_interleaved_encoder(batch):
    encoder, (tokens, pos, scales) = batch
    plain = InterleavedEncoder(encoder.layers[0], num_blocks=2).double().eval()
    loaded = plain.load_state_dict(encoder.state_dict(), strict=False)
    assert not loaded.missing_keys and all("scorer." in key for key in loaded.unexpected_keys)
    kept = encoder.keep_ratio
    try:
        encoder.keep_ratio = 1.0
        found = encoder(tokens, pos, scales)[0]
    finally:
        encoder.keep_ratio = kept
    expected = plain(tokens, pos, scales)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(encoder(tokens, pos, scales)[0], expected)


@torch.no_grad()
def test_of_the_finest_map_only_the_best_quarter_of_each_image_changes(batch):
    encoder, (tokens, pos, scales) = batch
    low = slice(scales.start(1))
    memory = encoder(tokens, pos, scales)
    scores = encoder.scorer(tokens[:, low] + pos[:, low]).squeeze(-1)
    for index in range(2):
        valid = ~scales.padding_mask[index]
        kept = int(valid[low].sum()) // 4 + 1
        best = scores[index].masked_fill(~valid[low], float("-inf")).topk(kept).indices
        changed = (memory[index] != tokens[index]).any(-1)
        assert changed[low].nonzero().flatten().tolist() == sorted(best.tolist())
        assert changed[low.stop :][valid[low.stop :]].all()
