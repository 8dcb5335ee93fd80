# Every target creates .venv and installs what it needs; only Python 3.12, git and make must be there.
PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin
GROUPS ?= --group test --group lint
EXTRAS ?= plot,mirror
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt
# tunix's own dependencies are 7 GB because of torch; this is what its models import.
WILD := wrapt tensorboardX jaxtyping tqdm huggingface_hub sentencepiece pillow perfetto pandas einops safetensors grain
WILD_ALONE := google-tunix qwix google-metrax clu
# The accelerators of a development machine are no part of the tests.
export JAX_PLATFORMS ?= cpu
# The tests' machine code is not optimized (tests/conftest.py), except where this stands before them.
OPTIMIZED := XLA_FLAGS=--xla_backend_optimization_level=3

.PHONY: demo test test-remat3 test-long test-floor test-py313 test-wild package docs bench bench-timed bench-faults bench-compiled lint clean

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

# The same regions under JAX's coming implementation of remat, which is off by default. It does not save names in the
# forward rule of a custom_vjp, and leaves dead draws of random numbers in the trace: what relies on either is left out.
REMAT3 := test_region.py test_region_contents.py test_group.py test_author_regions.py naming/test_names.py
test-remat3: $(VENV)/.installed
	JAX_REMAT3=1 $(OPTIMIZED) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" $(addprefix tests/remattools/transform/,$(REMAT3))

test-long: $(VENV)/.installed
	$(OPTIMIZED) $(BIN)/python -m pytest -m long

# The oldest supported releases of everything that pyproject names.
test-floor:
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet uv
	.venv-floor/bin/uv pip install --quiet --python .venv-floor/bin/python --resolution lowest-direct -e ".[$(EXTRAS)]" --group test
	.venv-floor/bin/python -m pytest -m "not long"

# The same suite on the next Python.
test-py313:
	$(MAKE) test PYTHON=python3.13 VENV=.venv-py313

# Models that others wrote, unedited.
test-wild:
	test -x .venv-wild/bin/uv || ($(PYTHON) -m venv .venv-wild && .venv-wild/bin/python -m pip install --quiet uv)
	.venv-wild/bin/uv pip install --quiet --python .venv-wild/bin/python -c constraints.txt -e . --group test $(WILD)
	.venv-wild/bin/uv pip install --quiet --python .venv-wild/bin/python --no-deps $(WILD_ALONE) \
		mamba2-jax mamba3-jax jraphx canvit-nnx canvit-core
	$(OPTIMIZED) .venv-wild/bin/python -m pytest -m wild tests/wild

# The site in site/; any warning is an error.
docs: $(VENV)/.installed
	$(INSTALL) -e ".[$(EXTRAS)]" --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The built wheel and sdist, each installed and used outside the checkout.
package: $(VENV)/.installed
	rm -rf dist
	$(BIN)/uv build --quiet --python $(BIN)/python --out-dir dist
	$(BIN)/python tests/packaging/check.py dist/*.whl dist/*.tar.gz

# Every figure of docs/benchmarks, anew: some hours. The power cuts need root, the policies tunix and libtpu.
# What is timed runs alone; faults and compiles, which no load changes, run beside each other.
bench:
	test -x .venv-bench/bin/uv || ($(PYTHON) -m venv .venv-bench && .venv-bench/bin/python -m pip install --quiet uv)
	.venv-bench/bin/uv pip install --quiet --python .venv-bench/bin/python -c constraints.txt \
		-e ".[tpu,plot,mirror]" --group test --group bench $(WILD)
	.venv-bench/bin/uv pip install --quiet --python .venv-bench/bin/python --no-deps $(WILD_ALONE)
	$(MAKE) bench-timed
	$(MAKE) -j 2 bench-faults bench-compiled

bench-timed:
	.venv-bench/bin/python benchmarks/import_time.py --write
	.venv-bench/bin/python benchmarks/remat_trace.py --write docs/benchmarks/remat_trace.md
	.venv-bench/bin/python benchmarks/ckpt_speed.py --write
	.venv-bench/bin/python benchmarks/ckpt_mirror.py --write
	.venv-bench/bin/python benchmarks/ckpt_partial.py --write
	.venv-bench/bin/python benchmarks/ckpt_leaves.py --write
	.venv-bench/bin/python benchmarks/ckpt_surgery.py --write

bench-faults:
	.venv-bench/bin/python benchmarks/ckpt_faults.py --write
	.venv-bench/bin/python benchmarks/ckpt_interrupts.py --write

bench-compiled:
	.venv-bench/bin/python benchmarks/remat_baseline.py --out docs/benchmarks --cache .bench
	.venv-bench/bin/python benchmarks/remat_presets.py --cache .bench --write
	.venv-bench/bin/python benchmarks/remat_groups.py --cache .bench --write docs/benchmarks/remat_groups.md
	.venv-bench/bin/python benchmarks/remat_optimum.py --cache .bench --write docs/benchmarks/remat_optimum.md
	.venv-bench/bin/python benchmarks/plan_budgets.py --write
	.venv-bench/bin/python benchmarks/plan_meshes.py --write
	.venv-bench/bin/python benchmarks/plan_start.py --write
	.venv-bench/bin/python benchmarks/explained_share.py --cache .bench --write docs/benchmarks/explained_share.md
	.venv-bench/bin/python benchmarks/remat_frontier.py --out docs/benchmarks --cache .bench

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
	rm -rf .venv .venv-floor .venv-py313 .venv-wild .venv-bench .bench build dist site .mypy_cache .ruff_cache .demo
