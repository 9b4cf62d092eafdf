# make help: what there is. Needs Python 3.11 to 3.13 with venv, and a C compiler.

PYTHON ?= python3
BIN := .venv/bin
# vLLM starts five times slower without bytecode.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test unit lint format verify lock apiserver cluster-up cluster-down e2e e2e-gpu soak bench clean images

help: ## print this
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv from the locks; does nothing if it is there (PYTHON=python3.12 names another Python)
	@$(PYTHON) scripts/setup_env.py

demo: setup ## a fleet on this machine: a trainer, inference processes, the operator, a real API server (ARGS=...)
	@$(BIN)/python -m weightsync_demo $(ARGS)

test: setup ## all tests that need no GPU (ARGS="-k name")
	@$(BIN)/python -m pytest $(ARGS)

unit: setup ## unit tests only
	@$(BIN)/python -m pytest tests/unit $(ARGS)

lint: setup ## format, lint, types, import contracts
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

format: setup ## rewrite the sources in the one format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

verify: lint unit ## what a change has to pass before it is looked at

lock: setup ## resolve requirements/*.in anew (ARGS="--upgrade-package kopf")
	@$(BIN)/python scripts/lock.py $(ARGS)

apiserver: setup ## build the API server that the demo and the tests use, once
	@$(BIN)/python -m weightsync_demo.kube $(ARGS)

cluster-up: setup ## a Kubernetes cluster of two real nodes on this machine (Linux, root)
	@PYTHONPATH=tests/cluster $(BIN)/python -m weightsync_cluster up $(ARGS)

cluster-down: setup ## remove that cluster, whatever state it is in
	@PYTHONPATH=tests/cluster $(BIN)/python -m weightsync_cluster down $(ARGS)

# CI=true: what is missing is built, and fails the run where it can't be.
e2e: setup ## all end-to-end tests, on a cluster of their own (ARGS="--kubeconfig F --context C" names another)
	@CI=true $(BIN)/python -m pytest tests/e2e --ignore=tests/e2e/test_demo.py -m 'not gpu' $(ARGS)

e2e-gpu: setup ## the end-to-end scenarios on GPUs, in a kind cluster (examples/on-gpus); says why where they can't run
	@$(BIN)/python -m pytest tests/e2e/scenarios -m gpu -rs $(ARGS)

soak: setup ## 100,000 random lives of a fleet in virtual time, on all cores (ARGS="--seeds 2000 --write")
	@$(BIN)/python tests/simulation/soak.py $(ARGS)

bench: setup ## one benchmark (NAME=host_path, orchestration or publish; ARGS="--write")
	@$(BIN)/python benchmarks/$(or $(NAME),host_path).py $(ARGS)

images: ## build the images with docker, podman or buildah (ARGS="agent --build-arg TORCH=cpu")
	@$(PYTHON) scripts/images.py $(ARGS)

clean: ## remove .venv and what tools leave behind
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
