"""The states of all random generators that a training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

States = dict[str, Any]


def get_random_states() -> States:
    """The states of the generators of Python, NumPy, PyTorch and the current GPU.

    Returns:
        Numbers, strings, tuples and tensors, which ``torch.load`` reads with ``weights_only=True``;
        ``cuda`` is None where no GPU is in use.
    """
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: States) -> None:
    """Brings the generators into states that :func:`get_random_states` returned.

    A state of a GPU is left out where there is none now.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_sample(*key: int) -> None:
    """Seeds the generators that augmentations draw from by all numbers of a key.

    Not those of GPUs: ``torch.manual_seed`` would reset them, too, in the training's process.
    """
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])


@contextmanager
def same_random_states() -> Iterator[None]:
    """Afterwards the generators are in the states that they were in before."""
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(states)
