#!/usr/bin/env python
"""Time the parts of a detector's inference, with the native operators and with those in PyTorch.

    benchmark.py --config-file dino/lite_dino_r50_h3l1_2p1x3_36ep.py --size 800x1066 --threads 2

Both kinds of operators take turns on the same random image and weights, so that whatever else the
machine does hits both alike. Figures are medians over the rounds, in milliseconds.
"""

import argparse
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from detectron2.config import LazyConfig, instantiate
from size_argument import parse_size
from torch import nn
from tqdm import tqdm

from lite_detr import model_zoo, ops
from lite_detr.modeling import attention
from lite_detr.modeling.detector import Detector

PARTS = ("backbone", "neck", "encoder", "queries", "decoder")
PYTORCH = {
    "ms_deform_attn": ops.ms_deform_attn_pytorch,
    "key_aware_ms_deform_attn": ops.key_aware_ms_deform_attn_pytorch,
}


class Stopwatch:
    """Adds up the seconds that a model's parts take, in one forward pass after another."""

    def __init__(self, model: Detector):
        self.seconds: dict[str, float] = defaultdict(float)
        for name in PARTS:
            part = getattr(model, name)
            part.register_forward_pre_hook(lambda *_, name=name: self._add(name, -1))
            part.register_forward_hook(lambda *_, name=name: self._add(name, 1))

    def _add(self, name: str, sign: int) -> None:
        self.seconds[name] += sign * time.perf_counter()


@contextlib.contextmanager
def operators(kind: str) -> Iterator[None]:
    """Lets the attention modules call the operators of a kind."""
    with contextlib.ExitStack() as stack:
        if kind == "pytorch":
            for name, function in PYTORCH.items():
                stack.enter_context(mock.patch.object(attention, name, function))
        yield


def measure(
    model: nn.Module, size: tuple[int, int], kinds: Sequence[str], rounds: int
) -> dict[str, dict[str, float]]:
    """The median milliseconds of each part and of the whole, for each kind of operators."""
    inputs = [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)}]
    stopwatch = Stopwatch(model)
    times = {kind: defaultdict(list) for kind in kinds}
    for index in tqdm(range(rounds + 1), unit="round"):
        for kind in kinds:
            stopwatch.seconds.clear()
            begin = time.perf_counter()
            with operators(kind), torch.no_grad():
                model(inputs)
            stopwatch.seconds["total"] = time.perf_counter() - begin
            if index > 0:  # The first round warms up.
                for name, seconds in stopwatch.seconds.items():
                    times[kind][name].append(1000 * seconds)
    return {
        kind: {name: statistics.median(samples) for name, samples in parts.items()}
        for kind, parts in times.items()
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """A row for each part, with its share of the time with native operators."""
    kinds = list(results)
    lines = [
        "| part | " + " | ".join(f"{kind}, ms" for kind in kinds) + f" | share, {kinds[0]} |",
        "|---|" + "---:|" * (len(kinds) + 1),
    ]
    for name in (*PARTS, "total"):
        times = " | ".join(f"{results[kind][name]:.0f}" for kind in kinds)
        share = results[kinds[0]][name] / results[kinds[0]]["total"]
        lines.append(f"| {name} | {times} | {share:.0%} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="C", help="a file or a name of the model zoo")
    add("--size", type=parse_size, default=(800, 1066), metavar="HxW", help="of the image, px")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--rounds", type=int, default=7)
    add("opts", nargs="*", metavar="key=value", help="change the config's values")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(args.threads)
    cfg = LazyConfig.apply_overrides(model_zoo.get_config(args.config_file), args.opts)
    model = instantiate(cfg.model).eval()
    kinds = ("native", "pytorch") if ops.backend() == "native" else ("pytorch",)
    results = measure(model, args.size, kinds, args.rounds)
    print(f"PyTorch {torch.__version__}, {args.threads} threads, {args.size[0]}x{args.size[1]}")
    print(table(results))


if __name__ == "__main__":
    main()
