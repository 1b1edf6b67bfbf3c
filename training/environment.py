"""Go on with the Python of `make install`: scripts run this file when the Python that was called lacks the project."""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = REPOSITORY / ".venv"

if Path(sys.prefix) == ENVIRONMENT or not (ENVIRONMENT / "installed").exists():
    sys.exit(f"resnet_ensemble is not installed; run `make install` in {REPOSITORY}, then this again")
python = str(ENVIRONMENT / "bin" / "python")
os.execv(python, [python, *sys.orig_argv[1:]])  # noqa: S606  # no shell is wanted
