"""MLflow's server, as the README starts it, against pages of other sites."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.local import stop
from tests.pipelines.sites import Site


@pytest.mark.slow
def test_other_sites_and_other_names_of_this_machine_are_refused(tmp_path: Path) -> None:
    site = Site(tmp_path)
    command = [str(Path(sys.executable).with_name("mlflow")), "ui", "--backend-store-uri", "sqlite:///mlflow.db"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(tmp_path / "mlflow.log", "w") as log:
        server = subprocess.Popen(
            [*command, "--port", str(site.port), "--workers", "1"],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        site.wait_until_healthy("/health")
        url = f"http://127.0.0.1:{site.port}/api/2.0/mlflow/experiments/create"
        for headers in ({"Origin": "http://elsewhere.test"}, {"Host": "elsewhere.test"}):
            assert httpx.post(url, json={"name": "theirs"}, headers=headers).status_code == 403
        assert httpx.post(url, json={"name": "ours"}).status_code == 200
    finally:
        stop(server)
