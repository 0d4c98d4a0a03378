# make demo | test: from nothing. Everything lives in .venv and in the folders that `make clean` removes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# a rank of a test is one thread: two ranks on two cores must not fight for them
export OMP_NUM_THREADS ?= 1

.PHONY: setup system demo demo-sft test check verify bench docs clean distclean

setup: system $(INSTALLED)

system:  # Debian packages for the launch and MPI parts: installed for root, otherwise named
	@scripts/system_packages.sh

$(INSTALLED): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "zeropipe needs Python 3.11 or newer: make setup PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo.sh demo

demo-sft: setup  # fetches a model of 93 MB
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/demo_sft.sh demo-sft

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q --durations=0 tests/unit/test_layers.py tests/unit/test_names.py

verify: setup
	$(BIN)/python scripts/verify.py docs/verification.md
	$(BIN)/python -m scripts.scale docs/scale.md
	$(BIN)/python scripts/faults.py docs/faults.md
	$(BIN)/python scripts/families.py

bench: setup
	$(BIN)/python scripts/bench.py docs/performance.md

docs: setup  # the site, in build/site; any warning is an error
	$(BIN)/python scripts/site_pages.py build/site

clean:
	rm -rf build dist demo demo-sft .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) *.egg-info
