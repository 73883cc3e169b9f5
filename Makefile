# Every target makes the environment by itself, when it is missing or older than the requirements.

PYTHON ?= python3
ENVIRONMENT = .venv/.installed
PY = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv/bin/python

.PHONY: demo test test-slow lint format

demo: $(ENVIRONMENT)
	$(PY) train.py --config configs/demo.yaml

test: $(ENVIRONMENT)
	$(PY) -m pytest

test-slow: $(ENVIRONMENT)
	$(PY) -m pytest -m slow

lint: $(ENVIRONMENT)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: $(ENVIRONMENT)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

$(ENVIRONMENT): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@
