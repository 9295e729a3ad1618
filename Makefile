# Two commands do all their own set-up on a fresh machine: make try, make test.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
export POLYSPAN_HOME ?= $(CURDIR)/.polyspan

.PHONY: try test lint types layers tests slow evidence bench clean

try: $(VENV)/.installed
	$(BIN)/polyspan claim --all --level quick --workers $(WORKERS)
	@$(BIN)/polyspan gallery build > .polyspan/where && echo "Open the gallery: file://$$(cat .polyspan/where)"

test: $(VENV)/.developed lint types layers tests

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'polyspan needs Python 3.11 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[hf]"
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable ".[dask,equivariant,graphs,hf,postgres,text,vectors]"
	touch $@

lint: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.developed
	$(BIN)/ty check --python $(VENV)

layers: $(VENV)/.developed
	$(BIN)/lint-imports

tests: $(VENV)/.developed
	$(PYTEST) -m "not slow"

# Trainings, verdicts over seeds, processes that are killed at every step: before a release.
slow: $(VENV)/.developed
	$(PYTEST) -m slow

# The project's own evidence, kept in the repository so that the gallery stands in a fresh clone.
evidence: $(VENV)/.installed
	$(BIN)/polyspan claim --all --level quick --out evidence
	test -z "$$POLYSPAN_DATA" || $(BIN)/polyspan claim --all --level standard --out evidence

bench: $(VENV)/.developed
	for file in benchmarks/[!_]*.py; do $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) .polyspan
