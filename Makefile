# Every target works from a fresh clone with Python 3.11 to 3.13 and make.
PYTHON ?= python3
VENV := .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow bench lint docs clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/hakari demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: setup
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	$(BIN)/zensical build --clean --strict

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/samplers.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/moe.py
	$(BIN)/python benchmarks/routers.py
	$(BIN)/python benchmarks/lp_coverage.py
	$(BIN)/python benchmarks/local_projections.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/gibbs_coverage.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/feedback.py
	$(BIN)/python benchmarks/feedback_simulations.py

clean:
	rm -rf $(VENV) site runs .pytest_cache .mypy_cache .ruff_cache
