#!/usr/bin/env bash
# Installs Detectron2 for a Python, unless it has it.
#
#   tools/install_detectron2.sh PYTHON [REQUIREMENT]
#
# REQUIREMENT is what pip shall install it from, such as upstream's repository. Without one, the
# redistribution is taken from the package index: its wheel is tagged for Python 3.10, but its Python
# files run on later ones too, and what its compiled part holds (rotated boxes, deformable
# convolution, a faster COCO evaluation) lite_detr does without.
set -euo pipefail

python=$1
requirement=${2:-}

if "$python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("detectron2"))'
then
    exit 0
fi
if [ -n "$requirement" ]; then
    exec "$python" -m pip install --quiet --no-build-isolation "$requirement"
fi
# What the wheel asks for, less its limit to numpy 1, and what its visualizer imports besides.
"$python" -m pip install --quiet --constraint constraints.txt \
    black cloudpickle fvcore hydra-core iopath matplotlib 'omegaconf>=2.1,<2.4' \
    opencv-python-headless packaging 'Pillow>=7.1' pycocotools tabulate tensorboard \
    'termcolor>=1.1' tqdm 'yacs>=0.1.8'
"$python" -m pip install --quiet --no-deps --only-binary=:all: --python-version 3.10 \
    --implementation cp --abi none --platform any \
    --target "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    sal-detectron2==0.7.2
