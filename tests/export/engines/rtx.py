"""Graphs through the real compiler of TensorRT-RTX, which needs no GPU. In its own process: a fault there is a crash.

    python tests/export/engines/rtx.py JOBS.json     # a list of jobs; each one's answer is printed as a line of JSON

A job names a `graph` file, `crop` and `resize` of its views, and may have a `precision` that its layers should have.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorrt_rtx

from resnet_ensemble.export.engines import EngineBuildError
from resnet_ensemble.export.engines.tensorrt_builder import Timings, build, check_types
from resnet_ensemble.export.engines.tensorrt_profiles import Profile, profiles
from resnet_ensemble.training.views import Preprocessing

TIMINGS = Timings()


def compile_one(job: dict[str, Any]) -> dict[str, Any]:
    seen = Preprocessing(job["resize"], job["crop"], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    sizes = [Profile(*map(tuple, profile)) for profile in job["profiles"]] if "profiles" in job else profiles(seen)
    began = time.process_time()
    try:
        graph = Path(job["graph"]).read_bytes()
        plan = build(tensorrt_rtx, graph, sizes, timings=TIMINGS, workspace=job.get("workspace"))
        if "precision" in job:
            check_types(plan.layers, job["precision"])
    except EngineBuildError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {
        "layers": plan.layers,
        "bytes": len(plan.content),
        "seconds": round(time.process_time() - began, 2),
        "version": tensorrt_rtx.__version__,
    }


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(compile_one(job)), flush=True)
