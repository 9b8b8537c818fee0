"""The commands of bash blocks, as bash itself reads them, without running any.

Bash goes through the blocks of a page with a ``PATH`` that leads nowhere; whatever it would start
is written down instead. So assignments, quotes, continued lines, comments, loops and ``$(...)``
mean what they mean to a reader's shell, and a variable that is never set is an error.
"""

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from markdown_blocks import ROOT, Block

# Builtins that would act on the reader's own shell, or that only a real program can answer.
BUILTINS = ("source", ".", "cd", "kill", "exec", "trap", "ulimit", "wait")
# What `command -v NAME` is to find.
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
# Of a shell that was started with an empty environment.
SHELLS_OWN = ("PWD", "OLDPWD", "SHLVL", "_")


class ShellError(ValueError):
    """What bash says of a page's commands, with the page's line."""


@dataclass(frozen=True)
class Command:
    """A program that a page starts.

    Attributes:
        arguments: the program and what it is given.
        line: of the page, from 1.
        title: of the block.
        environment: variables that the page sets for it.
    """

    arguments: tuple[str, ...]
    line: int = 1
    title: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


def commands(blocks: Sequence[Block], folder: Path) -> list[Command]:
    """The commands of a page's bash blocks in order; one block's variables are also the next's.

    Args:
        folder: an empty one, where bash runs.

    Raises:
        ShellError: bash ends with an error, as of syntax, an unset variable or a missing script.
    """
    blocks = [block for block in blocks if block.language == "bash"]
    lines, titles = [], {}
    for block in blocks:
        # On the same lines as in the page, which bash then counts for us.
        lines += [""] * (block.line - len(lines)) + block.text.splitlines()
        titles |= dict.fromkeys(range(block.line + 1, len(lines) + 1), block.title)
    (folder / "prelude").write_text(PRELUDE + "\n".join(map(_recorder, _names_with_slashes())))
    (folder / "page").write_text("\n".join(lines) + "\n")
    (folder / "record").write_text("")
    variables = {"BASH_ENV": folder / "prelude", "record_to": folder / "record"}
    shell = subprocess.run(
        ["bash", "page"], cwd=folder, env=variables, capture_output=True, text=True, timeout=30
    )
    if shell.returncode:
        raise ShellError(shell.stderr.strip() or f"bash ends with {shell.returncode}")
    return [
        Command(arguments, line, titles[line], environment)
        for line, arguments, environment in _read_record((folder / "record").read_text())
    ]


def _names_with_slashes() -> list[str]:
    """Programs that bash does not look for in ``PATH``, by all names that pages may use."""
    patterns = ("*.py", "tools/**/*.py", "tools/*.sh", "demo/*.py")
    scripts = [script for pattern in patterns for script in ROOT.glob(pattern)]
    names = [script.relative_to(ROOT).as_posix() for script in scripts]
    paths = [name for name in names if "/" in name] + [f"./{name}" for name in names]
    return [*FOUND, *BUILTINS, *(f".venv/bin/{name}" for name in FOUND), *paths]


def _recorder(name: str) -> str:
    return f'function {name} {{ record "${{BASH_LINENO[0]}}" {name} "$@"; }}'


def _read_record(text: str) -> list[tuple[int, tuple[str, ...], dict[str, str]]]:
    """The line, the arguments and the environment of each command."""
    fields = iter(text.split("\0")[:-1])
    found = []
    for line in fields:
        arguments = tuple(next(fields) for _ in range(int(next(fields))))
        settings = [next(fields).split("=", 1) for _ in range(int(next(fields)))]
        environment = {name: value for name, value in settings if name not in SHELLS_OWN}
        found.append((int(line), arguments, environment))
    return found
