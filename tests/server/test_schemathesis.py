"""What /openapi.json says is what the server does: schemathesis, unmodified, against a server process."""

import os
import subprocess
import sys
from pathlib import Path

from tests.server.test_process import metric, process, wait_until_ready

KEY = "0123456789abcdef"


def test_schemathesis_finds_no_failure(root: Path, tmp_path: Path) -> None:
    with process(RESNET_BACKEND="fake", RESNET_ADMIN_KEY=KEY) as (running, url):
        wait_until_ready(url)
        # Its own main function: the script may not be on the path of whoever runs the tests.
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"]
        command += ["--config-file", str(root / "schemathesis.toml"), "run", f"{url}/openapi.json"]
        command += ["--checks", "all", "--max-examples", "10", "--seed", "1", "--generation-deterministic"]
        command += ["--header", f"Authorization: Bearer {KEY}", "--no-color"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        found = subprocess.run(
            command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

        assert found.returncode == 0, found.stdout + found.stderr
        assert "18 selected / 18 total" in found.stdout  # the admin's and the Open Inference Protocol's among them
        of_version = (
            "/v2/models/{name}/versions/{version}/infer"  # of which schemathesis.toml names the one that is there
        )
        assert metric(url, f'resnet_requests_total{{method="POST",route="{of_version}",status="200"}}') > 0
        assert running.poll() is None
