# Every target makes the environment by itself, when it is missing or older than the requirements.

PYTHON ?= python3
ENVIRONMENT = .venv/.installed
PY = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv/bin/python

.PHONY: demo test test-slow test-lowest lint format

demo: $(ENVIRONMENT)
	$(PY) train.py --config configs/demo.yaml

test: $(ENVIRONMENT)
	$(PY) -m pytest

test-slow: $(ENVIRONMENT)
	$(PY) -m pytest -m slow

# What is published, with the lowest versions of all that it needs that requirements.txt admits: the same answers.
test-lowest: $(ENVIRONMENT) .venv-lowest/.installed
	LOWEST_PYTHON=.venv-lowest/bin/python $(PY) -m pytest tests/test_versions.py

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

.venv-lowest/.installed: requirements.txt
	$(PYTHON) -m venv .venv-lowest
	sed -nE '/^(torch|transformers|huggingface-hub|safetensors|tokenizers|pillow|jinja2)>=/s/>=/==/p' requirements.txt \
		> .venv-lowest/requirements.txt
	.venv-lowest/bin/pip install -q -r .venv-lowest/requirements.txt
	touch $@
