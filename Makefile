# All commands of this project; `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Variables are set only on the command line of make, because the environment may use the same names.
PYTHON := python3.11
DEMO := configs/experiment/demo.yaml
CONFIG := $(DEMO)
DATA :=
ARGS :=

# make train on several processes; make train and render-shards on a cluster. See `lrm launch --help`.
NODES :=
GPUS :=
PROCESSES :=
STRATEGY :=
NAME :=
PARTITION :=
ACCOUNT :=
TIME :=
CONTAINER :=
MASTER :=
DRY_RUN :=

# make infer
IMAGE :=
CKPT :=

# make evaluate
PROTOCOL :=

# make render-shards
ASSETS := data_tools/demo_assets
OUT := data/demo
VIEWS := 16
RES := 128
SAMPLES := 16
JOBS :=
BENCH :=

APT_VENV := python3.11-venv
APT_BLENDER := libx11-6 libxrender1 libxfixes3 libxi6 libxt6 libxkbcommon0 libsm6 libgl1

# $(call apt,PACKAGES): install system packages as root; otherwise print the command and fail.
define apt
if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq --no-install-recommends $(1); \
else echo "System packages are missing. Run: sudo apt-get install $(1); then run make again" >&2; exit 1; fi
endef

# $(call quoted,VALUE): VALUE as one word of the shell.
quoted = '$(subst ','\'',$(1))'
# $(call each,PREFIX,VALUES): one word if VALUES is the path of a file; otherwise, one word per value between spaces.
each = $(if $(shell test -e $(call quoted,$(2)) && echo 1),$(1)$(call quoted,$(2)),$(foreach name,$(2),$(1)$(call quoted,$(name))))
# $(call option,--name,VALUE): --name='VALUE', or nothing without a value.
option = $(if $(2),$(1)=$(call quoted,$(2)))
JOB = $(call option,--nodes,$(NODES)) $(call option,--gpus,$(GPUS)) $(call option,--processes,$(PROCESSES)) \
  $(call option,--partition,$(PARTITION)) $(call option,--account,$(ACCOUNT)) $(call option,--container,$(CONTAINER))
LAUNCH = $(JOB) $(call option,--strategy,$(STRATEGY)) $(call option,--name,$(NAME)) $(call option,--time,$(TIME)) \
  $(call option,--master,$(MASTER)) $(if $(DRY),--dry-run)
DRY = $(filter-out 0,$(DRY_RUN))
RENDER_JOB = $(call option,--nodes,$(NODES)) $(call option,--gpus,$(GPUS)) $(call option,--partition,$(PARTITION)) \
  $(call option,--account,$(ACCOUNT)) $(call option,--time,$(TIME)) $(if $(DRY),--dry-run)
RENDER = $(call option,--assets,$(ASSETS)) $(call option,--out,$(OUT)) $(call option,--views,$(VIEWS)) \
  $(call option,--res,$(RES)) $(call option,--samples,$(SAMPLES)) $(call option,--jobs,$(JOBS)) $(ARGS)
LAYERS = $(call each,-c=,$(CONFIG))
# The shards of the demo are rendered if DATA is their folder, or if neither DATA nor CONFIG is set.
DEMO_SHARDS = $(if $(DRY),,$(if $(filter data/demo,$(or $(DATA),$(if $(filter $(DEMO),$(CONFIG)),data/demo))),\
  data/demo/manifest.json))

# Reject variables that are not listed after the ## of a target. Otherwise, make train NODE=8 would train on one node.
GIVEN := $(if $(filter-out 0,$(MAKELEVEL)),,$(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name))))
ifneq ($(GIVEN),)
TAKEN := $(foreach goal,$(MAKECMDGOALS),$(shell grep -E '^$(goal):' $(firstword $(MAKEFILE_LIST)) | grep -oE '\<[A-Z_]+=' | tr -d =))
UNKNOWN := $(filter-out PYTHON SHELL MAKE% $(TAKEN),$(GIVEN))
EMPTY := $(filter-out ARGS SHELL MAKE%,$(foreach name,$(GIVEN),$(if $($(name)),,$(name))))
$(if $(EMPTY),$(error make $(MAKECMDGOALS): $(EMPTY:%=%=) has no value. Check that its shell variables are set))
$(if $(UNKNOWN),$(error make $(MAKECMDGOALS): expected $(if $(TAKEN),variables among $(TAKEN),no variables), but found $(UNKNOWN). See `make help`))
endif

.PHONY: help train infer evaluate demo serve doctor render-shards tensorboard test test-fast test-gpu soak bench lint clean

help: ## List the commands
	@echo "To train the demo model and watch it:  make train && make tensorboard"; echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 18

train: .venv/ready $(DEMO_SHARDS) ## Train: CONFIG= DATA= ARGS="--trainer.max_steps 50"; on several processes: NODES= GPUS= PROCESSES= STRATEGY= NAME= PARTITION= ACCOUNT= TIME= CONTAINER= MASTER= DRY_RUN=
ifeq ($(strip $(LAUNCH)),)
	.venv/bin/lrm fit $(LAYERS) $(call option,--data.folder,$(DATA)) $(ARGS)
else
	@.venv/bin/lrm launch $(LAUNCH) $(LAYERS) $(call option,--data,$(DATA)) -- $(ARGS)
endif

infer: .venv/ready ## Reconstruct photos as 3D files: IMAGE=photo.png IMAGE="a.png in/*.png" CKPT= ARGS="--texture"
	@test -n $(call quoted,$(IMAGE)) || { echo "IMAGE is not set. Run: make infer IMAGE=photo.png" >&2; exit 2; }
	.venv/bin/lrm infer $(call each,,$(IMAGE)) $(call option,--ckpt,$(CKPT)) $(ARGS)

evaluate: .venv/ready ## Evaluate a trained model: CKPT= DATA= PROTOCOL=lrm PROCESSES= ARGS="--baseline"
	.venv/bin/lrm evaluate $(call option,--ckpt,$(CKPT)) $(call option,--data,$(DATA)) $(call option,--protocol,$(PROTOCOL)) \
	  $(call option,--processes,$(PROCESSES)) $(ARGS)

demo: .venv/ready ## Serve a web page that reconstructs photos: CKPT= ARGS="--port 7860"
	.venv/bin/lrm demo $(call option,--ckpt,$(CKPT)) $(ARGS)

serve: .venv/ready ## Serve reconstructions over HTTP: CKPT= ARGS="--port 8000"
	.venv/bin/lrm serve $(call option,--ckpt,$(CKPT)) $(ARGS)

doctor: .venv/ready ## Check the requirements of a run on every node: CONFIG= DATA= ARGS= NODES= GPUS= PROCESSES= STRATEGY= PARTITION= ACCOUNT= CONTAINER=
	.venv/bin/lrm doctor $(JOB) $(LAYERS) $(call option,-c,$(STRATEGY:%=configs/trainer/%.yaml)) \
	  $(call option,--data.folder,$(DATA)) $(ARGS)

render-shards: .venv-render/ready ## Render meshes to shards: ASSETS= OUT= VIEWS= RES= SAMPLES= JOBS= ARGS=; on a cluster: NODES= GPUS= PARTITION= ACCOUNT= TIME= DRY_RUN=
ifeq ($(strip $(RENDER_JOB)),)
	.venv-render/bin/python -m data_tools render $(RENDER)
else
	@.venv-render/bin/python -m data_tools launch $(RENDER_JOB) -- $(RENDER)
endif

data/demo/manifest.json:
	$(MAKE) .venv-render
	.venv-render/bin/python -m data_tools render --out data/demo

tensorboard: .venv/ready ## Show the runs in TensorBoard: ARGS="--port 6007"
	.venv/bin/tensorboard --logdir runs $(ARGS)

test: .venv/ready .venv-render/ready .tools/ready ## Run all tests that do not require a GPU: ARGS="-k cameras"
	.venv/bin/python -m pytest -m "not gpu and not soak" $(ARGS)

test-fast: .venv/ready .tools/ready ## Run the fast tests, without Blender: ARGS=
	.venv/bin/python -m pytest -m "not gpu and not soak and not slow and not blender" $(ARGS)

test-gpu: .venv/ready ## Run the tests that require a GPU: ARGS=
	@.venv/bin/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu: PyTorch found no GPU. Run `make test` to run the tests that do not require a GPU")'
	.venv/bin/python -m pytest -m gpu $(ARGS)

soak: .venv/ready .venv-render/ready .tools/ready ## Run the long tests: ARGS=
	.venv/bin/python -m pytest -m soak -s $(ARGS)

bench: .venv/ready .venv-render/ready ## Measure the speed of this machine: BENCH="scaling overhead stall" ARGS="--rounds 3"
	.venv/bin/python -m tests.bench $(BENCH) $(ARGS)

lint: .venv/ready ## Check style, types and import layers
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

clean: ## Remove the environments and caches (not data/, not runs/)
	rm -rf .venv .venv-render .tools .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# Programs for tests: the Khronos glTF validator (npm) and a browser.
.tools/ready: tests/web/package.json
	@command -v npm >/dev/null || { $(call apt,nodejs npm); }
	@command -v chromium >/dev/null || { $(call apt,chromium); }
	@mkdir -p .tools && cp $< .tools/
	cd .tools && npm install --silent --no-audit --no-fund --no-package-lock
	@touch $@

.tools: .tools/ready
.venv: .venv/ready
.venv-render: .venv-render/ready

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt,$(APT_VENV)); }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --progress-bar on -e '.[dev]'
	@touch $@

.venv-render/ready: data_tools/requirements.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call apt,$(APT_VENV)); }
	$(PYTHON) -m venv .venv-render
	.venv-render/bin/python -m pip install --quiet --progress-bar on -r data_tools/requirements.txt
	@.venv-render/bin/python -c 'import bpy' >/dev/null 2>&1 || { $(call apt,$(APT_BLENDER)); }
	@.venv-render/bin/python -c 'import bpy'
	@touch $@
