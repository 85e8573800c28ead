PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the interpreter that `make test-compat` tries: another megatron-core line runs there
COMPAT_PYTHON ?= python3.12
COMPAT_VENV ?= .venv-compat

.PHONY: help quickstart test test-compat parity checks format docs bench score-planner report-example clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

quickstart: $(VENV)/.run  ## train a small Llama on real text with 2 CPU processes
	$(BIN)/toolkit train launch/recipes/quickstart.yaml --num-procs 2
	@$(BIN)/python launch/next_steps.py runs/quickstart

test: $(VENV)/.dev  ## all tests, in an environment of their own
	$(BIN)/python -m pytest

$(COMPAT_VENV)/.dev: pyproject.toml constraints.txt
	$(COMPAT_PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test-compat: $(COMPAT_VENV)/.dev  ## the parity suite with the other interpreter and megatron-core
	$(COMPAT_VENV)/bin/python -m pytest tests/parity

parity: $(VENV)/.dev  ## the parity suite, and docs/parity.md and docs/memory.md from what it measured
	$(BIN)/python -m pytest tests/parity tests/checkpoint tests/memory/test_own_runs.py --all-cells
	$(BIN)/python -m tests.parity.report > docs/parity.md
	$(BIN)/python -m tests.memory.report > docs/memory.md

checks: $(VENV)/.dev  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.run  ## the generated tables of docs/
	$(BIN)/python -m toolkit.parallel.rules > docs/rules.md
	$(BIN)/python -m toolkit.config.schema_docs > docs/configuration.md

bench: $(VENV)/.bench  ## step time against a bare megatron-core loop and Hugging Face Trainer + DeepSpeed
	$(BIN)/python -m tests.bench.overhead --write docs/performance.md

score-planner: $(VENV)/.run  ## docs/planner.md: predictions against published measurements
	$(BIN)/python -m toolkit.plan.score ../shared/planner/published_dev.jsonl ../shared/planner/score_planner.py --out docs/planner.md

report-example: $(VENV)/.dev  ## docs/report.png: two small runs, trained, profiled and shown
	$(BIN)/python -m tests.report.example

clean:
	rm -rf $(VENV) $(COMPAT_VENV) runs build *.egg-info
