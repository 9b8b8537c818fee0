"""Datasets with planted faults, through inspection, loading, training and evaluation."""

import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import detectron2.data.transforms as T
import pytest
import torch
from coco_datasets import FaultyDataset
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import inference_on_dataset
from detectron2.utils.env import seed_all_rng
from programs import TINY
from small_detectors import CONFIGS, small_config

from lite_detr import model_zoo
from lite_detr.data.coco import apply_data_config
from lite_detr.data.inspection import inspect_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return FaultyDataset(tmp_path_factory.mktemp("faulty"), seed=5, num_images=110, num_unusable=11)


def make_config(dataset, detector="deformable_detr"):
    """A detector that is small enough for tests, on the dataset."""
    cfg = model_zoo.get_config(str(TINY))
    cfg.model = small_config(detector)
    if detector == "dino":
        cfg.model.denoising = model_zoo.get_config(CONFIGS["dino"]).model.denoising
    paths = {"json": str(dataset.json_file), "images": str(dataset.image_root)}
    for split in ("train", "val"):
        for key, path in paths.items():
            cfg.data[f"{split}_{key}"] = path
    cfg.dataloader.train.mapper.augmentations = [L(T.RandomFlip)(horizontal=True)]
    # A thousand objects are two thousand denoising queries for each image of the batch.
    cfg.dataloader.train.total_batch_size = 2 if detector == "dino" else 10
    apply_data_config(cfg)
    return cfg


def load_twice(cfg, num_workers):
    """Each image twice; returns the loader, and what was read as (id, image)."""
    cfg.dataloader.train.num_workers = num_workers
    seed_all_rng(3)
    loader = instantiate(cfg.dataloader.train)
    batches = islice(loader, 2 * loader.num_images // cfg.dataloader.train.total_batch_size)
    return loader, [(sample["image_id"], sample["image"]) for batch in batches for sample in batch]


def train_and_evaluate(cfg, dataset, num_workers, iterations):
    """Trains until every file has been met; SimpleTrainer raises where a loss is not finite."""
    for split in ("train", "test"):
        cfg.dataloader[split].num_workers = num_workers
    seed_all_rng(3)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    loader = instantiate(cfg.dataloader.train)
    trainer = SimpleTrainer(model, loader, instantiate(cfg.optimizer))
    trainer.train(0, iterations)
    assert met(loader) == set(dataset.unusable)
    assert trainer.storage.latest()["unusable_images"][0] == len(dataset.unusable)
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    assert results["unusable"] == {"images": len(dataset.unusable)}
    assert 0 <= results["bbox"]["AP"] <= 100


def met(loader):
    return {Path(name).name for name, _ in loader.unusable.values()}


def planted_and_found(dataset):
    inspection = inspect_dataset(
        str(dataset.json_file), str(dataset.image_root), for_evaluation=True, num_queries=10
    )
    planted = {kind: Counter(where) for kind, where in dataset.planted.items()}
    return planted, {fault.kind: Counter(fault.where) for fault in inspection.faults}


def test_an_inspection_finds_all_that_was_planted_and_nothing_else(dataset):
    planted, found = planted_and_found(dataset)
    assert found == planted and len(planted) > 20


@pytest.mark.slow
def test_inspections_of_many_draws_find_all_that_was_planted(tmp_path):
    """Prints the counts, as docs/data_faults.md has them."""
    total = Counter()
    for seed in range(100):
        dataset = FaultyDataset(tmp_path / "faulty", seed, num_images=200, num_unusable=20)
        planted, found = planted_and_found(dataset)
        assert found == planted, seed
        total += Counter({kind: where.total() for kind, where in planted.items()})
        shutil.rmtree(tmp_path / "faulty")
    for kind, count in total.most_common():
        print(f"{count:6} {kind}")


def test_training_meets_every_unusable_image_and_says_so_once(dataset, warnings):
    loader, samples = load_twice(make_config(dataset), num_workers=0)
    assert met(loader) == set(dataset.unusable)
    told = [text for text in warnings if "other images replace it" in text]
    assert len(told) == len(dataset.unusable)
    assert all(any(f"/{name}: " in text for text in told) for name in dataset.unusable)
    assert all(image.numel() for _, image in samples)


def test_replacements_are_the_same_with_workers(dataset):
    _, alone = load_twice(make_config(dataset), num_workers=0)
    loader, with_workers = load_twice(make_config(dataset), num_workers=2)
    assert met(loader) == set(dataset.unusable)
    assert [number for number, _ in alone] == [number for number, _ in with_workers]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(alone, with_workers))


def test_a_detector_trains_and_is_evaluated_on_faulty_data(dataset):
    train_and_evaluate(make_config(dataset), dataset, num_workers=2, iterations=16)


@pytest.mark.slow
@pytest.mark.parametrize(("num_workers", "seed"), [(0, 1), (2, 2)])
@pytest.mark.parametrize("detector", CONFIGS)
def test_every_detector_trains_on_other_draws(detector, num_workers, seed, tmp_path):
    dataset = FaultyDataset(tmp_path / "faulty", seed, num_images=200, num_unusable=20)
    planted, found = planted_and_found(dataset)
    assert found == planted
    cfg = make_config(dataset, detector)
    iterations = 260 // cfg.dataloader.train.total_batch_size
    train_and_evaluate(cfg, dataset, num_workers, iterations)
