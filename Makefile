# Everything from a bare machine: each target makes the environment first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# As CUDA_VISIBLE_DEVICES leaves them.
GPUS = $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count())")

# Two ranks share the model by tensor parallelism, on two GPUs or on the CPU; one GPU takes it alone.
LAYOUT = $(if $(filter 1,$(GPUS)),run.ranks=1,run.ranks=2 parallel.tp=2)
ARGS ?=

# What `make image` and `make image-cpu` build; BUILD_ARGS="--build-arg EXTRAS=wandb" adds to them.
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' megavit/__init__.py)
REVISION = $(shell git describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null || echo unknown)
DOCKER ?= docker
IMAGE ?= megavit:$(VERSION)
BUILD_ARGS ?=

.PHONY: train bench test test-slow test-gpu check format docs image image-cpu clean

train: $(INSTALLED)
	$(BIN)/megavit train $(LAYOUT) $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.step $(ARGS)

# By file on two processes: each starts its own ranks, once. As they come: by the number of their tests, which xdist would
# sort them by, files of few long ones were left for the end.
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

# The site, in build/site, after the pages that follow from the code. An issue that Zensical finds fails the build.
docs: $(INSTALLED)
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --strict --clean

define build_image
	@command -v $(DOCKER) > /dev/null || \
		{ echo "make $@: $(DOCKER) is not installed; install it, or name another with DOCKER=podman" >&2; exit 2; }
	@$(DOCKER) info > /dev/null 2>&1 || \
		{ echo "make $@: $(DOCKER) is installed but its engine does not answer; '$(DOCKER) info' says why" >&2; exit 2; }
	$(DOCKER) build --file $(1) --tag $(2) --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) $(BUILD_ARGS) .
endef

image:
	$(call build_image,docker/Dockerfile,$(IMAGE))

image-cpu:
	$(call build_image,docker/Dockerfile.cpu,$(IMAGE)-cpu)

# The clone by its path too: else a script beside it would import the clone's own folder, as an empty package.
$(INSTALLED): setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e '.[dev]'
	echo $(CURDIR) > $$(echo $(VENV)/lib/python3*/site-packages)/clone.pth
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
