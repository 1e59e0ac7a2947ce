# One command per job; `make` alone lists them. Each job that needs .venv makes it first (scripts/setup.py, which
# is done at once when nothing changed). The settings below reach the shell as environment variables, never as
# text, so that any value is safe; ARGS is shell words, as typed.

CONFIG ?= recipe/configs/llama-3.1-70b.yaml
DATA ?=
RUN ?=
RUNTIME ?= auto
ARGS ?=
export CONFIG DATA RUN RUNTIME FLAVOUR PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help setup demo plan preflight prepare train eval export-adapters chat bench test lint lock clean ready runtime
.SILENT:

BIN = .venv/bin/
RECIPE = $(BIN)python -m recipe
with_config = --config "$$CONFIG"
with_data = $(if $(DATA),--data "$$DATA")
with_run = $(if $(RUN),--run "$$RUN")

help:
	printf '%s\n' \
	'Begin' \
	'  make setup            the locked packages into .venv (FLAVOUR=cpu|gpu PYTHON= TORCH_INDEX=)' \
	'  make demo             the whole job, small and real, on the CPU' \
	'' \
	'Fine-tune' \
	'  make plan             does it fit, part by part; needs no GPU (CONFIG=)' \
	'  make preflight        is this machine able to do it (CONFIG=)' \
	'  make prepare          download the model and quantise it to NF4 (CONFIG=)' \
	'  make train            train, or go on with an unfinished run (CONFIG= DATA= RUN=)' \
	'' \
	'Use what was trained' \
	'  make eval             loss, perplexity and samples (RUN=)' \
	'  make export-adapters  a verified PEFT folder (RUN=)' \
	'  make chat             talk to it, adapters on or off (RUN=)' \
	'' \
	'Work on the recipe' \
	'  make bench            speed and memory at true shapes, against other ways (ARGS=)' \
	'  make test             the tests' \
	'  make lint             style and types' \
	'  make lock             renew both locks from requirements.in' \
	'  make clean            remove caches; never runs, models or data' \
	'' \
	'Settings' \
	"  CONFIG=FILE           a YAML, as in recipe/configs/ (now $$CONFIG)" \
	'  DATA=PATH             training data in place of the config'"'"'s' \
	'  RUN=NAME              a run in runs/' \
	'  RUNTIME=auto|host     where it runs: the host'"'"'s .venv' \
	'  ARGS="..."            passed on, for example ARGS="--set lora.r=32"'

setup:
	command -v "$${PYTHON:-python3}" >/dev/null || { echo "setup: $${PYTHON:-python3} not found: install Python 3.11 or newer" >&2; exit 2; }
	"$${PYTHON:-python3}" scripts/setup.py $(SETUP_ARGS)

ready: SETUP_ARGS = --quiet
ready: setup

runtime:
	case "$$RUNTIME" in \
	auto|host) ;; \
	docker) echo 'RUNTIME=docker: the container image comes with a later version; use RUNTIME=host' >&2; exit 2 ;; \
	*) echo "RUNTIME=$$RUNTIME: expected auto or host" >&2; exit 2 ;; \
	esac

demo: runtime ready
	$(RECIPE) demo $(with_run) $(ARGS)

plan preflight prepare: runtime ready
	$(RECIPE) $@ $(with_config) $(ARGS)

train: runtime ready
	$(RECIPE) train $(with_config) $(with_data) $(with_run) $(ARGS)

eval chat: runtime ready
	$(RECIPE) $@ $(with_run) $(ARGS)

export-adapters: runtime ready
	$(RECIPE) export $(with_run) $(ARGS)

bench: runtime ready
	$(RECIPE) bench $(ARGS)

test: ready
	$(BIN)python -m pytest $(ARGS)

lint: ready
	$(BIN)ruff check
	$(BIN)ruff format --check
	$(BIN)mypy

lock: ready
	$(BIN)python scripts/lock.py $(ARGS)

clean:
	find . \( -path ./.venv -o -path ./runs -o -path ./models -o -path ./data -o -path ./.git \) -prune -o \
	  -type d \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .mypy_cache \
	  -o -name '*.egg-info' -o -path ./build \) -prune -exec rm -rf {} +
