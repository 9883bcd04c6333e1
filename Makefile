# Every target makes .venv by itself. PYTHON names the interpreter to build it from (3.11 or newer).
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python

# Two test processes with one compute thread each: more threads would only fight over the cores.
TEST_PROCESSES ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: demo test lint bench clients fuzz faults docs clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --root-user-action=ignore -c constraints.txt -e '.[dev]'
	touch $@

## the whole product on real data: `make demo`, `make demo FULL=1` for about an hour, APT=1 for the apt packages too
demo: $(READY)
	FULL='$(FULL)' APT='$(APT)' $(RUN) -m examples.quickstart

## every test; lint and the layer rule are among them
test: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

## each benchmark prints one JSON object; `ordering` trains some hundred students and takes more than an hour; those that
## need a demo with FULL=1 (lit_decoder, vlm_quality) or trl (vlm_step) are started by hand
bench: $(READY)
	for name in selection cache step checkpoint onnx service $(if $(ORDERING),ordering); do $(RUN) -m benchmarks.$$name || exit 1; done

## outside clients on artefacts made here, each in an environment of its own; `make clients ONLY='peft openvino'`
clients: $(READY)
	$(RUN) -m tools.clients $(if $(ONLY),--only $(ONLY),--output benchmarks/results/clients.json)

## 50,000 random inputs through every reader of foreign data: about an hour on two cores
fuzz: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tools.fuzz --output benchmarks/results/fuzz.json

## interrupt 200 small runs by signals, full disks and damaged checkpoints, and resume them: about half an hour
faults: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m tools.faults --output benchmarks/results/faults.json

## run every code block of README.md and docs/
docs: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m pytest tests/e2e/test_docs.py

## what was built and measured here; the cache of downloads (ACED_HOME) stays
clean:
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
