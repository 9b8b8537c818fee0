# The two commands of the README are `make demo` and `make test`; both set up .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# A pip requirement to install Detectron2 from, such as upstream's repository; the default is the
# redistribution on the package index.
DETECTRON2 ?=

DATASETS := $(or $(DETECTRON2_DATASETS),datasets)
DEMO_CONFIG ?= digits/lite_dino_efficientnet_lite0.py
DEMO_OUTPUT ?= output/demo

# glibc gives large blocks back to the kernel at every free; a training step on a CPU took half as
# long again for the page faults that follow.
CPU_ENV := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: install demo test lint clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py constraints.txt tools/install_detectron2.sh \
		$(shell find kernels -name '*.cpp' -o -name '*.h')
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt 'setuptools<81' wheel ninja
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision
	tools/install_detectron2.sh $(BIN)/python $(DETECTRON2)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation \
		--editable '.[demo,dev]'
	$(BIN)/python -c 'import lite_detr'
	touch $@

demo: install
	$(BIN)/python tools/make_digits.py --output $(DATASETS)/digits
	$(CPU_ENV) $(BIN)/python train_net.py --config-file $(DEMO_CONFIG) \
		train.output_dir=$(DEMO_OUTPUT)
	$(BIN)/python tools/plot_metrics.py $(DEMO_OUTPUT)/metrics.json
	$(BIN)/python demo/demo.py --config-file $(DEMO_CONFIG) \
		--weights $(DEMO_OUTPUT)/model_final.pth --input $(DATASETS)/digits/val \
		--output $(DEMO_OUTPUT)/predictions --contact-sheet $(DEMO_OUTPUT)/contact_sheet.png

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist projects/*.egg-info .pytest_cache .ruff_cache
