# Everything runs in .venv, which these targets make and refresh by themselves.

PY  := .venv/bin/python
# Most modules are never imported: each is compiled at its first import, once, and not by every process.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

# PyTorch, for the parity tests only. Its CPU and CUDA builds share this version and differ in hashes, so no lock file
# can hold it. On Linux the default index gives the CUDA build, several GB with the CUDA packages that it cannot be
# imported without (hence no --no-deps). With a CPU wheel at hand: make test TORCH=path/to/torch-2.13.0+cpu-….whl
TORCH ?= torch==2.13.0
# The same holds for torchvision, of which the tests use only networks, which are Python (tests/conftest.py).
TORCHVISION ?= torchvision==0.28.0

# The first of these that runs and is 3.11, 3.12 or 3.13 makes .venv. TensorFlow has no wheels for 3.14 yet.
PYTHON ?= python3 python3.13 python3.12 python3.11

# Passed to the program that a target runs: make train ARGS="--config.seed=1", make test ARGS="-k stem".
ARGS ?=

# An environment whose interpreter is gone (an upgraded system, a copied folder) is made anew.
$(shell $(PY) -c '' 2>/dev/null || rm -f .venv/.runtime .venv/.test)

.PHONY: help train study test drill lint format lock check-install clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' Makefile

train: .venv/.runtime  ## Train the quickstart model (ARGS="--config.…=…")
	$(PY) -m convstem_jax.main --config configs/quickstart.py $(ARGS)

study: .venv/.runtime  ## Run the short stability study and write its report
	$(PY) -m convstem_jax.study $(ARGS)

test: .venv/.test  ## Run the tests (ARGS="-k …")
	$(PY) -m pytest $(ARGS)

drill: .venv/.test  ## Run the long tests of several processes, saves and TPUs (more than half an hour on 2 cores)
	DRILL=1 $(PY) -m pytest -n0 --timeout=1200 tests/test_processes.py tests/test_checkpoint.py tests/test_preflight.py \
		tests/test_tpu_forms.py $(ARGS)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PY) -m pytest -n0 --timeout=1200 tests/test_train.py -k "evaluated or interrupted"

lint: .venv/.test  ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/.test  ## Fix style and formatting
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

UV_COMPILE = uv pip compile --quiet --no-config --no-python-downloads --universal --python-version 3.11 \
  --generate-hashes --custom-compile-command "make lock" $(ARGS)

lock:  ## Regenerate the lock files (ARGS=--upgrade for newer versions)
	@uv --version >/dev/null || { echo 'make lock needs uv: pip install uv' >&2; exit 1; }
	$(UV_COMPILE) requirements.txt -o requirements.lock
	$(UV_COMPILE) requirements-test.txt -c requirements.lock -o requirements-test.lock
	$(UV_COMPILE) requirements-tpu.txt -c requirements.lock -o requirements-tpu.lock
	$(UV_COMPILE) requirements-gpu.txt -c requirements.lock -o requirements-gpu.lock

check-install:  ## Install the lock files of TPU and GPU machines into empty environments (4 GB to fetch)
	for d in tpu gpu; do \
	  python3 -m venv --clear build/$$d && \
	  build/$$d/bin/python -m pip install --require-hashes -r requirements.lock -r requirements-$$d.lock && \
	  build/$$d/bin/python -m pip check || exit 1; \
	done

clean:  ## Remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last: an install that was cut off is started again, from an empty .venv.
.venv/.runtime: requirements.lock
	@for p in $(PYTHON); do \
	  "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && python=$$p && break; \
	  v=$$("$$p" --version 2>&1) && found="$$found $$p is $$v."; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Python 3.11, 3.12 or 3.13 is needed.$${found:- None of these runs: $(PYTHON).}" \
	    "Install one and name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	"$$python" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$$python lacks the venv module. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	echo "Making .venv with $$("$$python" --version) and installing requirements.lock (0.6 GB to fetch, about 2 minutes) ..."; \
	"$$python" -m venv --clear .venv
	@$(PIP) --require-hashes -r requirements.lock
	@touch $@

.venv/.test: requirements-test.lock requirements-tpu.lock .venv/.runtime
	@echo 'Installing requirements-test.lock and $(TORCH) (about 1 minute, longer for a CUDA build) ...'
	@$(PIP) --require-hashes -r requirements-test.lock
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(PIP) --require-hashes -r requirements-tpu.lock; fi  # the TPU compiler
	@$(PIP) $(TORCH)
	@$(PIP) --no-deps $(TORCHVISION)
	@touch $@
