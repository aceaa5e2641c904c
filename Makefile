# make         what there is to make (make help)
# make demo    set up, then tune the starter GPT-2 with PPO (offline); ARGS="--steps 20 --seed 1"
# make test    set up, then run the tests;                             ARGS="tests/test_core.py -x"
# make test-gpu                          the tests that need a GPU
# make bench   set up, then time an iteration beside other releases;   ARGS="--workload b --repeats 3"
# make models  get the real models of some tests and examples, from PyPI
# make notebooks, make docs               run the notebooks and keep what they show; build site/
# make readme  write README.md from notebooks/index.ipynb
#
# Every target makes its own environment in .venv, with the versions of constraints.txt. Those of the
# other releases are made in .venv-peers.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
RUN_READY := .venv/.ready-to-run
DEV_READY := .venv/.ready-to-develop
IN_TWO := -n 2 --dist worksteal  # processes, of one thread each; ARGS="-n 0" for one
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

.PHONY: help demo test test-slow test-gpu models bench notebooks readme docs check format clean

help:
	@echo "make demo       set up .venv, then tune a small GPT-2 with PPO, offline; ARGS='--steps 20'"
	@echo "make test       set up .venv, then run the tests; ARGS='tests/test_core.py -x'"
	@echo "make test-slow  those that take minutes too"
	@echo "make test-gpu   those that need a GPU"
	@echo "make models     get the real models of some tests and examples"
	@echo "make bench      time an iteration beside other releases"
	@echo "make notebooks  run the notebooks and keep what they show"
	@echo "make readme     write README.md from notebooks/index.ipynb"
	@echo "make docs       build the manual in site/"
	@echo "make check      format, lint, types, layers, README"
	@echo "make format     repair what can be repaired"
	@echo "make clean      remove .venv and all that was built"

demo: $(RUN_READY)
	$(BIN)/trl demo $(ARGS)

test: $(DEV_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(IN_TWO) $(ARGS)

test-gpu: $(DEV_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)

test-slow: $(DEV_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(IN_TWO) -m "slow or not slow" $(ARGS)

models: $(DEV_READY)
	$(BIN)/python examples/real_models/get.py

bench: $(DEV_READY)
	$(BIN)/python benchmarks/peers.py --make-environment trl-0.11.4 trl-1.12.0
	$(BIN)/python benchmarks/peers.py $(ARGS)

notebooks: $(DEV_READY)
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/run.py $(ARGS)

readme: $(DEV_READY)
	$(BIN)/python notebooks/readme.py

docs: $(DEV_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html in a browser: links and search work without a server."

check: $(DEV_READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python notebooks/readme.py --check

format: $(DEV_READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist site .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN_READY): $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing trl and what it needs into .venv: 1.3 GB on a CPU, some minutes ..."
	$(INSTALL) --editable .
	@touch $@

$(DEV_READY): $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing trl, what it needs and the development tools into .venv ..."
	$(INSTALL) --editable '.[dev]'
	@touch $(RUN_READY) $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON) here: install Python 3.11 or newer, or name it: make PYTHON=python3.12 ..."; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "trl needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name another one: make PYTHON=python3.12 ..."; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments: its modules venv and ensurepip are missing" \
	    "(on Debian and Ubuntu: apt install python3-venv)."; \
	  exit 1; }
	$(PYTHON) -m venv .venv
