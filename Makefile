# `make help` lists what there is. Paths are relative throughout: make cannot handle spaces in
# names, and the checkout may lie under any path.

PYTHON ?= python3
MODEL ?= demo/checkpoint
# The whole name, so that no two models share a repository.
NAME = $(if $(filter demo/checkpoint,$(MODEL)),demo,model-$(subst /,-,$(subst $() ,-,$(MODEL))))
# One that is named is served as it is; else MODEL's, exported when it is missing or outdated.
REPOSITORY ?= build/repositories/$(NAME)
EXPORT_OPTIONS ?=
HOST ?= 127.0.0.1
TRITON_HOST ?= 127.0.0.1
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
OPENAI_PORT ?= 8080
URL ?= grpc://localhost:$(GRPC_PORT)
WEB_PORT ?= 7860
INSTANCES ?= 2
SAGEMAKER_PORT ?= 8090
TESTS ?= tests
INPUTS ?= 1000000
PEERS ?= transformers vllm openvino
SESSIONS ?= 1 4 16
PASSES ?= 2
STEP ?= 1

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SILENT:

# Always the interpreter, never a script of .venv/bin: those break when the path has spaces.
python := .venv/bin/python
sources := python_backend export sagemaker cli demo benchmarks examples tests
demo_repository := build/repositories/demo/settings.json
# Whether REPOSITORY was named, by the command line or the environment.
named := $(filter-out file,$(origin REPOSITORY))
# A file's tests share what they start. In the order of their names: it begins with long ones.
two_processes := -n 2 --dist loadfile --no-loadscope-reorder
export_inputs := $(wildcard demo/checkpoint/* model_repository/*/config.pbtxt \
    model_repository/*/1/*.py export/llava_export/*.py export/llava_export/*/*.py \
    $(addprefix python_backend/llava_triton/,contract/settings.py checkpoint/*.py \
    checkpoint/families/*.py))

##@ The main job

demo: .venv/runtime compiler ## Show a picture to a real server and ask about it
	LLAVA_REPOSITORIES=build/repositories $(python) -m llava_cli demo

serve: .venv/runtime compiler repository ## Serve in the foreground (REPOSITORY= or MODEL=, HOST=, HTTP_PORT= ...)
	exec $(python) -m llava_cli serve '$(REPOSITORY)' --log build/serve.log \
	    --host '$(HOST)' --openai-port $(OPENAI_PORT) --triton-host '$(TRITON_HOST)' \
	    --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT)

chat: .venv/web ## A page to chat on, beside `make serve` (URL=, WEB_PORT=)
	exec $(python) -m llava_cli chat --web '$(URL)' --web-port $(WEB_PORT)

export: .venv/runtime ## Fill build/repositories/NAME from MODEL=, a directory or a hub name (EXPORT_OPTIONS=)
	$(call export_model,$(MODEL),build/repositories/$(NAME))

sagemaker-local: .venv/runtime compiler repository ## A local SageMaker endpoint (INSTANCES=2, SAGEMAKER_PORT=8090)
	exec $(python) -m llava_sagemaker.local --repository '$(REPOSITORY)' \
	    --instances $(INSTANCES) --port $(SAGEMAKER_PORT)

##@ Checking and measuring

test: .venv/development clients aiperf compiler libb64 curl chromium lint ## Everything: lint, types, tests (TESTS= picks some)
	$(python) -m pytest $(two_processes) $(TESTS)

check: .venv/development compiler lint ## Lint, types, and the parts by themselves (2 minutes)
	$(python) -m pytest -q $(two_processes) tests/unit

lint: .venv/development ## Style and types
	$(python) -m ruff check .
	$(python) -m ruff format --check --quiet .
	$(python) -m mypy $(wildcard $(sources))
	for model in model_repository/*/1/model.py; do $(python) -m mypy --no-error-summary "$$model"; done

bench: .venv/bench compiler ## Speed beside plain transformers and the hardware's limits (25 minutes)
	$(python) -m benchmarks.bench

# Those that cannot be installed are named in the table, with pip's words.
bench-peers: .venv/bench compiler ## Speed beside vLLM, OpenVINO and transformers (8 minutes a pass, and transformers; PEERS=, SESSIONS=, PASSES=)
	for peer in $(filter-out transformers,$(PEERS)); do $(MAKE) .venv-$$peer/installed || true; done
	$(python) -m benchmarks.peers --peers $(PEERS) --sessions $(SESSIONS) --passes $(PASSES)

screenshot: .venv/development compiler chromium ## The README's picture of the page, by its test
	LLAVA_SCREENSHOT=docs/images/chat.png $(python) -m pytest -q tests/server/test_web_page.py

accuracy: .venv/runtime compiler $(demo_repository) ## What bfloat16, int8 and int4 weights cost and gain (5 minutes)
	$(python) -m benchmarks.accuracy

bench-adapter: .venv/runtime compiler ## What the session adapter costs beside gRPC (7 minutes)
	$(python) -m benchmarks.adapter_cost

bench-bodies: .venv/runtime ## What streams notice of the worst bodies sent beside them (2 minutes)
	$(python) -m benchmarks.large_bodies

soak: .venv/runtime compiler $(demo_repository) ## Sessions through every door of a real server (20 minutes)
	$(python) -m benchmarks.soak

hostile: .venv/runtime compiler $(demo_repository) ## What strangers can do, with honest clients beside them (5 minutes)
	$(python) -m benchmarks.hostile

fuzz: .venv/fuzz compiler $(demo_repository) ## A million inputs for the parsers of what clients send, but videos (15 minutes; INPUTS=)
	$(python) -m tests.fuzz --inputs $(INPUTS)

chaos: .venv/runtime compiler ## Everything is killed and stopped, beside sessions that must not notice (20 minutes)
	$(python) -m benchmarks.chaos

gpu-wheels: .venv/runtime ## What a GPU machine without a network lacks, into build/gpu-wheels
	$(python) -m benchmarks.gpu_check.wheels --output build/gpu-wheels

gpu-check: ## What an NVIDIA GPU does, STEP=1, 2, 3 by PYTHON= itself, no .venv (10 minutes each; docs/gpu.md)
	'$(PYTHON)' -m benchmarks.gpu_check --step '$(STEP)' --wheels build/gpu-wheels \
	    --scratch build/gpu-check --output benchmarks/results

profile: .venv/runtime compiler libb64 $(demo_repository) ## Whole sessions under NVIDIA's perf_analyzer
	$(python) -m benchmarks.profile

##@ The demo checkpoint

train: .venv/runtime ## Train it again, from nothing (an hour on 2 cores)
	$(python) -m demo.train

evaluate: .venv/runtime ## Its answers to 1,500 questions about unseen pictures
	$(python) -m demo.evaluate

##@ House-keeping

clean: ## Remove what was built, except the virtual environment
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove the virtual environment too
	rm -rf .venv .venv-clients .venv-aiperf .venv-vllm .venv-openvino tests/clients/vercel/node_modules python_backend/*.egg-info *.egg-info

help: ## This list
	awk 'BEGIN {FS = ":.*## "} \
	    /^##@/ {printf "\n%s\n", substr($$0, 5)} \
	    /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: demo serve chat screenshot export sagemaker-local test check lint bench bench-peers bench-adapter bench-bodies accuracy gpu-wheels gpu-check soak hostile fuzz chaos profile train evaluate clean distclean help
.PHONY: repository clients aiperf compiler libb64 curl chromium force

# ---- model repositories ----

# $(call export_model,MODEL,REPOSITORY)
export_model = echo "exporting $(1) to $(2)"; $(python) -m llava_cli export '$(1)' --output '$(2)' $(EXPORT_OPTIONS)

$(demo_repository): $(export_inputs) | .venv/runtime
	$(call export_model,demo/checkpoint,$(@D))
	touch $@

# The repository that `serve` serves. (The export looks by itself whether there is anything to do.)
repository: $(if $(named),,$(if $(filter demo,$(NAME)),$(demo_repository))) | .venv/runtime
	$(if $(named)$(filter demo,$(NAME)),,$(call export_model,$(MODEL),$(REPOSITORY)))

# ---- what must be installed ----

# Stamps: made again when the pins, the project's needs or the place of the checkout change.
.venv/runtime: .venv/checkout pyproject.toml constraints.txt
	$(call pip_install,server$(comma)export$(comma)heic$(comma)video$(comma)sagemaker)
	touch $@

.venv/web: .venv/runtime
	$(call pip_install,server$(comma)export$(comma)heic$(comma)video$(comma)sagemaker$(comma)web)
	touch $@

.venv/bench: .venv/runtime
	$(call pip_install,server$(comma)export$(comma)heic$(comma)video$(comma)sagemaker$(comma)bench)
	touch $@

.venv/development: .venv/runtime
	$(call pip_install,server$(comma)export$(comma)heic$(comma)video$(comma)sagemaker$(comma)deploy$(comma)web$(comma)bench$(comma)dev$(comma)tensorrt)
	touch $@

.venv/fuzz: .venv/development
	$(call pip_install,server$(comma)export$(comma)heic$(comma)sagemaker$(comma)dev$(comma)fuzz)
	touch $@

# A virtual environment knows its own path and the checkout's: one that was moved is made anew.
unmoved := $(shell [ -x .venv/bin/python ] && [ "$$(cat .venv/checkout 2>/dev/null)" = "$$(pwd)" ] && echo yes)
.venv/checkout: $(if $(unmoved),,force)
	'$(PYTHON)' -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	    echo "error: '$(PYTHON)' must be a Python 3.11 or 3.12; name one with PYTHON=" >&2; exit 1; }
	'$(PYTHON)' -c 'import ensurepip' 2>/dev/null || { $(call debian,python3-venv); }
	echo "making .venv with $$('$(PYTHON)' --version)"
	'$(PYTHON)' -m venv --clear .venv
	pwd > $@

comma := ,

# $(call pip_install,EXTRAS): the project in place, with pinned dependencies; a dot a package.
define pip_install
echo "installing the project with [$(1)]: a minute or two"
{ $(python) -m pip install -q -c constraints.txt setuptools && \
    $(python) -m pip install --progress-bar off --no-build-isolation -c constraints.txt \
        -e '.[$(1)]' | while read -r word rest; do \
	    case "$$word" in Collecting) printf .;; Installing) printf ' unpacking ';; esac; \
        done; \
} 2> .venv/pip-messages || { echo; cat .venv/pip-messages >&2; exit 1; }
echo done
endef

# The libraries of other people's clients, for tests/clients; the one of Node where there is npm.
clients: .venv-clients/installed $(if $(shell command -v npm),tests/clients/vercel/node_modules)

.venv-clients/installed: tests/clients/requirements.txt tests/clients/constraints.txt | .venv/checkout
	echo "installing the clients' libraries into .venv-clients: a minute or two"
	'$(PYTHON)' -m venv --clear .venv-clients
	.venv-clients/bin/python -m pip install -q -r tests/clients/requirements.txt \
	    -c tests/clients/constraints.txt
	touch $@

# NVIDIA's load generator, whose pins are others, for tests/clients/test_aiperf.py.
aiperf: .venv-aiperf/installed

.venv-aiperf/installed: tests/clients/aiperf-requirements.txt tests/clients/aiperf-constraints.txt | .venv/checkout
	echo "installing AIPerf into .venv-aiperf: a minute or two"
	'$(PYTHON)' -m venv --clear .venv-aiperf
	.venv-aiperf/bin/python -m pip install -q -r tests/clients/aiperf-requirements.txt \
	    -c tests/clients/aiperf-constraints.txt
	touch $@

# Other engines, for `make bench-peers`. Their files list all that they need, because releases that
# fit together are not always those that they ask for: hence --no-deps.
.venv-vllm/installed .venv-openvino/installed: .venv-%/installed: benchmarks/peers/%-requirements.txt | .venv/checkout
	echo "installing $* into .venv-$*: some minutes"
	'$(PYTHON)' -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install -q --no-deps -r $< 2> .venv-$*/pip-messages || { \
	    cat .venv-$*/pip-messages >&2; exit 1; }
	touch $@

tests/clients/vercel/node_modules: tests/clients/vercel/package-lock.json
	if npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --silent; then touch $@; \
	    else echo "warning: npm has failed; the test of the Vercel AI SDK is skipped" >&2; fi

compiler: # for the language model's kernels on the CPU; compiled when they are first used
	command -v c++ >/dev/null || { $(call debian,g++); }

libb64: # a library that perf_analyzer needs
	/sbin/ldconfig -p | grep libb64.so.0d >/dev/null || { $(call debian,libb64-0d); }

curl: # for the example that uses nothing else
	command -v curl >/dev/null || { $(call debian,curl); }

chromium: # for the test of the page
	command -v chromium >/dev/null || { $(call debian,chromium); }

# $(call debian,PACKAGE)
sudo := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
debian = echo "installing the Debian package $(1)"; \
    { $(sudo) apt-get update -qq && $(sudo) env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends $(1) >/dev/null; } || { \
    echo "error: the Debian package $(1) is needed, and installing it needs root: ask for apt-get install $(1)" >&2; exit 1; }
