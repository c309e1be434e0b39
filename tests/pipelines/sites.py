"""A project with servers of its own, in a folder."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.local import free_port

PREFECT = str(Path(sys.executable).with_name("prefect"))


def stop(process: subprocess.Popen) -> None:
    """End a process group: a worker that is told once may wait for its runs."""
    for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sent)
            try:
                process.wait(timeout=8)
            except subprocess.TimeoutExpired:
                continue
    process.wait()


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
        with open(self.folder / f"{words[0]}.log", "w") as log:
            self.processes.append(
                subprocess.Popen(
                    [PREFECT, *words],
                    cwd=self.folder,
                    env=self.environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return self.processes[-1]

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PREFECT, "--no-prompt", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def wait_until_healthy(self, path: str = "/api/health") -> None:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        raise TimeoutError(f"no server answers on port {self.port}; see the logs in {self.folder}")
