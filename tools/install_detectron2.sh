#!/usr/bin/env bash
# Install Detectron2 for a Python, unless it has it.
#
#   tools/install_detectron2.sh PYTHON [REQUIREMENT]
#   tools/install_detectron2.sh --download PYTHON FOLDER
#
# REQUIREMENT is what pip shall install, such as upstream's repository. Without one, it installs the
# redistribution on the package index whose file has the hash in requirements/detectron2.txt. Its
# wheel is tagged for Python 3.10, but its Python files run on later ones also, and lite_detr does not
# need its compiled part (rotated boxes, deformable convolution, a faster COCO evaluation).
#
# --download prints a new requirements/detectron2.txt, for `make lock`.
set -euo pipefail

redistribution=sal-detectron2==0.7.2
# So that pip takes the wheel for a Python that it was not built for.
tags=(--no-deps --only-binary=:all: --python-version 3.10 --implementation cp --abi none --platform any)

if [ "$1" = --download ]; then
    "$2" -m pip download --quiet "${tags[@]}" --dest "$3" "$redistribution"
    echo "$redistribution $("$2" -m pip hash "$3"/*.whl | tail -n 1)"
    exit
fi

python=$1
requirement=${2:-}
requirements=$(dirname "$0")/../requirements

if "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("detectron2"))'
then
    exit 0
fi
if [ -n "$requirement" ]; then
    exec "$python" -m pip install --quiet --no-build-isolation "$requirement"
fi
# What the wheel requires, without its limit to numpy 1, and what its visualizer imports. After
# `make install` has installed requirements/install.txt, nothing is missing.
"$python" -m pip install --quiet --constraint "$requirements/install.in" \
    black cloudpickle fvcore hydra-core iopath matplotlib 'omegaconf>=2.1,<2.4' \
    opencv-python-headless packaging 'Pillow>=7.1' pycocotools tabulate tensorboard \
    'termcolor>=1.1' tqdm 'yacs>=0.1.8'
"$python" -m pip install --quiet --require-hashes "${tags[@]}" \
    --target "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    --requirement "$requirements/detectron2.txt"
