"""The service as a platform and an operator see it: two real ones over one store, in processes of their own."""

import asyncio
import fcntl
import json
import os
import signal
import sys
from datetime import UTC, datetime

import httpx
import psutil
import pytest
import uvicorn

from app.service.champions import Champions
from app.service.operation.readiness import drain_on_sigterm, draining, why_not_ready
from app.service.settings import settings
from pipelines.registry import store
from tests.local import Handler, LocalServer, run
from tests.service.champions import COLOUR, GREY, put, wait_until
from tests.service.served import serving
from tests.service.test_metrics import read

REQUEST = {"dataset": "grey", "num_samples": 2, "seed": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("operated") / ".bentoml"
    home.mkdir()
    return home


@pytest.fixture(scope="module")
def collector():
    """A collector of traces: its address, and the bodies that came."""
    traces = []

    class Taking(Handler):
        def do_POST(self) -> None:
            traces.append(self.rfile.read(int(self.headers["content-length"])))
            self.reply(200)

    with LocalServer(Taking) as server:
        yield server.url, traces


@pytest.fixture(scope="module")
def served(home, collector):
    endpoint, traces = collector
    values = {"PIXELCNN_DATASETS": "grey", "PIXELCNN_DRAIN_S": "4", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    temporary = home.parent / "temporary"
    temporary.mkdir()
    with serving(home, home.parent / "log", **values, OTEL_BSP_SCHEDULE_DELAY="500", TMPDIR=str(temporary)) as served:
        served.traces = traces
        yield served


def get(served, path: str) -> httpx.Response:
    return httpx.get(served.url + path, timeout=30)


def post(served, **headers: str) -> httpx.Response:
    return httpx.post(f"{served.url}/generate", json=REQUEST, headers=headers, timeout=60)


def metric(served, start: str) -> float:
    lines = get(served, "/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(start))


def test_only_this_machine_reaches_it(served):
    processes = [served.process.pid, *served.workers()]
    sockets = [one for process in processes for one in psutil.Process(process).net_connections("tcp")]
    listening = {one.laddr for one in sockets if one.status == psutil.CONN_LISTEN}
    assert served.port in {port for _, port in listening}
    assert {address for address, _ in listening} == {"127.0.0.1"}


@pytest.fixture
def promote(served, home, monkeypatch):
    """Makes a dataset's champion, unless an earlier test of this module has, and waits until it is served."""
    monkeypatch.setenv("BENTOML_HOME", str(home))

    def promote(dataset, config) -> None:
        if dataset not in get(served, "/models").json():
            store.serve(put(home.parent, dataset, config, "1", seed=0))
            wait_until(lambda: dataset in get(served, "/models").json())

    return promote


@pytest.fixture
def champions(promote):
    promote("colour", COLOUR)
    promote("grey", GREY)


def test_it_is_ready_once_a_champion_of_each_wanted_dataset_is_served(served, promote):
    """The first test of this service."""
    answer = get(served, "/readyz")
    assert answer.status_code == 503
    assert answer.json()["error"].startswith("no champion of grey is served: promote a model")
    assert get(served, "/livez").status_code == 200
    promote("colour", COLOUR)
    assert get(served, "/readyz").status_code == 503
    promote("grey", GREY)
    wait_until(lambda: get(served, "/readyz").status_code == 200)
    wait_until(lambda: metric(served, "pixelcnn_ready") == 1)


@pytest.mark.slow
@pytest.mark.usefixtures("champions")
def test_a_second_service_of_the_store_does_not_spoil_the_first_ones_counts(served, home):
    count = 'pixelcnn_request_seconds_count{dataset="grey",endpoint="generate"}'
    post(served)
    before = metric(served, count)
    assert before >= 1
    with serving(home, home.parent / "second-log") as second:
        assert get(second, "/models").json() == get(served, "/models").json()  # from the start, BENTOML_HOME unset
        assert metric(served, count) == before
        assert metric(second, count) == 0
        post(served)
        assert metric(served, count) == before + 1


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == "default-src 'none'"
    assert "http" not in answer.text
    assert "<script" not in answer.text
    for link in ("models", "docs.json", "readyz"):
        assert f'href="{link}"' in answer.text
        assert client.get(f"/{link}").status_code == 200
    assert client.get("/docs").status_code == 404, "FastAPI's page is another server's script"


def lines_of(served) -> list[dict]:
    """Return the lines of the requests, all of which must be JSON from the start of the worker on."""
    return [json.loads(line) for line in served.log.read_text().splitlines() if '"message": "request"' in line]


@pytest.mark.usefixtures("champions")
def test_each_request_is_a_line_with_its_id_and_nothing_of_the_drawing(served):
    image = [[1, 0, 1, 0]] * 5
    body = {"dataset": "grey", "image": image, "observed": [[1] * 4] * 2 + [[0] * 4] * 3}
    for number, (path, status) in enumerate(
        (("/complete", 200), ("/complete_stream", 200), ("/complete?image=1", 400))
    ):
        sent = body if status == 200 else {**body, "dataset": "grey", "image": "drawing"}
        answer = httpx.post(served.url + path, json=sent, headers={"X-Request-Id": f"id-{number}"})
        assert answer.status_code == status
        assert answer.headers["x-request-id"] == f"id-{number}"
        wait_until(lambda id=answer.headers["x-request-id"]: [x for x in lines_of(served) if x["request_id"] == id], 10)
        line = [x for x in lines_of(served) if x["request_id"] == answer.headers["x-request-id"]][-1]
        known = {"time", "level", "message", "request_id", "method", "path", "status", "seconds", "dataset", "version"}
        assert set(line) == known | ({"waited_s"} if status == 200 else set())
        assert (line["dataset"], line["version"], line["status"]) == ("grey", "1", status)
        assert line["path"] == path.partition("?")[0]
        assert abs((datetime.fromisoformat(line["time"]) - datetime.now(UTC)).total_seconds()) < 60
    for bad in ("", "x" * 65, "a b", "line\tbreak", "\xe9"):
        answer = httpx.get(f"{served.url}/models", headers={"X-Request-Id": bad.encode("latin-1")})
        assert answer.headers["x-request-id"] != bad
        assert len(answer.headers["x-request-id"]) == 16
    assert metric(served, 'pixelcnn_requests_total{path="/complete",status="400"}') == 1
    answer = httpx.get(f"{served.url}/from-outside{'x' * 100}")
    named = answer.headers["x-request-id"]
    wait_until(lambda: [x for x in lines_of(served) if x["request_id"] == named], 10)
    [path] = [x["path"] for x in lines_of(served) if x["request_id"] == named]
    assert path == f"/from-outside{'x' * 47}", "60 characters of it"
    assert metric(served, 'pixelcnn_requests_total{path="other",status="404"}') == 1
    assert "from-outside" not in get(served, "/metrics").text
    httpx.get(f"{served.url}/readyz")
    assert not [line for line in served.log.read_text().splitlines() if "readyz" in line]


@pytest.mark.usefixtures("champions")
def test_traces_are_sent_where_an_endpoint_is_set(served):
    """It is set for all tests of this service; the collector is the one of the fixture `collector`."""
    answer = post(served)
    assert answer.status_code == 200
    wait_until(lambda: b"POST /generate" in b"".join(served.traces), 20)


def test_its_variables_reach_gate_and_timer_and_without_an_endpoint_nothing_that_sends_traces_is_loaded():
    code = """
import pathlib, sys
from bentoml._internal.configuration.containers import BentoMLContainer
from app.service import PixelCNNService as service
from app.service.gate import Gate
print([name for name in sys.modules if "opentelemetry.exporter" in name])
print(dict(service.middlewares)[Gate], service.config["traffic"])
print(pathlib.Path(BentoMLContainer.prometheus_multiproc_dir.get()).parent)
"""
    variables = {"PIXELCNN_TOKEN": " s3cret\n", "PIXELCNN_TIMEOUT_S": "7", "TMPDIR": ""}
    done = run([sys.executable, "-c", code], env={**os.environ, **variables})
    # Not on a disk: once that is full, who counts there is killed.
    counts = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    assert done.stdout.splitlines() == ["[]", "{'token': 's3cret'} {'timeout': 7}", counts], done.stderr


def test_counts_of_a_killed_service_are_removed_by_the_next(tmp_path):
    for name in ("left", "held", "empty"):
        (tmp_path / f"pixelcnn-metrics-{name}").mkdir()
    for name in ("left", "held"):
        (tmp_path / f"pixelcnn-metrics-{name}/counter_1.db").touch()
    code = """
import fcntl, os
import app.service
own = os.open(app.service._counts.name, os.O_RDONLY)
try:
    fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(*sorted(os.listdir(os.environ["TMPDIR"])))
"""
    held = os.open(tmp_path / "pixelcnn-metrics-held", os.O_RDONLY)  # as a service that runs does
    fcntl.flock(held, fcntl.LOCK_EX)
    done = run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    os.close(held)
    there = done.stdout.split()
    assert len(there) == 3, done.stderr
    assert {"pixelcnn-metrics-empty", "pixelcnn-metrics-held"} < set(there)  # an empty one is about to be held
    assert {path.name for path in tmp_path.iterdir()} == {"pixelcnn-metrics-empty", "pixelcnn-metrics-held"}


@pytest.mark.slow
@pytest.mark.usefixtures("champions")
def test_sigterm_ends_readiness_first_and_answers_afterwards(served, home):
    """The last test of this service."""
    served.process.send_signal(signal.SIGTERM)
    wait_until(lambda: get(served, "/readyz").status_code == 503, 3)
    assert get(served, "/livez").status_code == 200
    answer = post(served)
    assert answer.status_code == 200
    assert answer.headers["connection"] == "close"
    served.process.wait(30)
    with pytest.raises(httpx.ConnectError):
        post(served)
    assert list((home.parent / "temporary").iterdir()) == []


# In this process.


def test_a_refused_champion_is_counted_until_a_good_one_comes(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    (tmp_path / "bentoml").mkdir()
    champions = Champions(tmp_path / "bentoml/models")
    tag = put(tmp_path, "refused", GREY, "1", seed=0)
    (tmp_path / "bentoml/models" / tag.replace(":", "/") / "config.json").write_text("{")
    store.serve(tag)
    champions.refresh()
    assert read("pixelcnn_champion_refused", dataset="refused") == 1
    assert f"{tag} cannot be served" in caplog.text
    store.serve(put(tmp_path, "refused", GREY, "2", seed=0))
    champions.refresh()
    assert read("pixelcnn_champion_refused", dataset="refused") == 0
    assert read("pixelcnn_store_readable") == 1
    champions.folder.rename(tmp_path / "gone")
    # The service of the other tests, which may run in this process, too, sets it anew ten times a second.
    wait_until(lambda: champions.refresh() or read("pixelcnn_store_readable") == 0)


def test_without_named_datasets_one_of_any_is_enough(monkeypatch):
    assert "no champion of any dataset is served" in why_not_ready([])
    assert why_not_ready(["grey"]) == ""
    monkeypatch.setattr(settings, "datasets", ("grey", "colour", "more"))
    assert "no champion of colour, more is served" in why_not_ready(["grey"])
    monkeypatch.setattr(settings, "datasets", ())
    draining.set()
    try:
        assert "is about to end" in why_not_ready(["grey"])
    finally:
        draining.clear()


def test_after_sigterm_the_end_comes_whatever_fails_or_does_not_leave():
    server = uvicorn.Server(uvicorn.Config("unused"))
    handler = signal.signal(signal.SIGTERM, server.handle_exit)

    def fail() -> None:
        raise RuntimeError("nobody to tell")

    async def run() -> None:
        drain_on_sigterm(fail)
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)

    try:
        asyncio.run(run())
    finally:
        signal.signal(signal.SIGTERM, handler)
        draining.clear()
    assert server.should_exit
    longest = settings.body_timeout_s + settings.timeout_s + settings.send_timeout_s
    assert server.config.timeout_graceful_shutdown == longest, "or it would wait for a reader that takes nothing"
