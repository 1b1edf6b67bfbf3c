# The commands of this repository. CI runs the same ones. Python 3.11 or newer; PYTHON=python3.13 for another one.
#   make serve   set up what serving needs and serve bundles/cifar10 on PORT (default 8000)
#   make install a development environment in .venv
#   make test    set up what tests need and run all of them
#   make check   lint, format and types
#   make bench   this server beside others; ARGS="bundles/mine --images PHOTOS" for another bundle
#   make gpu-check        what of this holds on this host's NVIDIA GPU: sets up TensorRT, writes a report in build/
#   make types-tensorrt   the TensorRT files against the real bindings of TensorRT 11.4; needs a C compiler, no GPU
#   make constraints      write the versions that are installed in .venv into constraints.txt
#   make clean            remove the environments and what was built
PORT ?= $(or $(RESNET_PORT),8000)
PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

SERVE = .venv-serve
DEV = .venv
PEERS = .venv-peers
GPU = .venv-gpu

.PHONY: serve install test check bench gpu-check types-tensorrt links constraints clean

serve: $(SERVE)/installed
	RESNET_PORT=$(PORT) exec $(SERVE)/bin/python -m resnet_ensemble.server

install: $(DEV)/installed

# Two processes, each with files of its own: many tests wait for a server. By itself, pytest runs them one by one.
test: $(DEV)/installed
	$(DEV)/bin/python -m pytest --numprocesses 2 --dist loadfile

# mypy does not follow setuptools' editable hook, so the folders are linked under the name that they are imported by.
links:
	mkdir -p build/links/resnet_ensemble
	ln -sfn $(CURDIR)/training build/links/resnet_ensemble/training
	ln -sfn $(CURDIR)/export build/links/resnet_ensemble/export
	ln -sfn $(CURDIR)/server build/links/resnet_ensemble/server
	ln -sfn $(CURDIR)/clients/python build/links/resnet_ensemble/client

check: $(DEV)/installed links
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	MYPYPATH=build/links $(DEV)/bin/mypy -p resnet_ensemble -p benchmarks

bench: $(DEV)/installed $(PEERS)/installed
	$(DEV)/bin/python -m benchmarks.serving --peers $(PEERS)/bin/python $(ARGS)

BUNDLE ?= bundles/cifar10
gpu-check:
	@if $(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null; \
	then $(MAKE) $(GPU)/installed && $(GPU)/bin/python export/gpu_check.py $(BUNDLE); \
	else echo "no GPU to check: NVIDIA's driver (libcuda.so.1) is not here"; fi

types-tensorrt: $(DEV)/installed links
	$(DEV)/bin/python tests/types/check_tensorrt.py

# Versions that are known to work together, from the development environment.
constraints: $(DEV)/installed
	$(DEV)/bin/python -m pip freeze --exclude-editable | grep -viE '^(nvidia|cuda-toolkit|triton=)' > constraints.txt

$(SERVE)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(SERVE)
	$(SERVE)/bin/python $(PIP) --editable '.[server,cpu,openvino]'
	touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(DEV)
	$(DEV)/bin/python $(PIP) --editable '.[server,cpu,openvino,train,export,batch,dev]'
	touch $@

# TensorRT and ONNX Runtime for GPUs, some GB. Apart, since the two packages of ONNX Runtime write the same files.
$(GPU)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(GPU)
	$(GPU)/bin/python $(PIP) --editable '.[server,gpu,tensorrt]'
	touch $@

# The servers that ours is measured beside, in an environment of their own.
$(PEERS)/installed: benchmarks/peers/requirements.txt pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python $(PIP) --requirement benchmarks/peers/requirements.txt
	$(PEERS)/bin/python $(PIP) --no-deps --editable .
	touch $@

clean:
	rm -rf build $(SERVE) $(DEV) $(PEERS) $(GPU) *.egg-info
