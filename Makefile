# `make demo`, `make test` and `make bench` work on a machine with Python >= 3.11, git and make: they set up .venv first.

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test bench lint

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --quiet tests

# The bundled pair against the published way, in a minute. Models this small gain nothing from a second thread
bench: $(VENV)/ready
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py --num_problems 1000 \
		--baseline_problems 50 --baseline_updates 20 --output_dir bench

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
