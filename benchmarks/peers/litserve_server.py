"""The same model in LitServe.

    python -m benchmarks.peers.litserve_server --bundle bundles/cifar10 --port 8002 --workers 2 --threads 1 --batch 8

Batching is as its documentation shows it (`max_batch_size=8` with `batch` and `unbatch`), but for the timeout: there
0.1 s, which every request that is alone would wait. It is 1 ms here, which is as often as LitServe's loop looks.
"""

from typing import Any

import litserve
from fastapi import Request

from benchmarks.peers.model import Model, arguments

_BATCH_TIMEOUT = 0.001  # seconds


class Api(litserve.LitAPI):  # type: ignore[misc]
    """Decode, batch, run, take apart."""

    def __init__(self, model: dict[str, Any], batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=_BATCH_TIMEOUT if batch > 1 else 0.0)
        self._settings = model
        self._batched = batch > 1

    def setup(self, device: str) -> None:  # noqa: ARG002  # it is always the CPU
        """In each worker."""
        self._model = Model(**self._settings)

    def decode_request(self, request: Request) -> Any:
        """A form with a file. LitServe reads the annotation as the kind of request, and gives the parsed form."""
        return self._model.views(request["image"].file.read())

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Members may want views of different sizes, so arrays are joined by the model."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Answers for a batch, or for one picture where there are no batches."""
        return self._model.run(x) if self._batched else self._model.run([x])[0]

    def unbatch(self, output: Any) -> Any:
        """One answer a request."""
        return output

    def encode_response(self, output: Any) -> Any:
        """It is a dictionary already."""
        return output


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="largest batch; 1 is none")
    given = parser.parse_args()
    api = Api({"bundle": given.bundle, "protocol": given.protocol, "threads": given.threads}, given.batch)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=given.workers, timeout=False)
    server.run(host="127.0.0.1", port=given.port, generate_client_file=False, log_level="warning")
