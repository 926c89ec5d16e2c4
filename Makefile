# Everything from a fresh clone: only python3 (3.11 or newer) and make are needed. A second call re-does no set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY ?= data/studies/quick.yaml
WORKERS ?= 2

.PHONY: help study test families notebooks gallery bench figures docs lint clean

help:
	@echo "make study      run $(STUDY) and print where its report is   (STUDY=... for another)"
	@echo "make notebooks  open the notebooks in JupyterLab"
	@echo "make gallery    execute all notebooks on the embedded model, into docs/gallery"
	@echo "make test       run all tests"
	@echo "make families   check every class of causal language models; the table is data/families.csv"
	@echo "make bench      measure every claim about speed and memory; results in benchmarks/results"
	@echo "make figures    make the figures of the README anew, from data/results and from a finished quick study"
	@echo "make docs       build the documentation; it is build/site/index.html"
	@echo "make lint       check style, format, types and imports"

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pftools needs Python 3.11 or newer, and $(PYTHON) is older: call make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV), once: 2.6 GB, some five minutes on two cores."
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,docs,slurm]'
	touch $@

study: $(VENV)/ready
	$(BIN)/pftools run $(STUDY)

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10

# It can be stopped, and goes on where it was; ANEW=--anew begins again.
families: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families.walk $(ANEW)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

notebooks: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" jupyter lab --LabApp.default_url=/lab/tree/notebooks/00_plan_study.ipynb

gallery: $(VENV)/ready
	$(BIN)/python docs/gallery/make.py

bench: $(VENV)/ready
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script --store || exit 1; done

figures: $(VENV)/ready
	$(BIN)/python data/results/figure.py seeds figures/seeds.svg
	$(BIN)/pftools report $(STUDY) --figures figures

docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) build *.egg-info
