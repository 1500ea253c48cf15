# The commands that people and CI both use. `make serve` and `make test` are all a newcomer needs.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: serve test lint docs bench-offline clean

serve: $(VENV)/.run  ## start the server on the bundled ∞-MoE
	$(BIN)/moedial serve $(ARGS)

test: lint  ## everything that CI runs
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev  ## regenerate the tables that tests compare
	$(BIN)/python -m docs.generate

bench-offline: $(VENV)/.dev
	$(BIN)/python -m benchmarks.offline $(ARGS)

# torch first and alone, so that no other package can ask for a different build of it.
$(VENV)/.run: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
