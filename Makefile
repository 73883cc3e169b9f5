# Every target creates the environment if it is missing or older than the requirements.

PYTHON ?= python3
ENVIRONMENT = .venv/.installed
PY = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false .venv/bin/python
# Up to four processes with one thread each, because most tests spend their time on starting processes.
IN_PARALLEL = -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-slow test-versions test-lowest lint format

demo: $(ENVIRONMENT)
	$(PY) train.py --config configs/demo/two_stages.yaml

test: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PY) -m pytest $(IN_PARALLEL)

test-slow: $(ENVIRONMENT)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow $(IN_PARALLEL)

# Check that modeling_mmcot gives the same texts and scores under each minor version of transformers. VERSIONS="…"
# selects versions.
test-versions: $(ENVIRONMENT)
	tests/make_versions.sh .versions .venv/bin/pip $(VERSIONS)
	MMCOT_VERSIONS=.versions $(PY) -m pytest tests/modeling/test_versions.py -s

# Run all tests with the lowest version of each package that requirements.txt allows.
test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 $(PY:.venv/%=.venv-lowest/%) -m pytest $(IN_PARALLEL)

lint: $(ENVIRONMENT)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(ENVIRONMENT)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

$(ENVIRONMENT): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

.venv-lowest/.installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv-lowest
	sed -n 's/>=/==/p' requirements.txt > .venv-lowest/constraints.txt
	.venv-lowest/bin/pip install -q -r requirements-dev.txt -c .venv-lowest/constraints.txt
	touch $@
