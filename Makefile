# jobd for developers. `make` alone says what there is.

# The first Python that is new enough, where none is named.
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
PARALLEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv test check coverage faults planted format demo bench bench-peers vendor screenshots linearizability simulation world proof pins clean

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Another Python: make check PYTHON=python3.13 VENV=.venv-313"

venv: $(READY)  ## a virtual environment in .venv with jobd and its tools, in the pinned versions

# The pins carry hashes, so everything in them is checked; jobd itself has none and is installed by itself.
$(READY): pyproject.toml .ci/constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jobd needs Python 3.11 or newer; name yours: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes --requirement .ci/constraints.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

test: $(READY)  ## the tests, in as many processes as PARALLEL says (ARGS="-k name" for some of them, in one)
	$(BIN)/pytest $(or $(ARGS),--numprocesses $(PARALLEL))

check: $(READY)  ## all that CI runs: format, lint, types, tests on both event loops, coverage, the demo
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test ARGS="--loop both --numprocesses $(PARALLEL)"
	$(MAKE) coverage
	$(BIN)/jobd demo

# Only tests that go the same way each time: no branch may be reached by luck.
COVERING := tests/unit/model tests/unit/core tests/unit/engine tests/unit/webhooks tests/unit/maintenance/test_plans.py
coverage: $(READY)  ## every branch of the pure rooms and the actor is run by the tests that mirror them, or this fails
	$(BIN)/coverage run -m pytest --quiet --hypothesis-seed=0 $(COVERING)
	$(BIN)/coverage report

faults: $(READY)  ## real faults on the real daemon, as root: what is promised, and what came of it (ARGS="NAME --rounds N")
	$(BIN)/python -m tests.proof.faults $(or $(ARGS),--report)

SEEDS ?= 20000
simulation: $(READY)  ## the actor, rules and cleanup in virtual time under faults, by seed: SEEDS=20000, about an hour (ARGS: --seed K)
	$(BIN)/python -m tests.proof.simulation --seeds $(SEEDS) --jobs $(PARALLEL) $(ARGS)

world: $(READY)  ## every state that one job and three workers can get into, and what must hold in each
	$(BIN)/python -m tests.proof.small_world

linearizability: $(READY)  ## histories of contending clients under faults, each explained by some order (ARGS: --seed K)
	$(BIN)/python -m tests.proof.linearizability --histories 500 $(ARGS)

planted: $(READY)  ## planted bugs, each put into a copy: which tests find it, and how fast (ARGS: NAME ..., --promises)
	$(BIN)/python -m tests.proof.planted --jobs $(PARALLEL) $(ARGS)

proof: $(READY)  ## all of these, one after the other, as root: hours (ARGS="PART ... --write" for some, and into docs/RELIABILITY.md)
	$(BIN)/python -m tests.proof.run $(ARGS)

PEERS := build/peers
bench-peers: $(READY)  ## the same work by other queues, in the same run (installs them, as root; ARGS="PEER ... --runs N")
	command -v redis-server >/dev/null && command -v beanstalkd >/dev/null && command -v npm >/dev/null \
		&& ls -d /usr/lib/postgresql/*/bin >/dev/null \
		|| { apt-get -qq update && apt-get -qq install --yes --no-install-recommends postgresql redis-server beanstalkd nodejs npm; }
	$(PIP) install --target $(PEERS)/python --upgrade asyncpg==0.32.0 huey==3.5.4
	npm install --silent --no-save --no-package-lock --ignore-scripts --prefix $(PEERS) bullmq@5
	PYTHONPATH=$(PEERS)/python JOBD_PEERS_NODE=$(PEERS)/node_modules $(BIN)/python -m tests.benchmarks.peers $(ARGS)

vendor: $(READY)  ## bring the dashboard's libraries into jobd/dashboard/static, in the versions of tests/browser/vendor.py (needs npm)
	$(BIN)/python -m tests.browser.vendor

screenshots: $(READY)  ## pictures of the dashboard in build/screenshots (needs chromium; ARGS="overview jobs --scene busy", --readme)
	$(BIN)/python -m tests.browser.screenshots $(ARGS)

format: $(READY)  ## put the code into its usual form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)  ## a daemon, workers and a worker's death, in ten seconds
	$(BIN)/jobd demo

bench: $(READY)  ## how fast it is on this machine (ARGS as for jobd bench: SCENARIO ... --runs N --json)
	$(BIN)/jobd bench $(ARGS)

pins:  ## write .ci/constraints.txt anew from pyproject.toml (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
		--generate-hashes --no-emit-index-url --no-emit-package colorama --no-annotate --quiet \
		--custom-compile-command 'make pins' --output-file .ci/constraints.txt

clean:  ## remove what the other targets have made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
