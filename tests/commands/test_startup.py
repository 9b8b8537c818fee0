"""The console program, and that its commands answer before they import what takes seconds."""

import pytest
from programs import ROOT, run_python

from lite_detr.commands import COMMANDS

# Runs a file or a module as Python does, where imports that take seconds fail.
LIGHT = """
import runpy, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "detectron2", "numpy"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refused())
program, *arguments = sys.argv[1:]
sys.argv = [program, *arguments]
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__")
"""
MODULES = [f"lite_detr.{name}" for name in ("cli", "errors", "labels", "model_zoo")]
MODULES += [f"lite_detr.commands.{name.replace('-', '_')}" for name in COMMANDS]


def run_light(*arguments):
    return run_python("-c", LIGHT, *arguments)


@pytest.mark.parametrize("module", MODULES)
def test_what_programs_import_first_takes_no_seconds(module):
    run = run_light(module)
    assert run.returncode == 0, run.stderr


def test_an_import_that_takes_seconds_is_noticed():
    assert "torch is imported" in run_light("lite_detr.ops").stderr


def test_the_console_program_lists_its_commands():
    run = run_light("lite_detr", "--help")
    assert run.returncode == 0 and run.stdout.startswith("usage: lite-detr [-h] [--version] COMM")
    for command in COMMANDS:
        assert f"\n  {command} " in run.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_calls_it_as_it_was_called(command):
    run = run_light("lite_detr", command, "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: lite-detr {command} [-h]")
    assert "%(prog)s" not in run.stdout


@pytest.mark.parametrize("program", ["train_net.py", "demo/demo.py", "tools/export.py"])
def test_programs_of_the_checkout_answer_as_soon(program):
    run = run_light(str(ROOT / program), "--help")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"usage: {program.rpartition('/')[2]} [-h]")
    assert run_light(str(ROOT / program), "--nowhere").returncode == 2


def test_a_wrong_name_of_a_config_is_answered_as_soon():
    run = run_light("lite_detr", "train", "--config-file", "dino/lite_dino_r51.py")
    assert run.returncode == 1
    assert run.stderr.startswith("error: config 'dino/lite_dino_r51.py' is neither a file nor")
    assert run.stderr.count("\n") == 1
