"""Endings on the shortest way, without the page: what its server answers to a stroke."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from streamlit import net_util

from app.canvas import live
from app.canvas.drawing import TOUCHED, Drawing, drawing_text
from app.canvas.endings import Endings, Settings, asked_of
from app.canvas.live import LIVE_PATH, MAX_BYTES, answer_live
from app.canvas.main import app as canvas
from app.canvas.origins import OwnOrigin
from app.canvas.session import GALLERY, VISITS, Visit
from app.canvas.waiting import Leaving, drawn
from app.client import Rows, ServedModel, ServiceClient, ServiceError
from tests.app.stub_service import MODELS, StubService

INK = np.zeros((28, 28), dtype=np.int64)
INK[4:10, 12:15] = 255
STROKE = Drawing(INK, np.where(INK > 0, TOUCHED, 0))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of the way, on a server of its own."""
    app = Starlette(routes=[Route(LIVE_PATH, answer_live, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}{LIVE_PATH}"
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def visit(service: StubService) -> Visit:
    """A visit whose page was shown once."""
    visit = VISITS["a-visit"] = Visit(name="a-visit", language="en", client=ServiceClient(service.url))
    model = ServedModel.model_validate(MODELS["mnist5k"])
    visit.settings = Settings("mnist5k", model, "above", 9, 3, 0.8, None, "", True, False, True)
    return visit


def body(drawing: Drawing, name: str = "a-visit") -> dict[str, str]:
    return {"visit": name, "drawing": drawing_text(drawing)}


def events_of(response: httpx.Response) -> Iterator[dict[str, object]]:
    for line in response.iter_lines():
        if line:
            yield json.loads(line.removeprefix("data: "))


def test_a_stroke_is_answered_row_by_row_and_kept_for_the_page(url: str, visit: Visit, service: StubService) -> None:
    service.row_s, visit.language = 0.2, "fr"
    with httpx.stream("POST", url, json=body(STROKE)) as response:
        assert response.status_code == 200
        events = events_of(response)
        first = next(events)
        assert 'data-drawn="0"' in str(first["html"])
        assert visit.live is None
        assert visit.live_for  # so that the page does not ask for the same
        service.row_s = 0.0
        *_, last = events
    assert last["finished"]
    assert str(last["html"]).count("nats</span>") == 9
    assert 'alt="Fin 9: ' in str(last["html"])
    assert not visit.live_for
    [(path, sent)] = service.requests
    assert path == "/complete_stream"
    assert (sent["label"], sent["temperature"], sent["seed"]) == (3, 0.8, visit.seed)
    assert sent["image"] == (INK > 0).astype(int).tolist()
    assert np.array(sent["observed"])[:10].all()
    assert not np.array(sent["observed"])[10:].any()
    settings, image = visit.settings, service.answers[0]["completions"][4]
    assert settings is not None
    taken = Drawing(255 * np.array(image), TOUCHED * np.array(image))
    assert httpx.post(url, json=body(taken)).status_code == 204  # nor an ending that was clicked
    visit.take_live(drawing_text(STROKE), settings)
    [ending] = visit.gallery
    assert (ending.seed, ending.drawing, ending.settings) == (visit.seed, drawing_text(STROKE), settings.query)
    assert ending.images.tolist() == service.answers[0]["completions"]
    assert visit.answered == ending.request
    assert httpx.post(url, json=body(STROKE)).status_code == 204  # what is answered is not asked for again


def test_another_drawing_gets_another_seed(url: str, visit: Visit, service: StubService) -> None:
    visit.seed = -1  # of the drawing before
    assert httpx.post(url, json=body(STROKE) | {"fresh": True}).status_code == 200
    assert service.requests[-1][1]["seed"] == visit.seed >= 0
    higher = Drawing(np.roll(INK, -1, axis=0), TOUCHED * (np.roll(INK, -1, axis=0) > 0))
    assert httpx.post(url, json=body(higher)).status_code == 200
    assert service.requests[-1][1]["seed"] == service.requests[-2][1]["seed"]


def test_endings_of_another_drawing_are_not_taken(visit: Visit, service: StubService, url: str) -> None:
    assert httpx.post(url, json=body(STROKE)).status_code == 200
    assert visit.live is not None
    assert visit.settings is not None
    visit.take_live(drawing_text(Drawing(INK.T, np.where(INK.T > 0, TOUCHED, 0))), visit.settings)
    assert visit.gallery == []
    visit.take_live(drawing_text(STROKE), replace(visit.settings, temperature=1.0))
    visit.take_live(drawing_text(STROKE), replace(visit.settings, seed=5))
    visit.pending = True  # other ones are wanted, of another seed
    visit.take_live(drawing_text(STROKE), visit.settings)
    assert visit.gallery == []
    visit.pending = False
    visit.take_live(drawing_text(STROKE), visit.settings)
    assert len(visit.gallery) == 1


def answered(visit: Visit, drawing: Drawing) -> Endings:
    """Endings of a drawing that add nothing to it."""
    assert visit.settings is not None
    asked = asked_of(drawing, visit.settings, seed=5)
    return replace(asked, images=np.maximum(asked.images, 0), log_probs=[-1.0] * 9, seed=5)


def test_a_whole_drawing_is_no_ending_of_itself(visit: Visit) -> None:
    """Other settings, or an undone stroke, ask for it again."""
    visit.keep(answered(visit, STROKE))
    assert visit.settings is not None
    assert not visit.is_ending(asked_of(STROKE, replace(visit.settings, label=7), seed=5))
    assert visit.is_ending(asked_of(replace(STROKE, mark=STROKE.mark + TOUCHED * (INK == 0)), visit.settings, seed=5))


def test_an_earlier_answer_leaves_what_came_live(visit: Visit) -> None:
    visit.live = newer = answered(visit, Drawing(INK.T, np.where(INK.T > 0, TOUCHED, 0)))
    visit.keep(answered(visit, STROKE))
    assert visit.live is newer
    visit.keep(newer)
    assert visit.live is None


def test_what_was_answered_since_is_not_asked_again(visit: Visit) -> None:
    """Where something else fails later, and is tried again."""
    visit.unanswered = True  # a stroke found no service; the next one did
    visit.unfinished = answered(visit, STROKE)
    visit.keep(visit.unfinished)
    assert visit.unfinished is None, "else it were shown while the next drawing waits"
    visit.retry()
    assert not visit.pending


def test_a_visit_keeps_its_last_endings_alone(visit: Visit) -> None:
    for seed in range(GALLERY + 2):
        visit.keep(replace(answered(visit, STROKE), seed=seed))
    assert [ending.seed for ending in visit.gallery] == list(range(GALLERY + 1, 1, -1))


def test_all_rows_are_shown_before_their_probabilities(visit: Visit) -> None:
    """However soon they follow one another."""
    assert visit.settings is not None
    *_, whole, scored = drawn(visit.client, asked_of(STROKE, visit.settings, seed=5), lambda end: None)
    assert whole.log_probs is None
    assert np.array_equal(whole.images, scored.images)


def test_there_may_be_nothing_to_show(url: str, visit: Visit, service: StubService) -> None:
    nothing = np.zeros((28, 28), dtype=np.int64)
    assert httpx.post(url, json=body(Drawing(nothing, nothing))).status_code == 204
    everything = nothing + 255
    assert httpx.post(url, json=body(Drawing(everything, nothing + TOUCHED))).status_code == 204
    assert service.requests == []


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (json.dumps(body(STROKE, name="another")).encode(), 404),
        (b"{}", 400),
        (b"\xff", 400),
        (b"0" * (MAX_BYTES + 1), 413),
        (iter([b"{}"]), 413),  # in chunks, of whatever length they are
    ],
)
def test_what_is_wrong_is_refused_by_one_sentence(
    url: str, visit: Visit, service: StubService, sent: bytes | Iterator[bytes], status: int
) -> None:
    response = httpx.post(url, content=sent)
    assert response.status_code == status
    assert response.text.endswith(".")
    assert service.requests == []


def test_who_leaves_while_a_drawing_is_sent_is_no_error() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    request = Request({"type": "http", "method": "POST", "headers": [(b"content-length", b"9")]}, receive)
    assert asyncio.run(answer_live(request)).status_code == 400


def test_a_drawing_that_does_not_come_is_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(live, "BODY_TIMEOUT_S", 0.1)
    request = Request({"type": "http", "method": "POST", "headers": [(b"content-length", b"9")]}, receive)
    assert asyncio.run(answer_live(request)).status_code == 408


def test_a_service_that_fails_ends_the_answer(url: str, visit: Visit, service: StubService) -> None:
    service.break_stream = True
    with httpx.stream("POST", url, json=body(STROKE)) as response:
        assert not any(event["finished"] for event in events_of(response))
    service.close()
    with httpx.stream("POST", url, json=body(STROKE)) as response:
        assert list(events_of(response)) == []
    assert visit.live is None
    assert not visit.live_for


def test_the_next_stroke_ends_the_last(url: str, visit: Visit, service: StubService) -> None:
    service.row_s = 0.05
    with httpx.stream("POST", url, json=body(STROKE)) as response:
        assert response.status_code == 200
        older = events_of(response)
        assert not next(older)["finished"]
        other = Drawing(INK.T, np.where(INK.T > 0, TOUCHED, 0))
        service.row_s = 0.5
        with httpx.stream("POST", url, json=body(other)) as response_to_other:
            newer = events_of(response_to_other)
            assert not next(newer)["finished"]
            assert not any(event["finished"] for event in older)
            assert visit.live_for  # the end of the last is not that of this one
            service.row_s = 0.0
            assert list(newer)[-1]["finished"]
    assert visit.live is not None
    assert visit.live.drawing == drawing_text(other)
    assert not visit.live_for


def test_who_leaves_ends_the_request(
    url: str, visit: Visit, service: StubService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, although the service says nothing just then."""
    ended = threading.Event()
    stream = ServiceClient.complete_stream

    def watched(self: ServiceClient, **request: object) -> Iterator[object]:
        try:
            yield from stream(self, **request)  # type: ignore[arg-type]
        finally:
            ended.set()

    monkeypatch.setattr(ServiceClient, "complete_stream", watched)
    service.row_s = 30.0
    with httpx.stream("POST", url, json=body(STROKE)) as response:
        assert response.status_code == 200
        time.sleep(0.2)
    assert ended.wait(10)
    assert visit.live is None


def test_a_page_of_another_origin_is_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamlit, whose loop all visits share, would ask the Internet for this machine's address first."""
    monkeypatch.setattr(net_util, "get_external_ip", lambda: pytest.fail("the Internet was asked"))
    sent: list[str] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def accept(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    for app, origin in ((canvas, "elsewhere.test"), (canvas, "["), (OwnOrigin(accept), "127.0.0.1:8501")):
        headers = [(b"host", b"127.0.0.1:8501"), (b"origin", f"http://{origin}".encode())]
        asyncio.run(app({"type": "websocket", "path": "/_stcore/stream", "headers": headers}, receive, send))
    headers = [(b"host", b"127.0.0.1:8501")]  # no page
    asyncio.run(OwnOrigin(accept)({"type": "websocket", "path": "/", "headers": headers}, receive, send))
    assert sent == ["websocket.close", "websocket.close", "websocket.accept", "websocket.accept"]


def test_who_stops_stops_what_the_browser_gets_too(visit):
    stopped, begun = [], answered(visit, STROKE)
    visit.stop_live = lambda: stopped.append("live")
    visit.asked, visit.unfinished = begun.request, begun
    visit.want_no_endings()
    assert stopped == ["live"]
    assert (visit.answered, visit.unfinished) == (begun.request, None), "neither asked again, nor shown by half"


def test_a_request_that_opens_once_the_page_has_left_is_ended():
    leaving, ended = Leaving(), []
    leaving.leave()
    leaving.on_open(lambda: ended.append("it"))
    assert ended == ["it"]


def test_one_level_too_many_is_of_another_champion(visit):
    def stream(**_):
        yield Rows(start=0, rows=[[[2] * 28]] * 9)

    client = SimpleNamespace(complete_stream=stream)
    with pytest.raises(ServiceError, match="more levels"):
        list(drawn(client, asked_of(STROKE, visit.settings, seed=5), lambda end: None))


def test_how_ink_lies_is_measured_for_each_champion_once(visit, service):
    visit.refresh_models()
    for weights in ("1", "2", "1"):
        visit.models["mnist5k"].model["weights_sha256"] = weights
        visit.layout("mnist5k")
    assert [path for path, _ in service.requests] == ["/generate"] * 2


def test_what_found_no_service_is_wanted_again(visit):
    visit.unanswered = True
    visit.retry()
    assert visit.pending
    assert not visit.unanswered


def test_what_is_not_drawn_yet_is_no_level(visit):
    asked = asked_of(STROKE, visit.settings, seed=5)
    assert (asked.images[:, asked.known == 0] == -1).all()
    assert (asked.images[:, asked.known == 1] >= 0).all()
