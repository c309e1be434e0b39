"""A deployment, as a person runs it: a server, a work pool, a worker, `prefect deployment run`, COMPLETED."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from projects import ROOT, copy_project, tiny_dataset

from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import save_dataset

PREFECT = str(Path(sys.executable).with_name("prefect"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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

    def start(self, *words: str) -> None:
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

    def prefect(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PREFECT, "--no-prompt", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.3)
        raise TimeoutError((self.folder / "server.log").read_text())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    copy_project(tmp_path)
    save_dataset(tmp_path / "data/mnist5k.safetensors", tiny_dataset())
    site = Site(tmp_path)
    try:
        site.start("server", "start", "--host", "127.0.0.1", "--port", str(site.port))
        site.wait_until_healthy()
        yield site
    finally:
        for process in reversed(site.processes):
            stop(process)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_deployment_runs_to_completed(site: Site) -> None:
    done = site.prefect("work-pool", "create", "pixelcnn", "--type", "process", "--overwrite")
    assert done.returncode == 0, done.stdout + done.stderr
    done = site.prefect("deploy", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    site.start("worker", "start", "--pool", "pixelcnn")

    run = ("deployment", "run", "train-pair/train-pair", "--watch", "--watch-timeout", "150")
    done = site.prefect(*run, "-p", "pair=gated_pixelcnn-mnist5k")
    log = (site.folder / "worker.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert "step 1, epoch" in log, "progress is in the worker's log"
    (out,) = site.folder.glob("models/deployments/*/gated_pixelcnn-mnist5k")
    assert load_checkpoint(out)[1]["dataset"] == "mnist5k"
    assert (site.folder / "mlflow.db").exists()
    assert list(site.folder.rglob("*.pkl")) == []
    # Prefect itself keeps nothing of a run but its state.
    assert list((site.folder / "prefect-home").glob("storage/*")) == []

    done = site.prefect(*run, "-p", "pair=pixelcnn-svhn")
    assert done.returncode == 1, "a failed run is a failed command"
    assert "unknown pair 'pixelcnn-svhn'" in (site.folder / "worker.log").read_text()


def test_deployments_name_flows_that_exist() -> None:
    settings = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    deployments = {deployment["name"]: deployment for deployment in settings["deployments"]}
    assert {"train-pair", "train-all", "promote"} <= set(deployments)
    for deployment in deployments.values():
        path, function = deployment["entrypoint"].split(":")
        assert f"\ndef {function}(" in (ROOT / path).read_text()
        assert deployment["work_pool"]["name"] == "pixelcnn"
