"""The console program ``lite-detr``: one light module for each of its commands.

A command imports PyTorch and Detectron2 only when its arguments are read and checked, so that
``--help`` and a wrong argument are answered at once.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from .. import cli
from ..version import __version__

# Each is a module of this package, with ``_`` for ``-``.
COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "export",
    "check-data",
    "convert-data",
    "make-digits",
    "plot-metrics",
    "env",
)

# Before PyTorch is imported, also in the processes that a program starts.
cli.ignore_warnings()

DOC = """Lite DETR for Detectron2: train, evaluate and export efficient DETR detectors.

commands:
{commands}

%(prog)s COMMAND --help describes a command.
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(DOC.format(commands="\n".join(map(describe, COMMANDS))))
    parser.usage = "%(prog)s [-h] [--version] COMMAND ..."
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # Listed above, each with what it does.
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def describe(command: str) -> str:
    """Return the line of the help on a command: its name and the beginning of its docstring."""
    return f"  {command:<14}{load(command).__doc__.splitlines()[0]}"


def load(command: str) -> ModuleType:
    return importlib.import_module(f".{command.replace('-', '_')}", __name__)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run one command and return its exit status."""
    args = parse_args(argv)
    # What the command's help and errors call the program.
    sys.argv[0] = f"lite-detr {args.command}"
    return load(args.command).main(args.arguments)
