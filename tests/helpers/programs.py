"""Programs in processes of their own, and the options that give trainings a dataset."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN_NET = ROOT / "train_net.py"
CONFIGS = ROOT / "tests" / "helpers" / "configs"
# A detector that trains in seconds.
TINY = CONFIGS / "tiny.py"


def data_options(root: str | os.PathLike, *splits: str) -> list[str]:
    """The options of a config for a dataset that is laid out as the digits are.

    Args:
        splits: ``train`` and ``val``, or one of them; both if none is given.
    """
    return [
        option
        for split in splits or ("train", "val")
        for option in (
            f"data.{split}_json={root}/{split}.json",
            f"data.{split}_images={root}/{split}",
        )
    ]


def run_python(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python with one thread, and with this checkout's package.

    Args:
        arguments: of Python, such as a program and its own ones.
        variables: of the environment.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def environment(**variables: str) -> dict[str, str]:
    # Without what a launcher of the tests themselves may have set.
    own = {key: os.environ[key] for key in os.environ if not key.startswith(("SLURM", "MASTER"))}
    return own | {"PYTHONPATH": str(ROOT / "projects"), "OMP_NUM_THREADS": "1"} | variables
