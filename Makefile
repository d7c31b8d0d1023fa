# Every target works from nothing: the virtual environment is built first where it is missing.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-cluster test-gpu lint bench wheel clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/python -m distributed.demo $(if $(PICTURES),--pictures "$(PICTURES)")

# Two processes, each a file at a time: they fill two cores, and no machine is overloaded.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

# Ray nodes that are lost with their disks; a run whose storage is an S3-compatible server.
test-cluster: $(STAMP)
	$(BIN)/python -m pytest -q -m slow tests/test_cluster_storage.py tests/test_nodes.py tests/test_lost_nodes.py tests/test_autoscaling.py

# A GPU machine without a package registry may have the packages in its own python3.
test-gpu:
	@test -x $(BIN)/python || python3 -c "import deepspeed, pytest, ray, torch" 2>/dev/null || $(MAKE) $(STAMP)
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || echo python3); \
	$$python -m pytest -q -m gpu --durations=5 tests/gpu tests/test_official.py tests/test_profiling.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python bench/model.py
	$(BIN)/python bench/stream.py
	$(BIN)/python bench/overhead.py

# The project as one file with its compiled parts, for the nodes of a cluster, and unpacked for its
# jobs (`ray job submit --working-dir dist/job`). Build it on Linux with the nodes' processor.
wheel: $(STAMP)
	rm -rf dist build deploy/node/*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	@for part in _kernels16 _kernels8 _pixels _jpeg; do \
	  $(BIN)/python -m zipfile -l dist/*.whl | grep -q "$$part.*so" || echo "warning: the wheel \
	lacks $$part: see pip's output with a C compiler and libjpeg's headers (libjpeg-dev)"; done
	$(BIN)/python -m zipfile -e dist/*.whl dist/job
	cp dist/*.whl constraints.txt deploy/node/

# The token without which nobody talks to the cluster.
deploy/node/ray.token:
	umask 077 && openssl rand -hex 32 > $@

clean:
	rm -rf $(VENV) dist build data/demo runs/demo .pytest_cache .mypy_cache .ruff_cache

# The seconds that the installation took are written down: the demo's summary shows them.
$(STAMP): pyproject.toml constraints.txt
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" && \
	echo $$(( $$(date +%s) - start )) > $(STAMP)
