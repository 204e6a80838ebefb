# Everything runs in .venv, which the first target that needs it makes. PYTHON picks the Python that makes it.
PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/installed

CPUS := $(shell nproc 2>/dev/null || echo 1)
# Test processes: one a core, at most 8, since each of them holds a copy of torch.
WORKERS ?= $(shell [ $(CPUS) -gt 8 ] && echo 8 || echo $(CPUS))
# The files that share the benchmarks' command line; the others in that folder serve them.
BENCHMARKS ?= $(shell grep -ls '^from command import' benchmarks/*.py)
SOURCES := src ops lowering patterns tests $(wildcard benchmarks) setup.py .ci

# pip's build environments follow the pins as well.
export PIP_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format typecheck build bench coverage clean

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' Makefile | awk -F ':.*## ' '{ printf "  make %-10s %s\n", $$1, $$2 }'
	@echo '  PYTHON=python3.11 picks the Python for .venv, ARGS="..." is passed to the command that a target runs.'

venv: $(READY)  ## make .venv and install the project with what its tests need

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c '' 2>/dev/null || { echo "make: no Python under the name '$(PYTHON)'; name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: Infuse needs Python 3.10 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another with PYTHON=..."; exit 1; }
	@[ -x $(PY) ] || { echo "==> making $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: '$(PYTHON) -m venv' failed (Debian and Ubuntu: install python3-venv)"; exit 1; }; }
	@echo "==> installing torch and what else the project needs into $(VENV); the download takes a few minutes, once"
	@$(PY) -m pip install --disable-pip-version-check -e '.[demo,test,dev]'
	@touch $@

demo: $(READY)  ## a Llama with and without Infuse: what was rewritten, that it is right, how fast it is
	$(PY) -m infuse demo $(ARGS)

test: $(READY)  ## all tests; those that need a GPU are skipped without one
	@echo "==> pytest in $(WORKERS) processes"
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

lint: $(READY)  ## ruff: rules and formatting
	$(PY) -m ruff check $(SOURCES) $(ARGS)
	$(PY) -m ruff format --check $(SOURCES)

format: $(READY)  ## let ruff mend what it can
	$(PY) -m ruff check --fix $(SOURCES)
	$(PY) -m ruff format $(SOURCES)

typecheck: $(READY)  ## mypy, strict
	$(PY) .ci/typecheck.py $(ARGS)

build: $(READY)  ## compile the CUDA kernels (needs nvcc, no GPU)
	$(PY) -m infuse build $(ARGS)

bench: $(READY)  ## run every benchmark; results go to benchmarks/results
	@set -e; for file in $(BENCHMARKS); do echo "==> $$file"; $(PY) $$file $(ARGS); done

coverage: $(READY)  ## what is recognised in the zoo of models; an hour on two cores; ARGS=--quick: minutes
	$(PY) benchmarks/coverage.py --processes $(WORKERS) $(ARGS)

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-output
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
