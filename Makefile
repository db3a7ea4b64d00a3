# One environment in .venv, made when missing and again when requirements.lock or pyproject.toml change.
# Everything after that works offline.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# the demonstration behind `make run`; ends with `accuracy: RIGHT/TOTAL`
RUN_FLAGS ?= demo/clips/questions.jsonl --epd 1,1,1 --table
CHECKED := mmserve kernels bench tests demo

export HF_HUB_OFFLINE ?= 1
export TRANSFORMERS_OFFLINE ?= 1

.DEFAULT_GOAL := run
.PHONY: run serve test test-all check clean

run: $(STAMP)
	@answers=$$(mktemp -d) && trap 'rm -rf "$$answers"' EXIT && \
	$(BIN)/mmserve batch $(RUN_FLAGS) -o "$$answers/answers.jsonl"

serve: $(STAMP)
	@exec $(BIN)/mmserve serve --demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(CHECKED)

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find mmserve kernels tests demo bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "mmserve needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
