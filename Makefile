# `make demo` and `make test` work on a fresh clone: each makes its own .venv first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test lint all-tests random-tests clean

demo: $(READY)
	$(VENV)/bin/isthmus demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal

all-tests: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not gpu"

# Other examples, in another order: what passes by luck alone fails here some day. SEED=… runs the same again.
ifndef SEED
SEED := $(shell date +%s)
endif
random-tests: $(READY)
	@echo "SEED=$(SEED)"
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal --shuffle $(SEED) \
	  --hypothesis-profile random --hypothesis-seed $(SEED)

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
