# Each target sets up what it needs: a virtual environment in .venv with the extras of pyproject.toml.
# QEXP_DATA names the folder with mnist/ and physionet2012/; see experiments/README.md. ARGS reach the script.
PYTHON ?= python3
BIN := .venv/bin
export QEXP_DATA ?= $(if $(wildcard ../shared/data),$(abspath ../shared/data),$(HOME)/.cache/qexp_jax/data)
GRID := $(BIN)/python -m experiments.benchmark.grid
REPORT := $(BIN)/python -m experiments.benchmark.report
OUT := experiments/out
ONE_TASK := --sizes 1000 --epsilons 0.5 1 8 --seeds 3
LARGEST_CNN := --models cnn --sizes 10000 --search-from 4000
# Two processes; fails if either does.
BOTH_PARTS = $(GRID) --part 0/2 $(1) & other=$$!; $(GRID) --part 1/2 $(1); ended=$$?; wait $$other && exit $$ended
FEW_BASELINES := --methods qexp zero_shot non_private dp_gd dp_sgd_all dp_adam_last objective_perturbation
MIMIC_TASKS ?= mimic_mortality_by_care_unit mimic_long_stay_by_care_unit
SMALL_TASKS ?= $(foreach kind,moved flipped inverted,physionet_$(kind)) \
  $(foreach kind,noisy turned transposed,digits_$(kind)) $(foreach kind,changed inverted,table_$(kind)) \
  table_rare physionet_rare
ON_SMALL_TASKS = --tasks $(SMALL_TASKS) --models linear mlp --sizes 500 2000 --epsilons 1 8 \
  --methods zero_shot qexp dp_gd dp_sgd_all non_private

.PHONY: help demo compare compare-full mnist mimic mimic-published shift small loss units ablation predicted membership benchmarks cluster large report test lint docs clean

help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[experiments,test,lint]'
	touch $@

##@ Start
demo: .venv/ready ## one private release and what it gains; packaged MNIST (a minute)
	$(BIN)/python -m experiments.demo $(ARGS)

##@ Comparison
# A representative part of the benchmark: at most a quarter of an hour on two cores.
compare: .venv/ready ## a part of the benchmark (10 minutes)
	$(GRID) --tasks physionet_icu mnist_trained --models linear mlp --sizes 1000 --epsilons 1 8 --seeds 3 \
	  $(FEW_BASELINES) --out $(OUT)/compare $(ARGS)
	$(REPORT) --results $(OUT)/compare

# The whole grid, by two processes, overnight; started again, it goes on where it stopped. The CNN at 10,000 records
# comes last: its searches start where those at 4000 ended.
compare-full: .venv/ready ## the whole benchmark, resumable (days)
	$(call BOTH_PARTS,$(ARGS))
	$(call BOTH_PARTS,$(LARGEST_CNN) $(ARGS))
	$(REPORT)

mnist: .venv/ready ## MNIST by writers, three models, n = 1000 (an hour)
	$(GRID) --tasks mnist_trained $(ONE_TASK) $(FEW_BASELINES) --out $(OUT)/mnist $(ARGS)
	$(REPORT) --results $(OUT)/mnist

# DATA=<directory of MIMIC-III or MIMIC-IV> for users with credentials; MIMIC_TASKS="mimic_mortality_by_era ...".
mimic: .venv/ready ## MIMIC-III or IV, DATA=dir; else PhysioNet 2012 (10 minutes)
ifdef DATA
	$(BIN)/python -m experiments.data.mimic_report --data-dir $(DATA) --out $(OUT)/mimic
	$(GRID) --tasks $(MIMIC_TASKS) --data-dir $(DATA) $(ONE_TASK) $(FEW_BASELINES) --out $(OUT)/mimic $(ARGS)
else
	@echo "No DATA=<directory of MIMIC-III or MIMIC-IV>: running the open stand-in, PhysioNet 2012 (stays of MIMIC-II)."
	$(GRID) --tasks physionet_icu $(ONE_TASK) $(FEW_BASELINES) --out $(OUT)/mimic $(ARGS)
endif
	$(REPORT) --results $(OUT)/mimic

# The protocol of arXiv:2311.09200 on the whole private part, DATA=<directory of MIMIC-III 1.4>; medians of ten runs.
mimic-published: .venv/ready ## the protocol of arXiv:2311.09200, DATA=dir (not timed)
	$(if $(DATA),,$(error DATA=<directory of MIMIC-III 1.4> is needed))
	$(GRID) --tasks mimic_mortality_published mimic_long_stay_published --data-dir $(DATA) --models linear gru \
	  --sizes 100000 --epsilons 0.001 0.01 0.1 1 10 --methods qexp zero_shot non_private dp_gd dp_sgd_all \
	  --out $(OUT)/mimic_published $(ARGS)
	$(BIN)/python -m experiments.benchmark.mimic_medians --results $(OUT)/mimic_published

# A shift so heavy that public curvature says little: MNIST turned by 40 degrees.
shift: .venv/ready ## MNIST turned by 40 degrees (half a day)
	$(GRID) --tasks mnist_rotated --models mlp cnn --sizes 4000 --epsilons 1 8 --seeds 10 \
	  --methods qexp zero_shot non_private dp_gd dp_sgd_all --out $(OUT)/shift $(ARGS)
	$(REPORT) --results $(OUT)/shift

# Small tasks outside the grid, mild to hopeless shifts.
small: .venv/ready ## ten small tasks, no shift to hopeless ones (half an hour)
	$(GRID) $(ON_SMALL_TASKS) --out $(OUT)/small $(ARGS)
	$(REPORT) --results $(OUT)/small

# The same with baselines chosen by their test loss in place of accuracy or AUROC.
loss: .venv/ready ## the same, baselines chosen by test loss (half an hour)
	$(GRID) $(ON_SMALL_TASKS) --metric negative_loss --out $(OUT)/loss $(ARGS)
	$(REPORT) --results $(OUT)/loss

##@ Studies
units: .venv/ready ## a writer's privacy against an image's (15 minutes)
	$(BIN)/python -m experiments.studies.units $(ARGS)

ablation: .venv/ready ## metric against k for each projection (15 minutes)
	$(BIN)/python -m experiments.studies.ablation $(ARGS)

predicted: .venv/ready ## predicted against measured cost of noise (5 minutes)
	$(BIN)/python -m experiments.studies.predicted $(ARGS)

membership: .venv/ready ## likelihood-ratio attacks (15 minutes)
	$(BIN)/python -m experiments.studies.membership $(ARGS)

##@ Seconds and size
# Other libraries, torch among them, go into the same environment; about half an hour on one core.
benchmarks: .venv/ready ## seconds against other libraries (half an hour)
	$(BIN)/pip install --quiet --editable '.[benchmarks]'
	$(BIN)/python -m experiments.benchmarks $(ARGS)

# Two processes on this machine; LAUNCH="srun --ntasks-per-node=1" ARGS= under SLURM, see experiments/studies/cluster.py.
cluster: .venv/ready ## one release by two processes; SLURM, TPU pods (2 minutes)
	$(LAUNCH) $(BIN)/python -m experiments.studies.cluster $(if $(LAUNCH),,--local 2) $(ARGS)

# 124 million parameters on the processor's cores.
large: .venv/ready ## 124 million parameters on a processor (6 minutes)
	$(BIN)/python -m experiments.studies.large $(ARGS)
	$(BIN)/python -m experiments.studies.large --tune lora $(ARGS)

report: .venv/ready ## tables and pictures of results (seconds)
	$(REPORT) $(ARGS)

##@ Development
test: .venv/ready ## the tests (15 minutes)
	$(BIN)/python -m pytest -q -rs -n auto --maxprocesses 4

lint: .venv/ready ## ruff and mypy (seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# HTML pages from the docstrings; a broken reference is an error.
docs: .venv/ready ## API reference from the docstrings (half a minute)
	$(BIN)/pip install --quiet --editable '.[docs]'
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -E -W -n docs docs/_build

clean: ## remove what was made
	rm -rf .venv $(OUT) docs/_build docs/api
