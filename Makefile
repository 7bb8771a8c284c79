# Build, test and check megavit from a bare machine: each target creates the environment first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The number of GPUs that CUDA_VISIBLE_DEVICES allows.
GPUS = $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count())")

# Two ranks with tensor parallelism, on two GPUs or on the CPU; one rank on one GPU.
LAYOUT = $(if $(filter 1,$(GPUS)),run.ranks=1,run.ranks=2 parallel.tp=2)
ARGS ?=

# Variables of `make image` and `make image-cpu`; BUILD_ARGS="--build-arg EXTRAS=wandb" adds an extra.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' megavit/__init__.py)
REVISION = $(shell git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo unknown)
DOCKER ?= docker
IMAGE ?= megavit:$(VERSION)
BUILD_ARGS ?=

.PHONY: train bench test test-slow test-gpu check format docs pages image image-cpu clean

train: $(INSTALLED)
	$(BIN)/megavit train $(LAYOUT) $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.step $(ARGS)

# Distribute files over two processes, each of which starts its ranks once. Keep the order of the files: xdist's order by
# number of tests would run files with few long tests last.
test: $(INSTALLED)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu" $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(INSTALLED)
	MEGAVIT_DEVICE=cuda $(BIN)/pytest -m gpu $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The site, in build/site. An issue that Zensical finds, a link without a target for one, fails the build.
docs: $(INSTALLED)
	$(BIN)/zensical build --strict --clean

# The pages that follow from the code.
pages: $(INSTALLED)
	$(BIN)/python docs/generate.py

define build_image
	@command -v $(DOCKER) > /dev/null || \
		{ echo "make $@: $(DOCKER) is not installed; install it, or choose another engine: DOCKER=podman" >&2; exit 2; }
	@$(DOCKER) info > /dev/null 2>&1 || \
		{ echo "make $@: $(DOCKER) is installed but its engine does not answer; '$(DOCKER) info' shows why" >&2; exit 2; }
	$(DOCKER) build --file $(1) --tag $(2) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(BUILD_ARGS) .
endef

image:
	$(call build_image,docker/Dockerfile,$(IMAGE))

image-cpu:
	$(call build_image,docker/Dockerfile.cpu,$(IMAGE)-cpu)

# Put the clone on Python's path: a script next to the clone would otherwise import its folder as an empty package.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e '.[dev]'
	echo $(CURDIR) > $$(echo $(VENV)/lib/python3*/site-packages)/clone.pth
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
