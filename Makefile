# The two commands of the README: each does all the set-up, with Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: compare test chaos wheel slow check clean

compare: $(STAMP)  ## the study quickstart: three learned augmentations and RandAugment on 200 digits (4 minutes)
	$(BIN)/augbench sweep quickstart --executor local

test: $(STAMP)  ## all tests that take seconds
	$(BIN)/python -m pytest -q -m "not slow" \
		-n 2 --dist loadfile --no-loadscope-reorder --durations 10

chaos: $(STAMP)  ## a sweep killed at random moments until every run is done (2 minutes)
	$(BIN)/python -m pytest -q tests/test_chaos.py -k killed_at_random_moments

wheel: $(STAMP)  ## the quickstart and its report from a wheel, outside the checkout (a minute)
	.ci/wheel

slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

check: $(STAMP)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv .pytest_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; set it with: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing (a few minutes the first time) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)
