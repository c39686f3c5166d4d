# Two commands on a fresh machine: make demo, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint quick slow clean
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/vpd demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Six and more of the paper's claims on shipped bases, in about two minutes.
quick: $(VENV)/ready
	$(BIN)/vpd reproduce --quick --jobs 2

# Minutes long: needs the packages that vpd model smollm2-135m names.
slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow -n 0

clean:
	rm -rf $(VENV) demo-out reproduce-out
