# `make demo` and `make test` work on a fresh machine with Python (3.11 or newer) and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TRAIN := .venv/train.done
DEV := .venv/dev.done

.PHONY: demo test slow lint bench bench-full docs pictures clean

demo: $(TRAIN)  ## train on the digits bundled with scikit-learn; report in runs/digits/
	$(BIN)/dia train digits --keep-checkpoints 40
	$(BIN)/dia report runs/digits

# What takes long to set up, the tests of a file share.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -q

test: $(DEV)  ## every test but the slow ones
	$(PYTEST)

slow: $(DEV)  ## the tests that take minutes
	$(PYTEST) -m slow

lint: $(DEV)  ## formatting, style, types, floors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(DEV)  ## the layers beside their rivals, in minutes; writes docs/benchmarks.md and .json
	$(BIN)/python -m benchmarks.speed --turns 3
	$(BIN)/python -m benchmarks.importing

# With VIT=RUN and SHAKESPEARE=RUN, folders of `dia train`, also the layers of trained models.
TRAINED := $(if $(VIT),--vit $(VIT)) $(if $(SHAKESPEARE),--shakespeare $(SHAKESPEARE))
PARTS := speed scaling importing evaluations inference response boltzmann choosing launches cuda
bench-full: $(DEV)  ## all of docs/benchmarks.md and .json; VIT=RUN SHAKESPEARE=RUN for trained models
	@missed=; \
	run() { echo "benchmarks.$$*"; $(BIN)/python -m benchmarks.$$* || missed="$$missed $$1"; }; \
	for part in $(PARTS); do run $$part; done; \
	$(if $(strip $(TRAINED)),run trained $(TRAINED);) \
	test -z "$$missed" || { echo "beyond a bar, or failed:$$missed"; exit 1; }

docs: $(DEV)  ## build the site in site/, warnings as errors, and run the code in README and docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python -m pytest -q tests/docs -m 'slow or not slow' -k 'not makes_every_picture'

pictures: $(DEV)  ## make the pictures of docs/ again
	$(BIN)/python docs/pictures.py

clean:
	rm -rf .venv runs site

# An interrupted install leaves no stamp, so it is done again.
.venv/bin/python:
	$(PYTHON) -m venv .venv

$(TRAIN): .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[train]'
	touch $@

$(DEV): .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[train,dev]'
	touch $@ $(TRAIN)
