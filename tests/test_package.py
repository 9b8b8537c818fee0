"""The package as users get it: as a wheel, and without Detectron2."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from programs import ROOT

from lite_detr import model_zoo


def build_wheel(source, **environment):
    """A wheel built from a copy of the sources, so that the build leaves nothing in them."""
    for name in "LICENSE MANIFEST.in README.md cuda_build.py pyproject.toml setup.py".split():
        shutil.copy(ROOT / name, source)
    for name in ("configs", "kernels", "projects"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v"]
    build = subprocess.run(
        [*command, "-w", source / "dist", source],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert build.returncode == 0, build.stderr
    return next((source / "dist").glob("lite_detr-*.whl")), build.stdout + build.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Without the native operators, whose build takes minutes."""
    return build_wheel(tmp_path_factory.mktemp("source"), LITE_DETR_NO_EXT="1")[0]


def test_without_the_native_operators_a_wheel_fits_every_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


def test_a_failed_build_leaves_a_wheel_without_the_native_operators(tmp_path):
    """As on a machine without a compiler; the build says what is missing, and where to read on."""
    wheel, output = build_wheel(tmp_path, CC="false", CXX="false")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "_C" in name]
    hint = next(line for line in output.splitlines() if "native operators not built" in line)
    assert "'false'" in hint
    assert "docs/kernels.md" in hint


def run_python(code, path, cwd):
    environment = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_plain_installation_finds_every_config_from_any_directory(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    (tmp_path / "elsewhere").mkdir()
    code = (
        "from lite_detr import model_zoo\n"
        f"assert model_zoo.__file__.startswith({str(site)!r}), model_zoo.__file__\n"
        "name = 'deformable_detr/lite_deformable_detr_r50_h3l1_2p1x3_50ep.py'\n"
        "assert model_zoo.get_config(name).model.encoder.num_high_levels == 3\n"
        "name = name.replace('.py', '.yaml')\n"
        "assert model_zoo.get_yaml_config(name).MODEL.DETR.ATTENTION == 'key_aware'\n"
        "print(*model_zoo.list_configs(), *model_zoo.list_configs('.yaml'))\n"
    )
    run = run_python(code, site, tmp_path / "elsewhere")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == model_zoo.list_configs() + model_zoo.list_configs(".yaml")


def test_a_wheel_has_what_kernels_are_compiled_from_at_run_time(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {path for path in (ROOT / "kernels").rglob("*") if path.suffix in (".h", ".cuh")}
    wanted = {path.relative_to(ROOT) for path in sources if "cpu" not in path.parts}
    assert {f"lite_detr/{path}" for path in wanted} <= names
    assert not [name for name in names if name.endswith((".cpp", ".cu"))]


def test_the_list_of_configs_holds_the_models_and_not_their_parts():
    names = model_zoo.list_configs()
    assert "deformable_detr/deformable_detr_r50_single_stage_50ep.py" in names
    assert not any(name.startswith("common") for name in names)


def test_without_detectron2_the_operators_work_and_the_rest_says_how_to_install_it(tmp_path):
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'detectron2':\n"
        "            raise ModuleNotFoundError('no detectron2', name='detectron2')\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import lite_detr\n"
        "lite_detr.ops.backend()\n"
        "lite_detr.modeling\n"
    )
    run = run_python(code, ROOT / "projects", tmp_path)
    assert run.returncode == 1
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith("lite_detr.errors.MissingPackageError: lite_detr needs Detectron2")
    for source in ("make install", "facebookresearch/detectron2", "sal-detectron2"):
        assert source in message
