# Two commands on a fresh machine:  make quickstart  and  make test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A constraint, so that what was tested is what is installed where torch comes from more than one place.
TORCH := torch==2.13.0

# The CPU build of torch 2.13 has no torchvision on the package index; this pair is there for a GPU and runs on a CPU.
TORCHVISION := .venv-torchvision
TORCH_AND_TORCHVISION := torch==2.14.1 torchvision==0.29.1

# Leave it to Python to compile the modules that are imported: pip would compile all 25,000, which takes minutes. (For
# this option, pip reads a false value in the environment as `--no-compile`.)
export PIP_NO_COMPILE := 0
# Containers often forbid writing them: then every process compiles again, which takes longer than the imports.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test fast slow notebook gpu nightly root-tests torchvision-tests lint clean

quickstart: $(INSTALLED)  ## train and evaluate a small VLM on real images, offline, about 3 minutes after installation
	$(BIN)/orpo-ray train recipes/quickstart.yaml

test: $(INSTALLED)  ## run all checks and tests except the nightly ones
	$(MAKE) -j2 --output-sync=target lint fast  # types are checked on one core
	$(MAKE) slow

fast: $(INSTALLED)  ## run tests/unit; each test takes seconds at most
	$(BIN)/pytest -q tests/unit -n 2 --dist loadfile

slow: $(INSTALLED)  ## run tests/integration: runs on a real Ray, engines in several processes, a browser
	$(BIN)/pytest -q tests/integration -n 2 --dist loadfile

notebook: $(INSTALLED)  ## run the notebook with the whole story from top to bottom, in fewer steps, about 3 minutes
	$(BIN)/pytest -q -m nightly tests/unit/test_notebooks.py

gpu: $(INSTALLED)  ## run tests/gpu on one NVIDIA GPU, 8 minutes at most; without a GPU they are skipped
	$(BIN)/pytest -q -m gpu tests/gpu

nightly: lint $(INSTALLED) torchvision-tests  ## run every test, with full matrices and torchvision
	$(BIN)/pytest -q -m "nightly or not nightly" -n 2 --dist loadfile

root-tests: $(INSTALLED)  ## run the tests that need root, Slurm, mounts or networks of their own; none may be skipped
	ORPO_RAY_NO_SKIPS=1 $(BIN)/pytest -q -m "nightly or not nightly" tests/nightly/test_slurm.py \
	  tests/nightly/test_cut_link.py tests/integration/test_doctor.py tests/integration/test_damaged_checkpoints.py \
	  tests/unit/training/test_saving.py

torchvision-tests: $(TORCHVISION)/.installed  ## run the tests that need torchvision, in a separate environment (5.5 GB)
	$(TORCHVISION)/bin/pytest -q -m torchvision -n 2 --dist loadfile

lint: $(INSTALLED)  ## check style, types, and imports between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs docs-serve
docs: $(INSTALLED)  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

docs-serve: $(INSTALLED)  ## serve the documentation on http://127.0.0.1:8000 and rebuild it on changes
	$(BIN)/mkdocs serve --strict

# Without a GPU, torch comes from its CPU index (no CUDA packages); where that cannot be reached, from wherever pip
# is told to look. With a GPU, the default build is the right one, and torchvision serves the processors that want it.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null; then \
	  $(BIN)/pip install -q $(TORCH) torchvision; \
	elif ! $(BIN)/python -c "import torch" 2>/dev/null; then \
	  $(BIN)/pip install -q --retries 0 --index-url https://download.pytorch.org/whl/cpu $(TORCH) torchvision 2>/dev/null \
	    || $(BIN)/pip install -q $(TORCH); \
	fi
	$(BIN)/pip install -q -e ".[dev]"
# A torchvision that was built for another torch cannot be imported, and transformers with it cannot either.
	$(BIN)/python -c "import torchvision" 2>/dev/null || $(BIN)/pip uninstall -q -y torchvision 2>/dev/null
	touch $@

$(TORCHVISION)/.installed: pyproject.toml
	test -x $(TORCHVISION)/bin/python || $(PYTHON) -m venv $(TORCHVISION)
	$(TORCHVISION)/bin/pip install -q $(TORCH_AND_TORCHVISION)
	$(TORCHVISION)/bin/pip install -q -e ".[dev]"
	$(TORCHVISION)/bin/python -c "import torchvision"
	touch $@

clean:  ## remove the environment and the runs made here
	rm -rf $(VENV) $(TORCHVISION) runs
