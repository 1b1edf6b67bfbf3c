# The commands of this repository. CI runs the same ones.
#   make serve   set up what serving needs and serve bundles/cifar10 on PORT (default 8000)
#   make test    set up what tests need and run all of them
#   make check   lint, format and types
#   make bench   the benchmarks
PORT ?= 8000
PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

SERVE = .venv-serve
DEV = .venv

.PHONY: serve install test check bench engines constraints clean

serve: $(SERVE)/installed
	RESNET_PORT=$(PORT) $(SERVE)/bin/python -m resnet_ensemble.server

install: $(DEV)/installed

test: $(DEV)/installed
	$(DEV)/bin/python -m pytest

# mypy does not follow setuptools' editable hook, so the folders are linked under the name that they are imported by.
check: $(DEV)/installed
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	mkdir -p build/links/resnet_ensemble
	ln -sfn $(CURDIR)/training build/links/resnet_ensemble/training
	ln -sfn $(CURDIR)/export build/links/resnet_ensemble/export
	ln -sfn $(CURDIR)/server build/links/resnet_ensemble/server
	ln -sfn $(CURDIR)/clients/python build/links/resnet_ensemble/client
	MYPYPATH=build/links $(DEV)/bin/mypy -p resnet_ensemble

bench: $(DEV)/installed
	$(DEV)/bin/python benchmarks/serving.py

engines: $(DEV)/installed
	$(DEV)/bin/python export/build_engines.py

# Versions that are known to work together, from the development environment.
constraints: $(DEV)/installed
	$(DEV)/bin/python -m pip freeze --exclude-editable | grep -viE '^(nvidia|cuda|triton==)' > constraints.txt

$(SERVE)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python $(PIP) --editable '.[server,cpu]'
	touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP) --editable '.[server,cpu,openvino,train,export,dev]'
	touch $@

clean:
	rm -rf build $(SERVE) $(DEV) *.egg-info
