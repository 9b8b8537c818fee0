"""Optimized detectors: the same contract and results, and the memory that the process keeps."""

import copy
import ctypes
import functools
import logging
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyCall, instantiate
from detectron2.structures import ImageList
from programs import run_python
from small_detectors import CONFIGS, TinyBackbone, small_config, small_detector, small_inputs
from torch import nn

import lite_detr
from lite_detr.export import ExportableDetector, check, export_torchscript
from lite_detr.inference import (
    OptimizationError,
    keep_freed_memory,
    optimize,
    optimize_for_inference,
)
from lite_detr.modeling import MultiScaleDeformableAttention


@pytest.fixture(params=CONFIGS)
def model(request):
    return small_detector(request.param).float().eval()


def detections(model, inputs):
    with torch.no_grad():
        return [output["instances"] for output in model(inputs)]


def same_sizes():
    return small_inputs(0, 0)


def mixed_sizes():
    small, large = small_inputs(0, height=40, width=64), small_inputs(0, height=64, width=48)
    return [small[0] | {"height": 80, "width": 130}, large[0]]


@pytest.mark.parametrize("make_inputs", [same_sizes, mixed_sizes])
def test_results_are_those_of_the_model(model, make_inputs):
    optimized = optimize_for_inference(model)
    assert type(optimized) is type(model) and not optimized.training
    inputs = make_inputs()
    for _ in range(2):  # The second time with what was kept.
        expected, found = (detector.forward_queries(inputs) for detector in (model, optimized))
        assert (
            found["pred_logits"].sigmoid() - expected["pred_logits"].sigmoid()
        ).abs().max() < 1e-5
        assert (found["pred_boxes"] - expected["pred_boxes"]).abs().max() < 1e-5
        for ours, theirs in zip(detections(optimized, inputs), detections(model, inputs)):
            assert ours.image_size == theirs.image_size and len(ours) == len(theirs)
            assert torch.equal(ours.pred_classes, theirs.pred_classes)
            assert torch.allclose(ours.scores, theirs.scores, rtol=0, atol=1e-5)
            assert torch.allclose(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, atol=1e-2)


def test_plain_attention_is_optimized_as_well():
    config = small_config("dino")
    config.encoder.layer.attention._target_ = MultiScaleDeformableAttention
    model = instantiate(config).eval()
    expected, found = (
        detector.forward_queries(same_sizes())
        for detector in (model, optimize_for_inference(model))
    )
    assert (found["pred_boxes"] - expected["pred_boxes"]).abs().max() < 1e-5


def test_the_model_itself_is_left_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimize_for_inference(model, torch.bfloat16)
    assert model.training and "locate_tokens" not in vars(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_geometry_is_computed_once_for_a_shape(model, monkeypatch):
    calls = []
    computed = type(model).locate_tokens
    monkeypatch.setattr(
        type(model), "locate_tokens", lambda *args: calls.append(1) or computed(*args)
    )
    optimized = optimize_for_inference(model)
    for inputs in (same_sizes(), same_sizes(), mixed_sizes(), same_sizes(), mixed_sizes()):
        optimized.forward_queries(inputs)
    assert len(calls) == 2
    monkeypatch.setattr(optimize, "MAX_KEPT", 2)
    # A third shape takes the place of the one that was met longest ago.
    for inputs in (small_inputs(0), mixed_sizes(), same_sizes()):
        optimized.forward_queries(inputs)
    assert len(calls) == 4


def test_images_of_one_size_in_another_padding_are_told_apart(model):
    optimized = optimize_for_inference(model)
    sizes = [(40, 64)]
    for padded in ((40, 64), (64, 96)):
        images = ImageList(torch.randn(1, 3, *padded), sizes)
        (expected, _), (found, _) = model.encode(images), optimized.encode(images)
        assert torch.allclose(found, expected, atol=1e-4)


@pytest.fixture
def hurried_threads():
    """Threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_share_a_cache(hurried_threads, monkeypatch):
    """With room for two shapes of nine, so that each shape comes and goes all the time."""
    monkeypatch.setattr(optimize, "MAX_KEPT", 2)
    cache = optimize.GeometryCache(lambda maps, images: images.image_sizes)
    maps = [torch.empty(1, 1, 1, 1)]
    shapes = [ImageList(torch.empty(1, 3, 8, 8), [(height, 8)]) for height in range(9)]

    def look_up(start):
        order = [shapes[(start + step) % 9] for step in range(400)]
        return all(cache(maps, images) == images.image_sizes for images in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look_up, range(100)))
    assert len(cache.kept) == 2


def test_threads_share_a_detector(hurried_threads, monkeypatch):
    monkeypatch.setattr(optimize, "MAX_KEPT", 1)
    model = small_detector("dino").float().eval()
    batches = [small_inputs(0, height=side, width=64) for side in (32, 40, 48)]
    expected = [model.forward_queries(batch)["pred_boxes"] for batch in batches]
    optimized = optimize_for_inference(model)

    def run(number):
        return optimized.forward_queries(batches[number % 3])["pred_boxes"]

    with ThreadPoolExecutor(4) as pool:
        for number, boxes in enumerate(pool.map(run, range(48))):
            assert (boxes - expected[number % 3]).abs().max() < 1e-5


def test_a_copy_is_on_its_own(model):
    optimized = optimize_for_inference(model)
    optimized.forward_queries(same_sizes())
    for copied in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert copied.locate_tokens.compute.__self__ is copied
        assert not copied.locate_tokens.kept
        found = copied.forward_queries(same_sizes())
        assert torch.equal(found["memory"], optimized.forward_queries(same_sizes())["memory"])


def test_what_inference_mode_keeps_is_not_used_where_gradients_are_recorded():
    optimized = optimize_for_inference(small_detector("dino").float())
    image = torch.rand(3, 64, 96) * 255
    with torch.inference_mode():
        optimized([{"image": image}])
    image.requires_grad_()
    memory, _ = optimized.encode(optimized.preprocess_images([{"image": image}]))
    memory.square().mean().backward()
    assert image.grad.abs().max() > 0


@torch.no_grad()
def test_an_optimized_detector_can_be_exported(tmp_path):
    model = small_detector("deformable_detr").float()
    optimized = optimize_for_inference(model)
    images, sizes = torch.rand(2, 3, 64, 96) * 255, torch.tensor([[64, 96], [50, 70]])
    for detector in (model, optimized):
        detector.detections_per_image = 20
    for found, expected in zip(
        ExportableDetector(optimized)(images, sizes), ExportableDetector(model)(images, sizes)
    ):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)
    optimized([{"image": images[0]}])
    kept = len(optimized.locate_tokens.kept)
    export_torchscript(optimized, tmp_path / "optimized.ts")
    assert len(optimized.locate_tokens.kept) == kept
    run = check.run_torchscript(tmp_path / "optimized.ts")
    batches = check.sample_batches(model)
    assert max(check.check_batches(run, check.run_detector_one_by_one(model), batches)) < 1e-5


def test_weights_of_16_bits_but_scores_and_boxes_of_32(model, caplog):
    optimized = optimize_for_inference(model, torch.bfloat16)
    exact = {name for name, weight in optimized.named_parameters() if weight.dtype == torch.float32}
    assert exact and all("class_embed" in name or "bbox_embed" in name for name in exact)
    assert {w.dtype for w in optimized.parameters()} == {torch.float32, torch.bfloat16}
    assert torch.equal(optimized.pixel_mean, model.pixel_mean)
    found = optimized.forward_queries(same_sizes())
    assert found["pred_boxes"].dtype == found["pred_logits"].dtype == torch.float32
    assert found["memory"].dtype == torch.bfloat16
    # Rounding to 8 bits in every layer.
    expected = model.forward_queries(same_sizes())["memory"]
    assert (found["memory"] - expected).abs().mean() < 0.02 * expected.abs().mean()
    assert (found["memory"] - expected).abs().max() > 0
    said = any("bfloat16" in record.message for record in caplog.records)
    assert said != torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_small_images_in_bfloat16_are_near_float32(compile, monkeypatch):
    """PyTorch's convolutions leave out a part of small maps on CPUs with AMX, as of 2.14."""
    # What is traced matters, and inductor would take minutes for it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    backbone = LazyCall(TinyBackbone)(channels=(64, 128, 576))
    torch.manual_seed(0)
    model = instantiate(small_config("deformable_detr", backbone=backbone)).eval()
    optimized = optimize_for_inference(model, torch.bfloat16, compile=compile)
    sizes = [(96, 64), (64, 48), (160, 40), (33, 128), (40, 33), (200, 100), (64, 200)]
    batches = [small_inputs(*[0] * 3, height=height, width=width) for height, width in sizes]
    batches.append([batch[0] for batch in batches[:3]])
    for batch in batches[:3] if compile else batches:
        expected = model.forward_queries(batch)["memory"]
        # What is left in memory is far from what belongs there.
        torch.full((10**6,), 1e37, dtype=torch.bfloat16)
        found = optimized.forward_queries(batch)["memory"].float()
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_float16_is_refused_on_a_cpu(model):
    with pytest.raises(OptimizationError, match="do not compute in float16: give bfloat16"):
        optimize_for_inference(model, torch.float16)


def test_errors_say_what_is_accepted(model):
    with pytest.raises(TypeError, match=r"takes a detector of lite_detr, got Linear$"):
        optimize_for_inference(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got DataParallel: give its \.module"):
        optimize_for_inference(nn.DataParallel(model))
    with pytest.raises(TypeError, match="in torch.float32, got torch.float64"):
        optimize_for_inference(model.double())
    with pytest.raises(ValueError, match="dtype is torch.int8, accepted are torch.float32"):
        optimize_for_inference(model.float(), torch.int8)


def test_the_package_offers_it_and_the_log_says_what_it_did(model, caplog):
    caplog.set_level(logging.INFO, "lite_detr")
    lite_detr.optimize_for_inference(model)
    assert "0 batch norms folded, weights in float32" in caplog.text


@pytest.mark.slow
def test_compiled_parts_give_the_same_results(model):
    optimized = optimize_for_inference(model, compile=True)
    for inputs in (same_sizes(), mixed_sizes()):
        expected, found = (detector.forward_queries(inputs) for detector in (model, optimized))
        assert (found["pred_boxes"] - expected["pred_boxes"]).abs().max() < 1e-5


@pytest.mark.slow
def test_compiled_parts_in_bfloat16_are_near_float32(model):
    optimized = optimize_for_inference(model, torch.bfloat16, compile=True)
    # The third has the first one's shapes, whose compiled code is there.
    for inputs in (same_sizes(), mixed_sizes(), same_sizes()):
        expected, found = (
            detector.forward_queries(inputs)["memory"].float() for detector in (model, optimized)
        )
        assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()


# The number of pages that the kernel hands out for ten blocks of 40 MiB, before and after.
FAULTS = """
import importlib.util, resource, torch
from lite_detr.inference import keep_freed_memory

def faults(blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        torch.empty(10 * 2**20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(10))
assert keep_freed_memory()
faults(20)  # The heap grows until it has a free block of this size.
print(faults(10))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_blocks_are_used_again():
    run = run_python("-c", FAULTS)
    assert run.returncode == 0, run.stderr
    before, after = map(int, run.stdout.split())
    assert before > 10 * 1000 and after < 100


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not keep_freed_memory()
