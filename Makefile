# make install | demo | test | test-all | check | format
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test test-all check format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: install
	$(BIN)/vipo demo --overwrite $(ARGS)

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu or gpu"

check: install
	$(BIN)/ruff format --check src tests examples bench tools
	$(BIN)/ruff check src tests examples bench tools
	$(BIN)/mypy

format: install
	$(BIN)/ruff format src tests examples bench tools
	$(BIN)/ruff check --fix src tests examples bench tools

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
