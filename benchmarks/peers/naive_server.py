"""The server that people write first: FastAPI, a session of ONNX Runtime, one run a request, on a thread of the pool.

    python -m benchmarks.peers.naive_server --bundle bundles/cifar10 --port 8001

uvicorn takes uvloop and httptools where they are installed.
"""

import uvicorn
from fastapi import FastAPI, UploadFile

from benchmarks.peers.model import Model, arguments


def create_app(model: Model) -> FastAPI:
    """One route. It is no coroutine, so Starlette runs it on its threads, 40 at most."""
    app = FastAPI()

    @app.post("/predict")
    def predict(image: UploadFile) -> dict[str, str | int | float]:
        (answer,) = model.run([model.views(image.file.read())])
        return answer

    return app


if __name__ == "__main__":
    given = arguments(__doc__).parse_args()
    app = create_app(Model(given.bundle, given.protocol, given.threads))
    uvicorn.run(app, host="127.0.0.1", port=given.port, access_log=False, log_level="warning")
