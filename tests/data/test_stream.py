"""The stream of training samples: its order, its random draws, and going on anywhere in it."""

import copy
import itertools
import json
import logging
import random

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from lite_detr.data.stream import SampleStream, StreamedBatches
from lite_detr.data.train_loader import build_train_loader
from lite_detr.errors import ConfigError

NUM_IMAGES = 11
SEED = 5


def records():
    """Two of the images are upright, so that one waits for the other over many batches."""
    return [
        {"image_id": i, "file_name": f"{i}.jpg", "width": 40, "height": 50 if i in (3, 8) else 30}
        for i in range(NUM_IMAGES)
    ]


def draw(record):
    """A mapper that reads no image, but draws from all generators as augmentations do."""
    draws = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**record, "image": record["image_id"], "draws": draws}


def build(num_workers=0, grouping=True, batch=2, sampler=None, dataset=None, **options):
    np.random.seed(SEED)  # what the seed of the order is drawn from
    return build_train_loader(
        records() if dataset is None else dataset,
        mapper=draw,
        total_batch_size=batch,
        num_workers=num_workers,
        aspect_ratio_grouping=grouping,
        sampler=sampler,
        **options,
    )


def take(loader, count):
    """The next batches, each as the images' ids and what was drawn for them."""
    batches = itertools.islice(loader, count)
    return [[(sample["image_id"], sample["draws"]) for sample in batch] for batch in batches]


def ids(batches):
    return [[image for image, _ in batch] for batch in batches]


@pytest.fixture
def as_rank(monkeypatch):
    """``as_rank(rank, size)``: from then on Detectron2 takes this process for one of a job's."""

    def become(rank, size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: size)
        monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: size)
        monkeypatch.setattr(comm, "shared_random_seed", lambda: SEED)

    return become


@pytest.mark.parametrize("grouping", [True, False])
def test_images_and_batches_are_detectron2s(grouping):
    ours = build(grouping=grouping)
    theirs = build_detection_train_loader(
        records(),
        mapper=draw,
        sampler=TrainingSampler(NUM_IMAGES, seed=ours.state_dict()["seed"]),
        total_batch_size=2,
        aspect_ratio_grouping=grouping,
    )
    assert ids(take(ours, 30)) == ids(take(theirs, 30))


@pytest.mark.parametrize("grouping", [True, False])
def test_the_number_of_workers_changes_neither_order_nor_draws(grouping):
    alone, two, three = (take(build(workers, grouping), 15) for workers in (0, 2, 3))
    assert alone == two == three


def test_no_two_samples_draw_the_same():
    draws = [draws for batch in take(build(), 30) for _, draws in batch]
    assert all(len(set(column)) == len(draws) for column in zip(*draws))


@pytest.mark.parametrize("grouping", [True, False])
def test_the_stream_goes_on_behind_every_batch(grouping):
    whole = take(build(grouping=grouping), 30)
    loader = build(grouping=grouping)
    for done in range(25):
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = build(grouping=grouping)
        resumed.load_states([state])
        assert take(resumed, 5) == whole[done : done + 5]
        assert take(loader, 1) == whole[done : done + 1]


def test_it_goes_on_from_a_stream_that_went_on():
    whole, state, batches = take(build(), 30), build().state_dict(), []
    for _ in range(10):
        loader = build()
        loader.load_states([state])
        batches += take(loader, 3)
        state = loader.state_dict()
    assert batches == whole


@pytest.mark.parametrize("before, after", [(2, 2), (2, 0), (0, 3)])
def test_what_workers_read_ahead_does_not_count(before, after):
    whole = take(build(), 20)
    loader = build(before)
    assert take(loader, 7) == whole[:7]
    resumed = build(after)
    resumed.load_states([loader.state_dict()])
    assert take(resumed, 13) == whole[7:]


def test_an_upright_image_waits_for_another_across_the_new_start():
    loader = build()
    while not loader.state_dict()["held"]:
        take(loader, 1)
    [(place, index)] = loader.state_dict()["held"]
    resumed = build()
    resumed.load_states([loader.state_dict()])
    batches = take(resumed, 40)
    assert index in (3, 8)
    [with_upright, *_] = [batch for batch in batches if batch[0][0] in (3, 8)]
    assert with_upright[0][0] == index and place < loader.state_dict()["start"]


def test_another_batch_size_goes_on_at_the_same_image():
    images = [image for batch in ids(take(build(grouping=False), 30)) for image in batch]
    loader = build(grouping=False)
    take(loader, 6)
    resumed = build(grouping=False, batch=3)
    resumed.load_states([loader.state_dict()])
    assert [image for batch in ids(take(resumed, 4)) for image in batch] == images[12:24]


def test_the_seed_is_the_checkpoints():
    loader = build()
    whole = take(build(), 10)
    state = loader.state_dict()
    np.random.seed(SEED + 1)
    other = build_train_loader(records(), mapper=draw, total_batch_size=2)
    assert other.state_dict()["first"] != state["first"]
    other.load_states([state])
    assert take(other, 10) == whole


def test_a_sampler_of_detectron2_goes_on():
    def sampler():
        return RepeatFactorTrainingSampler(torch.linspace(1, 2, NUM_IMAGES), seed=1)

    whole = take(build(sampler=sampler()), 20)
    loader = build(sampler=sampler())
    take(loader, 9)
    resumed = build(sampler=sampler())
    resumed.load_states([loader.state_dict()])
    assert take(resumed, 11) == whole[9:]


def rare_and_frequent():
    """All images have class 0, one has class 1, and another one is a crowd of class 1."""
    dataset = records()
    for record in dataset:
        record["annotations"] = [{"category_id": 0, "bbox": [0, 0, 5, 5], "bbox_mode": 1}]
    dataset[2]["annotations"].append({**dataset[2]["annotations"][0], "category_id": 1})
    crowd = {"category_id": 1, "iscrowd": 1, "bbox": [0, 0, 5, 5], "bbox_mode": 1}
    dataset[5]["annotations"].append(crowd)
    return dataset


@pytest.mark.parametrize("size", [1, 2])
def test_images_of_rare_classes_are_seen_more_often_by_all_processes(size, as_rank):
    """sqrt(0.99 / (1 / 11)) = 3.3 times an epoch, wherever the stream went on."""
    shown = []
    for rank in range(size):
        as_rank(rank, size)
        # Not grouped, as images that wait for others are seen later.
        options = dict(grouping=False, repeat_threshold=0.99)
        whole = take(build(dataset=rare_and_frequent(), **options), 400)
        first = build(dataset=rare_and_frequent(), **options)
        begun = take(first, 150)
        state = copy.deepcopy(first.state_dict())
        np.random.seed(SEED + 1)
        later = build_train_loader(
            rare_and_frequent(),
            mapper=draw,
            total_batch_size=2,
            aspect_ratio_grouping=False,
            num_workers=2 * (size == 1),
            repeat_threshold=0.99,
        )
        later.load_states([state] * size)
        assert begun + take(later, 250) == whole
        shown += [image for batch in ids(whole) for image in batch]
    counts = np.bincount(shown, minlength=NUM_IMAGES)
    others = np.delete(counts, 2)
    assert counts[2] / others.mean() == pytest.approx(np.sqrt(0.99 * NUM_IMAGES), rel=0.05)
    assert others.max() - others.min() <= 2


@pytest.mark.parametrize("options", [{"repeat_threshold": 2.0}, {"sampler": range(5)}])
def test_a_wrong_threshold_or_a_sampler_beside_it_is_refused(options):
    with pytest.raises(ConfigError, match="repeat_threshold"):
        build(**{"repeat_threshold": 0.5, **options})


def test_another_order_of_images_is_said(caplog):
    loader = build()
    take(loader, 9)
    resumed = build(sampler=TrainingSampler(NUM_IMAGES, shuffle=False))
    with caplog.at_level(logging.WARNING, "lite_detr"):
        resumed.load_states([loader.state_dict()])
    assert "order of its images, is not the checkpoint's" in caplog.text
    start = loader.state_dict()["start"]
    assert ids(take(resumed, 1))[0][0] == start % NUM_IMAGES


def test_each_process_goes_on_with_its_own_samples(as_rank):
    states, rest = [], []
    for rank in range(2):
        as_rank(rank, 2)
        loader = build(batch=4)
        take(loader, 5)
        states.append(copy.deepcopy(loader.state_dict()))
        rest.append(take(loader, 5))
    assert rest[0] != rest[1]
    for rank in range(2):
        as_rank(rank, 2)
        loader = build(batch=4)
        loader.load_states(states)
        assert take(loader, 5) == rest[rank]


def test_another_number_of_processes_goes_on_at_the_same_place_and_says_so(as_rank, caplog):
    states = []
    for rank in range(4):
        as_rank(rank, 4)
        loader = build(batch=4, grouping=False)
        take(loader, 6)
        states.append(loader.state_dict())
    as_rank(0, 1)
    # 24 of the images in their order are done.
    order = list(itertools.islice(TrainingSampler(NUM_IMAGES, seed=states[0]["seed"]), 30))
    alone = build(batch=3, grouping=False)
    with caplog.at_level(logging.WARNING, "lite_detr"):
        alone.load_states(states)
    assert ids(take(alone, 2)) == [order[24:27], order[27:30]]
    assert "4 processes and this job has 1" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_trainings_generators_alone(num_workers):
    loader = iter(build(num_workers))
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(3)
    take(loader, 3)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_a_second_iterator_goes_on_with_the_stream():
    whole = take(build(), 6)
    stream = SampleStream([draw(record) for record in records()], TrainingSampler(11, seed=2))
    batches = StreamedBatches(([sample] for sample in stream), stream)
    loader = build()
    assert take(loader, 2) + take(loader, 4) == whole
    first, second = next(iter(batches)), next(iter(batches))
    assert first != second
