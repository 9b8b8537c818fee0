"""Runs documented commands in a folder that looks like the repository's root, with little data.

Small stand-ins lie in place of the datasets and pictures that pages take for granted. Programs run
as they are written, with the additions of :data:`SHRUNK`; ``page_commands`` checks what is written
without these, so they hide no mistake.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from page_commands import Command
from PIL import Image
from programs import ROOT, run_program

from lite_detr.data.digits import write_digits_dataset

SECONDS = 900  # a command takes a tenth of it at most, on a machine that does nothing else

# Pages may rewrite their tables and pictures.
COPIED = ("docs",)
LINKED = "Makefile configs demo kernels projects pyproject.toml tests tools train_net.py".split()
BLOOD_CELLS = ("RBC", "WBC", "Platelets")
SIDE = 64  # pixels of the pictures that stand for a reader's own

WHOLE_IMAGES = "dataloader.test.mapper.augmentations=[]"


@dataclass(frozen=True)
class Shrunk:
    """Further arguments of a program, so that a run takes seconds.

    Attributes:
        first: before all arguments.
        defaults: before the first ``key=value``, which may be the same key and then counts.
        last: after all arguments, so that these count.
    """

    first: tuple[str, ...] = ()
    defaults: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    def apply(self, arguments: Sequence[str]) -> list[str]:
        settings = (i for i, text in enumerate(arguments) if re.match(r"[\w.]+=", text))
        place = next(settings, len(arguments))
        middle = [*arguments[:place], *self.defaults, *arguments[place:]]
        return [*self.first, *middle, *self.last]


SHRUNK = {
    "train_net.py": Shrunk(
        first=("--num-gpus", "1"),
        # The weights of most backbones are downloaded.
        defaults=("train.init_checkpoint=",),
        last=(
            "train.max_iter=1",
            "train.eval_period=1",
            "dataloader.train.total_batch_size=2",
            "dataloader.train.num_workers=0",
            "dataloader.train.mapper.augmentations=[]",
            "dataloader.test.num_workers=0",
            WHOLE_IMAGES,
        ),
    ),
    "demo/demo.py": Shrunk(first=(WHOLE_IMAGES,)),
    "tools/visualize_attention.py": Shrunk(first=(WHOLE_IMAGES,)),
    "tools/visualize_tokens.py": Shrunk(first=(WHOLE_IMAGES,)),
    "tools/make_digits.py": Shrunk(last=("--train", "4", "--val", "2")),
    "tools/analyze_model.py": Shrunk(last=("--size", "64x64")),
    "tools/benchmarks/detectors.py": Shrunk(
        # The competitor chooses 300 of the tokens, and ends where there are fewer.
        last=("--sizes", "128x128", "--rounds", "1", "--threads", "1", "--no-memory")
    ),
    "tools/benchmarks/operators.py": Shrunk(
        last=("--levels", "8x8", "4x4", "--seconds", "0.1", "--threads", "1")
    ),
    "tools/benchmarks/operator_times.py": Shrunk(
        last=("--size", "64x64", "--rounds", "1", "--threads", "1")
    ),
    "tools/benchmarks/growth.py": Shrunk(
        last=("--long-sides", "64", "128", "--batch", "1", "--rounds", "1", "--threads", "1")
    ),
    "pytest": Shrunk(last=("--collect-only", "-p", "no:cacheprovider")),
}

SHRUNK |= {
    "lite-detr train": SHRUNK["train_net.py"],
    "lite-detr evaluate": SHRUNK["train_net.py"],
    "lite-detr predict": SHRUNK["demo/demo.py"],
}

# What is not run, and why.
EXEMPT = {
    "make install": "it made the environment that these tests run in",
    "source .venv/bin/activate": "these tests run in it",
    "make demo": "test_the_commands_of_make_demo_run runs what it consists of",
    "make test": "this very program",
    "make sanitize": "it compiles for minutes, and runs the operators' tests once more",
    "make lint": "CI runs it, on all files",
    "make docs": "tests/docs/test_site.py is about it",
    "python tools/benchmarks/onnx_files.py": "its test runs it, on a small detector",
    "python tools/soak.py": "tests/engine/test_resume.py runs it, on a detector of its own",
    "python tools/benchmarks/large_picture.py": "it needs a trained detector of digits",
}

# What a page needs from another: trained weights.
TRAIN_FIRST = (
    "python train_net.py --config-file digits/lite_dino_efficientnet_lite0.py "
    "train.output_dir=output/first"
)
BEFORE = {
    "docs/deploy.md": TRAIN_FIRST,
    "docs/inference.md": TRAIN_FIRST,
    "docs/attention_maps.md": (
        "python train_net.py --config-file bccd/lite_dino_efficientnet_lite0.py "
        "data.train_json=bccd/train.json data.train_images=bccd/images "
        "data.val_json=bccd/val.json data.val_images=bccd/images train.output_dir=output/bccd"
    ),
}

# Variables that only make programs faster; the effect of others shows in a new process.
SPEED_ONLY = {"OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_"}


def reason_not_to_run(command: Command) -> str:
    """Return why a command is exempt; empty if it is not."""
    words = " ".join(command.arguments)
    found = (why for prefix, why in EXEMPT.items() if re.match(rf"{re.escape(prefix)}\b", words))
    return next(found, "")


class Sandbox:
    """The folder, and the processes that run in it.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        for name in COPIED:
            subprocess.run(["cp", "-r", ROOT / name, folder / name], check=True)
        write_digits_dataset(folder / "datasets" / "digits", num_train=4, num_val=2)
        for name in ("bccd", "blood"):
            write_blood_cells(folder / name)
        write_images(folder / "photos", ["1.jpg", "2.jpg"])

    def run(self, command: Command) -> tuple[int, str]:
        """Return the exit status of a command, and what it printed."""
        arguments = [argument.removeprefix(".venv/bin/") for argument in command.arguments]
        if arguments[:2] == ["taskset", "-c"]:
            # This machine may not have that core.
            arguments = arguments[3:]
        if arguments[0].endswith(".py"):
            arguments = ["python", *arguments]
        if arguments[0] == "lite-detr":
            # Its console script may not be installed where the tests run.
            shrunk = SHRUNK.get(" ".join(arguments[:2]), Shrunk())
            arguments = ["python", "-m", "lite_detr", arguments[1], *shrunk.apply(arguments[2:])]
        program = next((i for i, name in enumerate(arguments) if name in SHRUNK), None)
        if program is not None:
            arguments[program + 1 :] = SHRUNK[arguments[program]].apply(arguments[program + 1 :])
        own = re.match(
            r"python (-m (lite_detr|detectron2|pytest)\b|\S+\.py\b)", " ".join(arguments)
        )
        # Tests are those of the repository.
        folder = ROOT if "pytest" in arguments else self.folder
        if own and command.environment.keys() <= SPEED_ONLY:
            run = run_program(*arguments[1:], cwd=folder, seconds=SECONDS)
            return run.returncode, run.stdout + run.stderr
        return self._start(arguments, folder, command.environment)

    def _start(
        self, arguments: list[str], folder: Path, environment: dict[str, str]
    ) -> tuple[int, str]:
        if arguments[0] == "torchrun":
            arguments = ["python", "-m", "torch.distributed.run", *arguments[1:]]
        if arguments[0] == "python":
            arguments[0] = sys.executable
        run = subprocess.run(
            arguments,
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT / "projects")} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
        return run.returncode, run.stdout


def write_images(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in names:
        pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_blood_cells(folder: Path) -> None:
    """Write two images to train on and two to test on, with a cell of each kind on each."""
    names = [f"BloodImage_{number:05}.jpg" for number in (7, 11, 17, 23)]
    write_images(folder / "images", names)
    categories = [{"id": i, "name": name} for i, name in enumerate(BLOOD_CELLS)]
    for split, chosen in {"train": names[:2], "val": names[2:]}.items():
        images = [
            {"id": i, "file_name": name, "width": SIDE, "height": SIDE}
            for i, name in enumerate(chosen)
        ]
        annotations = [
            {
                "id": 10 * image["id"] + category["id"],
                "image_id": image["id"],
                "category_id": category["id"],
                "bbox": [8 + 16 * category["id"], 8, 16, 24],
                "area": 16 * 24,
                "iscrowd": 0,
            }
            for image in images
            for category in categories
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(content))
