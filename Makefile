# `make demo` and `make test` work on a fresh clone: each makes its own .venv first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint all-tests clean

demo: $(READY)
	$(VENV)/bin/isthmus demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

all-tests: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not gpu"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

# torch is installed first and exactly, so that no other package's looser request decides which build comes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs
