"""Save, restore and seed the random generators that training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

States = dict[str, Any]


def get_random_states() -> States:
    """Return the states of the generators of Python, NumPy, PyTorch and the current GPU.

    Returns:
        Numbers, strings, tuples and tensors, which ``torch.load`` reads with ``weights_only=True``;
        ``cuda`` is None if no GPU is in use.
    """
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_random_states(states: States) -> None:
    """Restore states that :func:`get_random_states` returned.

    The state of a GPU is ignored if there is no GPU now.
    """
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_sample(*key: int) -> None:
    """Seed the generators that augmentations draw from with all numbers of a key.

    GPUs' generators are not seeded; ``torch.manual_seed`` would reset them in the training process.
    """
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])


@contextmanager
def same_random_states() -> Iterator[None]:
    """Restore the generators' states afterwards."""
    states = get_random_states()
    try:
        yield
    finally:
        set_random_states(states)
