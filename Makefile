# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check

.PHONY: quickstart test slow check parity zoo newest clean

quickstart: .venv/train  ## install, fetch the real model and data, fine-tune, evaluate, write a report
	$(BIN)/python -m train fit configs/quickstart.yaml

test: .venv/test  ## every method and every module, under 15 minutes on two cores
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

slow: .venv/test  ## the rest: every variant of every method in every style of model, runs that are killed and resumed
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

check: .venv/dev  ## format, lint, types, doctests, documents; warnings are errors
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest --doctest-modules jaxpeft train
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

parity: .venv/parity  ## the tests that ask torch and PEFT for the expected values
	$(BIN)/python -m pytest -m parity

zoo: .venv-zoo/zoo  ## models of other libraries, adapted as they come; checks docs/models.md
	JAX_PLATFORMS=cpu XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false" \
	  .venv-zoo/bin/python tests/flax_zoo.py

newest: .venv-newest/test  ## the tests of `make test` on a newer Python, with the newest jax and flax it can have
	.venv-newest/bin/python -c "import sys, jax, flax; print('Python', sys.version.split()[0], 'jax', jax.__version__, 'flax', flax.__version__)"
	.venv-newest/bin/python -m pytest -n 2 --dist loadgroup -m "not slow"

# Each stamp is one extra of pyproject.toml, installed into .venv.
.venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/$(PIP_INSTALL) -e '.[train,$*]'
	touch $@

.venv-zoo/zoo: tests/flax_zoo.txt pyproject.toml
	test -x .venv-zoo/bin/python || $(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/$(PIP_INSTALL) -r tests/flax_zoo.txt
	.venv-zoo/bin/$(PIP_INSTALL) --no-deps -e .
	touch $@

.venv-newest/test: pyproject.toml
	test -x .venv-newest/bin/python || $(NEWEST) -m venv .venv-newest
	.venv-newest/bin/$(PIP_INSTALL) -e '.[train,test]'
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-zoo build runs
