"""The markdown pages: their blocks, the commands in these, and whether what they name exists.

To check a command, a program of this repository is run until its parser has read the arguments;
configs and overrides among these are then looked up in the model zoo.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from markdown_it import MarkdownIt
from programs import ROOT, project

from lite_detr.errors import LiteDetrError
from lite_detr.overrides import load_config

# Builtins that would act on the reader's own shell, or that only a real program can answer.
BUILTINS = ("source", ".", "cd", "kill", "exec", "trap", "ulimit", "wait")
# What `command -v NAME` finds.
FOUND = ("python", "python3", "pip")

PRELUDE = """
set -eu
PATH=/nonexistent
export -n BASH_ENV record_to
record() {
    local _line=$1 _name _exported=()
    shift
    for _name in $(compgen -e); do _exported+=("$_name=${!_name}"); done
    printf '%s\\0' "$_line" "$#" "$@" "${#_exported[@]}" "${_exported[@]}" >>"$record_to"
}
command_not_found_handle() { record "${BASH_LINENO[0]}" "$@"; }
builtin trap 'builtin wait' EXIT
"""
# Variables of a shell that was started with an empty environment.
SHELLS_OWN = ("PWD", "OLDPWD", "SHLVL", "_")


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: the first word after the fence, such as ``bash``; empty if there is none.
        title: of ``title="..."`` after it; empty if there is none.
        text: the content.
        line: of the opening fence, from 1; the text begins on the next.
    """

    language: str
    title: str
    text: str
    line: int


class ShellError(ValueError):
    """What bash says of a page's commands, with the page's line."""


@dataclass(frozen=True)
class Command:
    """A program that a page starts.

    Attributes:
        arguments: the program and its arguments.
        line: of the page, from 1.
        environment: variables that the page sets for it.
    """

    arguments: tuple[str, ...]
    line: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


def pages() -> list[Path]:
    """Return the site's pages: README, CONTRIBUTING, and all of ``docs/``."""
    root = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*root, *sorted((ROOT / "docs").rglob("*.md"))]


def all_pages() -> list[Path]:
    """Return the site's pages and those beside the code."""
    return [*pages(), *sorted([*ROOT.glob("kernels/*.md"), *ROOT.glob("t*/**/README.md")])]


def blocks(text: str) -> list[Block]:
    """Return all fenced blocks of a page in order."""
    found = []
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            language, _, rest = token.info.strip().partition(" ")
            title = rest.partition('title="')[2].partition('"')[0]
            found.append(Block(language, title, token.content, token.map[0] + 1))
    return found


def code_spans(text: str) -> list[tuple[str, int]]:
    """Return the inline code of a page, each span with its line, from 1."""
    found = []
    for token in MarkdownIt().enable("table").parse(text):
        line = token.map[0] + 1 if token.type == "inline" else 0
        for child in token.children or ():
            line += child.type in ("softbreak", "hardbreak")
            if child.type == "code_inline":
                found.append((child.content, line))
    return found


def commands(blocks: Sequence[Block], folder: Path) -> list[Command]:
    """Return the commands of a page's bash blocks in order, without running any.

    Bash goes through the blocks with a ``PATH`` that leads nowhere, and what it would start is
    recorded instead. So assignments, quotes, continued lines, comments, loops and ``$(...)`` mean
    what they mean to a reader's shell, and the variables of one block are known in the next.

    Args:
        folder: an empty one, where bash runs.

    Raises:
        ShellError: bash ends with an error, such as a syntax error or an unset variable.
    """
    lines = []
    for block in blocks:
        if block.language == "bash":
            # On the same lines as in the page, which bash then counts for us.
            lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    (folder / "prelude").write_text(PRELUDE + "\n".join(map(_recorder, _names_with_slashes())))
    (folder / "page").write_text("\n".join(lines) + "\n")
    (folder / "record").write_text("")
    variables = {"BASH_ENV": folder / "prelude", "record_to": folder / "record"}
    shell = subprocess.run(
        ["bash", "page"], cwd=folder, env=variables, capture_output=True, text=True, timeout=30
    )
    if shell.returncode:
        raise ShellError(shell.stderr.strip() or f"bash ends with {shell.returncode}")
    return _read_record((folder / "record").read_text())


def _names_with_slashes() -> list[str]:
    """Return the programs that bash does not look for in ``PATH``, by all names that pages use."""
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("tools/**/*.*"), *ROOT.glob("demo/*.py")]
    names = [script.relative_to(ROOT).as_posix() for script in scripts]
    paths = [name for name in names if "/" in name] + [f"./{name}" for name in names]
    return [*FOUND, *BUILTINS, *(f".venv/bin/{name}" for name in FOUND), *paths]


def _recorder(name: str) -> str:
    return f'function {name} {{ record "${{BASH_LINENO[0]}}" {name} "$@"; }}'


def _read_record(text: str) -> list[Command]:
    fields = iter(text.split("\0")[:-1])
    found = []
    for line in fields:
        arguments = tuple(next(fields) for _ in range(int(next(fields))))
        settings = [next(fields).split("=", 1) for _ in range(int(next(fields)))]
        environment = {name: value for name, value in settings if name not in SHELLS_OWN}
        found.append(Command(arguments, int(line), environment))
    return found


# Programs of the system or of others, which are known by name alone.
OTHERS = frozenset(
    "cat cd cp git head ls mkdir nproc nvidia-smi rm sbatch source tail tee tensorboard "
    "trtexec wc".split()
)
# Each with a value, so that the program behind the options can be found.
SRUN_OPTION = re.compile(r"--[a-z-]+(=\S+)?")
# What a program that reads arguments has in it, by itself or as one of our commands.
HAS_PARSER = re.compile(r"argument_?parser|make_parser|lite_detr\.commands", re.IGNORECASE)
# Variables that make sets for the programs that it runs.
MAKES_OWN = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")


class CommandError(ValueError):
    """A command cannot run as it is written; the message says why."""


class Parsed(BaseException):
    """Ends a program whose command line is parsed; not an Exception, so no program catches it."""

    def __init__(self, namespace: argparse.Namespace):
        self.namespace = namespace


def check(arguments: Sequence[str]) -> None:
    """Check a command.

    Raises:
        CommandError: a program, option, config, override, file or target does not exist.
    """
    program, *rest = arguments
    name = program.removeprefix(".venv/bin/").removeprefix("./")
    if name in CHECKS:
        CHECKS[name](rest)
    elif (ROOT / name).is_file() and "/" in program:
        if not (ROOT / name).stat().st_mode & 0o100:
            raise CommandError(f"{name} is not executable: write python before it")
        if name.endswith(".py"):
            check_program(ROOT / name, rest)
    elif name not in OTHERS:
        raise CommandError(f"there is no program {program}")


def check_python(rest: Sequence[str]) -> None:
    match rest:
        case ["-P", *options] | ["-W", _, *options]:
            check_python(options)
        case ["-c", code, *_]:
            compile(code, "-c", "exec")
        case ["-m", "pytest", *options]:
            check_pytest(options)
        case ["-m", module, *options]:
            check_module(module, options)
        case [file, *options] if (ROOT / file).is_file():
            check_program(ROOT / file, options)
        case _:
            raise CommandError(f"python runs no {' '.join(rest[:2])}: there is no such file")


def check_module(name: str, rest: Sequence[str]) -> None:
    with contextlib.suppress(ModuleNotFoundError):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin:
            check_program(Path(spec.origin), rest)
            return
    raise CommandError(f"there is no module {name}")


def check_program(path: Path, rest: Sequence[str]) -> None:
    """Let a program parse its arguments, and look up the configs and overrides among them."""
    if not HAS_PARSER.search(path.read_text()):
        # setup.py and other people's modules have parsers of other kinds.
        if rest and ROOT / "projects" in path.parents:
            raise CommandError(f"{path.name} takes no arguments, given {' '.join(rest)}")
        return
    look_up(parse(path, rest))


def look_up(namespace: argparse.Namespace | None) -> None:
    """Look up the configs and overrides among a program's arguments."""
    options = getattr(namespace, "opts", getattr(namespace, "options", None)) or []
    for name in ("config_file", "compare", "configs"):
        value = getattr(namespace, name, None) or []
        for config in [value] if isinstance(value, str) else value:
            # What a training run saves; the tests that run the pages read it.
            if re.fullmatch(r"output/\S+/config\.yaml", config):
                continue
            try:
                load_config(config, options)
            except LiteDetrError as error:
                raise CommandError(str(error)) from error


def parse(
    path: Path, rest: Sequence[str], *, of_command: bool = False
) -> argparse.Namespace | None:
    """Return what a program's own parser makes of its arguments; None if it prints its help.

    Args:
        path: the program.
        rest: its arguments.
        of_command: the first of them is a command, and the arguments behind it are parsed.

    Raises:
        CommandError: the parser refuses them.
    """
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        for name in ("parse_args", "parse_intermixed_args"):
            method = intercepted(getattr(argparse.ArgumentParser, name), of_command)
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


def intercepted(method: Callable, of_command: bool) -> Callable:
    def parse_and_stop(parser, *arguments, **keywords):
        namespace = method(parser, *arguments, **keywords)
        # The parser that only finds the command goes on.
        if of_command and "arguments" in namespace:
            return namespace
        raise Parsed(namespace)

    return parse_and_stop


def check_lite_detr(rest: Sequence[str]) -> None:
    look_up(parse(ROOT / "projects/lite_detr/__main__.py", rest, of_command=True))


def check_torchrun(rest: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            namespace = get_args_parser().parse_args(rest)
        except SystemExit as end:
            raise CommandError(said.getvalue().strip().rpartition("\n")[2]) from end
    check_python([namespace.training_script, *namespace.training_script_args])


def check_taskset(rest: Sequence[str]) -> None:
    match rest:
        case ["-c", cores, *command] if command and re.fullmatch(r"\d+([,-]\d+)*", cores):
            check(command)
        case _:
            raise CommandError(f"taskset takes -c CORES COMMAND, given {' '.join(rest)}")


def check_srun(rest: Sequence[str]) -> None:
    while rest and SRUN_OPTION.fullmatch(rest[0]):
        rest = rest[1:]
    if not rest or rest[0].startswith("-"):
        raise CommandError("srun takes --OPTION=VALUE ... COMMAND")
    check(rest)


def check_pytest(rest: Sequence[str]) -> None:
    settings = project()["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in settings["markers"]}
    for before, argument in zip(["", *rest], rest, strict=False):
        if before == "-m":
            for name in set(re.findall(r"\w+", argument)) - markers - {"not", "and", "or"}:
                raise CommandError(f"pytest knows no marker {name}, but {', '.join(markers)}")
        elif argument.startswith("tests") and not (ROOT / argument.partition("::")[0]).exists():
            raise CommandError(f"there are no tests {argument}")


def check_pip(rest: Sequence[str]) -> None:
    for argument in rest:
        if found := re.fullmatch(r"\.\[(.+)\]", argument):
            for extra in set(found[1].split(",")) - set(
                project()["project"]["optional-dependencies"]
            ):
                raise CommandError(f"the package has no extra {extra}")


def check_make(rest: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in rest:
        name, is_setting, _ = argument.partition("=")
        if is_setting and not re.search(rf"^{name} \?=|\$\({name}\)", makefile, re.MULTILINE):
            raise CommandError(f"the Makefile has no variable {name}")
    if problem := recipe(*rest).stderr:
        raise CommandError(problem.strip())


def recipe(*arguments: str) -> subprocess.CompletedProcess:
    """Return what ``make`` would run if everything is installed."""
    command = ["make", "--dry-run", "--old-file=.venv/installed", *arguments]
    # As typed by a reader, and not as part of the `make test` that runs the tests.
    environment = {name: value for name, value in os.environ.items() if name not in MAKES_OWN}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "lite-detr": check_lite_detr,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "srun": check_srun,
    "taskset": check_taskset,
    "torchrun": check_torchrun,
}
