# Every chore of the project, one line each; `make` alone lists them. The work is in tools/ and in pyproject.toml.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# Processes that share the tests. Most of a test's time is containerd's and runc's, so two cores carry more than two.
JOBS := 3
PARALLEL := --numprocesses $(JOBS) --dist worksteal
CODE := $(wildcard src tests tools examples benchmarks)

# A root shell opened with plain `su` has no sbin in its PATH, and runc lives there.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.PHONY: help
help: ## list the chores
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

.PHONY: setup
setup: ## make .venv and install containerd, runc, crun and busybox-static where root may and they are missing
	@tools/setup.sh venv
	@tools/setup.sh servers

.PHONY: venv
venv: ## make .venv alone
	@tools/setup.sh venv

.PHONY: demo
demo: setup ## run a container and show what happens: a real one, or where none can run, one of FakeContainerd's
	@$(PYTHON) examples/demo.py

.PHONY: test
test: setup ## run all tests, under 5 minutes on two cores, and say on which servers they ran
	@$(PYTEST) $(PARALLEL) $(if $(filter check,$(MAKECMDGOALS)),--cov --cov-report=)

.PHONY: stress
stress: setup ## run the tests that have counts once more with the full counts
	@LIBCONTAINERD_STRESS=1 $(PYTEST) -m stress

SECONDS := 60
.PHONY: fuzz
fuzz: setup ## feed what reads from outside with hostile bytes for SECONDS=60, by atheris where it installs
	@tools/setup.sh fuzz
	@$(PYTHON) tools/fuzz.py $(SECONDS)

.PHONY: matrix
matrix: setup ## run contract and integration tests on containerd 1.6, 1.7 and 2.x of Debian, and print the table
	@$(PYTHON) -m tools.matrix bookworm trixie sid

.PHONY: matrix-newest
matrix-newest: setup ## the same on the newest alone
	@$(PYTHON) -m tools.matrix sid

.PHONY: chaos
chaos: setup ## kill containerd, shims, client and connection in the middle of things; ROUNDS=100, SEED=n to replay
	@LIBCONTAINERD_CHAOS_ROUNDS=$(or $(ROUNDS),100) LIBCONTAINERD_CHAOS_SEED=$(SEED) $(PYTEST) -q -p no:cacheprovider tests/chaos

.PHONY: soak
soak: setup ## create, start, exec, exit, delete for SECONDS=600, and say what the client holds per 1,000 execs
	@$(PYTHON) -m benchmarks.soak $(if $(filter command%,$(origin SECONDS)),$(SECONDS),600)

LATE := events:0.3,queue:0.2 answers:0.1,requests:0.05 output:0.1,threads:0.1
.PHONY: late
late: setup ## run contract and integration tests with events, answers, output and threads that come late for certain
	@failed=0; for late in $(LATE); do LIBCONTAINERD_TEST_LATE=$$late $(PYTEST) -q $(PARALLEL) --timeout 240 \
		tests/contract tests/integration || failed=1; done; exit $$failed

.PHONY: oldest
oldest: ## run the unit tests on the oldest supported grpcio, protobuf and pydantic
	@tools/setup.sh oldest
	@if [ -x .venv-oldest/bin/python ]; then .venv-oldest/bin/python -m pytest $(PARALLEL) tests/unit; fi

.PHONY: bench
bench: setup ## compare with containerd's Go client, raw stubs and ctr, in about 12 minutes; ROUNDS=n, DOCS=1 renews docs/
	@$(PYTHON) -m benchmarks

.PHONY: bench-quick
bench-quick: venv ## count calls, threads, descriptors and copies, and fail where they are not what they should be
	@$(PYTHON) -m benchmarks.counts

.PHONY: check
check: format-check lint types protos-check layers changelog docs demo test coverage ## all that CI checks, except stress and oldest

.PHONY: format
format: venv ## rewrite the code in the project's format
	@$(PYTHON) -m ruff check --quiet --fix-only $(CODE)
	@$(PYTHON) -m ruff format $(CODE)

.PHONY: format-check
format-check: venv ## check the format
	@$(PYTHON) -m ruff format --check $(CODE)

.PHONY: lint
lint: venv ## check the code with ruff
	@$(PYTHON) -m ruff check $(CODE)

.PHONY: types
types: venv ## check the types with mypy --strict
	@$(PYTHON) -m mypy $(CODE)

.PHONY: protos
protos: venv ## generate src/libcontainerd/_wire/pb from protos/
	@$(PYTHON) tools/gen_protos.py

.PHONY: protos-check
protos-check: venv ## check that the generated code is what protos/ gives
	@$(PYTHON) tools/gen_protos.py --check

.PHONY: layers
layers: venv ## check that imports run down only
	@$(PYTEST) -q tests/unit/test_layers.py

.PHONY: changelog
changelog: venv ## check that the change has a well-formed fragment in changelog.d/
	@$(PYTHON) tools/changelog.py check

.PHONY: docs
docs: venv ## check the documents: links, Python code, the examples in docstrings
	@$(PYTHON) tools/check_docs.py

.PHONY: coverage
coverage: venv ## report the branch coverage of the last `make check`, and fail under 95 %
	@$(PYTHON) -m coverage report --fail-under=95

.PHONY: clean
clean: ## remove the virtual environments and what the tools left
	rm -rf .venv .venv-oldest .venv-protos build dist htmlcov .coverage .coverage.* .hypothesis .fuzz .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
