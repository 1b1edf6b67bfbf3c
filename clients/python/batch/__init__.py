"""Batch jobs: any number of pictures, one row for each, whenever the job is killed and begun again.

from pathlib import Path
from resnet_ensemble.client import batch

summary = batch.run(batch.Job(("photos/",), Path("predictions.parquet")))
print(summary.total_rows, summary.total_errors, summary.exit_code)

The command for it is resnet-batch.
"""

from resnet_ensemble.client.batch._extras import MissingExtraError
from resnet_ensemble.client.batch._inputs import Columns
from resnet_ensemble.client.batch._job import Job, Summary, run
from resnet_ensemble.client.batch._output import OutputError
from resnet_ensemble.client.batch._places import InputError
from resnet_ensemble.client.batch._progress import Progress
from resnet_ensemble.client.batch._rows import COLUMNS
from resnet_ensemble.client.batch._servers import BundleUnusableError

__all__ = [
    "COLUMNS",
    "BundleUnusableError",
    "Columns",
    "InputError",
    "Job",
    "MissingExtraError",
    "OutputError",
    "Progress",
    "Summary",
    "run",
]
