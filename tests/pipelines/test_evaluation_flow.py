"""Scoring the champions again."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from projects import write_weights

from pipelines import evaluation_flow, registry, tracking
from pipelines.evaluation_flow import EXPERIMENT, evaluate_champions
from pipelines.release import release
from pixelcnn import evaluate, load_checkpoint, load_dataset, log_prob


def test_champions_are_scored_and_the_others_passed_over(weights: Path, prefect_server: str) -> None:
    release("pixelcnn-mnist5k")
    scores = evaluate_champions()
    model, _ = load_checkpoint(weights)
    data = load_dataset("data/mnist5k.safetensors")
    assert scores == {"mnist5k": pytest.approx(evaluate(model, data, num_images=8, batch_size=8))}
    client = tracking.client()
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.data.metrics["test/nll_nats"] == pytest.approx(scores["mnist5k"]["test/nll_nats"])
    assert run.data.tags["version"] == "1"
    assert run.data.tags["evaluated_data_hash"] == data.data_hash


def test_a_champion_that_cannot_be_scored_is_named(
    weights: Path,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release("pixelcnn-mnist5k")

    def damaged(*_: object) -> Path:
        raise ValueError("it holds other weights")

    monkeypatch.setattr(registry, "download", damaged)
    with pytest.raises(RuntimeError, match=r"not what was registered: mnist5k version 1 \(it holds other weights\)"):
        evaluate_champions(["mnist5k"])


class Service:
    """Answers as the service does, with a model that can be another one than the champion."""

    def __init__(self, folder: Path, version: str = "1") -> None:
        model, _ = load_checkpoint(folder)
        answers = self.answers = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answers.append(body)
                nats = log_prob(model, torch.tensor(body["image"])[None, None]).item()
                text = json.dumps({"log_prob": nats, "model": {"version": version}}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Service":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_the_service_is_asked_and_must_agree(
    weights: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release("pixelcnn-mnist5k")
    with Service(weights) as service:
        scores = evaluate_champions(["mnist5k"], service.url)
        assert [body["dataset"] for body in service.answers] == ["mnist5k"] * 8
        client = tracking.client()
        (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
        served = run.data.metrics["service/test_nll_nats_first_200"]
        assert served == pytest.approx(scores["mnist5k"]["test/nll_nats"], rel=1e-5)
        monkeypatch.setenv("PIXELCNN_SERVICE_URL", service.url)
        evaluate_champions(["mnist5k"])
        assert len(service.answers) == 16, "the environment names it, too"
    write_weights(seed=1)
    differs = r"mnist5k version 1 \(the service at .* scores .* registered are .* restart it"
    with Service(weights) as service, pytest.raises(RuntimeError, match=differs):
        evaluate_champions(["mnist5k"], service.url)
    another = r"answers with version 7: point it to the model store"
    with Service(weights, version="7") as service, pytest.raises(RuntimeError, match=another):
        evaluate_champions(["mnist5k"], service.url)
    with pytest.raises(RuntimeError, match=r"cannot be reached \(.*\): start it with make serve, or unset"):
        evaluate_champions(["mnist5k"], "http://127.0.0.1:9")


def test_a_champion_that_scores_something_else_is_named(
    weights: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release("pixelcnn-mnist5k")
    other = load_checkpoint(write_weights(seed=1))[0]
    monkeypatch.setattr(evaluation_flow, "load_checkpoint", lambda folder: (other, load_checkpoint(folder)[1]))
    with pytest.raises(RuntimeError, match="version 1 does not score what it says"):
        evaluate_champions(["mnist5k"])


def test_an_unknown_dataset_is_named(project: Path, prefect_server: str) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'svhn'"):
        evaluate_champions(["svhn"])
