#!/usr/bin/env python
"""Time models of transformers before and after lite_detr.interop.use_native_attention.

native_attention.py --size 640 --rounds 5 --threads 1
native_attention.py --models mask2former rt_detr

Models have their published sizes and random weights; nothing is downloaded. Both forms of a model
take turns on the same random image, in inference and float32. The ratio is the median over rounds
of the time before to the time after; p10 and p90 are its spread. Memory is the peak of one pass
above what was in use before it, as operators.py measures it.

The difference is the largest one in an output, as a share of its largest number: Grounding DINO's
logits reach 70. Mask2Former and OneFormer turn masks into zeros
and ones between layers, where a last bit decides about a cell; so for these it is that of the
pixel decoder's maps, and that of the outputs stands in brackets.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from calls import environment, peak_memory, time_turn
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from lite_detr import cli
from lite_detr.interop import use_native_attention

# A text of six tokens, as BERT numbers them.
WORDS = [[101, 4937, 1012, 3899, 1012, 102]]
SCALES = ("stage2", "stage3", "stage4")
# The outputs of models, and the maps that come before masks are turned into zeros and ones.
OUTPUTS = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
MAPS = ("pixel_decoder_last_hidden_state", "pixel_decoder_hidden_states")


def resnet() -> transformers.PreTrainedConfig:
    return transformers.ResNetConfig(out_features=list(SCALES))


def swin(*stages: str) -> transformers.PreTrainedConfig:
    return transformers.SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=list(stages)
    )


def deformable_detr(**options: Any) -> nn.Module:
    config = transformers.DeformableDetrConfig(backbone_config=resnet(), **options)
    return transformers.DeformableDetrForObjectDetection(config)


def deformable_detr_two_stage() -> nn.Module:
    return deformable_detr(two_stage=True, with_box_refine=True)


def grounding_dino() -> nn.Module:
    config = transformers.GroundingDinoConfig(backbone_config=swin(*SCALES))
    return transformers.GroundingDinoForObjectDetection(config)


def mm_grounding_dino() -> nn.Module:
    config = transformers.MMGroundingDinoConfig(backbone_config=swin(*SCALES))
    return transformers.MMGroundingDinoForObjectDetection(config)


def mask2former() -> nn.Module:
    config = transformers.Mask2FormerConfig(backbone_config=swin("stage1", *SCALES))
    return transformers.Mask2FormerForUniversalSegmentation(config)


def oneformer() -> nn.Module:
    config = transformers.OneFormerConfig(
        backbone_config=swin("stage1", *SCALES), is_training=False
    )
    return transformers.OneFormerForUniversalSegmentation(config)


def rt_detr() -> nn.Module:
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig())


def rt_detr_v2() -> nn.Module:
    return transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config())


def d_fine() -> nn.Module:
    return transformers.DFineForObjectDetection(
        transformers.DFineConfig(decoder_n_points=[3, 6, 3])
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build
    for build in (
        deformable_detr,
        deformable_detr_two_stage,
        grounding_dino,
        mm_grounding_dino,
        mask2former,
        oneformer,
        rt_detr,
        rt_detr_v2,
        d_fine,
    )
}


def build_model(name: str) -> nn.Module:
    """Build a model whose attentions look at different places for different queries."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.01 * torch.randn_like(parameter)
    return model


def make_inputs(name: str, size: int) -> dict[str, Tensor]:
    inputs = {"pixel_values": torch.randn(1, 3, size, size)}
    if "grounding" in name:
        inputs["input_ids"] = torch.tensor(WORDS)
    if name == "oneformer":
        inputs["task_inputs"] = torch.zeros(1, 77, dtype=torch.long)
    return inputs


def measure(name: str, size: int, rounds: int) -> dict[str, Any]:
    """Measure a model in both forms, in turns."""
    model, inputs = build_model(name), make_inputs(name, size)

    def run() -> dict[str, Any]:
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True)

    def run_as(native: bool, measured: Callable[[], Any]) -> Any:
        with use_native_attention(model) if native else nullcontext():
            return measured()

    before, after = (run_as(native, run) for native in (False, True))
    record = {
        "model": name,
        "attentions": len(use_and_restore(model)),
        "outputs": largest_difference(before, after, OUTPUTS),
        "maps": largest_difference(before, after, MAPS),
    }
    del before, after
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for index in range(rounds):
        for native in (False, True) if index % 2 else (True, False):
            (turn, *_) = run_as(native, lambda: time_turn(run, "cpu"))
            seconds[native].append(turn)
    memory = [run_as(native, lambda: peak_memory(run, "cpu")) for native in (False, True)]
    return record | {"before": seconds[False], "after": seconds[True], "memory": memory}


def use_and_restore(model: nn.Module) -> list:
    with use_native_attention(model) as report:
        return report.replacements


def largest_difference(before: Any, after: Any, names: Sequence[str]) -> float | None:
    """Return the largest relative difference of some outputs; None if a model has none of them."""
    differences = [
        relative_difference(one, other)
        for name in names
        for one, other in zip(tensors(before.get(name)), tensors(after.get(name)))
    ]
    return max(differences, default=None)


def relative_difference(one: Tensor, other: Tensor) -> float:
    # Logits of words that a text lacks are minus infinity.
    finite = one.isfinite() & other.isfinite()
    if not torch.equal(one[~finite], other[~finite]):
        return float("inf")
    one, other = one[finite], other[finite]
    return ((one - other).abs().max() / one.abs().max()).item()


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output or ())


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        before, after = np.array(record["before"]), np.array(record["after"])
        ratios = before / after
        low, high = np.percentile(ratios, [10, 90])
        maps, outputs = record["maps"], record["outputs"]
        difference = f"{outputs:.1e}" if maps is None else f"{maps:.1e} ({outputs:.1e})"
        rows.append(
            [
                record["model"],
                record["attentions"],
                f"{1e3 * statistics.median(before):.0f}",
                f"{1e3 * statistics.median(after):.0f}",
                f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})",
                difference,
                " -> ".join("?" if m is None else f"{m / 2**20:.0f}" for m in record["memory"]),
            ]
        )
    header = ["model", "attentions", "before, ms", "after, ms", "ratio (p10 to p90)"]
    header += ["difference", "memory, MiB"]
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    add(
        "--size", type=cli.whole_number(64), default=640, help="of the image (default: %(default)s)"
    )
    add("--rounds", type=cli.whole_number(1), default=5, help="(default: %(default)s)")
    add("--threads", type=cli.whole_number(1), default=1, help="(default: %(default)s)")
    add("--json", type=Path, metavar="FILE.json", help="also write the time of every round")
    args: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    names = tqdm(args.models)
    records = [measure(name, args.size, args.rounds) for name in names]
    print(table(records))
    if args.json:
        content = {"environment": environment("cpu"), "size": args.size, "records": records}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
