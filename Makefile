# Everything runs in .venv, which the first target that needs it sets up: demo with what a user installs,
# the others with what a developer needs. Only make, Python 3.11 or later and its venv module are asked for.

PYTHON ?= python3
BIN := .venv/bin
USER := .venv/installed-for-users
DEVELOPER := .venv/installed-for-developers
WRITER := .venv/installed-for-writers

.DEFAULT_GOAL := help
.PHONY: help demo test test-all unjitted coverage check bench accuracy notebooks picture docs clean ci

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(USER)  ## simulate particles, align them, compare with the truth; results in demo/
	rm -rf demo
	$(BIN)/mrefali demo demo

test: $(DEVELOPER)  ## the tests, without the long ones
	$(BIN)/pytest -m "not slow"

test-all: $(DEVELOPER)  ## every test
	$(BIN)/pytest

unjitted: $(DEVELOPER)  ## the tests with the kernels as plain Python
	NUMBA_DISABLE_JIT=1 $(BIN)/pytest -m "not slow and not jit_only"

coverage: $(DEVELOPER)  ## lines reached by the tests; unjitted, for compiled ones cannot be counted
	NUMBA_DISABLE_JIT=1 $(BIN)/coverage run -m pytest -m "not slow and not jit_only"
	$(BIN)/coverage report

check: $(DEVELOPER)  ## style, and which module may import which
	$(BIN)/ruff check .
	$(BIN)/lint-imports

bench: $(DEVELOPER)  ## time and memory of searches and runs, beside the original's; some five minutes
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/subpixel.py
	$(BIN)/python benchmarks/product.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/iteration.py
	$(BIN)/python benchmarks/ranks.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/start.py
	$(BIN)/pytest -q benchmarks/bench_*.py --benchmark-columns=min,median,rounds --benchmark-sort=name \
		--benchmark-max-time=0.5 --benchmark-warmup=on

accuracy: $(DEVELOPER)  ## make the tables of docs/accuracy.md anew, from simulated particles
	$(BIN)/python benchmarks/accuracy
	$(BIN)/python benchmarks/accuracy/interpolation.py
	$(BIN)/python benchmarks/accuracy/centring.py

notebooks: $(DEVELOPER)  ## run the notebooks from a clean kernel, keep their outputs
	$(BIN)/python notebooks/execute.py

picture: $(DEVELOPER)  ## make the README's pictures anew
	$(BIN)/python docs/make_picture.py
	$(BIN)/python docs/make_screenshot.py

docs: $(WRITER)  ## the pages of docs/ and the reference from the docstrings; in docs/_build/index.html
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -b html docs docs/_build

clean:  ## remove what was made, but not .venv
	rm -rf demo build dist docs/_build htmlcov .coverage .benchmarks .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find mrefali tests benchmarks notebooks docs -name __pycache__ -prune -exec rm -rf {} +

ci: check  ## all that must pass; the two runs of the tests side by side, each of which keeps a core busy
	$(MAKE) --jobs=2 --output-sync=target test unjitted
	$(MAKE) notebooks

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(USER): setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[viz]'
	touch $@

$(WRITER): setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

$(DEVELOPER): setup.cfg pyproject.toml | $(BIN)/python
	# the Berkeley DB binding, which writes bdb headers back, is compiled
	test -e /usr/include/db.h || (apt-get update -q && apt-get install -qy --no-install-recommends libdb-dev gcc python3-dev)
	# the browser in which the report is tested
	command -v chromium >/dev/null || (apt-get update -q && apt-get install -qy --no-install-recommends chromium)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	# the kernels, once for all tests
	$(BIN)/python -c "from mrefali import parallel, warmup; warmup.compile_kernels(parallel.SERIAL, 'capped')"
	touch $@ $(USER)
