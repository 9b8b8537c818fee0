"""Run the core tests on each Python, in environments of their own; `make test-pythons` does.

    python tests/pythons.py [3.10 3.12 ...]

For each version that is on PATH or that pyenv has, ``make install`` makes the environment
``build/pythonX.Y``, in which the core tests then run. The native operators have no Python in them:
they are those that ``make install`` has built already.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A part of everything that a Python could break, in less than two minutes of one core.
CORE = """
ops/test_native.py modeling/test_encoder.py modeling/test_detector.py engine/test_trainer.py
checkpoint/test_files.py checkpoint/test_saving.py export/test_model.py test_cli.py
test_overrides.py commands/test_startup.py
""".split()


def interpreter(version: str) -> str | None:
    """Return a Python of this version that can make environments; None if there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    of_pyenv = sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for path in filter(None, [shutil.which(f"python{version}"), *of_pyenv]):
        # pyenv's own `pythonX.Y` may be there and fail.
        result = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if result.stdout.strip() == version:
            return str(path)
    return None


def check(version: str, python: str) -> tuple[bool, str]:
    """Install and run the core tests; return whether both went well, and a line about it."""
    venv = Path("build") / f"python{version}"
    start = time.monotonic()
    # Byte code of what the tests import is made when they do.
    settings = os.environ | {"LITE_DETR_NO_EXT": "1", "PIP_NO_COMPILE": "1"}
    command = ["make", "install", f"VENV={venv}", f"PYTHON={python}"]
    if subprocess.run(command, cwd=ROOT, env=settings).returncode != 0:
        return False, "does not install"
    seconds = time.monotonic() - start
    command = [venv / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *(f"tests/{name}" for name in CORE)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(result.stdout, end="", flush=True)
    last = (result.stdout.splitlines() or ["no output"])[-1]
    return result.returncode == 0, f"{last}; installed in {seconds:.0f}s"


def main(versions: list[str]) -> int:
    lines, failed = [], False
    for version in versions:
        python = interpreter(version)
        passed, line = check(version, python) if python else (True, "skipped: not found")
        failed |= not passed
        lines.append(f"Python {version}: {line}")
        print(lines[-1], flush=True)
    print("", *lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or "3.10 3.11 3.12 3.13".split()))
