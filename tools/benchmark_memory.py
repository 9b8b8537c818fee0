"""The peak memory of a case.

Each case is measured in a process of its own, where no other case has left pages behind that it
could take over unseen. There `measure_calls.peak_memory` counts: on a GPU PyTorch's allocator, on a
CPU Linux's count of resident pages, so that what operators take behind PyTorch's back counts, too.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
from benchmark_records import Case, Memory
from benchmark_runner import WARM_UP, Runner
from benchmark_subjects import operators
from measure_calls import peak_memory
from torch import Tensor, nn


def memory_in_own_process(case: Case) -> Memory | None:
    """As :func:`measure_memory`; errors are raised here as they are there."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(measure_memory, case).result()


def measure_memory(case: Case) -> Memory | None:
    """What a case takes; None where nothing tells."""
    torch.set_num_threads(case.threads)
    runner = Runner(case)
    (encoder,) = runner.subject.parts["encoder"]
    calls: list[tuple[list, dict]] = []
    handle = encoder.register_forward_pre_hook(
        lambda _, args, options: calls.append(_as_leaves(args, options)), with_kwargs=True
    )
    runner.turn()
    handle.remove()
    for _ in range(WARM_UP - 1):
        runner.turn()
    step = peak_memory(runner.turn, case.device)
    if step is None:
        return None
    _run_encoder(runner, encoder, *calls[0])
    return Memory(
        held=runner.subject.held_bytes(),
        step=step,
        encoder=peak_memory(lambda: _run_encoder(runner, encoder, *calls[0]), case.device),
    )


def _as_leaves(args: tuple, options: dict) -> tuple[list, dict]:
    """What a module is called with, cut off from what came before it."""

    def leaf(value: object) -> object:
        if isinstance(value, Tensor) and value.requires_grad:
            return value.detach().requires_grad_()
        return value

    return [leaf(value) for value in args], {name: leaf(value) for name, value in options.items()}


def _run_encoder(runner: Runner, encoder: nn.Module, args: list, options: dict) -> None:
    """The encoder alone, in training forward and backward."""
    with operators(runner.case.operators), torch.set_grad_enabled(runner.training):
        with runner.autocast():
            # forward itself, since the hooks are of the stopwatch.
            memory = encoder.forward(*args, **options)
        if runner.training:
            memory = memory if isinstance(memory, Tensor) else memory.last_hidden_state
            memory.backward(torch.ones_like(memory))
            encoder.zero_grad()
            for leaf in (*args, *options.values()):
                if isinstance(leaf, Tensor):
                    leaf.grad = None
