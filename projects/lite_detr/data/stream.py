"""The stream of training samples, which another process can continue.

The stream is an order of images and a random seed for each of its places. So a sample depends on
its place alone: not on what was read before, or on the number of workers that read ahead.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..random_states import same_random_states, seed_sample
from ..signals import outlive_signals

logger = logging.getLogger("lite_detr")

# The key of a sample's place on its way from a worker to the training process.
PLACE = "place_in_stream"
# The number of images at the start of an order that identify it.
NUM_FIRST = 16


class SampleStream(IterableDataset):
    """This process's share of the samples of an endless training run, in the sampler's order.

    A place counts this process's samples from the start of training. Workers take turns, so that
    the loader's order is that of the places, whatever the number of workers.

    Args:
        dataset: maps an index to a sample, a dict. It may draw from the generators of Python,
            NumPy and PyTorch, which are seeded for each place.
        sampler: yields indices, the same in each new start. None shuffles every epoch differently,
            by a seed that is drawn here and shared by all processes.
        chunk_size: the number of consecutive samples from one worker, which it batches.
        repeat_factors: ``[len(dataset)]``: how often each sample is in an epoch, on average, if
            there is no ``sampler``. None: once.
        mixed: another dataset of the same indices, for the first places; see
            :class:`~lite_detr.data.mixing.MixedDataset`.
        num_mixed: the number of these places.

    Attributes:
        start: the first place that has not been read.
        held: ``{place: index}`` of earlier places whose samples have not been yielded.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: Sampler | None = None,
        chunk_size: int = 1,
        repeat_factors: Tensor | None = None,
        mixed: Dataset | None = None,
        num_mixed: int = 0,
    ):
        self.dataset = dataset
        self.mixed, self.num_mixed = mixed, num_mixed
        self.chunk_size = chunk_size
        self.has_own_sampler = sampler is None
        self.seed = comm.shared_random_seed()
        self.repeat_factors = repeat_factors
        self.sampler = self._own_sampler() if sampler is None else sampler
        # Stored, as workers that are spawned do not know the other processes.
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
                dataset = self.mixed if place < self.num_mixed else self.dataset
                yield {**dataset[index], PLACE: place}

    def indices(self) -> Iterator[int]:
        """Return the sampler's indices from ``start`` on."""
        return itertools.islice(self.sampler, self.start, None)

    def reseed(self, seed: int) -> None:
        self.seed = seed
        if self.has_own_sampler:
            self.sampler = self._own_sampler()

    def _own_sampler(self) -> Sampler:
        if self.repeat_factors is None:
            return TrainingSampler(len(self.dataset), seed=self.seed)
        return RepeatFactorTrainingSampler(self.repeat_factors, seed=self.seed)


class StreamedBatches(IterableDataset):
    """The batches of a loader of a :class:`SampleStream`, and the position that they reached.

    The position is that of the batches that training took, not of what workers have read ahead.
    Images that wait in one of Detectron2's two groups for others of their orientation are known by
    place and index, and are read again after a new start. Loading does not change the training
    process's random generators.

    Args:
        loader: Detectron2's, of the stream; yields lists of samples.
        stream: the one that the loader reads.
    """

    def __init__(self, loader: Iterable[list[dict]], stream: SampleStream):
        self.stream = stream
        # Of a function, not a method: a reference cycle would keep workers alive.
        self._batches = take_batches(loader, stream)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        """Return the one iterator, which continues after the last batch that was taken."""
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """Return this process's position: numbers, lists and tuples."""
        stream = self.stream
        return {
            "seed": stream.seed,
            "start": stream.start,
            "held": list(stream.held.items()),
            "first": self._first_indices(),
        }

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue where a job stopped; call it before the first batch is taken.

        With the job's number of processes, each continues with its own samples. With another
        number, the samples after those that were read are distributed again, and those that were
        waiting in groups are omitted.

        Args:
            states: of all processes of that job, by rank.
        """
        stream = self.stream
        stream.reseed(states[0]["seed"])
        if len(states) != stream.world_size:
            stream.start = sum(state["start"] for state in states) // stream.world_size
            logger.warning(
                "the checkpoint is of %d processes and this job has %d: it continues at the same "
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
                "the training set, or the order of its images, is not the checkpoint's: training "
                "continues at the same place of the new order"
            )

    def _first_indices(self) -> list[int]:
        return [int(index) for index in itertools.islice(self.stream.sampler, NUM_FIRST)]


def take_batches(
    loader: Iterable[list[dict[str, Any]]], stream: SampleStream
) -> Iterator[list[dict[str, Any]]]:
    """Yield the batches of a loader, and move the stream's position as each is taken."""
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
