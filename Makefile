# Development of jobd. `make` lists the targets.

# The first Python on the PATH that is new enough, unless PYTHON is set.
PYTHON ?= $(shell for each in python3 python3.13 python3.12 python3.11; do \
	$$each -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$each && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
PARALLEL ?= 2
# Many tests wait for the disk, a server or another process, so one process more runs them.
PROCESSES ?= $(shell expr $(PARALLEL) + 1)
SLOW_PROCESSES ?= $(shell expr $(PARALLEL) + 3)

# Tests start hundreds of processes. Without stored bytecode each of them compiles all of jobd.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help venv test check stock lint coverage faults planted mutation format demo cluster-tests cluster-demo bench bench-cpu bench-peers vendor screenshots linearizability simulation cluster-simulation world proof pins clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Another Python: make check PYTHON=python3.13 VENV=.venv-313"

venv: $(READY)  ## create a virtual environment in .venv with jobd and its tools, in pinned versions

# Everything in the constraints is checked by its hash. jobd itself has none, so it is installed separately.
# Modules are compiled when they are first imported, because pip would also compile the many that are never imported.
$(READY): pyproject.toml .ci/constraints.txt $(wildcard .ci/client/*)
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "jobd needs Python 3.11 or newer. Set its path: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot create virtual environments. On Debian: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile --require-hashes --requirement .ci/constraints.txt
	$(PIP) install --no-deps --no-build-isolation --editable .ci/client --editable .
	@touch $@

test: $(READY)  ## run the fast tests, in under three minutes (ARGS="-k name": a selection of all tests, in one process)
	$(BIN)/pytest $(or $(ARGS),$(FAST) --numprocesses $(PROCESSES); code=$$?; echo $(REST); exit $$code)
FAST := -m "not slow" --ignore tests/browser --ignore tests/proof
REST := "These were the fast tests. make check also runs the slow ones, make cluster-tests those of clusters, make proof the long proofs."

check: $(READY)  ## run what CI runs: format, lint, types, coverage, the demo, all tests, instructions
	$(MAKE) --jobs $(PARALLEL) --output-sync=target test lint coverage demo stock STOCK=client
	$(MAKE) bench-cpu ARGS=--check
	$(BIN)/pytest -m "slow and not long" --numprocesses $(SLOW_PROCESSES) --dist worksteal --durations 20

# Daemon and tests use uvloop. Programs that use the clients may run them on the event loop of asyncio.
STOCK := api client engine http maintenance webhooks
stock: $(READY)  ## run the asynchronous tests of some packages on the event loop of asyncio
	$(BIN)/pytest --quiet --loop stock -m asyncio $(addprefix tests/unit/,$(STOCK))

lint: $(READY)  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Deterministic tests only, so that no branch is covered by chance.
COVERING := $(addprefix tests/unit/,model core engine journal cluster maintenance/test_plan_runner.py \
	$(addprefix webhooks/test_,delivery_queue.py message.py retry.py url_policy.py))
coverage: $(READY)  ## check that the tests cover every branch of the core, the engine, the cluster and the pure parts of webhooks
	$(BIN)/coverage run -m pytest --quiet -m "not slow" --hypothesis-seed=0 $(COVERING)
	$(BIN)/coverage report

faults: $(READY)  ## inject faults into a real daemon and report which promises held, as root (ARGS="NAME --rounds N")
	$(BIN)/python -m tests.proof.faults $(or $(ARGS),--report)

SEEDS ?= 20000
simulation: $(READY)  ## simulate the actor, rules and cleanup under faults: SEEDS=20000, about an hour (ARGS: --seed K)
	$(BIN)/python -m tests.proof.simulation --seeds $(SEEDS) --jobs $(PARALLEL) $(ARGS)

NODE_SEEDS ?= 5000
cluster-simulation: $(READY)  ## simulate several nodes on one journal: NODE_SEEDS=5000, about an hour (ARGS: --seed K)
	$(BIN)/python -m tests.proof.simulation --cluster --seeds $(NODE_SEEDS) --steps 300 --jobs $(PARALLEL) $(ARGS)

world: $(READY)  ## check every state that one job and three workers can reach
	$(BIN)/python -m tests.proof.small_world

linearizability: $(READY)  ## check histories of concurrent clients under faults for linearizability (ARGS: --seed K)
	$(BIN)/python -m tests.proof.linearizability --histories 500 $(ARGS)

planted: $(READY)  ## plant known bugs, one at a time, and report which tests find them (ARGS: NAME ...)
	$(BIN)/python -m tests.proof.planted --jobs $(PARALLEL) $(ARGS)

MUTATION := $(CURDIR)/build/mutation
mutation: $(READY)  ## mutate core, engine, storage and cluster, list mutants that no unit test detects in build/survivors.txt: hours (ARGS="'jobd.core.views*'")
	$(PIP) install --target $(MUTATION) --upgrade --no-deps mutmut==3.8.1 libcst==1.9.0 setproctitle==1.3.8
	PYTHONPATH=$(MUTATION) $(BIN)/python -m mutmut run --max-children $(PARALLEL) $(ARGS)
	PYTHONPATH=$(MUTATION) $(BIN)/python -m mutmut results | grep -v ': not checked$$' > build/survivors.txt || true
	@echo "$$(wc -l < build/survivors.txt) survivors in build/survivors.txt; PYTHONPATH=$(MUTATION) $(BIN)/python -m mutmut show NAME"

proof: $(READY)  ## run all of these, as root: hours (ARGS="PART ... --write": a selection, written into docs/reliability.md)
	$(BIN)/python -m tests.proof.run $(ARGS)

PEERS := build/peers
bench-peers: $(READY)  ## compare with other queues in one run (installs them, as root; ARGS="PEER ... --runs N")
	command -v redis-server >/dev/null && command -v beanstalkd >/dev/null && command -v npm >/dev/null \
		&& ls -d /usr/lib/postgresql/*/bin >/dev/null \
		|| { apt-get -qq update && apt-get -qq install --yes --no-install-recommends postgresql redis-server beanstalkd nodejs npm; }
	$(PIP) install --target $(PEERS)/python --upgrade asyncpg==0.32.0 huey==3.5.4
	npm install --silent --no-save --no-package-lock --ignore-scripts --prefix $(PEERS) bullmq@5
	PYTHONPATH=$(PEERS)/python JOBD_PEERS_NODE=$(PEERS)/node_modules $(BIN)/python -m tests.benchmarks.peers $(ARGS)

vendor: $(READY)  ## download the dashboard's libraries in the versions of tests/browser/vendor.py (needs npm)
	$(BIN)/python -m tests.browser.vendor

screenshots: $(READY)  ## take screenshots of the dashboard (needs chromium or chromium-headless-shell; ARGS="overview jobs --scene busy", --readme)
	$(BIN)/python -m tests.browser.screenshots $(ARGS)

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)  ## kill a worker in the middle of a job and show the recovery, in ten seconds (ARGS=--ui: the dashboard)
	$(BIN)/jobd demo $(ARGS)

cluster-tests: $(READY)  ## run the long tests of clusters on PostgreSQL, which make check leaves out
	$(BIN)/pytest -m long --numprocesses $(PROCESSES) --dist worksteal

cluster-demo: $(READY)  ## start PostgreSQL and three nodes, kill the leader while workers draw, and check every result
	$(BIN)/python -m tests.proof.cluster_demo $(ARGS)

bench: $(READY)  ## measure throughput, latency, memory and startup (ARGS="SCENARIO ... --runs N --json")
	$(BIN)/python -m tests.benchmarks $(ARGS)

bench-cpu: $(READY)  ## count the instructions of a lifecycle by stage, and measure its time (needs valgrind; ARGS=--http, --check, --record)
	$(BIN)/python -m tests.benchmarks.cpu $(ARGS)

PIN := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --quiet \
	--custom-compile-command 'make pins'
pins:  ## regenerate .ci/constraints.txt and systemd/requirements.txt from pyproject.toml (needs uv)
	$(PIN) pyproject.toml --extra dev --upgrade --no-emit-package colorama --no-emit-package jobd-client \
		--output-file .ci/constraints.txt
	sed -n 's/^\([a-z].*==.*\) \\$$/\1/p' .ci/constraints.txt > build/pins.txt
	echo 'hatchling>=1.27' | $(PIN) pyproject.toml - --extra s3 --extra postgres --constraint build/pins.txt \
		--no-emit-package jobd-client --output-file systemd/requirements.txt

clean:  ## remove everything that the other targets created
	rm -rf $(VENV) build mutants dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
