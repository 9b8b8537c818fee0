#!/usr/bin/env python
"""Show how the attention of encoders develops in training, from the checkpoints of runs.

attention_statistics.py --runs output/plain output/key_aware --output attention_statistics.png

For the weights at the start and in each checkpoint of a run (train.checkpointer.max_to_keep), the
same training images go forward and backward once. Drawn against iterations, as means over the
encoder's layers:

- entropy of a query's weights in a head, as a share of that of equal weights on all points: 1 is an
  average over all points, 0 is one point alone;
- norm of the loss's gradient by the projection that decides on the weights (query_proj of key-aware
  attention, attention_weights of plain attention), divided by that of value_proj.

--json FILE writes the figures of each layer as well.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.utils.env import seed_all_rng
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

from lite_detr import cli, overrides
from lite_detr.analysis.attention_maps import find_attentions, record_attention
from lite_detr.checkpoint import DetrCheckpointer
from lite_detr.data.coco import apply_data_config
from lite_detr.errors import MissingFileError
from lite_detr.modeling import KeyAwareDeformableAttention
from lite_detr.modeling.attention import DeformableAttention

SEED = 0


class Statistics(NamedTuple):
    """Figures of each layer of an encoder, at a point of a training.

    Attributes:
        entropies: from 0 to 1.
        gradients: norms, of the weights' projection by the values'.
    """

    iteration: int
    entropies: list[float]
    gradients: list[float]


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Return the iterations that a run's checkpoints were written after, and the files.

    Raises:
        MissingFileError: there are none.
    """
    files = sorted(run.glob("model_[0-9]*.pth"))
    if not files:
        raise MissingFileError(
            f"{run} has no model_NNNNNNN.pth: train with train.checkpointer.max_to_keep=N, where N "
            "is the number of checkpoints to look at"
        )
    return [(int(file.stem.removeprefix("model_")) + 1, file) for file in files]


def measure(run: Path, num_batches: int, opts: Sequence[str]) -> Iterator[Statistics]:
    """Yield the figures of a run at its start and at each checkpoint."""
    cfg = overrides.load_config(str(run / "config.yaml"), opts)
    apply_data_config(cfg)
    states = [(0, cfg.train.init_checkpoint), *checkpoints(run)]
    inputs = first_batches(cfg, num_batches)
    for iteration, weights in states:
        seed_all_rng(cfg.train.seed)
        model = instantiate(cfg.model).to(cfg.train.device).train()
        DetrCheckpointer(model).load(str(weights))
        yield Statistics(iteration, *statistics(model, inputs))


def first_batches(cfg: DictConfig, number: int) -> list[list[dict]]:
    """Return the first batches of the training data, the same for each run."""
    seed_all_rng(SEED)
    return list(islice(instantiate(cfg.dataloader.train), number))


def statistics(model: nn.Module, inputs: Sequence[list[dict]]) -> tuple[list[float], list[float]]:
    """Return the entropy and the relative gradient of each of the encoder's layers."""
    attentions = {n: m for n, m in find_attentions(model).items() if n.startswith("encoder.")}
    entropies = {name: [] for name in attentions}
    for batch in inputs:
        seed_all_rng(SEED)  # For the noise of denoising queries.
        with record_attention(model, attentions) as maps:
            loss = sum(model(batch).values())
        for found in maps:
            entropies[found.name].append(relative_entropy(found.weights))
        loss.backward()
    return (
        [float(np.mean(values)) for values in entropies.values()],
        [relative_gradient(attention) for attention in attentions.values()],
    )


def relative_entropy(weights: Tensor) -> float:
    """Return the mean entropy of weights ``[B, Q, M, L, P]`` as a share of equal weights'."""
    weights = weights.flatten(-2)
    return float(torch.special.entr(weights).sum(-1).mean() / math.log(weights.shape[-1]))


def relative_gradient(attention: DeformableAttention) -> float:
    """Return the norm of the gradient by the weights' projection, divided by the values'."""
    key_aware = isinstance(attention, KeyAwareDeformableAttention)
    projection = attention.query_proj if key_aware else attention.attention_weights
    return float(projection.weight.grad.norm() / attention.value_proj.weight.grad.norm())


def draw(found: dict[str, list[Statistics]], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, points in found.items():
        iterations = [point.iteration for point in points]
        axes[0].plot(iterations, [np.mean(p.entropies) for p in points], ".-", label=name)
        axes[1].plot(iterations, [np.mean(p.gradients) for p in points], ".-", label=name)
    axes[0].set(
        title="Entropy of a query's weights", ylabel="share of equal weights'", ylim=(0, 1.05)
    )
    axes[1].set(title="Gradient of the weights' projection", ylabel="share of value_proj's")
    axes[1].set_ylim(0, None)
    axes[0].legend()
    for axis in axes:
        axis.set(xlabel="iterations", xlim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, required=True, metavar="DIR", help="their train.output_dir")
    add(
        "--names",
        nargs="+",
        metavar="NAME",
        help="of the runs in the picture; default: the folders",
    )
    add(
        "--batches",
        type=cli.whole_number(1),
        default=4,
        metavar="N",
        help="batches of training images (default: %(default)s)",
    )
    add("--output", type=Path, required=True, metavar="PICTURE", help="the picture to write")
    add("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    cli.add_overrides(parser)
    args = parser.parse_intermixed_args(argv)
    args.names = args.names or [str(run) for run in args.runs]
    if len(args.names) != len(args.runs):
        parser.error(f"{len(args.runs)} runs, but {len(args.names)} names: give --names for each")
    return args


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    found = {
        name: list(measure(run, args.batches, args.opts))
        for name, run in zip(args.names, args.runs)
    }
    draw(found, args.output)
    if args.json:
        figures = {name: [point._asdict() for point in points] for name, points in found.items()}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
