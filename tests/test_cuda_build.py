"""The build with a toolkit, with a missing or wrong one, and if nothing asks for CUDA.

The toolkits here are scripts. ``make cuda`` compiles the real kernels.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from programs import ROOT
from torch import torch_version

MAJOR = (torch.version.cuda or "13.0").split(".")[0]
KNOWN = "compute_75 compute_80 compute_86 compute_87 compute_89 compute_90 compute_100 compute_120"
NOTHING_ASKS = dict.fromkeys(
    "CUDA_HOME CUDA_VISIBLE_DEVICES FORCE_CUDA TORCH_CUDA_ARCH_LIST".split(), ""
)
# Answers like NVIDIA's, and compiles C++ if it is given a compiler.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-arch) printf '%s\\n' {known} ;;
  --dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
  *) echo "$@" >> {home}/compiled; {compile} ;;
esac
"""
COMPILE = """
  while [ "${1%.cu}" = "$1" ]; do shift; done
  exec c++ -fPIC -c -x c++ "$1" -o "$3"
"""


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


cuda_build = load("cuda_build")


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def make_toolkit(home, version=f"{MAJOR}.0", known=KNOWN, compile="exit 1"):
    script = NVCC.format(home=home, version=version, known=known, compile=compile)
    write_script(home / "bin" / "nvcc", script)
    return home


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """PyTorch for CUDA, no GPU, no toolkit, and an environment that asks for nothing."""
    for name in ("CUDA_HOME", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cuda_build, "USUAL_HOME", tmp_path / "usual")
    monkeypatch.setattr(torch.version, "cuda", f"{MAJOR}.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refusal():
    """Return the reason why no CUDA kernels are built."""
    with pytest.raises(cuda_build.CannotBuild) as caught:
        cuda_build.find_toolkit()
    return str(caught.value)


def test_nothing_is_said_where_nothing_asks_and_nothing_is_there():
    assert cuda_build.find_toolkit() is None


def test_a_toolkit_alone_does_not_ask(monkeypatch, tmp_path):
    """But it is mentioned, as container images are built where no GPU is visible."""
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda")))
    assert "no GPU is visible and FORCE_CUDA is not set" in refusal()


@pytest.mark.parametrize(
    "request_", ["FORCE_CUDA=1", "TORCH_CUDA_ARCH_LIST=8.0", "a GPU"], ids=lambda name: name
)
def test_what_asks_for_the_cuda_kernels(request_, monkeypatch, tmp_path):
    if request_ == "a GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    else:
        monkeypatch.setenv(*request_.split("="))
    reason = refusal()
    assert reason.startswith(request_.split("=")[0] + " is ")
    assert "nvcc is not on PATH" in reason
    assert f"needs the toolkit of CUDA {MAJOR}" in reason
    home = make_toolkit(tmp_path / "usual")
    assert cuda_build.find_toolkit() == cuda_build.Toolkit(home, f"{MAJOR}.0")


def test_pytorch_without_cuda_builds_for_cpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda")))
    assert cuda_build.find_toolkit() is None
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert cuda_build.find_toolkit() is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert "is built without CUDA" in refusal()


def test_a_wrapper_on_the_path_leads_to_its_toolkit(monkeypatch, tmp_path):
    home = make_toolkit(tmp_path / "opt" / "cuda")
    write_script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    assert cuda_build.find_home() == home


def test_a_link_on_the_path_leads_to_its_toolkit(tmp_path):
    """If nvcc does not tell where it is."""
    write_script(tmp_path / "cuda" / "bin" / "nvcc", "#!/bin/sh\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(tmp_path / "cuda" / "bin" / "nvcc")
    assert cuda_build.find_home() == tmp_path / "cuda"


def test_cuda_home_is_before_the_path(monkeypatch, tmp_path):
    make_toolkit(tmp_path)
    assert cuda_build.find_home() == tmp_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    assert cuda_build.find_home() == tmp_path / "other"


@pytest.mark.parametrize(
    "version, said",
    [
        ("11.8", "is of CUDA 11.8; "),
        ("unknown", "is missing or does not run; "),
        (None, "is missing or does not run; "),
    ],
)
def test_a_toolkit_that_does_not_go_with_pytorch(version, said, monkeypatch, tmp_path):
    if version is not None:
        make_toolkit(tmp_path / "cuda", version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("FORCE_CUDA", "1")
    reason = refusal()
    assert f"FORCE_CUDA is set, but {tmp_path}/cuda/bin/nvcc {said}" in reason
    assert f"PyTorch {torch.__version__} needs the toolkit of CUDA {MAJOR}" in reason


def test_a_minor_version_apart_is_near_enough(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "cuda", f"{MAJOR}.99")))
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert cuda_build.find_toolkit().version == f"{MAJOR}.99"


def for_gpus(names, ptx):
    """Return the flags for GPUs, with PTX for some of them."""
    numbers, with_ptx = names.replace(".", "").split(), ptx.replace(".", "").split()
    flags = {f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers}
    return flags | {f"-gencode=arch=compute_{number},code=compute_{number}" for number in with_ptx}


@pytest.mark.parametrize(
    "known, names, ptx",
    [
        (KNOWN, "7.5 8.0 8.6 8.9 9.0 10.0 12.0", "8.0 12.0"),
        # CUDA 12.0 to 12.6.
        (KNOWN.partition(" compute_100")[0], "7.5 8.0 8.6 8.9 9.0", "8.0 9.0"),
    ],
)
def test_without_a_gpu_the_default_is_what_nvcc_knows(known, names, ptx, tmp_path):
    toolkit = cuda_build.Toolkit(make_toolkit(tmp_path, known=known), "12.0")
    assert set(toolkit.architecture_flags()) == for_gpus(names, ptx)


def test_an_nvcc_that_knows_none_of_them_is_refused(tmp_path):
    toolkit = cuda_build.Toolkit(make_toolkit(tmp_path, known="compute_35"), "10.0")
    with pytest.raises(cuda_build.CannotBuild, match="names none of 7.5, 8.0"):
        toolkit.architecture_flags()


@pytest.mark.parametrize("names", ["8.0;9.0+PTX", "8.0 9.0+PTX"])
def test_a_list_of_architectures_is_taken_as_given(names, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
    toolkit = cuda_build.Toolkit(make_toolkit(tmp_path, known="compute_75"), f"{MAJOR}.0")
    assert set(toolkit.architecture_flags()) == for_gpus("8.0 9.0", "9.0")


def test_native_needs_a_visible_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    with pytest.raises(cuda_build.CannotBuild, match="is native, but no GPU is visible"):
        cuda_build.Toolkit(tmp_path, f"{MAJOR}.0").architecture_flags()


def test_visible_gpus_are_built_for(monkeypatch, tmp_path):
    gpus = [(8, 6), (9, 0), (8, 6)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90", "sm_120"])
    toolkit = cuda_build.Toolkit(tmp_path, f"{MAJOR}.0")
    assert set(toolkit.architecture_flags()) == for_gpus("8.6 9.0", "9.0")


@pytest.mark.parametrize(
    "version, names", [("12.4", ["cublas", "cudnn"]), ("13.0", ["cu13", "cublas", "cudnn"])]
)
def test_headers_of_pip_packages_come_last(version, names, monkeypatch, tmp_path):
    """CUDA 12 has a folder for each library, CUDA 13 one for all."""
    for name in ("cu11", "cu13", "cudnn", "cublas"):
        (tmp_path / "nvidia" / name / "include").mkdir(parents=True)
    (tmp_path / "nvidia" / "nccl" / "lib").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    flags = cuda_build.Toolkit(tmp_path, version).header_flags()
    assert flags == [f"-idirafter{tmp_path}/nvidia/{name}/include" for name in names]


def test_without_pip_packages_the_toolkit_has_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert cuda_build.Toolkit(tmp_path, "13.0").header_flags() == []


def test_the_cpu_build_has_nothing_of_cuda():
    extension = load("setup").native_extension()
    assert "kernels/library.cpp" in extension.sources
    assert not any("cuda" in source for source in extension.sources)
    assert list(extension.extra_compile_args) == ["cxx"]
    assert not any("cud" in library for library in extension.libraries)


@pytest.mark.parametrize("version, stable", [("2.9.1", False), ("2.10.0", True), ("2.15.0", True)])
def test_the_cpu_build_uses_the_stable_abi_where_pytorch_has_one(version, stable, monkeypatch):
    monkeypatch.setattr(torch_version, "__version__", torch_version.TorchVersion(version))
    extension = load("setup").native_extension()
    flags = extension.extra_compile_args["cxx"]
    assert ("-DTORCH_TARGET_VERSION=0x020a000000000000" in flags) == stable
    assert ("-fopenmp" in flags) == (not stable)
    assert (extension.libraries == ["torch_cpu"]) == stable


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The sources of the package, with one function in place of each kernel."""
    source = tmp_path_factory.mktemp("source")
    for name in ("LICENSE", "README.md", "cuda_build.py", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "configs")
    shutil.copytree(ROOT / "projects", source / "projects", ignore=ignore)
    (source / "kernels" / "cuda").mkdir(parents=True)
    for name in ("cpu.cpp", "cuda/wrapper.cpp", "cuda/kernel.cu"):
        function = Path(name).stem
        (source / "kernels" / name).write_text(f'extern "C" int {function}() {{ return 1; }}\n')
    return source


@pytest.fixture
def build(source, tmp_path, monkeypatch):
    """``build(**environment)``: the library, and the lines that lite-detr prints."""
    monkeypatch.undo()
    if torch.version.cuda is None:
        pytest.skip("PyTorch is built without CUDA")
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")

    def build(**environment):
        library = tmp_path / "lib" / "lite_detr" / "_C.so"
        command = ["setup.py", "-q", "build_ext", "--build-lib", library.parents[1]]
        run = subprocess.run(
            [sys.executable, *command, "--build-temp", tmp_path / "temp"],
            cwd=source,
            env=os.environ | NOTHING_ASKS | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        assert "Traceback" not in run.stderr
        said = [line for line in run.stderr.splitlines() if line.startswith("lite-detr")]
        return library.read_bytes() if library.exists() else None, said

    return build


@pytest.mark.slow  # It compiles the whole extension.
def test_a_wheel_with_the_extension_is_for_any_python(build, source, tmp_path):
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", tmp_path]
    run = subprocess.run(
        [*command, "--bdist-dir", tmp_path / "bdist"],
        cwd=source,
        env=os.environ | NOTHING_ASKS,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    platform = sysconfig.get_platform().replace("-", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    assert "lite_detr/_C.so" in zipfile.ZipFile(wheel).namelist()


def test_with_a_toolkit_cuda_kernels_are_compiled_and_linked(build, tmp_path):
    home = make_toolkit(tmp_path / "cuda", torch.version.cuda, compile=COMPILE)
    (home / "lib64").mkdir()
    runtime = home / "lib64" / "libcudart.so"
    subprocess.run(["c++", "-shared", "-x", "c++", os.devnull, "-o", runtime], check=True)
    write_script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    library, said = build(FORCE_CUDA="1", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
    assert said == []
    assert all(f"{function}\0".encode() in library for function in ("cpu", "wrapper", "kernel"))
    (arguments,) = (home / "compiled").read_text().splitlines()
    compiled = shlex.split(arguments)
    expected = for_gpus("7.5 8.0 8.6 8.9 9.0 10.0 12.0", "8.0 12.0")
    assert {flag for flag in compiled if "-gencode" in flag} == expected
    assert f"-I{home}/include" in compiled
    assert "-O3" in compiled


@pytest.mark.parametrize("reason", ["a failed compile", "another version"])
def test_without_the_cuda_kernels_one_line_says_why(reason, build, tmp_path):
    home = tmp_path / "cuda"
    make_toolkit(home, torch.version.cuda if reason == "a failed compile" else "9.9")
    library, (line,) = build(CUDA_HOME=str(home), FORCE_CUDA="1")
    assert b"cpu\0" in library
    assert b"wrapper\0" not in library
    assert line.startswith("lite-detr: CUDA kernels not built (")
    assert line.endswith("To build them, see docs/kernels.md")
    assert str(home) in line
    assert (home / "compiled").exists() == (reason == "a failed compile")


def test_a_failing_cpp_compiler_still_leaves_nothing(build, tmp_path):
    home = make_toolkit(tmp_path / "cuda", torch.version.cuda)
    library, (line,) = build(CUDA_HOME=str(home), FORCE_CUDA="1", CC="false", CXX="false")
    assert library is None
    assert line.startswith("lite-detr: native operators not built (")
