# TORCH names the build to install before everything else; give another to choose CPU or CUDA wheels.
PYTHON ?= python3
TORCH ?= torch==2.13.0
POLICY ?= bupo
SEED ?= 0

BIN := .venv/bin

.PHONY: install demo test test-demo lint bench clean

# One stamp, named after the torch it stands for: asking for another torch installs it.
STAMP := .venv/installed-$(subst =,,$(TORCH))

install: $(STAMP)

$(STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	rm -f .venv/installed-*
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

demo: install ## a small model learns sums with BuPO (POLICY=grpo: the baseline); about three minutes
	$(BIN)/bupo demo --policy $(POLICY) --seed $(SEED)

test: install
	$(BIN)/python -m pytest

test-demo: install ## the demo must learn; minutes
	$(BIN)/python -m pytest -m slow -s

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install ## against the bare GEMM of the same run
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-enable

clean:
	rm -rf .venv build *.egg-info .pytest_cache .hypothesis .benchmarks
