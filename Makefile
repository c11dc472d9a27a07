# make demo   compare eight architectures on a novel (about five minutes) and open runs/demo/report.html
# make test   run the tests
# Both make the virtual environment .venv first, if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch>=2.9,<2.14

.PHONY: demo test slow lint docs clean

demo: $(VENV)/installed
	$(BIN)/slipstream compare --budget 5m --out runs/demo
	@echo "open runs/demo/report.html in a browser"

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup

slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check . && $(BIN)/mypy

docs: $(VENV)/installed-dev
	$(BIN)/python docs/generate.py && $(BIN)/python docs/capabilities.py && $(BIN)/python docs/policies.py

# torch first and alone: its CPU build is then what everything else finds
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$(TORCH)"
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) runs
