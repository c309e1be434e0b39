"""What reaches a connection before the gate sees a request: heads without end, and clients that leave in between."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import uvicorn

import app.service  # noqa: F401 -- so that it is in use
from app.service.operation.connection import MAX_HEAD_BYTES
from app.service.settings import settings

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /complete HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
servers: list[uvicorn.Server] = []
left: list[str] = []  # the paths of requests that were told that their client has left


async def answer(scope, receive, send) -> None:
    """Answer with the path and the body's length; much at /whole, without end at /stream; late, unread at /slow."""
    length, more = 0, scope["path"] != "/slow"
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"transfer-encoding", b"chunked")]})
    leaving = asyncio.create_task(receive())
    while scope["path"] == "/stream" and not leaving.done():
        await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        await asyncio.sleep(0.01)
    if leaving.done() and leaving.result()["type"] == "http.disconnect":
        left.append(scope["path"])
    leaving.cancel()
    await asyncio.sleep(0.5 * (scope["path"] == "/slow"))
    connection = next(iter(servers[-1].server_state.connections), None)
    while scope["path"] == "/little" and not connection.transport.get_write_buffer_size():
        await send({"type": "http.response.body", "body": b"x" * 20_000, "more_body": True})
    end = b"x" * 30_000_000 if scope["path"] == "/whole" else f"{scope['path']} {length}".encode()
    await send({"type": "http.response.body", "body": end})


def converse(talk: Talk, then: Callable[[], bool] = lambda: True) -> None:
    """Serve as `bentoml serve` does, talk over one connection, and wait until something has come of it."""

    async def run() -> None:
        config = uvicorn.Config(answer, port=0, lifespan="off", log_level="error", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        servers.append(server)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        [port] = {one.getsockname()[1] for one in server.servers[0].sockets}
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            async with asyncio.timeout(10):
                await talk(reader, writer)
                while not then():
                    await asyncio.sleep(0.01)
            writer.close()
        finally:
            server.should_exit = True
            await serving

    asyncio.run(run())


def refused(sent: bytes, more: bytes = b"") -> tuple[str, str]:
    """Send a head, then as much more of it as is too much; return the status and the sentence that end it."""
    told: list[str] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        for _ in range(1 + MAX_HEAD_BYTES // len(more) if more else 0):  # not more: nobody reads it
            await asyncio.sleep(0.02)
            writer.write(more)
        told.append((await reader.read()).decode())

    converse(talk)
    [text] = told
    if not text:
        return "", ""
    head, body = text.split("\r\n\r\n")
    assert "connection: close" in head
    assert "content-type: application/json" in head
    return head.split("\r\n")[0], json.loads(body)["error"]


@pytest.mark.parametrize("more", [b"a: b\r\n" * 1400, b"x" * 8000], ids=["many lines", "one line"])
def test_a_head_without_end_is_refused(more: bytes) -> None:
    status, sentence = refused(GET + b"X-A: ", more)
    assert status == "HTTP/1.1 431 Request Header Fields Too Large"
    assert sentence == f"the request's headers must have at most {MAX_HEAD_BYTES} bytes: send fewer."


def test_an_address_without_end_is_refused() -> None:
    assert refused(b"GET /", b"x" * 8000)[0] == "HTTP/1.1 431 Request Header Fields Too Large"


@pytest.mark.parametrize("before", [b"", POST % 3 + b"abc"], ids=["at first", "after a request"])
def test_a_head_that_takes_long_is_refused(monkeypatch: pytest.MonkeyPatch, before: bytes) -> None:
    monkeypatch.setattr(settings, "body_timeout_s", 0.3)
    told: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(before)
        if before:
            await reader.readuntil(b"/complete 3\r\n0\r\n\r\n")
        writer.write(GET + b"X-A: ")
        reading = asyncio.create_task(reader.read())
        while not reading.done():
            writer.write(b"a")
            await asyncio.sleep(0.05)
        told.append(await reading)

    converse(talk)
    assert told[0].startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert told[0].endswith(b'{"error": "the request\'s headers took longer than 0.3 s to arrive: send it anew."}')


def test_who_connects_and_says_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "body_timeout_s", 0.2)
    assert refused(b"") == ("", "")


def test_what_is_no_http_is_refused_as_all_is() -> None:
    status, sentence = refused(b"\x16\x03\x01 hello\r\n\r\n")
    assert status == "HTTP/1.1 400 Bad Request"
    assert sentence == "this is no HTTP request that can be read: /docs.json says what to send."


def test_other_requests_are_answered_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their bodies are no heads, and take as long as the gate lets them."""
    monkeypatch.setattr(settings, "body_timeout_s", 0.2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = 4 * MAX_HEAD_BYTES
        for _ in range(2):
            writer.write(POST % size + b"x" * (size // 2))
            await asyncio.sleep(0.3)
            writer.write(b"x" * (size // 2))
            await reader.readuntil(f"/complete {size}\r\n0\r\n\r\n".encode())
        writer.write((GET + b"\r\n") * 3)  # sent ahead
        for _ in range(3):
            await reader.readuntil(b"/livez 0\r\n0\r\n\r\n")

    converse(talk)


def test_a_client_that_sent_ahead_and_leaves_ends_what_is_answered() -> None:
    left.clear()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"xxx")
        writer.write(GET + b"\r\n")
        await asyncio.sleep(0.1)
        writer.transport.abort()

    converse(talk, lambda: "/stream" in left)


@pytest.mark.parametrize("path", ["stream", "whole", "little"])
def test_a_reader_that_takes_nothing_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Also one that leaves little of its answer, whose connection is closed already."""
    monkeypatch.setattr(settings, "send_timeout_s", 0.3)
    left.clear()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cast(asyncio.Transport, writer.transport).pause_reading()
        writer.write(f"GET /{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())

    converse(talk, lambda: "a client took nothing for" in caplog.text and (path != "stream" or "/stream" in left))


def test_a_reader_that_takes_its_time_has_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "send_timeout_s", 0.3)
    taken: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /whole HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        while part := await reader.read(1_000_000):
            taken.append(len(part))
            await asyncio.sleep(0.003)

    converse(talk)
    assert sum(taken) > 30_000_000


def test_a_reader_that_took_its_time_may_ask_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "send_timeout_s", 0.3)
    told: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /whole HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.1)  # it is waited for
        await reader.readuntil(b"\r\n\r\n")
        size = int(await reader.readline(), 16)
        await reader.readexactly(size)
        await reader.readuntil(b"0\r\n\r\n")
        await asyncio.sleep(1)
        writer.write(GET + b"\r\n")
        told.append(await reader.readuntil(b"0\r\n\r\n"))

    converse(talk)
    assert b"/livez 0" in told[0]


@pytest.mark.parametrize("trailer", [b"a: b\r\n" * 1400, b"x" * 8000], ids=["many lines", "one line"])
def test_trailers_without_end_are_refused(trailer: bytes) -> None:
    head = b"POST /complete HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\na: "
    assert refused(head, trailer)[0] == "HTTP/1.1 431 Request Header Fields Too Large"


def test_what_is_sent_ahead_ends_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused after the answer, not within."""
    monkeypatch.setattr(settings, "body_timeout_s", 0.2)
    told: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(0.1)
        writer.write(GET)  # a head without its end
        told.append(await reader.read())

    converse(talk)
    answered, _, refusal = told[0].partition(b"/slow 0\r\n0\r\n\r\n")
    assert answered.startswith(b"HTTP/1.1 200 OK")
    assert refusal.startswith(b"HTTP/1.1 408 Request Timeout\r\n")


def test_a_body_that_cannot_be_read_puts_no_refusal_into_an_answer() -> None:
    told: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"POST /slow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"no length\r\n")
        told.append(await reader.read())

    converse(talk)
    assert told == [b""]


def test_empty_lines_after_an_answer_keep_no_connection(monkeypatch):
    monkeypatch.setattr(settings, "body_timeout_s", 0.3)
    ended = []

    async def talk(reader, writer):
        writer.write(GET + b"\r\n")
        while b"/livez 0" not in await reader.read(1000):
            pass
        await asyncio.sleep(0.1)
        writer.write(b"\r\n")
        async with asyncio.timeout(3):
            await reader.read()
        ended.append(True)

    converse(talk)
    assert ended
