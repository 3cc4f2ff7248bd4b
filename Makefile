# `make demo` and `make test` each do all their own set-up on a fresh machine (virtual environment included).
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint app clean
demo: $(VENV)/.runtime  ## detect faces in a public-domain photo, write runs/demo/
	$(PY) detect.py "$$($(PY) -c 'import matplotlib.cbook as c; print(c.get_sample_data("grace_hopper.jpg", asfileobj=False))')" --out runs/demo

test: $(VENV)/.dev  ## lint and the whole test suite
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m pytest

lint: $(VENV)/.dev  ## fix what ruff can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

app: $(VENV)/.app  ## the web page: drop a photo, see faces
	$(PY) app.py

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: requirements.txt | $(VENV)/.venv
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(PIP) -r requirements-dev.txt
	touch $@

$(VENV)/.app: requirements-app.txt $(VENV)/.runtime
	$(PIP) -r requirements-app.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
