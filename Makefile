# Every target sets up .venv by itself, and again only when pyproject.toml changes.
PYTHON ?= python3
MINUTES ?= 8
RUN := .venv/bin/python

.PHONY: quickstart test test-slow test-install docs lint format clean

quickstart: .venv/ready
	$(RUN) quickstart.py $(MINUTES)

test: .venv/ready lint
	$(RUN) -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not slow and not gpu"

test-slow: .venv/ready
	$(RUN) -m pytest -m "slow and not gpu"

# `pip install .` from nothing: what `ldm` can do in an empty environment, from an empty folder.
test-install:
	rm -rf .venv-install && $(PYTHON) -m venv .venv-install
	.venv-install/bin/python -m pip install --quiet --disable-pip-version-check .
	mkdir .venv-install/elsewhere && cd .venv-install/elsewhere && PATH="$$PWD/../bin:$$PATH" sh -eux ../../tests/helpers/install.sh

# The documentation as a site, build/site, in an environment of its own. Warnings end it.
docs:
	test -x .venv-docs/bin/mkdocs || ($(PYTHON) -m venv .venv-docs && .venv-docs/bin/python -m pip install --quiet \
	  --disable-pip-version-check 'mkdocs-material>=9.6' 'mkdocstrings[python]>=0.29' 'mkdocs-jupyter>=0.25' 'ruff>=0.12')
	NO_MKDOCS_2_WARNING=1 PATH="$$PWD/.venv-docs/bin:$$PATH" mkdocs build --quiet --config-file tools/mkdocs.yml

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: .venv/ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf .venv .venv-docs .venv-install runs outputs multirun .pytest_cache .ruff_cache *.egg-info

.venv/ready: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else f"ldm needs Python 3.11 or newer, found {v[0]}.{v[1]}; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@
