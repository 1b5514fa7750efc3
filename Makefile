# `make demo`, `make test`, `make docs` and the others work on a machine with Python >= 3.11, git and make: they set up .venv first.

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test bench docs lint types test-oldest

# Made anew when the declared dependencies change
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev,quantization]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/lightreasoner demo --output_dir lightreasoner-demo

# One thread a process: two processes on two cores
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --quiet tests

# The oldest declared version of every dependency, in an environment of its own
$(VENV)-oldest/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet uv
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct \
		--editable '.[test,quantization]'
	touch $@

test-oldest: $(VENV)-oldest/ready
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest --numprocesses 2 --dist worksteal --quiet tests

# The bundled pair against the published way, in a minute. Models this small gain nothing from a second thread
bench: $(VENV)/ready
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py --num_problems 1000 \
		--baseline_problems 50 --baseline_updates 20 --output_dir bench

$(VENV)/docs-ready: $(VENV)/ready
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

# Into site/, which opens from the disk; a broken link is an error
docs: $(VENV)/docs-ready
	$(BIN)/python -m zensical build --clean --strict
	$(BIN)/python tools/check_site.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/sentence_lengths.py

types: $(VENV)/ready
	$(BIN)/mypy
