# The first `make train` or `make test` builds .venv from the pinned versions; later ones start at once. Torch is the
# largest download: constraints.txt pins torch==2.13.0, and every build of that release that pip finds first will do.
PYTHON ?= python3
PIP_INSTALL = .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: train test lint clean help

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' Makefile

train: .venv/.installed ## train the default recipe on the built-in corpus; the result lies in runs/default
	.venv/bin/moxe train default $(ARGS)

test: .venv/.installed ## run the tests
	.venv/bin/pytest

lint: .venv/.installed-dev ## check style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find moxe tests -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "moxe needs Python 3.11 or newer, but $(PYTHON) is older or missing: run make PYTHON=/path/to/python3.11" >&2; \
		exit 2; \
	}
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP_INSTALL) -e '.[test,dev]'
	@touch $@
