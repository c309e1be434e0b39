"""Faults with real servers and whole process trees: minutes each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pixelcnn.data import save_dataset
from tests.local import stop
from tests.pipelines.projects import PAIR, copy_project, tiny_dataset, tiny_params, write_params
from tests.pipelines.sites import Site
from tools.faults.check import DATASET, check, fine

WAIT_S = 400
AWAY_S = 30  # a server is away for
TRAIN = [sys.executable, "-m", "pipelines.steps", "train-pair", PAIR]
TRAIN += ["--out", f"models/{PAIR}", "--report", f"reports/{PAIR}"]


def wait_for(what: Callable[[], object], why: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.2)


def project(data: bool = True) -> None:
    """Make a project whose training takes some seconds and is saved at each step."""
    copy_project(Path())
    params = tiny_params()
    params["pairs"][PAIR]["train"] |= {"save_minutes": 0, "max_epochs": 2}
    params["evaluate"] = {"batch_size": 50, "num_images": 0}
    write_params(Path(), params)
    if data:
        save_dataset(Path("data") / f"{DATASET}.safetensors", tiny_dataset())


def begin(command: list[str], **settings: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", **settings}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr, start_new_session=True)


def state(folder: str = "models") -> list[Path]:
    return list(Path(folder).glob(f"**/.{PAIR}.run-*/state.safetensors"))


def dvc_case(whole_group: bool) -> None:
    """Kill `dvc repro` in the middle of a training, with it or alone, run it again; check, and ask dvc status."""
    project(data=False)
    subprocess.run(["git", "init", "-q"], check=True)
    repro = [sys.executable, "-m", "dvc", "repro", f"evaluate@{PAIR}"]
    process = begin(repro)
    wait_for(state, "the training did not begin")
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    assert begin(repro).wait(WAIT_S) == 0, "dvc repro failed"
    status = [sys.executable, "-m", "dvc", "status", f"evaluate@{PAIR}"]
    text = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    assert "up to date" in text, text
    assert begin([sys.executable, "-m", "pipelines.steps", "register", PAIR]).wait(WAIT_S) == 0, "not registered"
    fine(lambda: check(DATASET, num_versions=1, num_runs=1))


def mlflow_case() -> None:
    """Kill the MLflow server while a training is under way; it comes back after half a minute."""
    project()
    site = Site(Path.cwd())
    url = f"http://127.0.0.1:{site.port}"
    words = ["server", "--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "mlartifacts"]
    words += ["--host", "127.0.0.1", "--port", str(site.port), "--workers", "1"]
    command = [str(Path(sys.executable).with_name("mlflow")), *words]
    server = begin(command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    try:
        site.wait_until_healthy("/health")
        os.environ["MLFLOW_TRACKING_URI"] = url
        trainer = begin(TRAIN)
        wait_for(state, "the training did not begin")
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        time.sleep(AWAY_S)
        server = begin(command, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        site.wait_until_healthy("/health")
        if trainer.wait(WAIT_S) != 0:
            assert begin(TRAIN).wait(WAIT_S) == 0, "the second training failed"
        fine(lambda: check(DATASET, num_versions=1, num_runs=1))
    finally:
        stop(server)


def prefect_case() -> None:
    """Kill the Prefect server while a training is under way."""
    project()
    site = Site(Path.cwd())
    words = ("server", "start", "--host", "127.0.0.1", "--port", str(site.port))
    server = site.start(*words)
    try:
        site.wait_until_healthy()
        url = site.environment["PREFECT_API_URL"]
        trainer = begin(TRAIN, PREFECT_API_URL=url)
        wait_for(state, "the training did not begin")
        os.killpg(server.pid, signal.SIGKILL)
        failed = trainer.wait(WAIT_S) != 0
        server = site.start(*words)
        site.wait_until_healthy()
        if failed:
            assert begin(TRAIN, PREFECT_API_URL=url).wait(WAIT_S) == 0, "the second training failed"
        fine(lambda: check(DATASET, num_versions=1, num_runs=1))
    finally:
        for process in site.processes:
            stop(process)


def worker_case() -> None:
    """Kill a worker and its run: the run is seen as crashed and started again, from its checkpoint, with no rerun."""
    project()
    params = tiny_params()
    params["pairs"][PAIR]["train"] |= {"save_minutes": 0, "max_epochs": 40}
    write_params(Path(), params)
    site = Site(Path.cwd())
    try:
        operate = site.operate()
        done = site.prefect("deployment", "run", "train-pair/train-pair", "-p", f"pair={PAIR}")
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for(lambda: state("models/deployments"), "the training did not begin")
        (lock,) = Path("models/deployments").glob(f"*/.{PAIR}.lock")
        os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
        children = Path(f"/proc/{operate.pid}/task/{operate.pid}/children").read_text().split()
        (worker,) = [pid for pid in children if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(worker), signal.SIGKILL)
        wait_for(lambda: list(Path("models/deployments").glob(f"*/{PAIR}/scores.json")), "it was not started again")
        wait_for(lambda: not state("models/deployments"), "it did not end")
        (flow_run,) = [path.name for path in Path("models/deployments").iterdir()]
        inspected = site.prefect("flow-run", "inspect", flow_run, "--output", "json").stdout
        assert json.loads(inspected)["run_count"] == 2, inspected
        fine(lambda: check(DATASET, num_versions=1, num_runs=1))
    finally:
        for process in site.processes:
            stop(process)


def cases() -> dict[str, Callable[[], None]]:
    """Return the cases, by name."""
    return {
        "dvc repro and its training killed": lambda: dvc_case(whole_group=True),
        "dvc repro killed, its training lives on": lambda: dvc_case(whole_group=False),
        f"MLflow server killed, away for {AWAY_S} s": mlflow_case,
        "Prefect server killed": prefect_case,
        "worker and its run killed (started again by itself)": worker_case,
    }
