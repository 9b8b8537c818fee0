"""The report that an issue needs, on machines where all is well and where something is broken."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling_problems import needs_native, run_python

import lite_detr
from lite_detr import collect_env, ops

PACKAGE = Path(lite_detr.__file__).parent
CAPABILITIES = ("portable", "avx2", "avx512")
COMPILER = shutil.which("cc")


@pytest.fixture
def quick(monkeypatch):
    """Detectron2's and PyTorch's reports start compilers and pip."""

    def replace(detectron2, pytorch="PyTorch's report"):
        import detectron2.utils.collect_env as theirs
        import torch.utils.collect_env as torchs

        monkeypatch.setattr(theirs, "collect_env_info", answer(detectron2))
        monkeypatch.setattr(torchs, "get_pretty_env_info", answer(pytorch))

    def answer(result):
        def call():
            if isinstance(result, Exception):
                raise result
            return result

        return call

    replace("Detectron2's report")
    return replace


def line_of(report, name):
    (line,) = [line for line in report.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


def test_the_report_says_what_is_installed_and_where(quick):
    report = collect_env.collect_env_info()
    assert line_of(report, "lite_detr") == f"{lite_detr.__version__} @{PACKAGE}"
    for device in ("cpu", "cuda"):
        assert line_of(report, f"operators on {device}").startswith(ops.backend(device))
    for name in ("torch", "torchvision", "pycocotools", "omegaconf", "numpy"):
        assert f"{name} {importlib.metadata.version(name)}\n" in report
    assert "failed" not in report
    assert report.endswith("Detectron2's report")


def test_packages_that_are_not_there_are_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(collect_env, "PACKAGES", ("numpy", "no-such-package"))
    version = importlib.metadata.version("numpy")
    assert collect_env.packages() == f"numpy {version}\nno-such-package (not installed)"


def test_variables_that_are_set_are_named(monkeypatch):
    for name in collect_env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert collect_env.variables() == "no variable set that lite_detr reads"
    monkeypatch.setenv("LITE_DETR_CPU_CAPABILITY", "avx2")
    assert collect_env.variables() == "LITE_DETR_CPU_CAPABILITY=avx2"


@needs_native
def test_the_instruction_set_is_the_one_that_the_kernels_chose():
    """The best that the processor has up to the one that is asked for."""
    best = {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)
    code = "import torch; from lite_detr import ops; print(torch.ops.lite_detr.cpu_capability())"
    for asked, capability in enumerate(CAPABILITIES):
        run = run_python(code, LITE_DETR_CPU_CAPABILITY=capability)
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == CAPABILITIES[min(asked, best)]


@needs_native
def test_an_instruction_set_that_there_is_not_is_in_the_report():
    """The kernels refuse it, and the report says what they say."""
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
from lite_detr import collect_env
print(collect_env.attempt(collect_env.cpu_operators))
"""
    run = run_python(code, LITE_DETR_CPU_CAPABILITY="sse9")
    assert "failed: ValueError: LITE_DETR_CPU_CAPABILITY must be" in run.stdout
    assert "unset it" in run.stdout


@pytest.mark.parametrize("part", ["package", "commit", "cpu_operators", "packages"])
def test_a_part_that_fails_leaves_the_others(quick, monkeypatch, part):
    def broken():
        raise OSError("it is broken")

    whole = collect_env.collect_env_info().splitlines()
    monkeypatch.setattr(collect_env, part, broken)
    report = collect_env.collect_env_info()
    assert report.count("failed: OSError: it is broken") == 1
    kept = [line for line in report.splitlines() if "it is broken" not in line]
    assert kept and set(kept) < set(whole)


def test_where_detectron2s_report_fails_there_is_pytorchs(quick):
    quick(AttributeError("module 'detectron2._C' has no attribute 'get_compiler_version'"))
    report = collect_env.collect_env_info()
    assert "Detectron2's report failed: AttributeError: module 'detectron2._C'" in report
    assert report.endswith("PyTorch's report")


def test_where_both_reports_fail_ours_stands(quick):
    quick(OSError("one"), RuntimeError("two"))
    report = collect_env.collect_env_info()
    assert line_of(report, "lite_detr")
    assert "OSError: one" in report
    assert report.endswith("failed: RuntimeError: two")


def run_command(*arguments, path):
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env=os.environ | {"PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def copy_package(folder):
    """Copy the package without its extension; return where that belongs."""
    ignore = shutil.ignore_patterns("__pycache__", "_C.so")
    return shutil.copytree(PACKAGE, folder / "lite_detr", ignore=ignore) / "_C.so"


def test_an_extension_that_does_not_load_is_reported_with_its_error(tmp_path):
    """By the command itself, in a copy of the package."""
    extension = copy_package(tmp_path)
    extension.write_bytes(b"not a library")
    run = run_command("-m", "lite_detr.collect_env", path=tmp_path)
    assert run.returncode == 0, run.stderr
    assert line_of(run.stdout, "operators on cpu") == "pytorch"
    # With what the loader says of the file.
    assert line_of(run.stdout, "extension").startswith(f"{extension}, not loaded: {extension}: ")
    assert line_of(run.stdout, "commit") == "none, as this is not a checkout"
    assert "python -m lite_detr.collect_env" in run.stderr


@pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")
def test_an_extension_for_another_pytorch_is_said_to_be_one(tmp_path):
    """As the wheel's is for PyTorch before 2.10."""
    extension, source = copy_package(tmp_path), tmp_path / "a.c"
    source.write_text("void torch_of_tomorrow(void);\nvoid (*f)(void) = torch_of_tomorrow;\n")
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", extension], check=True)
    run = run_command("-c", "import lite_detr.ops", path=tmp_path)
    assert run.returncode == 0, run.stderr
    assert f"(built for another PyTorch than {torch.__version__}: {extension}: und" in run.stderr


def test_the_file_by_itself_reports_where_nothing_can_be_imported(tmp_path):
    for name in ("detectron2", "torch", "lite_detr"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is broken')\n")
    run = run_command("-P", PACKAGE / "collect_env.py", path=tmp_path)
    assert run.returncode == 0, run.stderr
    assert line_of(run.stdout, "lite_detr").endswith("ImportError: lite_detr is broken")
    assert "Detectron2's report failed: ImportError: detectron2 is broken" in run.stdout
    assert run.stdout.strip().endswith("ImportError: torch is broken")
    assert f"numpy {importlib.metadata.version('numpy')}" in run.stdout
