"""Checkpoints under the references' names, without the references.

The golden files in ``tests/golden`` list the names, shapes and dtypes of these checkpoints, which
are hundreds of megabytes each, so none is stored:

- :func:`reference_checkpoint` computes the very weights that made a golden file's outputs from
  their names, so that anyone can rebuild them;
- :func:`reference_file` only has their names and shapes, each weight filled with a number of its
  own, and the other functions change these as the references' code does from variant to variant.
"""

import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lite_detr.modeling.criterion import Target

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTH, HEADS, LEVELS, POINTS = 256, 8, 4, 4


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value of the checkpoint entry ``name``, seeded by the CRC-32 of its name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    normal = (
        rng.standard_normal(shape).astype(np.float32)
        if shape
        else np.float32(rng.standard_normal())
    )
    module, leaf = (["", *name.split(".")])[-2:]
    if name.endswith("sampling_offsets.bias"):
        return 2.0 * normal
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(normal)
    if leaf == "running_mean":
        return 0.1 * normal
    if leaf == "weight" and len(shape) == 1:
        return 1 + 0.1 * normal
    if len(shape) <= 1:
        return 0.1 * normal
    is_embedding = (
        "embed" in module and "bbox" not in name and "class" not in name or "label_enc" in name
    )
    if len(shape) == 2 and is_embedding:
        return normal
    return normal / np.sqrt(np.prod(shape[1:]))


def reference_checkpoint(golden_file: str | Path) -> dict[str, Tensor]:
    """The reference state dict behind a golden file: full names and shapes, float32.

    Entries that the reference model shares between modules carry the name of the first (``like``)
    and so its values. Integer buffers (Swin's ``relative_position_index``,
    ``num_batches_tracked``) are left out: a model makes its own.
    """
    entries = json.loads(str(np.load(golden_file)["state_dict_json"]))
    return {
        name: torch.as_tensor(weight(entry["like"], tuple(entry["shape"])).astype(np.float32))
        for name, entry in entries.items()
        if entry["dtype"].startswith("float")
    }


def reference_file(name: str) -> dict[str, Tensor]:
    """The names and shapes of a golden file's checkpoint; weights that are one are equal."""
    entries = json.loads(str(np.load(GOLDEN / f"{name}.npz")["state_dict_json"]))
    floats = {key: entry for key, entry in entries.items() if entry["dtype"].startswith("float")}
    numbers: dict[str, float] = {}
    for index, entry in enumerate(floats.values()):
        numbers.setdefault(entry["like"], float(index))
    return {
        key: torch.tensor(numbers[entry["like"]]).expand(entry["shape"])
        for key, entry in floats.items()
    }


def golden_batch(golden: Mapping[str, np.ndarray], name: str) -> list[dict]:
    """The images of a golden file's batch, ``single`` or ``padded``, as detectors take them."""
    images = [golden[key] for key in sorted(golden) if key.startswith(f"{name}.image_")]
    return [{"image": torch.from_numpy(image).permute(2, 0, 1)} for image in images]


def golden_targets(golden: Mapping[str, np.ndarray]) -> list[Target]:
    """As they are, since Detectron2's ``Boxes`` would round them to float32."""
    return [
        Target(
            torch.from_numpy(golden[f"targets.labels_{image}"]),
            torch.from_numpy(golden[f"targets.boxes_{image}"]).double(),
        )
        for image in range(2)
    ]


def with_linear(
    weights: Mapping[str, Tensor], modules: Iterable[str], outputs: int
) -> dict[str, Tensor]:
    """Adds linear layers to every module that some pattern names, such as a key projection."""
    added = dict(weights)
    for number, module in enumerate(modules):
        added[f"{module}.weight"] = torch.tensor(-1.0 - number).expand(outputs, WIDTH)
        added[f"{module}.bias"] = torch.tensor(-1.0 - number).expand(outputs)
    return added


def attentions(part: str, name: str) -> list[str]:
    """The modules ``name`` in the deformable attention of all six layers of a part."""
    attention = {"encoder": "self_attn", "decoder": "cross_attn"}[part]
    return [f"transformer.{part}.layers.{layer}.{attention}.{name}" for layer in range(6)]


def without(weights: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
    """Drops the keys that a pattern finds."""
    return {key: value for key, value in weights.items() if not re.search(pattern, key)}


def plain_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lite-DINO with ``key_aware=False``, which builds ``query_proj`` all the same."""
    modules = attentions("encoder", "attention_weights")
    modules += attentions("decoder", "attention_weights")
    return with_linear(weights, modules, HEADS * LEVELS * POINTS)


def levels(weights: Mapping[str, Tensor], count: int, channels: list[int]) -> dict[str, Tensor]:
    """Plain attention over another number of scales, made from maps with these channels."""
    changed = without(weights, r"^input_proj\.")
    for key, value in weights.items():
        if match := re.search(r"(sampling_offsets|attention_weights)\.(weight|bias)$", key):
            outputs = HEADS * count * POINTS * (2 if match[1] == "sampling_offsets" else 1)
            changed[key] = value.flatten()[0].expand(outputs, *value.shape[1:])
    changed["transformer.level_embed"] = torch.zeros(count, WIDTH)
    for index in range(count):
        extra = index >= len(channels)
        inputs = WIDTH if index > len(channels) else channels[min(index, len(channels) - 1)]
        kernel = 3 if extra else 1
        changed[f"input_proj.{index}.0.weight"] = torch.zeros(WIDTH, inputs, kernel, kernel)
        for leaf in ("0.bias", "1.weight", "1.bias"):
            changed[f"input_proj.{index}.{leaf}"] = torch.zeros(WIDTH)
    return changed


def small_two_stage(num_classes: int, width: int = 32, layers: int = 2) -> dict[str, Tensor]:
    """Two-stage Deformable DETR, narrow and shallow but for its ResNet-50, with random weights.

    As in ``tests/helpers/configs/small_two_stage.py``, with 4 heads and 48 hidden channels.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {WIDTH: width, 2 * WIDTH: 2 * width, 3 * WIDTH: 3 * width, 1024: 48}
    outputs = {
        "sampling_offsets": 4 * LEVELS * POINTS * 2,
        "attention_weights": 4 * LEVELS * POINTS,
    }
    small: dict[str, Tensor] = {}
    for key, value in reference_file("deformable_detr_r50_two_stage").items():
        layer = re.search(r"(?:layers|class_embed|bbox_embed)\.(\d+)\.", key)
        is_head = "class_embed" in key or "bbox_embed" in key
        if layer and not key.startswith("backbone"):
            # The last pair of heads makes the proposals and stays the last one.
            if is_head and layer[1] == "6":
                key = re.sub(r"(_embed)\.6\.", rf"\1.{layers}.", key)
            elif int(layer[1]) >= layers:
                continue
        shape = list(value.shape)
        if not key.startswith("backbone"):
            kept = 1 if key.startswith("input_proj") and "3.0" not in key else len(shape)
            shape[:kept] = [sizes.get(size, size) for size in shape[:kept]]
            if key == "input_proj.3.0.weight":
                shape[1] = 2048
        for module, count in outputs.items():
            if f".{module}." in key:
                shape[0] = count
        if "class_embed" in key:
            shape[0] = num_classes
        tensor = torch.randn(shape, generator=generator) * 0.05
        if key.endswith(
            ("running_var", "bn1.weight", "bn2.weight", "bn3.weight", "sample.1.weight")
        ):
            tensor = tensor + 1
        small[key] = tensor
    # The decoder refers to the heads.
    for key in [key for key in small if key.startswith(("class_embed", "bbox_embed"))]:
        small[key] = small[f"transformer.decoder.{key}"]
    return small
