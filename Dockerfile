# The server, on a CPU, or with ONNX Runtime for NVIDIA GPUs (--target gpu; not yet run on one):
#   docker build --target cpu -t resnet-ensemble .
#   docker run -p 8000:8000 resnet-ensemble           # with --gpus all for the other target
# Nothing is fetched at start: the CIFAR-10 bundle is inside. For another one: -v DIR:/bundle -e RESNET_BUNDLE=/bundle,
# and its engines, if export/build_engines.py has built them on such a host: -v DIR.engines:/bundle.engines
FROM python:3.13-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 RESNET_HOST=0.0.0.0
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY training ./training
COPY export ./export
COPY server ./server
COPY clients ./clients
COPY bundles ./bundles
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://localhost:' + os.environ.get('RESNET_PORT', '8000') + '/readyz', timeout=2)"]
CMD ["python", "-m", "resnet_ensemble.server"]

FROM base AS gpu
RUN python -m pip install --constraint constraints.txt '.[server,gpu]'
WORKDIR /
USER 10001

FROM base AS cpu
RUN python -m pip install --constraint constraints.txt '.[server,cpu,openvino]'
WORKDIR /
USER 10001
