#!/usr/bin/env python
"""Lay out the operators as the Hub's ``kernels`` package loads them. Publishes nothing.

kernel_hub.py --output build/kernel_hub --repo-id USER/lite-detr-ops

The folder has build.toml and torch-ext/, which kernel-builder takes, and build/torch-cuda/, which
``kernels.get_local_kernel`` loads. There is nothing to compile: NVRTC does that at first use.

The Hub lets several versions run in one process, so that operators are registered in a namespace
that is named after their sources.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lite_detr import cli
from lite_detr.ops.nvrtc import SOURCES

OPS = Path(__file__).resolve().parents[1] / "projects" / "lite_detr" / "ops"
LICENSE = "Apache-2.0"
NAME = "lite-detr-ops"
BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "{license}"
backends = ["cuda"]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
pyext = ["py", "h", "cuh"]
"""
# The package around the operators, which import nothing beyond their folder and the sources.
INIT = '"""Multi-scale deformable attention of Lite DETR."""\n\nfrom .ops import *\n'


def files() -> Iterator[tuple[str, str]]:
    """Yield the path in the package and the text of each file."""
    yield "__init__.py", INIT
    for path in sorted(OPS.glob("*.py")):
        yield f"ops/{path.name}", path.read_text()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".h", ".cuh") and "cpu" not in path.parts:
            yield f"kernels/{path.relative_to(SOURCES).as_posix()}", path.read_text()


def in_namespace(text: str, namespace: str) -> str:
    """Move the operators from the namespace ``lite_detr`` to another one."""
    for before, after in (
        ("torch.ops.lite_detr", f"torch.ops.{namespace}"),
        ('Library("lite_detr"', f'Library("{namespace}"'),
        ("lite_detr::", f"{namespace}::"),
    ):
        text = text.replace(before, after)
    return text


def lay_out(output: Path, repo_id: str, version: int) -> str:
    """Write the folder, in place of what it was, and return the operators' namespace."""
    found = dict(files())
    digest = hashlib.sha256(repr(found).encode()).hexdigest()[:8]
    namespace = f"_{NAME.replace('-', '_')}_{digest}"
    variant = output / "build" / "torch-cuda"
    package = output / "torch-ext" / NAME.replace("-", "_")
    for folder in (variant, package):
        shutil.rmtree(folder, ignore_errors=True)
        for name, text in found.items():
            # The namespace of C++ has the same name, and stays.
            is_python = name.endswith(".py") and name != "ops/nvrtc_kernels.py"
            moved = in_namespace(text, namespace) if is_python else text
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(moved)
    metadata = {
        "name": NAME,
        "id": namespace,
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    words = dict(name=NAME, version=version, license=LICENSE, repo_id=repo_id)
    (output / "build.toml").write_text(BUILD_TOML.format(**words))
    return namespace


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/kernel_hub"))
    parser.add_argument("--repo-id", default=f"USER/{NAME}", help="the repository on the Hub")
    parser.add_argument("--kernel-version", type=cli.whole_number(1), default=1)
    return parser.parse_args(argv)


@cli.user_errors()
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    namespace = lay_out(args.output, args.repo_id, args.kernel_version)
    print(f"{args.output}: the operators are torch.ops.{namespace}")


if __name__ == "__main__":
    main()
