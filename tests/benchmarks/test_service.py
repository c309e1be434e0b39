"""What the service's benchmark counts, and its sentences."""

import random
import time
from pathlib import Path
from statistics import mean

import pytest

from app.client import ServedModel, ServiceClient, ServiceError
from benchmarks import service
from tests.app.stub_service import MODELS
from tests.local import Handler, LocalServer


def test_the_rate_is_that_of_clients_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second in which they come does not count."""

    class Slow(Handler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(0.05)
            self.reply(200)

    monkeypatch.setattr(random, "random", lambda: 0.9)
    with LocalServer(Slow) as server:
        found = service.crowd(server.url, {}, [b"{}"], clients=1, seconds=1)
    assert found["per_s"] == pytest.approx(1 / mean(found["answered"]), rel=0.5)


def test_what_was_lost_has_no_percentiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ServiceClient, "models", lambda _: {"mnist5k": ServedModel(**MODELS["mnist5k"])})
    for drawn, said in (([], "p50 nan ms"), ([0.5], "p50 500 ms")):
        monkeypatch.setattr(service, "visits", lambda *_, drawn=drawn: (drawn, drawn, ["away"]))
        service.main(canvases=1, strokes=1)
        assert said in capsys.readouterr().out


def test_its_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServiceClient, "models", lambda _: {"mnist5k": ServedModel(**MODELS["mnist5k"])})
    for words in ({"dataset": "mnits"}, {"datasets": ["mnits"]}):
        with pytest.raises(SystemExit, match=r"error: dataset 'mnits' is not served\. Name one that is: mnist5k\."):
            service.main(**words)

    def away(_: ServiceClient) -> None:
        raise ServiceError("It does not answer.")

    monkeypatch.setattr(ServiceClient, "models", away)
    with pytest.raises(SystemExit, match=r"error: It does not answer\."):
        service.main()


def test_an_environment_that_is_not_described_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIXELCNN_ENVIRONMENT", "staging")
    with pytest.raises(SystemExit, match=r"error: PIXELCNN_ENVIRONMENT is 'staging', which environments\.yaml"):
        service.main()
