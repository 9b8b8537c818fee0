"""What can be said of a command without running it: does all that it names exist?

Programs of this repository parse their command lines themselves: they are run up to the point where
their parser has done so. What they are given is then looked up in the model zoo.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

from config_options import check_options
from markdown_blocks import ROOT

from lite_detr import model_zoo

Arguments = Sequence[str]

# Programs of the system or of others, which are known by name alone.
OTHERS = frozenset(
    "cat cd cp git head ls mkdir nproc nvidia-smi rm sbatch source tail tee wc".split()
)
# With its value, so that the program behind the options can be told from it.
SRUN_OPTION = re.compile(r"--[a-z-]+(=\S+)?")
# What make gives the programs that it runs.
MAKES_OWN = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")


class CommandError(ValueError):
    """A command cannot run as it is written; the message says why."""


class Parsed(BaseException):
    """Ends a program whose command line is parsed; no program's ``except`` is to catch it."""

    def __init__(self, namespace: argparse.Namespace):
        self.namespace = namespace


def check(arguments: Arguments) -> None:
    """Checks a command.

    Raises:
        CommandError: a program, option, config, override, file or target does not exist.
    """
    program, *rest = arguments
    name = program.removeprefix(".venv/bin/").removeprefix("./")
    if name in CHECKS:
        CHECKS[name](rest)
    elif (ROOT / name).is_file() and "/" in program:
        check_executable(ROOT / name)
        if name.endswith(".py"):
            check_program(ROOT / name, rest)
    elif name not in OTHERS:
        raise CommandError(f"there is no program {program}")


def check_executable(path: Path) -> None:
    if not path.stat().st_mode & 0o100:
        raise CommandError(f"{path.relative_to(ROOT)} is not executable: write python before it")


def check_python(rest: Arguments) -> None:
    while rest and rest[0] in ("-P", "-W"):
        rest = rest[1 if rest[0] == "-P" else 2 :]
    match rest:
        case ["-c", code, *_]:
            compile(code, "-c", "exec")
        case ["-m", "pytest", *options]:
            check_pytest(options)
        case ["-m", "pip", *options]:
            check_pip(options)
        case ["-m", "torch.distributed.run", *options]:
            check_torchrun(options)
        case ["-m", module, *options]:
            check_module(module, options)
        case [file, *options] if (ROOT / file).is_file():
            check_program(ROOT / file, options)
        case _:
            raise CommandError(f"python runs no {' '.join(rest[:2])}: there is no such file")


def check_module(name: str, rest: Arguments) -> None:
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            check_program(Path(spec.origin), rest)
            return
    raise CommandError(f"there is no module {name}")


def check_program(path: Path, rest: Arguments) -> None:
    """Lets a program parse its arguments, and looks up the configs and overrides among them."""
    text = path.read_text()
    if not re.search(r"argument_?parser|make_parser", text, re.IGNORECASE):
        # setup.py and other people's modules have parsers of other kinds.
        if rest and ROOT / "projects" in path.parents:
            raise CommandError(f"{path.name} takes no arguments, given {' '.join(rest)}")
        return
    namespace = parse(path, rest)
    if namespace is None:
        return
    options = getattr(namespace, "opts", getattr(namespace, "options", None)) or []
    for config in config_files(namespace):
        try:
            check_options(config, options)
        except (FileNotFoundError, model_zoo.ConfigError, ValueError) as error:
            raise CommandError(str(error)) from error


def config_files(namespace: argparse.Namespace) -> list[str]:
    """All that the program was given where it takes configs."""
    found = []
    for name in ("config_file", "compare", "configs"):
        value = getattr(namespace, name, None) or []
        found += [value] if isinstance(value, str) else value
    return found


def parse(path: Path, rest: Arguments) -> argparse.Namespace | None:
    """What a program's own parser makes of its arguments; None where it prints its help.

    Raises:
        CommandError: the parser refuses them.
    """
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        for name in ("parse_args", "parse_intermixed_args"):
            method = intercepted(getattr(argparse.ArgumentParser, name))
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, name, method))
        stack.enter_context(mock.patch.object(sys, "argv", [str(path), *rest]))
        # As Python does for a file that it is given.
        stack.enter_context(mock.patch.object(sys, "path", [str(path.parent), *sys.path]))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Parsed as parsed:
            return parsed.namespace
        except SystemExit as end:
            if not end.code:
                return None
            raise CommandError(said.getvalue().strip().rpartition("\n")[2]) from end
    raise CommandError(f"{path.name} never parsed its arguments")


def intercepted(method: Callable) -> Callable:
    def parse_and_stop(parser, *arguments, **keywords):
        raise Parsed(method(parser, *arguments, **keywords))

    return parse_and_stop


def check_torchrun(rest: Arguments) -> None:
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            namespace = get_args_parser().parse_args(rest)
        except SystemExit as end:
            raise CommandError(said.getvalue().strip().rpartition("\n")[2]) from end
    check_python([namespace.training_script, *namespace.training_script_args])


def check_taskset(rest: Arguments) -> None:
    match rest:
        case ["-c", cores, *command] if command and re.fullmatch(r"\d+([,-]\d+)*", cores):
            check(command)
        case _:
            raise CommandError(f"taskset takes -c CORES COMMAND, given {' '.join(rest)}")


def check_srun(rest: Arguments) -> None:
    while rest and SRUN_OPTION.fullmatch(rest[0]):
        rest = rest[1:]
    if not rest or rest[0].startswith("-"):
        raise CommandError("srun takes --OPTION=VALUE ... COMMAND")
    check(rest)


def check_pytest(rest: Arguments) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]}
    before = ""
    for argument in rest:
        if before == "-m":
            for name in set(re.findall(r"\w+", argument)) - markers - {"not", "and", "or"}:
                raise CommandError(f"pytest knows no marker {name}, but {', '.join(markers)}")
        elif argument.startswith("-"):
            check_long_options([argument], help_of("pytest", "--help"), "pytest")
        elif before not in ("-k", "-n") and not (ROOT / argument.partition("::")[0]).exists():
            raise CommandError(f"there are no tests {argument}")
        before = argument


def check_pip(rest: Arguments) -> None:
    match rest:
        case ["install" | "download" as action, *options]:
            check_long_options(options, help_of("pip", action, "--help"), f"pip {action}")
        case _:
            raise CommandError(f"pip is used to install and download, given {' '.join(rest)}")
    for argument in options:
        if found := re.fullmatch(r"\.\[(.+)\]", argument):
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            for extra in set(found[1].split(",")) - set(project["optional-dependencies"]):
                raise CommandError(f"the package has no extra {extra}")


@functools.cache
def help_of(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def check_long_options(arguments: Arguments, text: str, program: str) -> None:
    known = set(re.findall(r"--[a-z][a-z_-]*", text))
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            raise CommandError(f"{program} has no option {name}")


def check_tensorboard(rest: Arguments) -> None:
    check_long_options(rest, help_of("tensorboard.main", "--helpfull"), "tensorboard")


def check_make(rest: Arguments) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in rest:
        name, is_setting, _ = argument.partition("=")
        if is_setting and not re.search(rf"^{name} \?=|\$\({name}\)", makefile, re.MULTILINE):
            raise CommandError(f"the Makefile has no variable {name}")
    if problem := recipe(*rest).stderr:
        raise CommandError(problem.strip())


def recipe(*arguments: str) -> subprocess.CompletedProcess:
    """What ``make`` would run where everything is installed."""
    command = ["make", "--dry-run", "--old-file=.venv/installed", *arguments]
    # As typed by a reader, and not as part of the `make test` that runs the tests.
    environment = {name: value for name, value in os.environ.items() if name not in MAKES_OWN}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


CHECKS: dict[str, Callable[[Arguments], None]] = {
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "srun": check_srun,
    "taskset": check_taskset,
    "tensorboard": check_tensorboard,
    "torchrun": check_torchrun,
}
