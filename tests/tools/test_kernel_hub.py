"""The operators as the Kernel Hub's package loads them, beside those of this package."""

import importlib.util
import json
import sys

import kernel_hub
import pytest
import torch

from lite_detr.ops import nvrtc, nvrtc_operators


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    kernel_hub.main(["--output", str(folder), "--repo-id", "someone/operators"])
    return folder


@pytest.fixture(scope="module")
def package(folder):
    """As ``kernels`` imports it: by the id in metadata.json."""
    variant = folder / "build" / "torch-cuda"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    yield package
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


def test_both_layouts_hold_the_same_package(folder):
    variant, source = folder / "build" / "torch-cuda", folder / "torch-ext" / "lite_detr_ops"
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    for file in files:
        assert (variant / file).read_bytes() == (source / file).read_bytes()
    assert {file.parts[0] for file in files} == {"__init__.py", "ops", "kernels"}
    build = (folder / "build.toml").read_text()
    # kernel-builder takes files with these endings.
    endings = {f'"{file.suffix[1:]}"' for file in files}
    assert all(ending in build.split("pyext")[1] for ending in endings)
    assert 'repo-id = "someone/operators"' in build


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of PyTorch")
def test_operators_live_in_a_namespace_of_their_own(package):
    theirs = getattr(torch.ops, package.__name__)
    for name in nvrtc_operators.OPERATORS:
        schemas = [getattr(space, name).default._schema for space in (theirs, torch.ops.lite_detr)]
        arguments = [[(a.name, str(a.type)) for a in schema.arguments] for schema in schemas]
        assert arguments[0] == arguments[1]
        dump = torch._C._dispatch_dump(f"{package.__name__}::{name}")
        assert "\nCUDA: registered" in dump and "\nAutograd" in dump
    assert package.backend("cpu") == "pytorch"


def test_a_kernel_compiles_from_the_sources_in_the_package(package):
    own = sys.modules[f"{package.__name__}.ops.nvrtc"]
    kernels = sys.modules[f"{package.__name__}.ops.nvrtc_kernels"]
    assert own.SOURCES.is_dir() and own.SOURCES != nvrtc.SOURCES
    try:
        own.environment()
    except own.Unavailable as error:
        pytest.skip(str(error))
    program = kernels.Kernel("msda_forward", torch.float16, "Offsets", 32).program()
    binary, _ = own.compile_program(program, "sm_90")
    assert binary.code.startswith(b"\x7fELF")
