"""A project with servers of its own, in a folder."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter
from prefect.client.schemas.sorting import FlowRunSort

from tests.local import free_port, run

PREFECT = str(Path(sys.executable).with_name("prefect"))


def tags_of_last_run(flow: str) -> set[str]:
    """Return the tags that a flow's newest run has in Prefect's pages."""
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(
            flow_filter=FlowFilter(name={"any_": [flow]}), sort=FlowRunSort.START_TIME_DESC, limit=1
        )
    return set(run.tags)


class Site:
    """A project with a Prefect server of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.environment = {
            **os.environ,
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_HOME": str(folder / "prefect-home"),
            "PWD": str(folder),  # what a shell sets, and prefect.yaml reads
            "PYTHONPATH": str(folder),
            "MLFLOW_TRACKING_URI": "",
            "GIT_CEILING_DIRECTORIES": str(folder.parent),
            "OMP_NUM_THREADS": "1",
        }
        self.processes: list[subprocess.Popen] = []

    def start(self, *words: str) -> subprocess.Popen:
        return self._begin(words[0], [PREFECT, *words])

    def serve(self) -> subprocess.Popen:
        """Start the server alone, as `operate` does."""
        words = ("--host", "127.0.0.1", "--port", str(self.port))
        return self._begin("server", [sys.executable, "-m", "pipelines.prefect_server", *words])

    def operate(self, **settings: str) -> subprocess.Popen:
        """Make the deployments and automations, and start a worker, and the server if need be; wait for all."""
        process = self._begin("operate", [sys.executable, "-m", "pipelines.operate"], **settings)
        deadline = time.monotonic() + 180
        while "Ready: " not in (said := (self.folder / "operate.log").read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        return process

    def _begin(self, name: str, command: list[str], **settings: str) -> subprocess.Popen:
        environment = {**self.environment, **settings}
        with open(self.folder / f"{name}.log", "w") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    cwd=self.folder,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return self.processes[-1]

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run([PREFECT, "--no-prompt", *words], 240, cwd=self.folder, env=self.environment)

    def wait_until_healthy(self, path: str = "/api/health") -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        raise TimeoutError(f"no server answers on port {self.port}; see the logs in {self.folder}")
