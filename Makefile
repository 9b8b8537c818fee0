# The two commands of the README are `make demo` and `make test`; both set up .venv first.

# The Pythons that requirements/*.txt and the tests are for, the preferred one first.
PYTHONS := 3.11 3.12 3.13 3.10
PYTHON ?= $(shell for name in $(PYTHONS:%=python%) python3; do \
	if $$name -c '' 2>/dev/null; then echo $$name; break; fi; done)
# Where `make test-pythons` runs the core tests, for example "3.10 3.12".
TEST_PYTHONS ?= $(PYTHONS)
VENV := .venv
BIN := $(VENV)/bin
# A pip requirement to install Detectron2 from, such as upstream's repository; the default is the
# redistribution on the package index.
DETECTRON2 ?=

# Processes that run the tests, each on one core. The tests of a file share what they set up, so they
# stay in one process; tests/conftest.py puts the longest files first.
TEST_PROCESSES ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile \
	--no-loadscope-reorder

DATASETS := $(or $(DETECTRON2_DATASETS),datasets)
DEMO_CONFIG ?= digits/lite_dino_efficientnet_lite0.py
DEMO_OUTPUT ?= output/demo

# A copy of the package, whose kernels stop at the first invalid access or undefined operation.
SANITIZED := build/sanitize/lib
SANITIZERS := -fsanitize=address,undefined,float-cast-overflow
# Python itself knows nothing of the sanitizer, which has to be loaded before all else.
SANITIZER_LIBRARIES = $(shell $(CXX) -print-file-name=libasan.so) \
	$(shell $(CXX) -print-file-name=libstdc++.so)
# Not under the sanitizer: one measures memory, the other starts compilers.
SANITIZE_TESTS := tests/ops -k 'not a_tenth_of_the_memory and not inductor'

# A copy of the package with the CUDA kernels, for GPUs that need not be here.
CUDA_COPY := build/cuda/lib
CUDA_COPY_FOR := $(or $(TORCH_CUDA_ARCH_LIST),8.0 9.0)

# The page's environment: its own packages, such as Gradio's older Pillow, before those of $(VENV).
APP := build/app

# The Python with PyTorch for `make gpu-check`, and flags such as --only operators.
GPU_PYTHON ?= $(shell test -x $(BIN)/python && echo $(BIN)/python || echo python3)
GPU_CHECK_FLAGS ?=

# Where `make test-wheel` installs the wheel: a Python and a version of PyTorch each.
TEST_WHEELS ?= 3.10:2.10.0 3.12:2.10.0 3.13:2.10.0 3.10:newest 3.12:newest 3.13:newest

# Another detector or address for `make app`, such as APP_FLAGS='--port 8000'.
APP_FLAGS ?=

.PHONY: install demo app test test-all test-pythons wheel test-wheel docs lock sanitize cuda \
	gpu-check lint clean

# Fails with one line for a Python that the first argument does not list; the second says what to do.
CHECK_PYTHON := -c 'import sys; version = "%d.%d" % sys.version_info[:2]; \
	version in sys.argv[1].split() or sys.exit("Python %s %s" % (version, sys.argv[2]))'

install: $(VENV)/installed
# Without this, `make install PYTHON=...` would do nothing where $(VENV) is of another Python.
ifeq ($(filter file undefined,$(origin PYTHON)),)
	@$(PYTHON) $(CHECK_PYTHON) \
		"$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
		'is not that of $(VENV): remove $(VENV) first, or add VENV=FOLDER'
endif

$(VENV)/installed: pyproject.toml setup.py cuda_build.py tools/install_detectron2.sh \
		$(addprefix requirements/,build.txt install.txt detectron2.txt) \
		$(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu*')
	@$(PYTHON) $(CHECK_PYTHON) '$(PYTHONS)' \
		'is not supported: add PYTHON=python3.11 to the command, or one of $(PYTHONS)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --requirement requirements/build.txt
	$(BIN)/pip install --quiet --require-hashes --no-build-isolation \
		--requirement requirements/install.txt
	tools/install_detectron2.sh $(BIN)/python $(DETECTRON2)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -W ignore -c 'import lite_detr.modeling'
	touch $@

# Goes on if it was interrupted, and shows a finished training again.
demo: install
	$(BIN)/python tools/make_digits.py --output $(DATASETS)/digits
	$(BIN)/python train_net.py --config-file $(DEMO_CONFIG) --resume \
		train.output_dir=$(DEMO_OUTPUT)
	$(BIN)/python tools/plot_metrics.py $(DEMO_OUTPUT)/metrics.json
	$(BIN)/python demo/demo.py --config-file $(DEMO_CONFIG) \
		--weights $(DEMO_OUTPUT)/model_final.pth --input $(DATASETS)/digits/val \
		--output $(DEMO_OUTPUT)/predictions --contact-sheet $(DEMO_OUTPUT)/contact_sheet.png
	@echo 'Pictures: $(DEMO_OUTPUT)/contact_sheet.png, and one by one in $(DEMO_OUTPUT)/predictions'

app: $(APP)/installed
	$(APP)/bin/python demo/app.py $(APP_FLAGS)

$(APP)/installed: $(VENV)/installed requirements/app.txt
	rm -rf $(APP)
	$(BIN)/python -m venv $(APP)
	$(APP)/bin/python -c 'import pathlib, site, sys; \
		pathlib.Path(site.getsitepackages()[0], "others.pth").write_text( \
		"import site; site.addsitedir(%r)\n" % sys.argv[1])' \
		"$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"
	$(APP)/bin/pip install --quiet --no-deps --require-hashes --requirement requirements/app.txt
	touch $@

test: install
	$(PYTEST)

# With those that are marked slow, such as long fuzz runs and a run of every command of the docs.
test-all: install
	$(PYTEST) -m ''

# The core tests on each of these Pythons; those that this machine lacks are named.
test-pythons: install
	$(BIN)/python tests/pythons.py $(TEST_PYTHONS)

# One file for every Python, and for PyTorch from 2.10 on, with CPU kernels. auditwheel finds out how
# old a system may be.
wheel: $(VENV)/wheel-installed
	rm -rf build/wheel build/lib* build/bdist* dist/*.whl
	CUDA_VISIBLE_DEVICES= TORCH_CUDA_ARCH_LIST= FORCE_CUDA= $(BIN)/pip wheel --quiet --no-deps \
		--no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so \
		--wheel-dir dist build/wheel/*.whl
	@ls -l dist/*.whl

$(VENV)/wheel-installed: $(VENV)/installed requirements/wheel.txt
	$(BIN)/pip install --quiet --require-hashes --requirement requirements/wheel.txt
	touch $@

# The wheel in fresh environments without a compiler; those of a Python that is missing are named.
test-wheel: wheel
	$(BIN)/python tests/wheels.py dist/*.whl $(TEST_WHEELS)

docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'The site is build/site/index.html; its search needs a server:'
	@echo '$(BIN)/python -m http.server --directory build/site'

$(VENV)/docs-installed: $(VENV)/installed requirements/docs.txt
	$(BIN)/pip install --quiet --require-hashes --requirement requirements/docs.txt
	touch $@

# Pins and hashes all that the packages in requirements/*.in need, after a change there: one file for
# every Python from the one named here on, which MkDocs' extensions want higher. Versions that fit stay
# as they are; `make lock LOCK_FLAGS=--upgrade` takes the newest of what is not in *.in.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv==0.13.9
	for lock in install:3.10 build:3.10 wheel:3.10 app:3.10 docs:3.11.5; do name=$${lock%:*}; \
		(cd requirements && UV_PYTHON_DOWNLOADS=never ../build/lock/bin/uv pip compile --quiet \
		--universal --python-version $${lock#*:} --generate-hashes --no-annotate --no-header \
		$(LOCK_FLAGS) --output-file $$name.txt $$name.in) || exit 1; done
	rm -rf build/lock/detectron2
	tools/install_detectron2.sh --download build/lock/bin/python build/lock/detectron2 \
		> requirements/detectron2.txt.new
	mv requirements/detectron2.txt.new requirements/detectron2.txt

# On a machine with a GPU too, the CPU kernels alone.
sanitize: install
	CUDA_VISIBLE_DEVICES= TORCH_CUDA_ARCH_LIST= FORCE_CUDA= \
		CFLAGS='$(SANITIZERS) -fno-sanitize-recover=all -g -O1' LDFLAGS='$(SANITIZERS)' \
		$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	test -f $(SANITIZED)/lite_detr/_C.so
	for capability in portable avx2 avx512; do CUDA_VISIBLE_DEVICES= \
		LD_PRELOAD='$(SANITIZER_LIBRARIES)' ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 LITE_DETR_CPU_CAPABILITY=$$capability \
		$(BIN)/python -m pytest -o pythonpath='$(SANITIZED) tests/helpers' \
			-p no:cacheprovider -s $(SANITIZE_TESTS) || exit 1; \
	done

cuda: install
	rm -rf $(CUDA_COPY)
	TORCH_CUDA_ARCH_LIST='$(CUDA_COPY_FOR)' \
		$(BIN)/python setup.py -q build --build-base build/cuda --build-lib $(CUDA_COPY)
	test "$$(PYTHONPATH=$(CUDA_COPY) \
		$(BIN)/python -W ignore -c 'from lite_detr import ops; print(ops.backend("cuda"))')" = native

# On a GPU, with any Python that has PyTorch; nothing is installed. At most ten minutes.
gpu-check:
	$(GPU_PYTHON) tools/gpu_check.py $(GPU_CHECK_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist projects/*.egg-info .pytest_cache .ruff_cache
