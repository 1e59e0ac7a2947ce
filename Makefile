# One command per job; `make` alone lists them. The jobs of a run go through scripts/run.py, into the container or into
# .venv; what needs .venv makes it first (scripts/setup.py, which is done at once when nothing changed). The settings
# below reach the shell as environment variables, never as text, so that any value is safe; ARGS is shell words, as typed.

CONFIG ?= recipe/configs/llama-3.1-70b.yaml
DATA ?=
RUN ?=
RUNTIME ?= auto
ARGS ?=
export CONFIG DATA RUN RUNTIME FLAVOUR PYTHON TORCH_INDEX BASE DEBIAN_MIRROR
unexport ARGS # meant for this make's command, not for the makes that the tests call

.DEFAULT_GOAL := help
.PHONY: help setup demo build build-check base plan preflight prepare data train eval reproduce export-adapters chat serve report compare doctor bench test \
  test-long lint lock audit clean ready python provision unprovision
.SILENT:

BIN = .venv/bin/
PYTHON3 = "$${PYTHON:-python3}"
RECIPE = $(PYTHON3) scripts/run.py
with_config = --config "$$CONFIG"
with_data = $(if $(DATA),--data "$$DATA")
with_run = $(if $(RUN),--run "$$RUN")

help:
	printf '%s\n' \
	'Begin' \
	'  make setup            the locked packages into .venv (FLAVOUR=cpu|gpu PYTHON= TORCH_INDEX=)' \
	'  make demo             the whole job, small and real, on the CPU' \
	'  make provision        this machine: driver, Docker, GPUs in containers, swap (ARGS="--tags checks" only looks)' \
	'  make unprovision      take that back, and nothing else' \
	'  make build            the container image, the same bytes everywhere (FLAVOUR= BASE= DEBIAN_MIRROR=)' \
	'' \
	'Fine-tune' \
	'  make plan             does it fit, part by part; needs no GPU (CONFIG=)' \
	'  make preflight        is this machine able to do it (CONFIG=)' \
	'  make prepare          download the model and quantise it to NF4 (CONFIG=)' \
	'  make data             rows as the model sees them; ARGS=check, ARGS=stats (CONFIG= DATA=)' \
	'  make train            train, or go on with an unfinished run (CONFIG= DATA= RUN=)' \
	'' \
	'Use what was trained' \
	'  make eval             loss, perplexity and samples (RUN=)' \
	'  make reproduce        the same run again, from its manifest, and compare (RUN=)' \
	'  make export-adapters  a verified PEFT folder (RUN=)' \
	'  make chat             talk to it, adapters on or off (RUN=)' \
	"  make serve            for OpenAI's clients, on this machine: vLLM on GPUs, else the CPU and a chat page (RUN=)" \
	"  make report           one HTML file of a run; while it trains: ARGS=--watch (RUN=)" \
	'  make compare          what differs between runs (RUN="one another")' \
	"  make doctor           what went wrong in a run and what to do (RUN=, or ARGS='--log FILE')" \
	'' \
	'Work on the recipe' \
	'  make bench            speed and memory at true shapes, against other ways (ARGS=)' \
	'  make test             the tests' \
	'  make test-long        those that take minutes each' \
	'  make lint             style and types, of the playbook too' \
	'  make lock             renew the locks of the Python and the Debian packages' \
	'  make audit            known vulnerabilities of the locked packages' \
	'  make build-check      build the image twice from nothing and compare' \
	'  make base             only the Debian that the image stands on' \
	'  make clean            remove caches; never runs, models or data' \
	'' \
	'Settings' \
	"  CONFIG=FILE           a YAML, as in recipe/configs/ (now $$CONFIG)" \
	'  DATA=PATH             training data in place of the config'"'"'s' \
	'  RUN=NAME              a run in runs/' \
	'  RUNTIME=auto|docker|host  where it runs: the container (auto: once it is built), else .venv' \
	'  ARGS="..."            passed on, for example ARGS="--set lora.r=32"'

python:
	command -v $(PYTHON3) >/dev/null || { echo "$${PYTHON:-python3} not found: install Python 3.11 or newer" >&2; exit 2; }

setup: python
	$(PYTHON3) scripts/setup.py $(SETUP_ARGS)

ready: SETUP_ARGS = --quiet
ready: setup

build build-check base: python
	$(PYTHON3) scripts/image.py $@

provision unprovision: python
	$(PYTHON3) scripts/provision.py $@.yml $(ARGS)

demo: python
	$(RECIPE) demo $(with_run) $(ARGS)

plan preflight prepare data: python
	$(RECIPE) $@ $(with_config) $(with_data) $(ARGS)

train: python
	$(RECIPE) train $(with_config) $(with_data) $(with_run) $(ARGS)

doctor: python
	$(RECIPE) doctor $(with_run) $(ARGS)

eval chat serve reproduce report: python
	$(RECIPE) $@ $(with_run) $(ARGS)

compare: python
	set -f; $(RECIPE) compare $$RUN $(ARGS)

export-adapters: python
	$(RECIPE) export $(with_run) $(ARGS)

bench: python
	$(RECIPE) bench $(ARGS)

test: ready
	$(BIN)python -m pytest $(ARGS)

test-long: ready
	RECIPE_LONG=1 $(BIN)python -m pytest tests/long $(ARGS)

lint: ready
	$(BIN)ruff check
	$(BIN)ruff format --check
	$(BIN)mypy
	cd ansible && PATH="../$(BIN):$$PATH" ../$(BIN)ansible-lint -q

lock: ready
	$(BIN)python scripts/lock.py $(ARGS)
	$(BIN)python scripts/debian.py

audit: ready
	$(BIN)python scripts/audit.py $(ARGS)

clean:
	find . \( -path ./.venv -o -path ./runs -o -path ./models -o -path ./data -o -path ./.git \) -prune -o \
	  -type d \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .mypy_cache \
	  -o -name '*.egg-info' -o -path ./build \) -prune -exec rm -rf {} +
