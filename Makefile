# demo, test, lint and docs set up .venv for themselves, pinned by constraints.txt; pip's own settings (PIP_INDEX_URL,
# PIP_FIND_LINKS, ...) are honoured. test-gpu and bench run in the environment that you are in, and install nothing: a GPU
# machine brings the torch that fits its driver.
PYTHON  ?= python3
WORKERS ?= auto
ARGS    ?=
CASES   ?= 20000
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0

# Of torch, sympy and transformers the tests import a part: Python compiles that part when it comes to it.
PIP   := -c constraints.txt --no-compile
VENV  := .venv
BIN   := $(VENV)/bin
MADE  := $(VENV)/.made
READY := $(VENV)/.ready
PAGES := $(VENV)/.pages

.DEFAULT_GOAL := help
.PHONY: help demo test lint format test-gpu sanitize bench docs report clean fuzz numerics soak portability

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "ARGS=... is handed on (make test ARGS='-k gemm'); PYTHON=... chooses the Python; WORKERS=... the test processes."

demo: $(READY) ## train a small DeepSeek-V3 here, save it, load it, generate from it
	$(BIN)/python -m dskernels.demo $(ARGS)

test: $(READY) ## all tests, with kernels in Triton's interpreter where there is no GPU; the heaviest in part (THOROUGH=1: whole)
	DSKERNELS_TEST_IN_PART=$(if $(THOROUGH),0,1) $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-gpu: WORKERS = 4
test-gpu: ## kernel tests on this machine's GPU; fails where there is none
	DSKERNELS_TEST_DEVICE=cuda $(PYTHON) -m pytest -q -rfE -n $(WORKERS) --dist worksteal $(ARGS)

sanitize: ## compute-sanitizer's four tools over every kernel, on this machine's GPU: make sanitize ARGS='--jobs 12'
	$(PYTHON) tests/sanitizers.py $(ARGS)

fuzz: $(READY) ## every public operation on whatever arguments: make fuzz CASES=20000
	DSKERNELS_FUZZ_CASES=$(CASES) $(BIN)/python -m pytest -q tests/fuzz $(ARGS)

soak: ## random operations, and generation under random load with faults: make soak ARGS='--minutes 9 --out soak.json'
	$(PYTHON) tests/soak.py $(ARGS)

numerics: ## the error of each operation against fp64, beside torch's: docs/numerics.md
	$(PYTHON) -m benchmarks.numerics $(ARGS)

portability: $(READY) ## compile every kernel for six GPUs by several releases of Triton, without a GPU: docs/support.md
	$(BIN)/python tests/portability.py releases $(TRITONS) $(ARGS)

bench: ## time the operations on this machine's GPU, beside their peers
	$(PYTHON) -m benchmarks $(ARGS)

report: $(READY) ## what is saved in benchmarks/results as a page, pictures and tables of docs/ and README; needs no GPU
	$(BIN)/python -m benchmarks --report

docs: $(PAGES) ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean: ## remove .venv and everything that was generated
	rm -rf $(VENV) build dist site demo run *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt | $(MADE)
	@echo "Filling $(VENV), once; most of the time goes to downloading torch."
	$(BIN)/python -m pip install $(PIP) --no-build-isolation -e '.[test,lint,plot,transformers,tiktoken]'
	@touch $@

# The documentation is built from the sources, and needs nothing of what they import.
$(PAGES): docs/requirements.txt | $(MADE)
	$(BIN)/python -m pip install -q $(PIP) -r docs/requirements.txt
	@touch $@

# The pip that comes with Python 3.11 takes 37 CPU seconds to find what constraints.txt names, a new one 16.
$(MADE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP) --upgrade pip setuptools
	@touch $@
