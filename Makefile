# make rehearse   the whole run, small, on this machine
# make test       the whole test suite, with the virtual Slurm cluster where there can be one
# make test-fast  leaves out what trains or tokenises
# make lint       ruff, and mypy (strict)
# PYTHON=python3.12 make … picks an interpreter; PIP_ARGS adds to pip's arguments (an index with CPU builds of torch, say).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

SLURM := slurmctld slurmd slurm-client munge

.PHONY: rehearse test test-fast slurm lint clean
rehearse: $(READY)
	$(BIN)/smol rehearse

# Two at a time: those of the cluster wait for a good part of theirs.
FIRST := tests/cluster tests/eval tests/test_rehearse.py
test: $(READY) slurm
	$(BIN)/python -m pytest -rs $(FIRST) & first=$$!; \
	$(BIN)/python -m pytest $(FIRST:%=--ignore=%); code=$$?; wait $$first && exit $$code

test-fast: $(READY)
	$(BIN)/python -m pytest -m "not slow"

# RUNLEVEL=1 keeps Debian from starting the daemons: the tests start their own.
slurm:
	@test -x /usr/sbin/slurmctld -a -x /usr/sbin/slurmd -a -x /usr/sbin/munged || { \
	  echo "installing $(SLURM)" && export RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive && test "$$(id -u)" = 0 && \
	  apt-get -qq update && apt-get -qq install -y --no-install-recommends $(SLURM) > /dev/null; } || \
	  echo "not installed: that takes root and Debian. The tests of tests/cluster will be skipped."

lint: $(READY)
	$(BIN)/ruff check recipes eval tests .github
	$(BIN)/ruff format --check recipes eval tests .github
	$(BIN)/mypy

# The marker is made last: a set-up that was interrupted starts again.
$(READY): setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info < (3, 14) or sys.exit("Python 3.10 to 3.13 is needed, found " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt $(PIP_ARGS) -e ".[dev]"
	touch $(READY)

clean:
	rm -rf .venv
