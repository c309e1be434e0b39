"""Who may enter, how many at once, and what happens to those who dawdle or leave."""

import asyncio
import base64
import logging
import os
from typing import Any

import httpx
import pytest
import torch
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from app.client import ServiceClient, ServiceError
from app.service import api as service
from app.service import gate, wire
from app.service.batching import IDLE_LANE
from app.service.operation.requests import RequestLog
from app.service.settings import settings
from pixelcnn.images import to_png
from tests.service.test_metrics import read

TOKEN = "s3cret-token"
OPEN = ("/healthz", "/livez", "/readyz")


async def hello(scope, receive, send) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


def ask(path: str, method: str = "GET", token: str = TOKEN, **headers: str | bytes) -> httpx.Response:
    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(gate.Gate(hello, token))
        async with httpx.AsyncClient(transport=transport, base_url="http://service.test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(run())


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"])
@pytest.mark.parametrize(("path", "method"), [("/complete", "POST"), ("/models", "GET"), ("/metrics", "GET")])
def test_without_the_token_nothing_is_answered(path, method, sent):
    headers = {"Authorization": sent.encode("latin-1")} if sent else {}
    response = ask(path, method, **headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"].startswith("this service wants a token: send the header Authorization: Bearer")
    assert TOKEN not in response.text


def test_with_the_token_or_without_one_set_everything_is_answered():
    assert ask("/models", Authorization=f"Bearer {TOKEN}").text == "hello"
    assert ask("/models", token="").text == "hello"
    for path in OPEN:
        assert ask(path).text == "hello"


def test_a_token_that_is_no_text_is_one_all_the_same():
    """It comes from the environment, as os.fsdecode reads it; else every request failed, health checks among them."""
    token = b"s3cret-\xff"
    assert ask("/models", token=os.fsdecode(token), Authorization=b"Bearer " + token).text == "hello"
    assert ask("/models", token=os.fsdecode(token), Authorization="Bearer s3cret-?").status_code == 401
    assert ask("/livez", token=os.fsdecode(token)).text == "hello"


def test_the_token_is_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(gate.hmac, "compare_digest", lambda a, b: compared.append((a, b)))
    assert ask("/models", Authorization=f"Bearer {TOKEN}").status_code == 401
    assert compared == [(f"Bearer {TOKEN}".encode(),) * 2]


def test_the_token_is_not_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        ask("/models", Authorization=f"Bearer {TOKEN}")
        ask("/models", Authorization=f"Bearer {TOKEN}-wrong")
    assert TOKEN not in caplog.text


def test_a_path_or_method_of_any_length_makes_no_long_line(caplog):
    caplog.set_level(logging.INFO, "bentoml.pixelcnn.requests")
    scope = {"type": "http", "method": 9999 * "X", "path": "/" + 9999 * "x", "headers": []}
    connection = Connection()
    asyncio.run(RequestLog(hello, ["/complete"])(scope, connection.receive, connection.send))
    assert caplog.records[-1].line["path"] == "/" + 59 * "x"
    assert caplog.records[-1].line["method"] == 60 * "X"


def test_the_client_sends_the_token_of_its_environment(monkeypatch):
    seen = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("authorization"))
        return httpx.Response(200, json={})

    for token in (TOKEN, ""):
        monkeypatch.setenv("PIXELCNN_TOKEN", token)
        ServiceClient("http://service.test", httpx.MockTransport(answer)).models()
    assert seen == [f"Bearer {TOKEN}", None]
    monkeypatch.setenv("PIXELCNN_TOKEN", "line\nbreak")
    with pytest.raises(ServiceError, match="PIXELCNN_TOKEN must be printable ASCII text"):
        ServiceClient("http://service.test")


def test_other_pages_may_not_read_the_answers(client):
    headers = {"Origin": "http://evil.test", "Access-Control-Request-Method": "POST"}
    for response in (client.options("/complete", headers=headers), client.get("/models", headers=headers)):
        assert not [name for name in response.headers if name.startswith("access-control-")]


# Bounds.


class Connection:
    """A client's side of one request, by hand: the body comes when `body` is set, it leaves when `left` is."""

    def __init__(self) -> None:
        self.body, self.left = asyncio.Event(), asyncio.Event()
        self.is_read, self.sent = False, []
        self.scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/complete", "headers": []}

    async def receive(self) -> dict:
        await self.body.wait()
        if not self.is_read:
            self.is_read = True
            return {"type": "http.request", "body": b"{}", "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        self.sent.append(message)


def sent_by(app: ASGIApp, *headers: tuple[bytes, bytes]) -> list[dict]:
    """Return what an application sends through a gate; nothing of the request is left running."""

    async def run() -> list[dict]:
        connection = Connection()
        connection.scope["headers"] = [*headers]
        connection.body.set()
        await asyncio.wait_for(gate.Gate(app)(connection.scope, connection.receive, connection.send), 5)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return connection.sent

    return asyncio.run(run())


def sending(*messages: dict):
    """Return an application that sends these messages, and then fails."""

    async def send_all(scope, receive, send) -> None:
        for message in messages:
            await send(message)
        raise RuntimeError("secret details")

    return send_all


def held_until(go: asyncio.Event):
    """Return an application that answers once it is let go."""

    async def wait(scope, receive, send) -> None:
        await receive()
        await go.wait()
        await hello(scope, receive, send)

    return wait


def test_beyond_the_requests_in_flight_all_are_refused_at_once(monkeypatch):
    monkeypatch.setattr(settings, "max_requests", 2)
    go = asyncio.Event()

    async def run() -> None:
        app = gate.Gate(held_until(go))
        connections = [Connection() for _ in range(3)]
        tasks = [asyncio.create_task(app(c.scope, c.receive, c.send)) for c in connections]
        await tasks[2]  # the others have not even sent their bodies
        start, _ = connections[2].sent
        assert start["status"] == 429
        assert 3 <= int(dict(start["headers"])[b"retry-after"]) <= 8
        for connection in connections:
            connection.body.set()
        go.set()
        await asyncio.gather(*tasks)
        assert [c.sent[0]["status"] for c in connections[:2]] == [200, 200]
        assert not app.active

    asyncio.run(run())


def test_beyond_a_clients_own_requests_it_alone_is_refused(monkeypatch):
    monkeypatch.setattr(settings, "max_client_requests", 2)
    go = asyncio.Event()

    async def run() -> None:
        app = gate.Gate(held_until(go))
        connections = [Connection() for _ in range(5)]
        for connection, name in zip(connections, (b"one", b"one", b"one", b"two", b""), strict=True):
            connection.scope |= {"headers": [(b"x-client", name)] if name else [], "client": ("127.0.0.1", 1)}
        tasks = [asyncio.create_task(app(c.scope, c.receive, c.send)) for c in connections]
        await asyncio.wait_for(tasks[2], 5)
        assert connections[2].sent[0]["status"] == 429
        assert b"you have 2 requests here already" in connections[2].sent[1]["body"]
        for connection in connections:
            connection.body.set()
        go.set()
        await asyncio.gather(*tasks)
        assert [c.sent[0]["status"] for c in (*connections[:2], *connections[3:])] == [200] * 4
        assert not app.active, "nobody is remembered"

    asyncio.run(run())


def test_what_fails_is_answered_at_once(caplog):
    start, body = sent_by(sending())
    assert start["status"] == 500
    assert b"secret" not in body["body"]
    assert "secret details" in caplog.text


def test_what_fails_in_its_answer_is_not_answered_again():
    begun = {"type": "http.response.start", "status": 200, "headers": []}
    assert sent_by(sending(begun)) == [begun]


def test_an_error_that_comes_in_parts_is_told_whole():
    start = {"type": "http.response.start", "status": 400, "headers": []}
    parts = [{"body": b'{"error": ', "more_body": True}, {"body": b'"two parts"}'}]
    _, *bodies = sent_by(sending(start, *({"type": "http.response.body", **part} for part in parts)))
    assert [message["body"] for message in bodies] == [b'{"error":"two parts"}']


@pytest.mark.parametrize("body", ["no JSON", "[]", "{}", "7"])
def test_an_error_without_a_sentence_gets_one(body):
    assert sent_by(PlainTextResponse(body, 502))[1]["body"] == b'{"error":"the request failed: Bad Gateway."}'


def test_who_comes_before_it_is_ready_is_told_when_to_return():
    start, _ = sent_by(PlainTextResponse("", 503))
    assert 3 <= int(dict(start["headers"])[b"retry-after"]) <= 8


async def read_then_hello(scope, receive, send) -> None:
    await receive()
    await hello(scope, receive, send)


@pytest.mark.parametrize(
    ("app", "headers", "expected"),
    [(hello, [], [b"close"]), (hello, [(b"content-length", b"2")], []), (read_then_hello, [], [])],
)
def test_a_body_that_may_never_end_closes_its_connection(app, headers, expected):
    start, _ = sent_by(app, *headers)
    assert [value for name, value in start["headers"] if name == b"connection"] == expected


def test_who_is_cancelled_by_another_has_not_been_left():
    async def cancelled(scope, receive, send) -> None:
        await receive()
        raise asyncio.CancelledError

    assert sent_by(cancelled) == []


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_failure_of_ours(caplog):
    async def read(scope, receive, send) -> None:
        await Request(scope, receive).body()  # raises ClientDisconnect

    async def run() -> None:
        connection = Connection()
        connection.body.set()
        connection.left.set()
        connection.is_read = True
        await asyncio.wait_for(gate.Gate(read)(connection.scope, connection.receive, connection.send), 5)
        assert connection.sent[0]["status"] == 499

    asyncio.run(run())
    assert not caplog.records


def working(ended: list[bool]):
    """Return an application that never answers, and notes when it is ended."""

    async def work(scope, receive, send) -> None:
        await receive()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    return work


@pytest.mark.parametrize("status", [499, 200])
def test_a_client_that_leaves_ends_its_request(status):
    ended: list[bool] = []

    async def begin(scope, receive, send) -> None:
        if status == 200:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await working(ended)(scope, receive, send)

    async def run() -> None:
        app, connection = gate.Gate(begin), Connection()
        connection.body.set()
        task = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
        await asyncio.sleep(0.01)
        assert not task.done()
        connection.left.set()
        await asyncio.wait_for(task, 5)
        assert ended == [True]
        assert not app.active
        begun = [message["status"] for message in connection.sent if "status" in message]
        assert begun == [status], "or the log would call it a failure of the service"

    asyncio.run(run())


def test_a_request_whose_time_is_up_ends_and_counts_as_one_that_failed(caplog):
    """BentoML cancels it, and answers by itself."""
    caplog.set_level(logging.INFO, "bentoml.pixelcnn.requests")
    counted, ended = {"path": "/complete", "status": "504"}, list[bool]()
    before = read("pixelcnn_requests_total", **counted)

    async def run() -> None:
        app, connection = RequestLog(gate.Gate(working(ended)), ["/complete"]), Connection()
        connection.body.set()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await app(connection.scope, connection.receive, connection.send)
        await asyncio.sleep(0.01)
        assert ended == [True]
        assert not connection.sent

    asyncio.run(run())
    assert caplog.records[-1].line["status"] == 504
    assert read("pixelcnn_requests_total", **counted) == before + 1


def test_a_body_that_does_not_come_is_not_awaited_for_ever(monkeypatch):
    monkeypatch.setattr(settings, "body_timeout_s", 0.05)

    async def never() -> dict:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b" ", "more_body": True}

    with pytest.raises(wire.RequestError, match=r"took longer than 0\.05 s to arrive") as caught:
        asyncio.run(wire.read_body(Request({"type": "http", "headers": []}, never)))
    assert caught.value.error_code == 408


def test_beyond_the_queue_requests_are_refused_at_once(client, monkeypatch):
    monkeypatch.setattr(service.Batcher, "num_waiting", settings.max_queue)
    for path in ("/generate", "/complete_stream"):
        body = {"dataset": "grey"}
        if path == "/complete_stream":
            body |= {"image": [[0] * 4] * 5, "observed": [[0] * 4] * 5}
        response = client.post(path, json=body)
        assert response.status_code == 429
        assert 3 <= int(response.headers["retry-after"]) <= 8
        assert "send this one again in a few seconds" in response.json()["error"]


def test_a_request_waits_for_its_clients_turn(client, monkeypatch):
    submit, clients = service.Batcher.submit, []

    def note(self, job) -> None:
        clients.extend([] if job.lane == IDLE_LANE else [job.client])  # a drawing that is scored is nobody's
        submit(self, job)

    monkeypatch.setattr(service.Batcher, "submit", note)
    for name in ("one", "two", "one"):
        assert client.post("/generate", json={"dataset": "grey"}, headers={"X-Client": name}).status_code == 200
    picture = base64.b64encode(to_png(torch.zeros(1, 5, 4, dtype=torch.int64), 2)).decode()
    body = {"dataset": "grey", "image": picture}
    assert client.post("/likelihood", json=body, headers={"X-Client": "two"}).status_code == 200
    one, two, again, *of_picture = clients
    assert one == again != two
    assert of_picture == [two, two], "to be read, and to be scored"


def test_a_stream_ends_in_time(client, monkeypatch):
    monkeypatch.setattr(settings, "timeout_s", 0.05)
    monkeypatch.setattr(service.Batcher, "submit", lambda self, job: None)
    body = {"dataset": "grey", "image": [[0] * 4] * 5, "observed": [[0] * 4] * 5}
    seconds = {"endpoint": "complete_stream", "dataset": "grey"}
    counted = {"path": "/complete_stream", "status": "504"}
    before = [read("pixelcnn_request_seconds_sum", **seconds), read("pixelcnn_requests_total", **counted)]
    assert "took longer than 0.05 s: ask for less" in client.post("/complete_stream", json=body).text
    assert read("pixelcnn_request_seconds_sum", **seconds) > before[0] + 0.04
    assert read("pixelcnn_requests_total", **counted) == before[1] + 1


def test_requests_that_come_together_are_read_one_per_turn_of_the_loop():
    turn, read = 0, []

    async def count_turns(num: int) -> None:
        nonlocal turn
        while len(read) < num:
            turn += 1
            await asyncio.sleep(0)

    async def read_one() -> None:
        async def receive() -> dict:
            return {"type": "http.request", "body": b'{"dataset": "grey"}', "more_body": False}

        scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
        await wire.GenerateRequest.from_http_request(Request(scope, receive), None)
        read.append(turn)

    async def together(num: int) -> None:
        await asyncio.gather(count_turns(len(read) + num), *(read_one() for _ in range(num)))

    asyncio.run(together(8))
    asyncio.run(together(8))  # in another event loop: nothing of the first one is left
    assert len(set(read)) == 16
    before = turn
    asyncio.run(together(1))
    assert read[-1] <= before + 2, "who comes alone waits for nobody who was before"


def test_clients_are_told_apart_by_their_name_or_else_their_address() -> None:
    seen = []

    async def note(scope, receive, send) -> None:
        seen.append(gate.client.get())
        await PlainTextResponse("hello")(scope, receive, send)

    async def ask(address: str, headers: dict[str, str]) -> None:
        transport = httpx.ASGITransport(gate.Gate(note), client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://service.test") as client:
            await client.post("/complete", headers=headers)

    async def run() -> None:
        for address, headers in (("a", {}), ("b", {}), ("a", {"X-Client": "1"}), ("b", {"X-Client": "1"})):
            await ask(address, headers)
        await ask("a", {"X-Client": 10_000 * "long"})

    asyncio.run(run())
    assert seen[2] == seen[3]
    assert len(set(seen)) == 4
    assert {len(name) for name in seen} == {16}  # hashed, so bounded: none holds what was sent
