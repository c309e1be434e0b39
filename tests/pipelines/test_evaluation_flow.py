"""Scoring the champions again."""

import base64
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from mlflow.exceptions import MlflowException
from prefect import tags

from pipelines.errors import reason
from pipelines.flows import evaluate as evaluation_flow
from pipelines.flows.drift import watch_drift
from pipelines.flows.evaluate import evaluate_champions, score_through_service
from pipelines.params import EVALUATIONS_EXPERIMENT
from pipelines.promotion.register import release
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pixelcnn import evaluate, load_checkpoint, load_dataset, log_prob, save_dataset
from tests.local import Handler, LocalServer
from tests.pipelines.projects import tiny_dataset, write_weights
from tests.pipelines.sites import tags_of_last_run


def test_champions_are_scored_and_the_others_passed_over(weights: Path, prefect_server: str) -> None:
    release("pixelcnn-mnist5k")
    with tags("nightly"):  # as a deployment's run has some
        scores = evaluate_champions(num_images=5)
    model, _ = load_checkpoint(weights)
    data = load_dataset("data/mnist5k.safetensors")
    assert scores == {"mnist5k": pytest.approx(evaluate(model, data, num_images=5, batch_size=8))}
    client = tracking.client()
    (run,) = client.search_runs([client.get_experiment_by_name(EVALUATIONS_EXPERIMENT).experiment_id])
    assert run.data.metrics["test/nll_nats"] == pytest.approx(scores["mnist5k"]["test/nll_nats"])
    assert run.data.tags["version"] == "1"
    assert run.data.tags["evaluated_data_hash"] == data.data_hash
    assert tags_of_last_run("evaluate-champions") == {"nightly", "mnist5k"}, "of what was scored, too"


def test_a_champion_that_cannot_be_scored_is_named(
    weights: Path,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release("pixelcnn-mnist5k")

    def damaged(*_: object) -> Path:
        raise ValueError("it holds other weights")

    monkeypatch.setattr(registry, "download", damaged)
    said = r"do not score what was registered, or could not be scored: mnist5k version 1 \(it holds other weights\)"
    with pytest.raises(ValueError, match=said):
        evaluate_champions(["mnist5k"])


@pytest.mark.parametrize("error", [OSError("no disk"), MlflowException("no disk")], ids=type)
def test_one_that_cannot_be_scored_does_not_hide_the_others(
    project: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked: list[str] = []

    def score(name: str, *_: object) -> dict[str, float]:
        asked.append(name)
        if name == "mnist":
            raise error
        return {}

    monkeypatch.setattr(registry, "champion", lambda _: SimpleNamespace(version="1"))
    monkeypatch.setattr(evaluation_flow, "prepared_file", lambda _: Path("params.yaml"))
    monkeypatch.setattr(evaluation_flow, "_evaluate", score)
    with pytest.raises(ValueError, match=r"could not be scored: mnist version 1 \(no disk\)$"):
        evaluate_champions(["mnist", "mnist5k"])
    assert asked == ["mnist", "mnist5k"]


def test_other_data_or_none_are_no_failure(
    weights: Path, prefect_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    release("pixelcnn-mnist5k")
    path = Path("data/mnist5k.safetensors")
    data = load_dataset(path)
    save_dataset(path, replace(data, images={**data.images, "test": 1 - data.images["test"]}))
    assert set(evaluate_champions(["mnist5k"], "http://127.0.0.1:9")) == {"mnist5k"}
    assert "the data are not those it was registered with: not compared" in caplog.text
    assert f"of the first {min(500, len(data.images['validation']))} images; registered with" in caplog.text
    path.unlink()
    assert evaluate_champions(["mnist5k"]) == {}


def test_a_night_has_an_end(weights: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_end(*_: object) -> None:
        for _ in range(600):  # in small steps: pytest's own alarm lets Prefect interrupt between them alone
            time.sleep(0.1)

    release("pixelcnn-mnist5k")
    assert evaluate_champions.timeout_seconds == evaluation_flow.MAX_S
    monkeypatch.setattr(evaluation_flow, "_evaluate", without_end)
    begun = time.monotonic()
    state = evaluate_champions.with_options(timeout_seconds=2)(["mnist5k"], return_state=True)
    assert (state.name, state.is_failed()) == ("TimedOut", True), "whoever is on call is called"
    assert time.monotonic() - begun < 50


class Service(LocalServer):
    """Answers as the service does, with a model that can be another one than the champion.

    Args:
        token: that callers must send.
        busy: how many requests are refused with 429 or 503, in turn, which ask to wait for 7 s.
    """

    def __init__(self, folder: Path, version: str = "1", token: str | None = None, busy: int = 0) -> None:
        model, _ = load_checkpoint(folder)
        answers = self.answers = []
        self.refused = refused = []

        class Answering(Handler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if token and self.headers["Authorization"] != f"Bearer {token}":
                    return self.refuse(401)
                if len(refused) < busy:
                    return self.refuse((503, 429)[len(refused) % 2])
                answers.append(body)
                nats = log_prob(model, torch.tensor(body["image"])[None, None]).item()
                text = json.dumps({"log_prob": nats, "model": {"version": version}}).encode()
                self.reply(200, text)

            def refuse(self, status: int) -> None:
                refused.append(status)
                self.reply(status, Retry_After="7")

        super().__init__(Answering)


def test_the_service_is_asked_and_must_agree(
    weights: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release("pixelcnn-mnist5k")
    with Service(weights) as service:
        scores = evaluate_champions(["mnist5k"], service.url)
        assert [body["dataset"] for body in service.answers] == ["mnist5k"] * 8
        client = tracking.client()
        (run,) = client.search_runs([client.get_experiment_by_name(EVALUATIONS_EXPERIMENT).experiment_id])
        served = run.data.metrics["service/test_nll_nats_first_200"]
        assert served == pytest.approx(scores["mnist5k"]["test/nll_nats"], rel=1e-5)
        monkeypatch.setenv("PIXELCNN_SERVICE_URL", service.url)
        evaluate_champions(["mnist5k"])
        assert len(service.answers) == 16, "the environment names it, too"
    write_weights(seed=1)
    differs = r"mnist5k version 1 \(the service at .* scores .* registered are .* restart it"
    with Service(weights) as service, pytest.raises(ValueError, match=differs):
        evaluate_champions(["mnist5k"], service.url)
    another = r"answers with version 7: point it to the model store"
    with Service(weights, version="7") as service, pytest.raises(ValueError, match=another):
        evaluate_champions(["mnist5k"], service.url)
    with pytest.raises(ValueError, match=r"cannot be reached \(.*\): start it with make serve, or name none"):
        evaluate_champions(["mnist5k"], "http://bob:Q7secret@127.0.0.1:9")
    assert "Q7secret" not in caplog.text


def test_a_promotion_meanwhile_is_no_failure(
    weights: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release("pixelcnn-mnist5k")

    def promoted(*_: object) -> httpx.Response:
        version = tracking.client().create_model_version("pixelcnn-mnist5k", "elsewhere").version
        registry.set_alias("mnist5k", "champion", version)
        return httpx.Response(200, json={"log_prob": -1.0, "model": {"version": version}})

    monkeypatch.setattr(evaluation_flow, "_post", promoted)
    assert set(evaluate_champions(["mnist5k"], "http://service", 5)) == {"mnist5k"}
    assert "version 1 is champion no more: the service is not compared" in caplog.text


def test_a_token_is_sent_and_a_busy_service_waited_for(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, waited = load_dataset("data/mnist5k.safetensors"), []
    clock = SimpleNamespace(monotonic=lambda: float(sum(waited)), sleep=waited.append)
    monkeypatch.setattr(evaluation_flow, "time", clock)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a neighbour is asked by no proxy
    for name in ("no_proxy", "NO_PROXY", "PIXELCNN_TOKEN"):
        monkeypatch.setenv(name, "")
    with Service(weights, token="secret", busy=3) as service:
        with pytest.raises(ConnectionError, match="asks for a token: set PIXELCNN_TOKEN to its own"):
            score_through_service(service.url, "mnist5k", "1", data, 2)
        monkeypatch.setenv("PIXELCNN_TOKEN", "secret")
        with_password = service.url.replace("://", "://bob:Q7secret@")
        assert score_through_service(with_password, "mnist5k", "1", data, 2) > 0
        assert (service.refused, waited) == ([401, 429, 503], [7, 7])
    with (
        Service(weights, token="secret", busy=10_000) as service,
        pytest.raises(ConnectionError, match=r"answered (429|503)"),
    ):
        score_through_service(service.url, "mnist5k", "1", data, 2)
    assert sum(waited) <= 14 + evaluation_flow.MAX_BUSY_S, "within bounds"


def test_what_a_service_says_keeps_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"a failure of {'many ' * 100} words: No space left"
    monkeypatch.setattr(evaluation_flow, "_post", lambda *_: httpx.Response(500, text=said))
    with pytest.raises(ConnectionError) as failed:
        score_through_service("http://127.0.0.1:9", "cifar10", "1", tiny_dataset("cifar10", 256, (3, 2, 4)), 2)
    assert reason(failed.value).endswith("No space left")


def test_colours_come_last_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    data, sent = tiny_dataset("cifar10", 256, (3, 2, 4)), []

    def answer(http: httpx.Client, path: str, body: dict) -> httpx.Response:
        sent.append(body["image"])
        return httpx.Response(200, json={"log_prob": -len(sent), "model": {"version": "1"}})

    monkeypatch.setattr(evaluation_flow, "_post", answer)
    assert score_through_service("http://service", "cifar10", "1", data, 3) == 2, "the mean of 1, 2, 3"
    assert torch.equal(torch.tensor(sent), data.levels("test", slice(0, 3)).permute(0, 2, 3, 1))


def test_a_password_in_the_address_is_sent_and_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect keeps each error and log line for whoever opens its pages."""
    sent = []

    class Refusing(Handler):
        def do_GET(self) -> None:
            sent.append(self.headers["Authorization"])
            self.reply(500)

    monkeypatch.setenv("PIXELCNN_TOKEN", "")
    with LocalServer(Refusing) as server, pytest.raises(ConnectionError, match=r"the service at http://127") as error:
        watch_drift.fn(service_url=server.url.replace("://", "://bob:Q7secret@"))
    assert sent == ["Basic " + base64.b64encode(b"bob:Q7secret").decode()]
    assert "Q7secret" not in str(error.value)


PAGES = ["<html>Log in</html>", "[]", "{}", '{"model": null}', '{"model": {"version": "1"}, "log_prob": null}']


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_the_service_is_told_so(monkeypatch: pytest.MonkeyPatch, page: str) -> None:
    monkeypatch.setattr(evaluation_flow, "_post", lambda *_: httpx.Response(200, text=page))
    with pytest.raises(ConnectionError, match=r"what answers at http://proxy/a is not the service: name its address"):
        score_through_service("http://bob:hid@den@proxy/a", "mnist", "1", tiny_dataset("mnist"), 1)


def test_a_champion_that_scores_something_else_is_named(
    weights: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    release("pixelcnn-mnist5k")
    other = load_checkpoint(write_weights(seed=1))[0]
    monkeypatch.setattr(registry, "load_checkpoint", lambda folder: (other, load_checkpoint(folder)[1]))
    with pytest.raises(ValueError, match="version 1 does not score what it says"):
        evaluate_champions(["mnist5k"])


def test_an_unknown_dataset_is_named(project: Path, prefect_server: str) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'svhn'"):
        evaluate_champions(["svhn"])
