PYTHON ?= python3
export PYTHONSAFEPATH = 1
BIN := .venv/bin

.PHONY: setup demo check test test-full clean

setup: .venv/.installed

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev]'
	touch $@

demo: setup
	$(BIN)/edgesmith build examples/digits/edgesmith.toml

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow and not alone'
	$(BIN)/python -m pytest -q -m 'alone and not slow'

test-full: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not alone'
	$(BIN)/python -m pytest -q -m alone

clean:
	rm -rf .venv out build dist src/edgesmith.egg-info
