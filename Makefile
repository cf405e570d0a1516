# Each target sets up what it needs: a virtual environment in .venv with the extras of pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
DATA ?= ../shared/data

.PHONY: demo test lint clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[experiments,test,lint]'
	touch $@

demo: .venv/ready
	$(BIN)/python -m experiments.demo $(ARGS)

test: .venv/ready
	QEXP_DATA="$${QEXP_DATA:-$(abspath $(DATA))}" $(BIN)/python -m pytest -q

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv experiments/out
