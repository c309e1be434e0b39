"""What the service tells Prometheus, as prometheus_client keeps it; test_service_faults.py reads it from /metrics."""

import logging
import math
import os

import prometheus_client
import pytest
import torch

from app.service.metrics import metrics
from app.service.operation import drawings
from app.service.settings import settings
from pipelines.registry import store
from pixelcnn import pixel_log_prob
from tests.service.champions import GREY, put, wait_until

IMAGE, OBSERVED = [[1, 0, 1, 0]] * 5, [[1] * 4] * 2 + [[0] * 4] * 3


def read(name: str, **labels: str) -> float:
    """Return a sample's value, 0 where there is none."""
    samples = [sample for metric in prometheus_client.REGISTRY.collect() for sample in metric.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_answers_are_counted_by_endpoint_and_dataset(client):
    complete = {"dataset": "grey", "image": IMAGE, "observed": OBSERVED, "num_samples": 3}
    requests = {
        "complete": complete,
        "complete_stream": complete,
        "generate": {"dataset": "grey"},
        "likelihood": {"dataset": "grey", "image": IMAGE},
    }
    for endpoint, request in requests.items():
        labels = {"endpoint": endpoint, "dataset": "grey"}
        before = read("pixelcnn_request_seconds_count", **labels)
        images = read("pixelcnn_batch_images_sum", lane="grey")
        calls = read("pixelcnn_batch_requests_count", lane="grey")
        assert client.post(f"/{endpoint}", json=request).status_code == 200
        assert read("pixelcnn_request_seconds_count", **labels) == before + 1
        if endpoint != "likelihood":
            assert read("pixelcnn_batch_images_sum", lane="grey") == images + request.get("num_samples", 1)
            assert read("pixelcnn_batch_requests_count", lane="grey") == calls + 1
    assert read("pixelcnn_waiting_requests") == 0


def test_what_clients_send_makes_no_new_series(client):
    client.post("/generate", json={"dataset": "name-from-outside"})
    client.get("/name-from-outside")
    labels = [sample.labels for metric in prometheus_client.REGISTRY.collect() for sample in metric.samples]
    assert not [values for values in labels if "name-from-outside" in str(values)]


@pytest.mark.usefixtures("client", "use_home")
def test_the_version_that_is_served_is_told(tmp_path):
    for version, other in (("1", "2"), ("2", "1")):
        store.serve(put(tmp_path / version, "told", GREY, version, seed=0))
        wait_until(lambda version=version: read("pixelcnn_champion", dataset="told", version=version) == 1)
        assert read("pixelcnn_champion", dataset="told", version=other) == 0


def test_what_people_draw_is_told_as_bits_per_dim(client):
    labels = {"dataset": "grey", "endpoint": "likelihood"}
    before = [read(f"pixelcnn_drawn_bits_per_dim_{part}", **labels) for part in ("count", "sum")]
    bits = client.post("/likelihood", json={"dataset": "grey", "image": IMAGE}).json()["bits_per_dim"]
    after = [read(f"pixelcnn_drawn_bits_per_dim_{part}", **labels) for part in ("count", "sum")]
    assert after[0] == before[0] + 1
    assert abs(after[1] - before[1] - bits) < 1e-6


@pytest.mark.parametrize("endpoint", ["complete", "complete_stream"])
def test_what_is_known_of_a_completion_is_scored(client, grey, monkeypatch, endpoint):
    """With the upper part known it is the likelihood of those rows, whatever was drawn below them."""
    monkeypatch.setattr(drawings, "SCORE_EVERY", 1)
    labels = {"dataset": "grey", "endpoint": endpoint}
    before = read("pixelcnn_drawn_bits_per_dim_sum", **labels)
    count = read("pixelcnn_drawn_bits_per_dim_count", **labels)
    known = [read(f"pixelcnn_drawn_share_{part}", dataset="grey", statistic="known_share") for part in ("count", "sum")]
    client.post(f"/{endpoint}", json={"dataset": "grey", "image": IMAGE, "observed": OBSERVED, "num_samples": 2})
    wait_until(lambda: read("pixelcnn_drawn_bits_per_dim_count", **labels) == count + 1)
    nats = -pixel_log_prob(grey, torch.tensor([[IMAGE]]))[:, :, :2].sum().item()
    found = read("pixelcnn_drawn_bits_per_dim_sum", **labels) - before
    assert abs(found - nats / (8 * math.log(2))) < 1e-4
    now = [read(f"pixelcnn_drawn_share_{part}", dataset="grey", statistic="known_share") for part in ("count", "sum")]
    assert now == [known[0] + 1, pytest.approx(known[1] + 0.4)]


def test_gauges_of_a_killed_worker_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr("app.service.metrics.Metrics", lambda: None)  # those of this process are there already
    kept = {"counter_1.db", "histogram_1.db", f"gauge_mostrecent_{os.getpid()}.db"}
    for name in (*kept, "gauge_mostrecent_1.db", f"gauge_livesum_1{os.getpid()}.db"):
        (tmp_path / name).touch()
    metrics.__wrapped__()
    assert {file.name for file in tmp_path.iterdir()} == kept


def test_without_watching_nothing_is_counted_or_logged(client, monkeypatch, caplog):
    monkeypatch.setattr(settings, "watch", False)
    nothing = metrics.__wrapped__()
    nothing.requests.labels("/complete", "200").inc()
    nothing.waiting.set(3)
    caplog.set_level(logging.INFO, "bentoml.pixelcnn.requests")
    before = read("pixelcnn_requests_total")
    assert client.post("/generate", json={"dataset": "grey"}).status_code == 200
    assert read("pixelcnn_requests_total") == before
    assert not [record for record in caplog.records if record.name == "bentoml.pixelcnn.requests"]
