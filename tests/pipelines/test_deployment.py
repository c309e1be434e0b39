"""A deployment, as a person runs it: a server, a work pool, a worker, `prefect deployment run`, COMPLETED."""

import re
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from websockets import Origin
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from pipelines import operate
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import save_dataset
from tests.local import Webhook, stop
from tests.pipelines.projects import PAIR, ROOT, copy_project, tiny_dataset, tiny_params, write_params
from tests.pipelines.sites import Site


@pytest.fixture(scope="module")
def on_call() -> Iterator[Webhook]:
    with Webhook() as webhook:
        yield webhook


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, on_call: Webhook) -> Iterator[Site]:
    """A server that was there before, and what `make operate` adds to it."""
    folder = tmp_path_factory.mktemp("site")
    copy_project(folder)
    save_dataset(folder / "data/mnist5k.safetensors", tiny_dataset())
    site = Site(folder)
    try:
        site.serve()
        site.wait_until_healthy()
        site.operate(PIXELCNN_NOTIFY_URL=on_call.url)
        yield site
    finally:
        for process in reversed(site.processes):
            stop(process)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_deployment_runs_to_completed(site: Site) -> None:
    run = ("deployment", "run", "train-pair/train-pair", "-p", "pair=gated_pixelcnn-mnist5k")
    done = site.prefect(*run, "--watch", "--watch-timeout", "150")
    log = (site.folder / "operate.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert "step 1, epoch" in log, "progress is in the worker's log"
    (out,) = site.folder.glob("models/deployments/*/gated_pixelcnn-mnist5k")
    assert load_checkpoint(out)[1]["dataset"] == "mnist5k"
    assert (site.folder / "mlflow.db").exists()
    assert list(site.folder.rglob("*.pkl")) == []
    # Prefect itself keeps nothing of a run but its state.
    assert list((site.folder / "prefect-home").glob("storage/*")) == []

    # A run that is cancelled stops its training; MLflow shows it as killed, and its folder is gone.
    params = tiny_params()
    params["pairs"][PAIR]["train"]["max_epochs"] = 10_000
    write_params(site.folder, params)
    done = site.prefect("deployment", "run", "train-pair/train-pair", "-p", f"pair={PAIR}")
    (run_id,) = set(re.findall(r"UUID: ([0-9a-f-]{36})", done.stdout))
    lock, trainer = site.folder / f"models/deployments/{run_id}/.{PAIR}.lock", ""
    deadline = time.monotonic() + 90
    while not list(lock.parent.glob(".trained/.*.run-*/run_id")):  # it trains
        assert time.monotonic() < deadline
        time.sleep(0.2)
    trainer = lock.read_text().split()[1]
    assert site.prefect("flow-run", "cancel", run_id).returncode == 0
    while Path(f"/proc/{trainer}").exists():
        assert time.monotonic() < deadline, "the training goes on"
        time.sleep(0.2)
    while lock.parent.exists():
        assert time.monotonic() < deadline, (site.folder / "operate.log").read_text()
        time.sleep(0.2)
    with sqlite3.connect(site.folder / "mlflow.db") as database:
        statuses = database.execute("select status from runs where name = ?", [PAIR]).fetchall()
    assert statuses == [("KILLED",)]

    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{site.port}/api"}):
        assert {one["folder"] for one in operate.read_server()[1].values()} == {str(site.folder)}

    # A page of another site may neither read runs nor start any.
    url = f"http://127.0.0.1:{site.port}/api/flow_runs/filter"
    asked = {"Origin": "http://elsewhere.test", "Access-Control-Request-Method": "POST"}
    assert httpx.options(url, headers=asked).status_code == 400
    answer = httpx.post(url, json={}, headers={"Origin": "http://elsewhere.test"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    address, other = f"127.0.0.1:{site.port}", f"elsewhere.test:{site.port}"
    for path in ("events/in", "events/out", "logs/out"):
        connect(f"ws://{address}/api/{path}", origin=Origin(f"http://{address}")).close()
        for origin in ("http://elsewhere.test", "http://["):
            with pytest.raises(InvalidStatus, match="403"):
                connect(f"ws://{address}/api/{path}", origin=Origin(origin))
        # Nor a page that makes its own name point to this machine.
        with pytest.raises(InvalidStatus, match="400"), socket.create_connection(("127.0.0.1", site.port)) as sock:
            connect(f"ws://{other}/api/{path}", origin=Origin(f"http://{other}"), sock=sock)
    assert httpx.get(f"http://{address}/api/csrf-token?client=a", headers={"Host": other}).status_code == 400


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_failed_watch_notifies(site: Site, on_call: Webhook) -> None:
    """As the runbooks say: by Prefect's own automation and webhook, whatever Prefect is told beside it."""
    run = ("deployment", "run", "evaluate-champions/evaluate-champions", "-p", 'datasets=["svhn"]')
    done = site.prefect(*run, "--watch", "--watch-timeout", "150")
    assert done.returncode == 1, "a failed run is a failed command"
    assert "ValueError: unknown dataset 'svhn'" in " ".join(done.stdout.split()), "whoever watches sees why"
    assert "Traceback" not in done.stdout
    text = on_call.told.get(timeout=60)["text"]
    assert text.startswith("evaluate-champions is Failed\n")
    assert "unknown dataset 'svhn'" in text
    assert on_call.told.empty()


def test_deployments_name_flows_that_exist() -> None:
    settings = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    deployments = {deployment["name"]: deployment for deployment in settings["deployments"]}
    assert {"train-pair", "train-all", "promote"} <= set(deployments)
    for deployment in deployments.values():
        path, function = deployment["entrypoint"].split(":")
        assert f"\ndef {function}(" in (ROOT / path).read_text()
        assert deployment["work_pool"]["name"] == "pixelcnn"
