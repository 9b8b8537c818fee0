"""The stream of training samples, which can go on where another process left it.

The stream is an order of images and a random seed for each of its places. So a sample depends on
its place alone: neither on what was read before, nor on how many workers read ahead.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..engine.preemption import outlive_signals
from ..random_states import same_random_states, seed_sample

logger = logging.getLogger("lite_detr")

# The key under which a sample carries its place on the way from a worker to the training.
PLACE = "place_in_stream"
# So many images at the start of an order tell whether it is the same.
NUM_FIRST = 16


class SampleStream(IterableDataset):
    """This process's share of the samples of an endless training, in the sampler's order.

    A place counts this process's samples from the start of the training. Workers take turns, so
    that the loader's order is that of the places, whatever the number of workers.

    Args:
        dataset: gives a sample, which is a dict, for an index. It may draw from the generators of
            Python, NumPy and PyTorch, which are seeded for each place.
        sampler: gives indices, the same in each new start. None shuffles every epoch anew, by a
            seed that is drawn here and shared by all processes.
        chunk_size: so many samples in a row come from one worker: the number that it batches.

    Attributes:
        start: the first place that is to be read.
        held: ``{place: index}``, places before it that are still to be given.
    """

    def __init__(self, dataset: Dataset, sampler: Sampler | None = None, chunk_size: int = 1):
        self.dataset = dataset
        self.chunk_size = chunk_size
        self.has_own_sampler = sampler is None
        self.seed = comm.shared_random_seed()
        self.sampler = TrainingSampler(len(dataset), seed=self.seed) if sampler is None else sampler
        # Workers that are spawned know nothing of the other processes.
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        self.start = 0
        self.held: dict[int, int] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            outlive_signals()
        places = itertools.chain(list(self.held.items()), enumerate(self.indices(), self.start))
        for turn, (place, index) in enumerate(places):
            if turn // self.chunk_size % count == number:
                seed_sample(self.seed, place * self.world_size + self.rank)
                yield {**self.dataset[index], PLACE: place}

    def indices(self) -> Iterator[int]:
        """The sampler's indices from the start on."""
        return itertools.islice(self.sampler, self.start, None)

    def reseed(self, seed: int) -> None:
        self.seed = seed
        if self.has_own_sampler:
            self.sampler = TrainingSampler(len(self.dataset), seed=seed)


class StreamedBatches(IterableDataset):
    """The batches of a loader of a :class:`SampleStream`, which knows how far they were taken.

    What counts is what training took, not what workers have read ahead. Images that wait in one of
    Detectron2's two groups for others of their orientation are known by place and index, and are
    read again after a new start. Loading leaves the training's random generators alone.

    Args:
        loader: Detectron2's, of the stream; gives lists of samples.
        stream: what the loader reads from.
    """

    def __init__(self, loader: Iterable[list[dict]], stream: SampleStream):
        self.stream = stream
        # Not a method's: in a cycle of references, workers would end late.
        self._batches = take_batches(loader, stream)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """There is one stream: each iterator goes on behind the last batch that was taken."""
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """How far this process has come: numbers, lists and tuples."""
        stream = self.stream
        return {
            "seed": stream.seed,
            "start": stream.start,
            "held": list(stream.held.items()),
            "first": self._first_indices(),
        }

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Goes on where a job stood, before the first batch is taken.

        With as many processes as the job had, each goes on with its own samples. With another
        number, the samples are shared out anew behind as many as were read in all, and those that
        were waiting in groups are left out.

        Args:
            states: of all processes of that job, by rank.
        """
        stream = self.stream
        stream.reseed(states[0]["seed"])
        if len(states) != stream.world_size:
            stream.start = sum(state["start"] for state in states) // stream.world_size
            logger.warning(
                "the checkpoint is of %d processes and this job has %d: it goes on at the same "
                "place of the epoch, but not with the same batches",
                len(states),
                stream.world_size,
            )
            return
        state = states[stream.rank]
        stream.start = state["start"]
        if self._first_indices() == state["first"]:
            stream.held = dict(state["held"])
        else:
            logger.warning(
                "the training set, or the order of its images, is not the checkpoint's: the "
                "training goes on at the same place of the new order"
            )

    def _first_indices(self) -> list[int]:
        return [int(index) for index in itertools.islice(self.stream.sampler, NUM_FIRST)]


def take_batches(
    loader: Iterable[list[dict[str, Any]]], stream: SampleStream
) -> Iterator[list[dict[str, Any]]]:
    """The batches of a loader, each of which is noted in the stream as it is taken."""
    indices = stream.indices()
    with same_random_states():
        batches = iter(loader)
    while True:
        with same_random_states():
            batch = next(batches, None)
        if batch is None:
            return
        places = [sample.pop(PLACE) for sample in batch]
        # The last sample completes the batch, so all places up to its own have been read.
        while stream.start <= places[-1]:
            stream.held[stream.start] = int(next(indices))
            stream.start += 1
        for place in places:
            del stream.held[place]
        yield batch
