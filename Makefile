# One-line targets; `make` alone lists them. Everything is installed into .venv, once.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
STAMP  := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt Makefile | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-slow zoo-check check bench bench-sweep gpu-bench gpu-suite clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP) ## install into .venv (about 6 GB: PyPI's torch is the CUDA build)

$(STAMP): pyproject.toml constraints.txt Makefile
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP) ## all four stages on the embedded digits model, and the report as a page
	$(BIN)/meansparse run --config configs/demo.yaml
	$(BIN)/meansparse report runs/digits-Linf-digits --format html -o runs/digits-Linf-digits/report.html
	@echo "meansparse by its name, in this shell: . $(BIN)/activate"
	@echo "open it: $(BIN)/python -m webbrowser -t runs/digits-Linf-digits/report.html"

docs: ## the pages of docs/ as a site, in site/ (its tools go into .venv/docs)
	test -x $(VENV)/docs/bin/mkdocs || { $(PYTHON) -m venv $(VENV)/docs && $(VENV)/docs/bin/python -m pip install --quiet \
	  --disable-pip-version-check $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])"); }
	NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/mkdocs build --strict --quiet
	@echo site/index.html

test: $(STAMP) ## the fast tests (minutes, no network), in two processes: make test JOBS=8 for more
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --durations=25 -m "not slow"

test-slow: $(STAMP) ## the slow tests: large models of the zoo, with random weights (no network)
	$(BIN)/python -m pytest -q -m slow

zoo-check: $(STAMP) ## MeanSparse on every model of the zoo, random weights (half an hour); writes docs/zoo-check.md
	$(BIN)/meansparse models --check --jobs 2 --run runs/zoo-check
	mkdir -p docs && cp runs/zoo-check/zoo-check.md docs/

check: $(STAMP) ## format, lint, types, which room may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP) ## the ratios of speed: make bench DATA=DIR (half an hour on two cores; SHORT=1 minutes)
	$(BIN)/python benchmarks/ratios.py $(if $(SHORT),--short) $(if $(DATA),--data-dir '$(DATA)') $(BENCH)

bench-sweep: $(STAMP) ## our sweep beside one pyautoattack run an alpha: make bench-sweep DATA=DIR (half an hour on two cores)
	$(BIN)/python benchmarks/sweep_speed.py $(if $(DATA),--data-dir '$(DATA)') $(BENCH)

gpu-bench: ## the same on a GPU: make gpu-bench DATA=DIR
	$(MAKE) bench BENCH='--device cuda $(BENCH)'

gpu-suite: $(STAMP) ## benchmark, trainings and tables on a GPU: make gpu-suite DATA=DIR OUT=runs/gpu-suite (DO="wide finish tables": these)
	PYTHON=$(abspath $(BIN))/python MEANSPARSE=$(abspath $(BIN))/meansparse benchmarks/gpu_suite.sh $(DO)

include tables.mk

clean: ## remove .venv and what tests and tools left; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build
