"""The service over its wire: every endpoint, every mistake a client can make, and the change of a champion."""

import asyncio
import base64
import importlib
import itertools
import json
import logging
import math
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bentoml._internal.utils.analytics import usage_stats
from starlette.requests import Request

import app.service
from app.service import api as service
from app.service import jobs, wire
from app.service.champions import Champions, released_by_dataset
from app.service.operation.requests import JsonFormatter, line_of_request
from app.service.settings import settings
from pipelines.registry import store
from pixelcnn import (
    bits_per_dim,
    build_model,
    completion_log_prob,
    log_prob,
    packed_bytes,
    pixel_log_prob,
    save_checkpoint,
)
from pixelcnn.checkpoint import sha256_of
from pixelcnn.images import to_png
from tests.local import run
from tests.service.champions import COLOUR, GREY, SCORES, make_checkpoint, put, wait_until
from tests.service.test_metrics import read

IMAGE = [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
OBSERVED = [[1, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
COMPLETE = {"dataset": "grey", "image": IMAGE, "observed": OBSERVED}
MODEL_KEYS = {"name", "version", "run_id", "git_commit", "data_hash", "weights_sha256"}


def levels_of(images: list) -> torch.Tensor:
    """Return grey images from the wire as (B, 1, H, W)."""
    return torch.tensor(images)[:, None]


def read_events(response) -> list[tuple[str, dict]]:
    events = []
    for block in response.text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            assert lines[0].startswith("event: ")
            assert lines[1].startswith("data: ")
            events.append((lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))))
    return events


def error_of(response, status: int) -> str:
    """Check an error's form; return its sentence."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert isinstance(body["error"], str)
    assert "Traceback" not in body["error"]
    assert "\n" not in body["error"]
    return body["error"]


# What it does.


def test_complete(client, grey):
    answer = client.post("/complete", json={**COMPLETE, "num_samples": 5, "label": 2, "seed": 7}).json()
    assert set(answer) == {"completions", "log_probs", "seed", "model"}
    assert answer["seed"] == 7
    levels = levels_of(answer["completions"])
    assert levels.shape == (5, 1, 5, 4)
    observed = torch.tensor(OBSERVED, dtype=torch.bool)
    assert bool((levels[:, 0][:, observed] == torch.tensor(IMAGE)[observed]).all())
    assert len({json.dumps(image) for image in answer["completions"]}) > 1
    expected = completion_log_prob(grey, levels, observed.expand(5, 1, 5, 4), torch.full((5,), 2))
    assert answer["log_probs"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert set(answer["model"]) == MODEL_KEYS


@pytest.mark.parametrize(("dataset", "shape"), [("grey", (5, 4)), ("colour", (4, 5, 3))])
def test_completing_nothing_is_generating(client, dataset, shape):
    settings = {"dataset": dataset, "num_samples": 4, "seed": 8, "temperature": 0.9}
    generated = client.post("/generate", json=settings).json()
    unknown = {
        "image": torch.zeros(shape, dtype=torch.int64).tolist(),
        "observed": torch.zeros(shape[:2]).int().tolist(),
    }
    events = read_events(client.post("/complete_stream", json=settings | unknown))
    event, completed = events[-1]
    assert event == "result"
    assert completed["completions"] == generated["images"]
    assert completed["log_probs"] == pytest.approx(generated["log_probs"], rel=1e-5)
    rows = [row for _, values in events[:-1] for row in np.array(values["rows"]).swapaxes(0, 1)]
    assert np.array_equal(np.stack(rows, axis=1), generated["images"])


def test_levels_under_missing_pixels_are_ignored(client):
    filled = [
        [level if known else 10**30 for level, known in zip(*rows, strict=True)]
        for rows in zip(IMAGE, OBSERVED, strict=True)
    ]
    one = client.post("/complete", json={**COMPLETE, "seed": 1}).json()
    assert client.post("/complete", json={**COMPLETE, "image": filled, "seed": 1}).json() == one


def test_same_seed_same_answer(client):
    for path, request in (("/complete", COMPLETE), ("/generate", {"dataset": "colour"})):
        request = {**request, "num_samples": 4, "seed": 2**63 - 1, "temperature": 0.9}
        answer = client.post(path, json=request).json()
        assert client.post(path, json=request).json() == answer
        other = client.post(path, json={**request, "seed": 5}).json()
        assert other["log_probs"] != answer["log_probs"]


def test_a_candidate_does_not_depend_on_how_many_were_asked_for(client):
    few, many = (
        client.post("/complete", json={**COMPLETE, "num_samples": num, "seed": 3}).json()["completions"]
        for num in (2, 16)
    )
    assert many[:2] == few


def test_a_drawn_seed_is_returned_and_repeats_the_answer(client):
    first, second = (client.post("/generate", json={"dataset": "grey", "num_samples": 8}).json() for _ in range(2))
    assert first["seed"] != second["seed"]
    assert 0 <= first["seed"] < 2**63
    request = {"dataset": "grey", "num_samples": 8, "seed": first["seed"]}
    assert client.post("/generate", json=request).json() == first


def test_generate(client, grey):
    answer = client.post("/generate", json={"dataset": "grey", "num_samples": 3, "label": 1, "seed": 0}).json()
    assert set(answer) == {"images", "log_probs", "seed", "model"}
    expected = log_prob(grey, levels_of(answer["images"]), torch.full((3,), 1))
    assert answer["log_probs"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert len(client.post("/generate", json={"dataset": "grey"}).json()["images"]) == 1


def test_temperature_0_takes_the_most_likely_levels(client):
    request = {"dataset": "grey", "temperature": 0, "num_samples": 3}
    images = client.post("/generate", json=request).json()["images"]
    assert images[0] == images[1] == images[2]
    assert client.post("/generate", json=request).json()["images"] == images
    assert client.post("/generate", json={**request, "temperature": 1e-6}).status_code == 200


def test_likelihood(client, grey):
    for label in (None, 0):
        request = {"dataset": "grey", "image": IMAGE} | ({} if label is None else {"label": label})
        answer = client.post("/likelihood", json=request).json()
        assert set(answer) == {"log_prob", "bits_per_dim", "packed_bytes", "surprise", "model"}
        assert answer["packed_bytes"] == packed_bytes(answer["log_prob"])
        levels = levels_of([IMAGE])
        nats = -pixel_log_prob(grey, levels, None if label is None else torch.tensor([label]))
        assert answer["log_prob"] == pytest.approx(-nats.sum().item(), rel=1e-5)
        assert answer["bits_per_dim"] == pytest.approx(bits_per_dim(nats.sum().item(), GREY.image_shape), rel=1e-5)
        assert torch.tensor(answer["surprise"]).allclose(nats[0, 0].detach(), rtol=1e-4)


def test_label_minus_1_and_null_mean_none(client):
    answers = [client.post("/likelihood", json={"dataset": "grey", "image": IMAGE, **label}).json()
               for label in ({}, {"label": -1}, {"label": None})]  # fmt: skip
    assert answers[0] == answers[1] == answers[2]
    assert client.post("/likelihood", json={"dataset": "grey", "image": IMAGE, "label": 1}).json() != answers[0]


def test_png_equals_levels(client):
    png = base64.b64encode(to_png(torch.tensor([IMAGE]), 2)).decode()
    for path, request in (("/likelihood", {"dataset": "grey"}), ("/complete", {**COMPLETE, "seed": 1})):
        by_levels = client.post(path, json={**request, "image": IMAGE})
        by_png = client.post(path, json={**request, "image": png})
        assert by_png.status_code == 200
        assert by_png.json() == by_levels.json()


def test_colour(client):
    images = client.post("/generate", json={"dataset": "colour", "num_samples": 2, "seed": 0}).json()["images"]
    assert torch.tensor(images).shape == (2, 4, 5, 3)
    observed = [[1] * 5, [1] * 5, [0] * 5, [0] * 5]
    request = {"dataset": "colour", "image": images[0], "observed": observed, "seed": 0}
    completion = client.post("/complete", json=request).json()["completions"][0]
    assert completion[:2] == images[0][:2]
    answer = client.post("/likelihood", json={"dataset": "colour", "image": images[0]}).json()
    assert torch.tensor(answer["surprise"]).shape == (4, 5)
    assert math.fsum(map(math.fsum, answer["surprise"])) == pytest.approx(-answer["log_prob"])
    # Red, green and blue are not exchanged on the way.
    png = base64.b64encode(to_png(torch.tensor(images[0]).permute(2, 0, 1), 4)).decode()
    assert client.post("/likelihood", json={"dataset": "colour", "image": png}).json() == answer


def test_models(client):
    models = client.get("/models").json()
    grey = models["grey"]
    assert (grey["shape"], grey["levels"], grey["labels"]) == ([1, 5, 4], 2, ["cat", "dog", "owl"])
    assert grey["scores"] == SCORES
    assert (grey["protocol"], grey["architecture"]) == ("toy", "gated_pixelcnn")
    assert grey["promoted_at"] == "2025-01-01T00:00:00+00:00"
    assert set(grey["model"]) == MODEL_KEYS
    assert (models["colour"]["shape"], models["colour"]["labels"]) == ([3, 4, 5], [])
    assert client.post("/generate", json={"dataset": "grey"}).json()["model"] == grey["model"]


# The stream.


@pytest.mark.parametrize("dataset", ["grey", "colour"])
def test_stream_tells_every_row_once_and_ends_with_the_same_answer(client, dataset):
    if dataset == "grey":
        request = {**COMPLETE, "num_samples": 3, "seed": 11}
    else:
        request = {
            "dataset": "colour",
            "image": [[[0, 1, 2]] * 5] * 4,
            "observed": [[1] * 5] + [[0] * 5] * 3,
            "seed": 1,
        }
    response = client.post("/complete_stream", json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    *rows, (kind, result) = read_events(response)
    assert kind == "result"
    assert result == client.post("/complete", json=request).json()
    told: list[list] = [[] for _ in result["completions"]]
    assert len(rows) > 1
    for kind, event in rows:
        assert kind == "rows"
        assert event["start"] == len(told[0])
        for image, more in zip(told, event["rows"], strict=True):
            image.extend(more)
    assert told == result["completions"]


def test_stream_of_a_whole_image(client):
    request = {**COMPLETE, "observed": [[1] * 4] * 5}
    *rows, (_, result) = read_events(client.post("/complete_stream", json=request))
    assert [row for _, event in rows for row in event["rows"][0]] == IMAGE
    assert (result["completions"], result["log_probs"]) == ([IMAGE], [0.0])


def test_stream_refuses_before_it_begins(client):
    assert "observed must be a list" in error_of(client.post("/complete_stream", json={**COMPLETE, "observed": 1}), 400)


def test_stream_that_fails_ends_with_an_error_event(client, monkeypatch, caplog):
    def fail(*arguments, **more):
        raise RuntimeError("secret details")

    monkeypatch.setattr(jobs, "complete_and_score", fail)
    labels = {"endpoint": "complete_stream", "dataset": "grey"}
    before = read("pixelcnn_request_seconds_count", **labels)
    failed = read("pixelcnn_requests_total", path="/complete_stream", status="500")
    caplog.set_level(logging.INFO, "bentoml.pixelcnn.requests")
    ((kind, event),) = read_events(client.post("/complete_stream", json=COMPLETE))
    assert kind == "error"
    assert event == {"error": "the completion failed: the service's log says why."}
    # On call it is a failure, though its first byte was sent with status 200.
    assert caplog.records[-1].line["status"] == 500
    assert "secret details" in caplog.text
    assert read("pixelcnn_requests_total", path="/complete_stream", status="500") == failed + 1
    assert read("pixelcnn_request_seconds_count", **labels) == before + 1


@pytest.mark.usefixtures("client", "use_home")
def test_drawing_stops_when_nobody_listens(monkeypatch):
    stopped = threading.Event()

    def draw_for_ever(*arguments) -> None:
        try:
            for row in itertools.count():
                arguments[-1](row, torch.zeros(1, 1, 4, dtype=torch.int64))
                time.sleep(0.01)
        except jobs._NobodyWaits:
            stopped.set()
            raise

    monkeypatch.setattr(jobs, "complete_and_score", draw_for_ever)

    async def listen_and_leave() -> None:
        instance = service.PixelCNNService.inner()
        instance.champions.refresh()
        stream = instance.complete_stream(wire.CompleteRequest(**COMPLETE))
        assert [await anext(stream) for _ in range(2)][1].startswith("event: rows")
        await stream.aclose()

    asyncio.run(listen_and_leave())
    assert stopped.wait(10)


# What it refuses.


def changed(**changes) -> dict:
    return {**COMPLETE, **changes}


def with_pixel(rows: list, value) -> list:
    """Return the rows with another value at (1, 3), which is observed."""
    return [[value if (i, j) == (1, 3) else v for j, v in enumerate(row)] for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (changed(image=IMAGE[:4]), "image must have 5 entries, got 4."),
        (changed(image=[row[:3] for row in IMAGE]), "image[0] must have 4 entries, got 3."),
        (changed(image=[[[v] for v in row] for row in IMAGE]), "image[0][0] must be a whole number, got [1]."),
        (changed(image=[]), "image must have 5 entries, got 0."),
        (changed(image=None), "image must be a list of 5 entries, got None."),
        (changed(image=with_pixel(IMAGE, 2)), "image[1][3] must be a level from 0 to 1, got 2."),
        (changed(image=with_pixel(IMAGE, -1)), "image[1][3] must be a level from 0 to 1, got -1."),
        (changed(image=with_pixel(IMAGE, 10**400)), "image[1][3] must be a level from 0 to 1, got 1000"),
        (changed(image=with_pixel(IMAGE, True)), "image[1][3] must be a whole number, got True."),
        (changed(image=with_pixel(IMAGE, "1")), "image[1][3] must be a whole number, got '1'."),
        (changed(image=with_pixel(IMAGE, 1.0)), "image[1][3] must be a whole number, got 1.0."),
        (changed(image=with_pixel(IMAGE, math.nan)), "image[1][3] must be a whole number, got nan."),
        (changed(image="no base64!"), "image must be a PNG in base64, or nested lists of levels"),
        (changed(image=base64.b64encode(b"GIF89a").decode()), "image is no readable PNG"),
        (
            changed(image=base64.b64encode(to_png(torch.zeros(1, 28, 28, dtype=torch.int64), 2)).decode()),
            "image must be 4 x 5 pixels, got 28 x 28.",
        ),
        (changed(observed=with_pixel(OBSERVED, 2)), "observed[1][3] must be 0 or 1, got 2."),
        (changed(observed=with_pixel(OBSERVED, True)), "observed[1][3] must be a whole number, got True."),
        (changed(observed=[[1]]), "observed must have 5 entries, got 1."),
        (changed(num_samples=0), "num_samples must be greater than or equal to 1, got 0."),
        (changed(num_samples=17), "num_samples must be less than or equal to 16, got 17."),
        (changed(num_samples="2"), "num_samples must be a valid integer, got '2'."),
        (changed(num_samples=2.0), "num_samples must be a valid integer, got 2.0."),
        (changed(num_samples=True), "num_samples must be a valid integer, got True."),
        (changed(num_samples=None), "num_samples must be a valid integer, got None."),
        (changed(label=3), "label must be from 0 to 2, or -1 for none, got 3."),
        (changed(label=-2), "label must be greater than or equal to -1, got -2."),
        (changed(label="cat"), "label must be a valid integer, got 'cat'."),
        (changed(temperature=-1), "temperature must be greater than or equal to 0, got -1."),
        (changed(temperature=101), "temperature must be less than or equal to 100, got 101."),
        (changed(temperature=1e-300), "temperature must be 0, or from 1e-06 to 100.0, got 1e-300."),
        (changed(temperature=math.nan), "temperature must be a finite number, got nan."),
        (changed(temperature=math.inf), "temperature must be a finite number, got inf."),
        (changed(temperature="1"), "temperature must be a valid number, got '1'."),
        (changed(temperature=False), "temperature must be a valid number, got False."),
        (changed(seed=-1), "seed must be greater than or equal to 0, got -1."),
        (changed(seed=2**63), "seed must be less than or equal to 9223372036854775807, got 9223372036854775808."),
        (changed(seed=1.5), "seed must be a valid integer, got 1.5."),
        (changed(dataset=5), "dataset must be a valid string, got 5."),
        (
            changed(sead=5),
            "unknown field 'sead'. Known: dataset, num_samples, label, temperature, seed, image, observed.",
        ),
        ({"dataset": "grey", "image": IMAGE}, "observed is missing: add it to the request."),
        ({}, "dataset is missing: add it to the request."),
        ([], "the request must be a JSON object with the fields dataset, "),
        ("complete", "the request must be a JSON object with the fields dataset, "),
    ],
)
def test_bad_requests(client, body, expected):
    headers = {"Content-Type": "application/json"}
    assert error_of(client.post("/complete", content=json.dumps(body), headers=headers), 400).startswith(expected)


def test_label_for_a_model_without_labels(client):
    request = {"dataset": "colour", "label": 0}
    assert error_of(client.post("/generate", json=request), 400).startswith("label must be absent: this model knows no")
    assert client.post("/generate", json={**request, "label": -1}).status_code == 200


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "the request is empty: send a JSON object with the fields dataset, image, label."),
        (b"  \n", "the request is empty"),
        (b"{", "the request is no readable JSON: Expecting property name enclosed in double quotes, at character 2."),
        (b"dataset=grey", "the request is no readable JSON"),
        (b"\xff\xfe\x00", "the request is no readable JSON"),
        (b"[" * 100_000, "the request is no readable JSON"),
        (b'{"dataset": ' + b"1" * 10_000 + b"}", "the request is no readable JSON"),
        (b'{"dataset": "\\ud800", "image": []}', "there is no champion for dataset '\\ud800'"),
    ],
)
def test_bodies_that_are_no_request(client, body, expected):
    response = client.post("/likelihood", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, response.status_code).startswith(expected)
    assert response.status_code == (404 if b"ud800" in body else 400)


@pytest.mark.parametrize("path", ["/complete", "/complete_stream", "/generate", "/likelihood"])
def test_no_champion(client, path):
    request = {"dataset": "mnist6k", "image": IMAGE, "observed": OBSERVED}
    if path in ("/generate", "/likelihood"):
        del request["observed"]
    if path == "/generate":
        del request["image"]
    expected = "there is no champion for dataset 'mnist6k' (served: colour, grey"
    assert error_of(client.post(path, json=request), 404).startswith(expected)


def test_starts_with_an_empty_store(client, answers_when_empty):
    assert answers_when_empty["models"].json() == {}
    assert "for dataset 'grey' (served: none)" in error_of(answers_when_empty["generate"], 404)


def test_content_type(client):
    body = json.dumps({"dataset": "grey"}).encode()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = client.post("/generate", content=body, headers={"Content-Type": content_type})
        assert error_of(response, 415).startswith("the request must have the header Content-Type: application/json")
    response = client.post("/generate", content=body, headers={"Content-Type": "application/vnd.bentoml+pickle"})
    error_of(response, 415)
    response = client.post("/generate", content=body, headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert response.status_code == 200


def test_body_too_large(client):
    headers = {"Content-Type": "application/json"}
    expected = "the request must have at most 1000000 bytes: send one image"
    response = client.post("/likelihood", content=b" " * 50_000_000, headers=headers)
    assert error_of(response, 413).startswith(expected)
    assert error_of(client.post("/likelihood", content=b" " * 1_000_000, headers=headers), 400), "as many are read"
    # In chunks, without a length.
    response = client.post("/likelihood", content=iter([b" " * 100_000] * 50), headers=headers)
    assert error_of(response, 413).startswith(expected)


def test_reading_ends_at_the_limit():
    num_read = 0

    async def receive() -> dict:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": b" " * 100_000, "more_body": True}

    request = Request({"type": "http", "headers": []}, receive)
    with pytest.raises(wire.RequestError, match="at most 1000000 bytes"):
        asyncio.run(wire.read_body(request))
    assert num_read == 11


def test_paths_and_methods(client):
    assert error_of(client.get("/nothing"), 404).startswith("there is nothing at '/nothing'")
    response = client.get("/complete")
    assert error_of(response, 405).startswith("'/complete' does not take 'GET'")
    assert response.headers["allow"] == "POST"
    assert error_of(client.post("/models"), 405).startswith("'/models' does not take 'POST'")
    assert client.get("/readyz").status_code == 200


def test_our_own_failure_tells_no_details(client, monkeypatch, caplog):
    def fail(*arguments, **more):
        raise RuntimeError("secret details")

    monkeypatch.setattr(jobs, "complete_and_score", fail)
    assert "secret" not in error_of(client.post("/generate", json={"dataset": "grey"}), 500)
    assert "secret details" in caplog.text


def test_the_cause_of_a_failure_is_logged_beside_the_id_of_its_request():
    error = RuntimeError("no space left")
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": "it failed", "exc_info": (RuntimeError, error, None)})
    token = line_of_request.set({"request_id": "id-1", "path": "/complete"})
    try:
        told = json.loads(JsonFormatter().format(record))
    finally:
        line_of_request.reset(token)
    known = {"level": "ERROR", "message": "it failed", "request_id": "id-1", "exception": "RuntimeError: no space left"}
    assert told == {"time": told["time"], **known}


def test_too_many_at_once(client, monkeypatch):
    monkeypatch.setattr(settings, "max_requests", 0)
    counted = {"path": "/generate", "status": "429"}
    before = read("pixelcnn_requests_total", **counted)
    response = client.post("/generate", json={"dataset": "grey"})
    assert "send this one again in a few seconds" in error_of(response, 429)
    assert 3 <= int(response.headers["retry-after"]) <= 8
    assert response.headers["x-request-id"]
    assert read("pixelcnn_requests_total", **counted) == before + 1
    assert client.get("/models").status_code == 200


def test_a_clients_mistake_is_not_logged_as_an_exception(client, caplog):
    client.post("/generate", json={"dataset": "nothing"})
    assert not [record for record in caplog.records if record.exc_info]


def test_no_usage_reports(client, monkeypatch):
    monkeypatch.delenv("BENTOML_DO_NOT_TRACK", raising=False)
    usage_stats.do_not_track.cache_clear()
    assert not usage_stats.do_not_track()  # as the command line asks, first of all
    importlib.reload(app.service)
    assert usage_stats.do_not_track()


# The store changes.


@pytest.mark.usefixtures("use_home")
def test_a_new_champion_takes_over_without_a_failed_request(client, tmp_path):
    store.serve(put(tmp_path, "swap", GREY, "1", seed=1))
    wait_until(lambda: "swap" in client.get("/models").json())
    answers = []
    end = threading.Event()

    def ask() -> None:
        while not end.is_set():
            answers.append(client.post("/likelihood", json={"dataset": "swap", "image": IMAGE}))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        wait_until(lambda: bool(answers))
        for version in ("2", "3"):
            store.serve(put(tmp_path, "swap", GREY, version, seed=int(version)))
            wait_until(lambda version=version: answers[-1].json()["model"]["version"] == version)
        # A rollback.
        store.serve(put(tmp_path, "swap", GREY, "2", seed=2))
        wait_until(lambda: answers[-1].json()["model"]["version"] == "2")
    finally:
        end.set()
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    # Each version answers with its own weights, whatever was served in between.
    by_version = {(a.json()["model"]["version"], a.json()["log_prob"]) for a in answers}
    assert sorted(version for version, _ in by_version) == ["1", "2", "3"]


DAMAGES = {"incomplete": "its metadata lacks the lineage", "nan": "its weights are not all finite numbers"}
UNLIKE = "its files or metadata are not those that were promoted"
DAMAGES |= {"lineage": "its weights are not those that were promoted: their SHA-256 is "}
DAMAGES |= dict.fromkeys(("weights", "config", "metadata", "missing", "other weights"), UNLIKE)


@pytest.mark.usefixtures("use_home")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_champion_is_not_taken_up(tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    (tmp_path / "bentoml").mkdir()
    champions = Champions(tmp_path / "bentoml/models")
    store.serve(put(tmp_path, "grey", GREY, "1", seed=0))
    champions.refresh()
    assert champions.get("grey").identity.version == "1"

    tag = put(tmp_path, "grey", GREY, "2", seed=1)
    folder = tmp_path / "bentoml/models" / tag.replace(":", "/")
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "metadata":
        text = (folder / "model.yaml").read_text()
        (folder / "model.yaml").write_text(text.replace("  run_id: run-2\n", ""))
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    elif damage in ("incomplete", "lineage"):  # none, or that of other weights, in a manifest that is right
        metadata = {key: value for key, value in store.metadata_of(tag).items() if key != "manifest_sha256"}
        make_checkpoint(tmp_path / "other", GREY, seed=9)
        if damage == "incomplete":
            del metadata["run_id"]
        tag = store.export(tmp_path / "other", metadata | {"weights_sha256": "0" * 64})
    elif damage == "nan":  # and promoted so: its manifest is right
        checkpoint = tmp_path / "broken"
        broken = make_checkpoint(checkpoint, GREY, seed=1)
        with torch.no_grad():
            next(broken.parameters()).fill_(math.nan)
        save_checkpoint(checkpoint, broken, SCORES)
        metadata = {key: value for key, value in store.metadata_of(tag).items() if key != "manifest_sha256"}
        tag = store.export(checkpoint, metadata | {"weights_sha256": sha256_of(checkpoint / "model.safetensors")})
    else:  # whole, but not what was promoted
        make_checkpoint(tmp_path / "other", GREY, seed=9)
        for file in (tmp_path / "other").iterdir():
            shutil.copy(file, folder)
    store.serve(tag)
    champions.refresh()
    assert champions.get("grey").identity.version == "1"
    assert f"{tag} cannot be served: {DAMAGES[damage]}" in caplog.text
    assert "version 1 is still served" in caplog.text
    # It is said once, not every second.
    caplog.clear()
    champions.refresh()
    assert not caplog.records

    # The next good one is taken up.
    store.serve(put(tmp_path, "grey", GREY, "3", seed=2))
    champions.refresh()
    assert champions.get("grey").identity.version == "3"


def test_pointer_that_is_being_written_changes_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    (tmp_path / "bentoml").mkdir()
    champions = Champions(tmp_path / "bentoml/models")
    champions.refresh()  # no store yet
    store.serve(put(tmp_path, "grey", GREY, "1", seed=0))
    champions.refresh()
    (tmp_path / "bentoml/models/pixelcnn-grey/latest").write_text("")
    champions.refresh()
    assert champions.get("grey").identity.version == "1"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_dataset_that_leaves_the_store_is_no_longer_served(tmp_path, monkeypatch):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    (tmp_path / "bentoml").mkdir()
    champions = Champions(tmp_path / "bentoml/models")
    store.serve(put(tmp_path, "leaving", GREY, "1", seed=0))
    store.serve(put(tmp_path, "colour", COLOUR, "1", seed=0))
    champions.refresh()
    assert read("pixelcnn_champion", dataset="leaving") == 1
    shutil.rmtree(tmp_path / "bentoml/models/pixelcnn-leaving")
    champions.refresh()
    assert set(champions.describe()) == {"colour"}
    with pytest.raises(wire.RequestError, match="there is no champion for dataset 'leaving'"):
        champions.get("leaving")
    assert read("pixelcnn_champion", dataset="leaving") == 0, "nor do the metrics say that it is served"


def test_released_weights_are_served_until_the_store_has_a_champion(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setattr("app.service.champions.compile_in_background", lambda: None)
    lineage = {"label_names": ["a", "b", "c"], "protocol": "toy", "git_commit": "c0ffee", "data_hash": "d41d8c"}
    released = {}
    for dataset in ("grey", "other", "damaged"):
        released[dataset] = tmp_path / dataset
        save_checkpoint(released[dataset], build_model(GREY), {**SCORES, **lineage, "dataset": dataset})
    (released["damaged"] / "model.safetensors").write_bytes(b"")
    (tmp_path / "bentoml/models").mkdir(parents=True)
    champions = Champions(tmp_path / "bentoml/models")
    champions.start(released)
    try:
        served = champions.describe()
        assert sorted(served) == ["grey", "other"]
        assert served["grey"]["labels"] == ["a", "b", "c"]
        weights = sha256_of(released["grey"] / "model.safetensors")
        told = {"version": "released", "weights_sha256": weights, "run_id": "", "git_commit": "c0ffee"}
        assert champions.get("grey").identity.model_dump().items() >= told.items()
        assert f"{released['damaged']} cannot be served" in caplog.text
    finally:
        champions.stop()
    store.serve(put(tmp_path, "grey", GREY, "1", seed=0))
    champions.refresh()
    expected = {"grey": "1", "other": "released"}
    assert {name: told["model"]["version"] for name, told in champions.describe().items()} == expected
    again = Champions(tmp_path / "bentoml/models")
    again.start(released)
    again.stop()
    assert {name: told["model"]["version"] for name, told in again.describe().items()} == expected
    # A model that is refused, and then removed, takes nothing away that it has never replaced.
    store.serve(put(tmp_path, "other", GREY, "2", seed=0))
    folder = tmp_path / "bentoml/models/pixelcnn-other"
    (folder / (folder / "latest").read_text() / "model.safetensors").write_bytes(b"")
    again.refresh()
    shutil.rmtree(folder)
    again.refresh()
    assert again.get("other").identity.version == "released"
    # One that is refused from the start has no substitute that nobody chose.
    store.serve(put(tmp_path, "other", GREY, "3", seed=0))
    (folder / (folder / "latest").read_text() / "model.safetensors").write_bytes(b"")
    restarted = Champions(tmp_path / "bentoml/models")
    restarted.start(released)
    restarted.stop()
    assert sorted(restarted.describe()) == ["grey"]


def test_the_best_released_weights_of_each_dataset(tmp_path, monkeypatch):
    names = [("a", "letters", 40.0), ("b", "mnist", 81.0), ("c", "mnist", 79.0)]
    folders = {name: tmp_path / name for name, _, _ in names}
    for name, dataset, nats in names:
        folders[name].mkdir()
        (folders[name] / "scores.json").write_text(json.dumps({"dataset": dataset, "validation/nll_nats": nats}))
    monkeypatch.setattr("app.service.champions.released", lambda: folders)
    assert released_by_dataset() == {"mnist": folders["c"], "letters": folders["a"]}


@pytest.mark.slow
def test_before_the_first_champion_its_sampler_is_compiled(tmp_path: Path) -> None:
    script = f"""
import threading
from pathlib import Path
from app.service.champions import Champions
from pixelcnn import load_checkpoint
from pixelcnn.sampling import kernels
from pixelcnn.sampling.fast import warm_up

def compiled():
    return {{name: len(value.signatures) for name, value in vars(kernels).items() if hasattr(value, "signatures")}}

assert not any(compiled().values())
Champions(Path({str(tmp_path)!r})).start()
[thread] = [thread for thread in threading.enumerate() if thread.name == "compile"]
thread.join()
before = compiled()
warm_up(load_checkpoint(Path("weights/gated_pixelcnn-mnist"))[0])
assert any(before.values()) and compiled() == before, (before, compiled())
"""
    done = run([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
