# make rehearse   the whole run, small, on this machine
# make test       the whole test suite; make test-fast leaves out what trains or tokenises
# make lint       ruff, and mypy (strict)
# PYTHON=python3.12 make … picks an interpreter; PIP_ARGS adds to pip's arguments (an index with CPU builds of torch, say).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: rehearse test test-fast lint clean
rehearse: $(READY)
	$(BIN)/smol rehearse

test: $(READY)
	$(BIN)/python -m pytest

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)
	$(BIN)/ruff check recipes eval tests
	$(BIN)/ruff format --check recipes eval tests
	$(BIN)/mypy

# The marker is made last: a set-up that was interrupted starts again.
$(READY): setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv
