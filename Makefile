# Every target creates .venv and installs what it needs; only Python 3.12, git and make must be there.
PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
GROUPS ?= --group test --group lint
EXTRAS ?= plot,mirror
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt
# The accelerators of a development machine are no part of the tests.
export JAX_PLATFORMS ?= cpu

.PHONY: demo test test-remat3 test-long test-floor lint bench clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not long"

# The same regions under JAX's coming implementation of remat, which is off by default.
test-remat3: $(VENV)/.installed
	JAX_REMAT3=1 $(BIN)/python -m pytest -n 2 -m "not long" tests/remattools/rules tests/remattools/transform

test-long: $(VENV)/.installed
	$(BIN)/python -m pytest -m long

# The oldest supported releases of everything that pyproject names.
test-floor:
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet uv
	.venv-floor/bin/uv pip install --quiet --python .venv-floor/bin/python --resolution lowest-direct -e ".[$(EXTRAS)]" --group test
	.venv-floor/bin/python -m pytest -m "not long"

# Models that others wrote, unedited. Their own dependencies would be 7 GB; what their models import is named here.
test-wild:
	test -x .venv-wild/bin/uv || ($(PYTHON) -m venv .venv-wild && .venv-wild/bin/python -m pip install --quiet uv)
	.venv-wild/bin/uv pip install --quiet --python .venv-wild/bin/python -c constraints.txt -e . --group test \
		wrapt tensorboardX jaxtyping tqdm huggingface_hub sentencepiece pillow perfetto pandas einops safetensors
	.venv-wild/bin/uv pip install --quiet --python .venv-wild/bin/python --no-deps \
		google-tunix qwix google-metrax clu mamba2-jax mamba3-jax jraphx canvit-nnx canvit-core
	.venv-wild/bin/python -m pytest -m wild tests/wild

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m ensurepip --default-pip > /dev/null
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(INSTALL) -e ".[$(EXTRAS)]" $(GROUPS)
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-wild build dist site .mypy_cache .ruff_cache .demo
