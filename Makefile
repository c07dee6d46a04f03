# Every target can be run from a bare clone, and again.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Small tensors: one thread is faster than two that wait for each other, and sums do not depend on the machine.
quickstart test test-slow test-faults: export OMP_NUM_THREADS := 1

# Every test and every run starts processes: without compiled files each of them compiles PyTorch and vLLM again.
unexport PYTHONDONTWRITEBYTECODE

bin := .venv/bin
# Tests of one file stay together: they share what the file builds.
pytest := $(bin)/python -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow test-faults audit lint format docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

install: ## install into .venv, for a GPU if there is one, else for a CPU (tools/install.sh)
	@bash tools/install.sh

quickstart: install ## build the mazes, train GRPO and TEA on them with vLLM rollouts, compare best-of-N
	@$(bin)/tealightning quickstart

test: install ## the tests that take under ten seconds each
	$(pytest) -m "not slow and not fault"

test-slow: install ## the tests that train and start processes
	$(pytest) -m "slow and not fault"

test-faults: install ## the tests that kill, cut off and corrupt; what they injected goes to runs/faults/
	rm -f runs/faults/injected.jsonl runs/faults/junit.xml
	$(pytest) --no-loadscope-reorder -m fault --fault-report runs/faults/injected.jsonl \
	  --junitxml runs/faults/junit.xml -o junit_suite_name="$$(git describe --always --dirty)"

lint: install ## ruff, its formatter in check mode, and mypy
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

format: install ## let ruff fix and format
	$(bin)/ruff check --fix
	$(bin)/ruff format

docs: install ## build the documentation into site/
	$(bin)/python -m pip install -qq --disable-pip-version-check --no-warn-conflicts -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --config-file tools/mkdocs.yml

audit: ## compare the pinned dependencies with the known vulnerabilities (needs the network)
	@bash tools/audit.sh

clean: ## remove caches and build products (keeps .venv and runs/)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find tealightning tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
