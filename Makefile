# Needs only python3 (3.11 or newer) and make; everything else is fetched into .venv and .cache.
.DEFAULT_GOAL := help
.PHONY: help demo test test-unit faults soak schemas docs deploy-files check screenshots compat lint format lock clean \
	bench bench-long bench-plots bench-profile bench-adopt
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PEERS := .cache/peers/.ready

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: $(READY) ## See the service at work on embedded servers and prove itself (about a minute); ARGS="--seconds 15"
	@$(BIN)/campaign-stats demo $(ARGS)

# Two workers, each with servers of its own.
test: $(READY) ## All tests, on real servers that they start themselves; ARGS="-k guard"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-unit: $(READY) ## Tests that need no server (seconds)
	@$(BIN)/python -m pytest tests/unit $(ARGS)

faults: $(READY) ## Every fault on a cluster of three brokers, a line each (needs Java 17 and Maven); SEED=123 ARGS="-k relay"
	@CAMPAIGN_STATS_REQUIRE_KAFKA=1 CAMPAIGN_STATS_FAULTS=all \
		$(if $(SEED),CAMPAIGN_STATS_FAULT_SEED=$(SEED)) $(BIN)/python -m pytest tests/faults \
		-m "not short" -p tests.faults.report $(ARGS)

soak: $(READY) ## Random faults under load, checked every round (needs Java 17 and Maven); MINUTES=60 SEED=123
	@$(if $(SEED),CAMPAIGN_STATS_FAULT_SEED=$(SEED)) $(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),10)

schemas: $(READY) ## Write the contracts' documents (JSON Schema, AsyncAPI, OpenAPI, README, page) from the models
	@$(BIN)/python -m schemas.tools

deploy-files: $(READY) ## Write what in deploy/ follows from the code: metrics, rules, dashboard
	@$(BIN)/python -m deploy.tools

check: $(READY) ## Everything in deploy/ held against its validators and the code; a line each
	@deploy/check $(ARGS)

screenshots: $(READY) ## Take deploy/screenshots of the status page of a loaded service (needs Chromium)
	@CAMPAIGN_STATS_SCREENSHOTS=deploy/screenshots $(BIN)/python -m pytest tests/service/test_watching.py -k status_page

docs: schemas ## The contracts as one page, schemas/index.html, and its screenshots (needs Chromium)
	@$(BIN)/python -m schemas.tools.screenshots "$$($(BIN)/python -m tests.witnesses)"

compat: $(READY) ## Whether the contracts still fit everything that was released
	@$(BIN)/python -m schemas.tools.compatibility

lint: $(READY) ## ruff, mypy, import layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY) ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(PEERS) ## Measure on real Kafka, beside others' ways (needs Java 17 and Maven); QUICK=1 ONLY=drain,relaying
	@$(if $(QUICK),QUICK=$(QUICK)) $(if $(ONLY),ONLY=$(ONLY)) $(BIN)/python -m tests.benchmarks $(ARGS)

bench-long: $(PEERS) ## Measure what needs millions or an hour: memory, growth, wear of tables; ONLY=growth
	@LONG=1 $(if $(ONLY),ONLY=$(ONLY)) $(BIN)/python -m tests.benchmarks $(ARGS)

bench-plots: $(PEERS) ## Draw what `make bench-long` found
	@.cache/peers/bin/python -m tests.benchmarks.plots build

bench-profile: $(PEERS) ## Say where the time goes (needs Java 17, Maven, a PostgreSQL with contrib); ARGS="--hints 200000"
	@$(BIN)/python -m tests.benchmarks.profile $(ARGS)

bench-adopt: $(READY) ## Measure what a product at work notices while it takes the service in; ARGS="--rounds 1"
	@$(BIN)/python -m tests.benchmarks.adopt $(ARGS)

lock: $(READY) ## Renew the lock files: everything, the peers, the image, the validators of deploy/
	@$(BIN)/pip install -q uv
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--extra embedded --extra dev --extra bench pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		tests/benchmarks/peers/requirements.in -o tests/benchmarks/peers/requirements.lock
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		-c requirements.lock pyproject.toml -o deploy/requirements.lock
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		-c requirements.lock deploy/build-backend.in -o deploy/build-backend.lock
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		deploy/tools/requirements.in -o deploy/tools/requirements.lock

clean: ## Remove everything that was fetched or built
	rm -rf .venv .cache build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "The venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
	@echo "Setting up .venv (once)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The peers of `make bench`, apart: one of them pins an older pydantic.
$(PEERS): $(READY) tests/benchmarks/peers/requirements.lock
	@echo "Setting up .cache/peers (once)"
	@$(PYTHON) -m venv --clear .cache/peers
	@.cache/peers/bin/python -m pip install -q --disable-pip-version-check --require-hashes \
		-r tests/benchmarks/peers/requirements.lock
	@touch $@
