# `make test` and `make demo` do all the set-up themselves, on a machine with Python >= 3.10.
#
#   make PYTHON=python3.12         another interpreter (only when .venv is made)
#   make VENV=/elsewhere           another environment
#   make PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#                                  the CPU wheel of torch: about 0.2 GB instead of 3 GB on Linux
#   make test PYTEST_ARGS="-k plan" WORKERS=4
#   make demo DEMO_ARGS="--help"
#   make bench-quick SAVE=1        results into benchmarks/results instead of build/bench
#
# The native extension: UCAN_FAST_SKIP_EXTENSION=1, UCAN_FAST_SKIP_CUDA=1, MAX_JOBS=2, CUDA_HOME=...

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.ucan-fast-installed
WHEEL_VENV := build/wheel-venv
# One thread per worker: several workers that each take all cores are slower. The last tests are
# shared out anew: a file of long ones would keep one worker alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install test demo bench bench-quick quality quality-quick report lint format wheel wheel-test clean distclean

help:
	@echo "make test        set up .venv, check style, run the tests"
	@echo "make demo        set up .venv, run the main job on MovieLens"
	@echo "make bench-quick every operator and whole passes against their peers, in under 5 minutes;"
	@echo "                 SAVE=1 keeps the results in benchmarks/results"
	@echo "make bench       the same over all models, shapes and ranks"
	@echo "make quality-quick  what every method forgets and costs: ml-100k, one seed, within 15 minutes"
	@echo "make quality DATA=F three data sets, three seeds; hours (benchmarks/quality/README.md)"
	@echo "make report      README, docs and figures from benchmarks/results"
	@echo "make lint        ruff check and format check"
	@echo "make format      let ruff mend what it can"
	@echo "make wheel       build dist/*.whl"
	@echo "make wheel-test  install the wheel elsewhere and use it from there"
	@echo "make clean       remove build outputs; distclean removes .venv too"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: ucan_fast needs Python 3.10 or later, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." ; \
	  echo "       Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" ; exit 1 ; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "error: '$(PYTHON)' cannot make virtual environments (Debian: apt install python3-venv)." ; exit 1 ; }
	$(PYTHON) -m venv $(VENV)

# torch first: the native extension compiles against it, and without build isolation pip never
# fetches a second one.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*) | $(BIN)/python
	$(PIP) install $(PIP_ARGS) -c constraints.txt setuptools ninja torch
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev]'
	@sed 's/^/native extension: /' ucan_fast/_native_build.txt
	@touch $@

install: $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(PYTEST) $(PYTEST_ARGS)

demo: $(STAMP)
	$(BIN)/python examples/movielens.py $(DEMO_ARGS)

bench-quick: $(STAMP)
	$(BIN)/python -m benchmarks --profile quick $(if $(SAVE),--save)

bench: $(STAMP)
	$(BIN)/python -m benchmarks --profile full $(if $(SAVE),--save)

quality-quick: $(STAMP)
	$(BIN)/python -m benchmarks.quality --profile quick --again $(if $(SAVE),--save)

quality: $(STAMP)
	$(BIN)/python -m benchmarks.quality --profile full $(if $(DATA),--data $(DATA)) $(if $(SAVE),--save)

report: $(STAMP)
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.quality.report

wheel: $(STAMP)
	rm -rf build/lib build/bdist.* dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

# A fresh environment that borrows the dependencies of .venv (their folder only: its editable
# install of this package is a .pth file, which is not read from there).
wheel-test: wheel
	rm -rf $(WHEEL_VENV)
	$(BIN)/python -m venv --without-pip $(WHEEL_VENV)
	$(PIP) --python $(WHEEL_VENV)/bin/python install --no-deps --no-index --find-links dist ucan-fast
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$($(WHEEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	cd $(WHEEL_VENV) && OMP_NUM_THREADS=1 bin/python $(CURDIR)/tests/check_wheel.py $(CURDIR)/dist/*.whl

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .benchmarks
	rm -f ucan_fast/*.so ucan_fast/_native_build.txt $(STAMP)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
