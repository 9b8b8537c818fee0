"""Programs in processes of their own, and the options that give training runs a dataset.

A fresh Python takes four seconds of a core to import PyTorch and its companions.
:func:`run_program` forks from a server that has done so once; :func:`run_python` starts a fresh
one, for tests that depend on it.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:
    # Python 3.10 has none; pytest brings this there.
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TRAIN_NET = ROOT / "train_net.py"
# By default, training starts one process per core, and each of them imports PyTorch again.
ONE_PROCESS = ("--num-gpus", "1")
CONFIGS = ROOT / "tests" / "helpers" / "configs"
# A detector that trains in seconds.
TINY = CONFIGS / "tiny.py"

SECONDS = 300
# Without Detectron2 and this package, which read the environment when they are imported.
PRELOADED = "torchvision cv2 matplotlib.pyplot pycocotools.coco scipy.optimize timm".split()
PRELOADED += ["torch.utils.tensorboard"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


def project() -> dict:
    """Return what ``pyproject.toml`` says."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


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


def run_python(
    *arguments: object, seconds: float = SECONDS, **variables: str
) -> subprocess.CompletedProcess:
    """Run a fresh Python with one thread, and with this checkout's package.

    Args:
        arguments: of Python, such as a program and its own ones.
        variables: of the environment.
    """
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def environment(**variables: str) -> dict[str, str]:
    # Without what a launcher of the tests themselves may have set.
    own = {key: os.environ[key] for key in os.environ if not key.startswith(("SLURM", "MASTER"))}
    return own | {"PYTHONPATH": str(ROOT / "projects"), "OMP_NUM_THREADS": "1"} | variables


def run_program(
    *arguments: object, cwd: Path | None = None, seconds: float = SECONDS, **variables: str
) -> subprocess.CompletedProcess:
    """Run a program as :func:`run_python` does, in a fork of the server.

    Args:
        arguments: a file, or ``-m`` and a module; then its own ones.
        cwd: the folder where it runs.
        variables: of the environment; those that PyTorch reads when it is imported have no effect.

    Raises:
        subprocess.TimeoutExpired: it did not end in time.
    """
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORKS.Process(
            target=_run_program,
            args=(arguments, str(cwd or Path.cwd()), environment(**variables), outputs),
        )
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, seconds)
        texts = [path.read_text(errors="replace") for path in outputs]
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _run_program(
    arguments: list[str], folder: str, variables: dict[str, str], outputs: list[Path]
) -> None:
    for stream, path in enumerate(outputs, start=1):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    # As a fresh Python has it: not what pytest has added.
    own = [path for path in sys.path if not Path(path or ".").resolve().is_relative_to(ROOT)]
    packages = [path for path in sys.path if "site-packages" in path]
    sys.path = [*variables["PYTHONPATH"].split(os.pathsep), *own]
    sys.path += [path for path in packages if path not in sys.path]
    # Data workers are forked, as they are from a program.
    multiprocessing.set_start_method("fork", force=True)
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            sys.path.insert(0, folder)
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        # A child of multiprocessing ends without them.
        atexit._run_exitfuncs()
