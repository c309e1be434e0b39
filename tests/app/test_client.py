"""The client against a stand-in of the same wire, and against answers that the wire does not allow."""

import ast
import base64
import json
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

import app.client
from app.canvas.waiting import in_background
from app.client import DEFAULT_URL, Rows, ServiceClient, ServiceError, service_url
from tests.app.stub_service import MODEL, StubService

IMAGE = [[int(column == 9 and row < 14) for column in range(28)] for row in range(28)]
OBSERVED = [[int(row < 14)] * 28 for row in range(28)]
EVENTS = {"content-type": "text/event-stream"}


def answering(handler: Any) -> ServiceClient:
    return ServiceClient("http://service.test", transport=httpx.MockTransport(handler))


def test_models_are_typed(service: StubService) -> None:
    models = ServiceClient(service.url).models()
    assert list(models) == ["cifar10", "fashion_mnist", "mnist5k"]
    served = models["mnist5k"]
    assert (served.shape, served.levels, served.labels[3]) == ([1, 28, 28], 2, "3")
    assert (served.protocol, served.architecture, served.model) == ("dynamic", "gated_pixelcnn", MODEL)
    assert served.scores["test/nll_nats"] == 98.765


def test_complete_sends_the_wire_format(service: StubService) -> None:
    *_, answer = ServiceClient(service.url).complete_stream(
        "mnist5k", IMAGE, OBSERVED, num_samples=3, label=7, temperature=0.9, seed=2**63 - 1
    )
    assert service.requests == [
        (
            "/complete_stream",
            {
                "dataset": "mnist5k",
                "image": IMAGE,
                "observed": OBSERVED,
                "num_samples": 3,
                "label": 7,
                "temperature": 0.9,
                "seed": 2**63 - 1,
            },
        )
    ]
    assert len(answer.completions) == len(answer.log_probs) == 3
    assert answer.completions[0][:14] == IMAGE[:14]
    assert (answer.seed, answer.model) == (2**63 - 1, MODEL)


def test_no_label_and_no_seed(service: StubService) -> None:
    list(ServiceClient(service.url).complete_stream("mnist5k", IMAGE, OBSERVED))
    body = service.requests[0][1]
    assert body["label"] == -1
    assert "seed" not in body


def test_stream_gives_every_row_then_the_answer(service: StubService) -> None:
    client = ServiceClient(service.url)
    *rows, answer = client.complete_stream("mnist5k", IMAGE, OBSERVED, num_samples=2, seed=5)
    assert all(isinstance(event, Rows) for event in rows)
    assert [event.start for event in rows] == list(range(28))
    assert [[event.rows[i][0] for event in rows] for i in range(2)] == answer.completions
    assert answer.model_dump() == service.answers[0]


def test_stream_without_an_end_is_an_error(service: StubService) -> None:
    service.break_stream = True
    with pytest.raises(ServiceError, match=r"stopped in mid-answer\. Try again; your drawing is kept"):
        list(ServiceClient(service.url).complete_stream("mnist5k", IMAGE, OBSERVED))


def asked(server: socket.socket) -> socket.socket:
    """Accept a connection, and read the request of an empty drawing that comes by it."""
    connection, _ = server.accept()
    connection.settimeout(10)
    while b"[]" not in connection.recv(65536):
        pass
    return connection


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_stream_that_is_cut_off_is_told_from_a_service_that_does_not_answer(has_begun: bool, is_reset: bool) -> None:
    """As a worker that is killed leaves it: without the last chunk."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        answers = in_background(
            lambda _: ServiceClient(f"http://127.0.0.1:{server.getsockname()[1]}").complete_stream("mnist", [], [])
        )
        assert next(answers) is None
        with asked(server) as connection:
            if has_begun:
                rows = b'event: rows\ndata: {"start": 0, "rows": [[[0]]]}\n\n'
                head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                connection.sendall(head + b"%x\r\n%s\r\n" % (len(rows), rows))
                assert Rows(start=0, rows=[[[0]]]) in answers
            if is_reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    begun, none = r"stopped in mid-answer\. Try again; .* \(request [0-9a-f]{12}\)$", r"does not answer\. Start it with"
    with pytest.raises(ServiceError, match=begun if has_begun else none) as caught:
        list(answers)
    assert caught.value.away


def test_stream_error_event_is_an_error() -> None:
    text = ': drawing\n\nevent: error\ndata: {"error": "The model failed."}\n\n'
    client = answering(lambda request: httpx.Response(200, text=text, headers=EVENTS))
    with pytest.raises(ServiceError, match=r"^The model failed\. \(request [0-9a-f]{12}\)$") as caught:
        list(client.complete_stream("mnist5k", IMAGE, OBSERVED))
    assert caught.value.away, "the request is not at fault, as where a 500 says so"


def test_stream_refused_before_drawing(service: StubService) -> None:
    service.refusal = (404, '{"error": "No champion for mnist5k. Run the promotion once."}')
    with pytest.raises(ServiceError, match=r"^No champion for mnist5k\. Run the promotion once\. \(request"):
        list(ServiceClient(service.url).complete_stream("mnist5k", IMAGE, OBSERVED))


def test_generate_and_likelihood() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/generate":
            assert body == {"dataset": "mnist5k", "num_samples": 1, "label": 2, "temperature": 1.0, "seed": 8}
            return httpx.Response(200, json={"images": [IMAGE], "log_probs": [-90.5], "seed": 8, "model": MODEL})
        assert request.url.path == "/likelihood"
        assert body == {"dataset": "mnist5k", "image": IMAGE, "label": -1}
        surprise = [[0.5] * 28] * 28
        answer = {"log_prob": -392.0, "bits_per_dim": 0.72, "packed_bytes": 71, "surprise": surprise, "model": MODEL}
        return httpx.Response(200, json=answer)

    client = answering(handler)
    assert client.generate("mnist5k", label=2, seed=8).log_probs == [-90.5]
    likelihood = client.likelihood("mnist5k", IMAGE)
    assert (likelihood.log_prob, likelihood.bits_per_dim, likelihood.surprise[27][27]) == (-392.0, 0.72, 0.5)


def test_service_down_says_how_to_start_it(service: StubService) -> None:
    service.close()
    client = ServiceClient(service.url)
    sentence = f"The service at {service.url} does not answer. Start it with `make serve`; your drawing is kept."
    for call in (
        client.models,
        lambda: list(client.complete_stream("mnist5k", IMAGE, OBSERVED)),
        lambda: client.generate("mnist5k"),
        lambda: client.likelihood("mnist5k", IMAGE),
    ):
        with pytest.raises(ServiceError) as caught:
            call()
        assert str(caught.value) == sentence


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_name_that_no_network_knows_is_no_answer(host: str) -> None:
    with pytest.raises(ServiceError, match="does not answer"):
        ServiceClient(f"http://{host}:3000").models()


def test_service_back_after_a_restart(service: StubService) -> None:
    client = ServiceClient(service.url)
    client.models()
    service.close()
    with pytest.raises(ServiceError):
        client.models()
    again = StubService(port=service.port)
    try:
        assert "mnist5k" in client.models()
    finally:
        again.close()


def test_the_service_is_never_reached_by_way_of_a_proxy(service: StubService, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert ServiceClient(service.url).models()


def test_slow_service() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("timed out", request=request)

    with pytest.raises(ServiceError, match=r"takes too long to answer\. Try again") as caught:
        answering(handler).generate("mnist5k")
    assert caught.value.away


@pytest.mark.parametrize(
    ("status", "text", "sentence"),
    [
        (400, '{"error": "temperature must be at most 100, got 1000."}', "temperature must be at most 100, got 1000."),
        (429, '{"error": "Too many at once. Try again."}', "Too many at once. Try again."),
        (429, "busy", "The service at http://service.test is busy. Try again in a moment; your drawing is kept."),
        (500, "oh", "The service at http://service.test failed; its log says why. Your drawing is kept."),
    ],
)
def test_refusals_become_their_sentence(status: int, text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    sent: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["x-request-id"])
        return httpx.Response(status, text=text)

    client = answering(refuse)
    with pytest.raises(ServiceError) as caught:
        client.generate("mnist5k")
    assert str(caught.value) == f"{sentence} (request {sent[-1]})"
    assert len(set(sent)) == len(sent)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_after_the_time_it_names(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    busy = [{"retry-after": "3"}, {"retry-after": "3600"}]

    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers=busy.pop(0)) if busy else httpx.Response(200, json={})

    assert answering(handler).models() == {}
    assert waited == [3.0, 5.0]
    busy = [{}, {"retry-after": "Thu, 01 Jan 2026 00:00:00 GMT"}, {}]
    with pytest.raises(ServiceError, match="is busy"):
        answering(handler).models()
    assert waited == [3.0, 5.0, 1.0, 1.0]
    busy = [{}]
    with pytest.raises(ServiceError, match="is busy"):
        list(answering(handler).complete_stream("mnist5k", IMAGE, OBSERVED))
    assert waited == [3.0, 5.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>another program</html>"),
        httpx.Response(200, json=[1, 2]),
        httpx.Response(200, json={"completions": []}),
        httpx.Response(404, text="Not Found"),
        httpx.Response(404, json={"error": ""}),
    ],
)
def test_another_program_on_the_port(response: httpx.Response) -> None:
    client = answering(lambda request: response)
    with pytest.raises(ServiceError, match=r"does not speak like the completion service\. Set PIXELCNN_SERVICE_URL"):
        client.generate("mnist5k")
    with pytest.raises(ServiceError, match="does not speak like the completion service") as caught:
        list(client.complete_stream("mnist5k", IMAGE, OBSERVED))
    assert caught.value.away == (response.status_code == 200), "a proxy may speak while the service starts"


def test_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIXELCNN_SERVICE_URL", raising=False)
    assert service_url() == DEFAULT_URL == "http://127.0.0.1:3000"
    monkeypatch.setenv("PIXELCNN_SERVICE_URL", "https://127.0.0.1:9999/\n")
    assert service_url() == ServiceClient(service_url()).url == "https://127.0.0.1:9999"


def test_the_named_environment_says_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIXELCNN_SERVICE_URL", raising=False)
    monkeypatch.setenv("PIXELCNN_ENVIRONMENT", " staging\n")
    with pytest.raises(ServiceError, match=r"'staging', which environments\.yaml .* not describe\. Known: none\."):
        service_url()
    Path("environments.yaml").write_text(
        "staging: {store: s, service: 'http://staging:3000'}\nempty: {store: e, service: }"
    )
    assert service_url() == "http://staging:3000"
    monkeypatch.setenv("PIXELCNN_SERVICE_URL", "http://production:3000")
    with pytest.raises(ServiceError, match="PIXELCNN_SERVICE_URL is set, but not to the service of staging"):
        service_url()
    monkeypatch.setenv("PIXELCNN_ENVIRONMENT", "empty")
    with pytest.raises(ServiceError, match="says no service of empty"):
        service_url()
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT")
    assert service_url() == "http://production:3000", "development, which the file does not describe"
    Path("environments.yaml").write_text("development: {service: 'http://development:3000'}")
    with pytest.raises(ServiceError, match="PIXELCNN_SERVICE_URL is set, but not to the service of development"):
        service_url()
    Path("environments.yaml").write_bytes(b"\xff")
    with pytest.raises(ServiceError, match=r"environments\.yaml must give each environment a registry, a store"):
        service_url()


def test_client_knows_the_wire_alone() -> None:
    tree = ast.parse(Path(app.client.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - sys.stdlib_module_names == {
        "collections.abc",
        "httpx",
        "httpx_sse",
        "stamina",
        "pydantic",
        "app.environment",
    }


def test_a_named_client_sends_its_name() -> None:
    seen = []

    def refuse(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("X-Client"))
        is_stream = request.url.path == "/complete_stream"  # which may be hung up, and nobody else with it
        assert (request.headers["Connection"] == "close") == is_stream
        return httpx.Response(404, json={"error": "no"})

    client = answering(refuse)

    def ask(one: ServiceClient) -> None:
        for call in (one.models, lambda: one.generate("mnist"), lambda: next(one.complete_stream("mnist", [], []))):
            with pytest.raises(ServiceError):
                call()

    ask(client.named("me"))
    ask(client)
    assert seen == [*3 * ["me"], *3 * [None]]


@pytest.mark.parametrize("has_come", [False, True])
def test_a_stream_that_is_left_while_it_waits_is_hung_up_at_once(has_come: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = ServiceClient(f"http://127.0.0.1:{server.getsockname()[1]}")
        answers = in_background(lambda on_open: client.complete_stream("mnist", [], [], on_open))
        assert next(answers) is None
        with asked(server) as connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: drawing\n\n")
            for _ in range(10 * has_come):  # the client has read so far, or not
                next(answers)
            answers.close()
            assert connection.recv(1) == b""  # nothing was sent that could have ended the stream


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host:x", "localhost:3000", "http://xn--a"])
def test_what_is_no_address_is_said(url: str) -> None:
    with pytest.raises(ServiceError, match=r"PIXELCNN_SERVICE_URL must be an address like http://127"):
        ServiceClient(url)
    with pytest.raises(ServiceError, match=r"got '[^']*'") as error:
        ServiceClient(url.replace("://", "://bob:secret@") if "://" in url else f"http//bob:secret@{url}")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("token", ["", " key\n"])
def test_a_password_in_the_address_is_not_told(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELCNN_TOKEN", token)
    sent: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["authorization"])
        return httpx.Response(500)

    with pytest.raises(ServiceError, match=r"^The service at http://host:3000 failed"):
        ServiceClient("http://bob:secret@host:3000", transport=httpx.MockTransport(refuse)).models()
    assert sent[0] == ("Bearer key" if token else "Basic " + base64.b64encode(b"bob:secret").decode())


@pytest.mark.parametrize("token", ["gehe\xfcim", "a\nb"])
def test_a_token_that_no_header_can_hold_is_said(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELCNN_TOKEN", token)
    with pytest.raises(ServiceError, match="PIXELCNN_TOKEN must be printable ASCII text"):
        ServiceClient()
