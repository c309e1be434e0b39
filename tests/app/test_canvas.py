"""The page in Streamlit's own test harness, with a stand-in for the service. Drawing itself: test_browser.py."""

import base64
import io
import math
import re
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import PIL.Image
import pytest
import yaml
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from app.canvas import waiting, widgets
from app.canvas.drawing import HOLE, TOUCHED, Drawing, decode_drawing, drawing_text
from app.canvas.grid import drawing_grid
from app.canvas.session import Visit
from app.canvas.texts import TEXTS, say_label
from tests.app.stub_service import StubService, served

ROOT = Path(__file__).parents[2]

PAGE = Path(__file__).parents[2] / "app" / "canvas" / "main.py"
INK = np.zeros((28, 28), dtype=int)
INK[5:12, 10:12] = 1  # a stroke that ends in row 11


def grid_text(ink: np.ndarray) -> str:
    """The grid's state with full ink where `ink` is 1."""
    return drawing_text(Drawing(255 * ink, ink))


OpenPage = Callable[[], AppTest]


@pytest.fixture
def open_page(service: StubService, monkeypatch: pytest.MonkeyPatch) -> OpenPage:
    """Open the page with a stroke on its grid."""
    monkeypatch.setenv("PIXELCNN_SERVICE_URL", service.url)

    def open_it() -> AppTest:
        page = AppTest.from_file(str(PAGE), default_timeout=20)
        page.session_state["grid-28x28"] = {"ink": grid_text(INK)}
        page.session_state["live"] = False
        return page.run()

    return open_it


def complete(page: AppTest) -> AppTest:
    page.button(key="main").click().run()
    assert not page.exception
    return page


def link_of(page: AppTest) -> dict[str, str]:
    """Return what the address tells after the last answer."""
    return dict(parse_qsl(page.session_state["visit"].gallery[0].link))


def pictures(page: AppTest) -> list[np.ndarray]:
    """The endings on the page as (H, W, 4) pixels, one per cell."""
    bodies = [element.proto.body for element in page.get("html")]
    body = "".join(body for body in bodies if body.startswith('<div class="endings'))
    found = []
    for data in re.findall(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)', body):
        pixels = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
        found.append(pixels)
    return found


def html_text(page: AppTest) -> str:
    return " ".join(element.proto.body for element in page.get("html"))


def test_complete_shows_endings_that_keep_the_drawing(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    path, body = service.requests[-1]
    assert path == "/complete_stream"
    assert body["image"] == INK.tolist()
    assert body["observed"] == [[int(row <= 11)] * 28 for row in range(28)]
    assert (body["dataset"], body["num_samples"], body["label"], body["temperature"]) == ("mnist5k", 9, -1, 0.9)
    assert body["seed"] == service.answers[-1]["seed"] < 10**6
    shown = pictures(page)
    assert len(shown) == 9
    for pixels in shown:
        assert (pixels[:12][INK[:12] == 1] == (28, 31, 43, 255)).all()
        assert (pixels[:12][INK[:12] == 0] == 255).all()
        added = pixels[12:].reshape(-1, 4)
        assert {tuple(map(int, pixel)) for pixel in added} == {(217, 72, 15, 255), (255, 246, 240, 255)}
    captions = re.findall(r'<figcaption><span title="(.*?)">(.*?)</span></figcaption>', html_text(page))
    num_added = 28 * 16
    assert captions == [
        (f"{-value / num_added / math.log(2):.3f} bits/dim", f"\N{MINUS SIGN}{-value:.1f} nats")
        for value in service.answers[-1]["log_probs"]
    ]
    assert "by pixelcnn-mnist5k version 3" in html_text(page)


def test_model_line_names_version_score_and_protocol(open_page: OpenPage) -> None:
    line = open_page().caption[-1].value
    assert line == (
        "Serving **pixelcnn-mnist5k** version 3 · test NLL 98.77 nats per image (protocol: dynamic, 500 test images)"
        " · commit 0123456"
    )


def test_only_my_ink_leaves_everything_else_to_the_model(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.button_group(key="known").set_value("ink").run()
    complete(page)
    assert service.requests[-1][1]["observed"] == INK.tolist()
    for pixels in pictures(page):
        assert (pixels[INK == 1] == (28, 31, 43, 255)).all()


def test_a_model_that_sees_the_whole_drawing_is_given_my_ink_alone(service: StubService, open_page: OpenPage) -> None:
    scores = {**service.models["mnist5k"]["scores"], "test/completion_top_nats": 37.0}
    service.models["mnist5k"] = {**service.models["mnist5k"], "scores": scores}
    page = complete(open_page())
    assert service.requests[-1][1]["observed"] == INK.tolist()
    assert any("wherever it is: the model sees all of it" in caption.value for caption in page.caption)
    page.button_group(key="known_all").set_value("above").run()
    complete(page)
    assert service.requests[-1][1]["observed"] == [[int(row <= 11)] * 28 for row in range(28)]


def test_settings_reach_the_service(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.selectbox(key="label").set_value(7)
    page.slider(key="n").set_value(4)
    page.slider(key="temperature").set_value(0.8)
    page.text_input(key="typed_seed").set_value("9223372036854775807").run()
    complete(page)
    body = service.requests[-1][1]
    assert (body["label"], body["num_samples"], body["temperature"], body["seed"]) == (7, 4, 0.8, 2**63 - 1)


def test_ink_of_a_grey_dataset_is_its_highest_level(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    options = page.selectbox(key="dataset").options
    assert [option.split(":")[0] for option in options] == ["mnist5k", "fashion_mnist", "cifar10"]  # digits first
    page.selectbox(key="dataset").set_value("fashion_mnist").run()
    complete(page)
    assert service.requests[-1][1]["image"] == (255 * INK).tolist()
    assert "test NLL 3.2100 bits/dim (protocol: 8-bit" in page.caption[-1].value


def test_one_colour_when_asked(open_page: OpenPage) -> None:
    page = complete(open_page())
    page.toggle(key="coloured").set_value(False).run()
    colours = {tuple(map(int, pixel)) for pixels in pictures(page) for pixel in pixels.reshape(-1, 4)}
    assert colours == {(28, 31, 43, 255), (255, 255, 255, 255)}


def test_as_i_draw_needs_no_button_and_asks_once(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    assert service.requests == []
    page.toggle(key="live").set_value(True).run()
    assert len(service.requests) == 1
    assert len(pictures(page)) == 9
    page.run()
    assert len(service.requests) == 1
    page.slider(key="n").set_value(2).run()
    assert len(service.requests) == 2
    assert len(pictures(page)) == 2


def test_endings_that_came_live_are_not_asked_again(service: StubService, open_page: OpenPage) -> None:
    """Nor from another seed, where the page saw a blank grid after they were asked for."""
    page = complete(open_page())
    visit = page.session_state["visit"]
    seed, visit.live, visit.gallery, visit.answered, visit.seed = visit.seed, *visit.gallery, [], None, None
    page.toggle(key="live").set_value(True).run()
    assert len(service.requests) == len(visit.gallery) == 1
    assert visit.seed == seed


def test_endings_that_come_live_are_waited_for(
    service: StubService, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that come while the page runs; but no longer when others are wanted."""
    page, stopped = open_page(), []
    visit = page.session_state["visit"]
    visit.live_for, visit.stop_live = (visit.settings.query, None), lambda: stopped.append("live")
    with monkeypatch.context() as patch:
        patch.setattr(Visit, "take_live", lambda self, *_: setattr(self, "live_for", None))  # the last row has come
        page.toggle(key="live").set_value(True).run()
    assert service.requests == stopped == []
    visit.live_for = (visit.settings.query, None)
    complete(page)
    assert len(service.requests) == len(stopped) == 1


def test_a_stroke_that_comes_while_the_page_runs_keeps_its_endings(
    open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page ends those of older drawings; what began since is not among them."""
    page, stopped = complete(open_page()), []
    visit = page.session_state["visit"]
    visit.stop_live = lambda: stopped.append("older")
    with monkeypatch.context() as patch:
        newer = {"live_for": (visit.settings.query, None), "stop_live": lambda: stopped.append("newer")}
        patch.setattr(Visit, "take_live", lambda self, *_: vars(self).update(newer))
        page.toggle(key="live").set_value(True).run()
    assert stopped == ["older"]


# Of a superscript, or so many digits, Python makes no number.
@pytest.mark.parametrize("text", ["\u00b2", "-1", "9" * 19, "1" * 5000], ids=len)
def test_wrong_seed_is_said_and_nothing_is_sent(service: StubService, open_page: OpenPage, text: str) -> None:
    page = open_page()
    page.text_input(key="typed_seed").set_value(text).run()
    complete(page)
    assert page.warning[0].value == (
        f"The seed must be a whole number from 0 to 9223372036854775807, got '{text}'. Empty means a new one."
    )
    assert service.requests == []
    page.text_input(key="typed_seed").set_value("12").run()
    assert not page.warning
    assert len(service.requests) == 1  # Complete was pressed: it is done as soon as it can be


def test_nothing_left_to_fill_in(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.session_state["grid-28x28"] = {"ink": "00" * 783 + "ff" + "00" * 783 + "01"}
    complete(page)
    assert "Nothing is left to fill in" in page.warning[0].value
    assert service.requests == []


def test_nothing_is_drawn_from_an_empty_grid(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.session_state["grid-28x28"] = {"ink": grid_text(0 * INK)}
    complete(page)
    assert not page.session_state["visit"].pending
    assert service.requests == []


def test_service_refuses(service: StubService, open_page: OpenPage) -> None:
    service.refusal = (429, '{"error": "Too many requests at once. Try again in a second."}')
    page = complete(open_page())
    (warning,) = page.warning
    assert warning.value == "Many are drawing just now: your turn comes in a moment. Your drawing is kept."
    assert any(text.value.startswith("Trying again in") for text in page.caption)  # by itself
    assert any(element.value.startswith("Too many requests at once.") for element in page.markdown)  # for its operator
    service.refusal = (400, '{"error": "temperature must be at most 2."}')
    complete(page)
    (warning,) = page.warning
    assert warning.value == "The model cannot take this as it is. Your drawing is kept."
    assert not page.session_state["visit"].is_waiting, "what comes next is not at fault"
    assert not any(text.value.startswith("Trying again in") for text in page.caption)
    assert any(element.value.startswith("temperature must be at most 2.") for element in page.markdown)
    service.refusal = None
    complete(page)
    assert not page.warning
    assert len(pictures(page)) == 9


def test_what_is_refused_is_not_asked_for_again_and_again(service: StubService, open_page: OpenPage) -> None:
    """Neither the endings of what is drawn live, nor their names."""
    refusal = (400, '{"error": "temperature must be at most 2."}')
    page, service.refusal = open_page(), refusal
    page.toggle(key="live").set_value(True).run()
    page.run()
    assert [warning.value[:27] for warning in page.warning] == ["The model cannot take this "]
    service.refusal = None
    complete(page)
    service.refusal = refusal
    page.toggle(key="named").set_value(True).run()
    page.run()
    assert [path for path, _ in service.requests] == ["/complete_stream", "/complete_stream", "/likelihood"]


def test_stream_that_breaks_keeps_the_last_endings(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    before = [pixels.tolist() for pixels in pictures(page)]
    service.break_stream = True
    complete(page)
    assert page.warning[0].value == "The model does not answer just now. Your drawing is kept."
    assert any("stopped in mid-answer" in element.value for element in page.markdown)  # for its operator
    assert [pixels.tolist() for pixels in pictures(page)] == before


def test_unfinished_endings_of_an_undone_stroke_are_not_shown(open_page: OpenPage) -> None:
    page = complete(open_page())
    before = [pixels.tolist() for pixels in pictures(page)]
    visit = page.session_state["visit"]
    visit.unfinished = replace(visit.gallery[0], images=0 * visit.gallery[0].images - 1, log_probs=None, drawing="")
    page.run()
    assert [pixels.tolist() for pixels in pictures(page)] == before


def test_unfinished_endings_that_nobody_finishes_are_not_shown(open_page: OpenPage) -> None:
    """Of a stroke after which *As I draw* was switched off."""
    page = complete(open_page())
    before = [pixels.tolist() for pixels in pictures(page)]
    visit = page.session_state["visit"]
    [ending] = visit.gallery
    visit.gallery = [replace(ending, drawing="another")]
    visit.unfinished = replace(ending, images=0 * ending.images - 1, log_probs=None)
    page.run()
    assert [pixels.tolist() for pixels in pictures(page)] == before


def test_a_champion_of_more_levels_is_asked_anew(service: StubService, open_page: OpenPage) -> None:
    """Where a stroke was sent in the levels of the one before."""
    page = open_page()
    page.session_state["visit"].models_at = math.inf  # has just been asked
    service.models["mnist5k"] = {**service.models["mnist5k"], "levels": 16, "protocol": "quantized"}
    page.toggle(key="live").set_value(True).run()
    assert page.warning[0].value == "The model does not answer just now. Your drawing is kept."
    assert page.session_state["visit"].gallery == []
    press(page, "Try again now")
    assert not page.warning
    assert service.requests[-1][1]["image"] == (15 * INK).tolist()
    assert page.session_state["visit"].gallery[0].levels == 16


def test_service_down_then_up_keeps_drawing_and_endings(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    service.close()
    complete(page)
    assert [warning.value for warning in page.warning] == ["The model does not answer just now. Your drawing is kept."]
    assert any("Start it with `make serve`" in element.value for element in page.markdown)  # for its operator
    assert len(pictures(page)) == 9
    again = StubService(port=service.port)
    try:
        complete(page)
        assert not page.warning
        assert again.requests[-1][1]["image"] == INK.tolist()
    finally:
        again.close()


def test_service_down_from_the_start(service: StubService, open_page: OpenPage) -> None:
    service.close()
    page = open_page()
    assert not page.exception
    assert list(page.session_state["visit"].drawn) == [INK.shape], "there is a grid to draw on"
    assert page.warning[0].value == "The model does not answer just now. Your drawing is kept."
    again = StubService(port=service.port)
    try:
        complete(page)
        assert not page.warning
        assert again.requests[-1][1]["image"] == INK.tolist()
        assert len(pictures(page)) == 9
    finally:
        again.close()


def test_no_champion_yet(service: StubService, open_page: OpenPage) -> None:
    service.models = {}
    page = open_page()
    assert page.warning[0].value == "There is no model yet. Your drawing is kept."
    assert any(element.value == "No model is promoted yet. Run `make pipeline`." for element in page.markdown)


def test_paint_is_kept_and_sent_in_colour(service: StubService, open_page: OpenPage) -> None:
    service.models = {"cifar10": service.models["cifar10"]}
    page = open_page()
    colours = np.random.default_rng(0).integers(256, size=(32, 32, 3))
    mark = np.zeros((32, 32), dtype=int)
    mark[3:9, 4:20] = TOUCHED
    colours[4, 5] = 0  # black is paint, too
    mark[5, 6] = HOLE
    page.session_state["grid-32x32x3"] = {"ink": drawing_text(Drawing(colours, mark))}
    complete(page)
    body = service.requests[-1][1]
    known = mark == TOUCHED
    assert body["observed"] == known.astype(int).tolist()
    assert body["image"] == (colours * known[..., None]).tolist()
    answer = service.answers[-1]
    shown = [pixels[..., :3].tolist() for pixels in pictures(page)]
    assert shown == answer["completions"]  # in their own colours
    num_added = 3 * int((~known).sum())
    bits = re.findall(r'title="([\d.]+) bits/dim', html_text(page))[0]
    assert bits == f"{-answer['log_probs'][0] / num_added / math.log(2):.3f}"
    linked = decode_drawing(link_of(page)["d"], (32, 32, 3))
    assert linked.mark.tolist() == mark.tolist()
    assert linked.strength.tolist() == colours.tolist()
    go_to(page, "Surprise")
    path, question = service.requests[-1]
    assert path == "/likelihood"
    assert question["image"] == (colours * (mark != HOLE)[..., None]).tolist()


def test_endings_of_another_shape_wait_until_it_is_drawn_again(open_page: OpenPage) -> None:
    page = complete(open_page())
    page.selectbox(key="dataset").set_value("cifar10").run()
    assert "Endings appear here" in html_text(page)
    assert "Continue from ending" not in html_text(page)
    page.selectbox(key="dataset").set_value("mnist5k").run()
    assert len(pictures(page)) == 9


@pytest.mark.parametrize("dataset", ["mnist5k", "cifar10"])
def test_start_from_a_half_that_the_model_made(service: StubService, open_page: OpenPage, dataset: str) -> None:
    page = open_page()
    page.selectbox(key="dataset").set_value(dataset).run()
    page.button_group(key="source").set_value("model").run()
    press(page, "Make a picture")
    path, body = service.requests[-1]
    assert (path, body["num_samples"]) == ("/generate", 1)
    made = np.array(service.generated(body)["images"][0])
    page.button_group(key="part_model").set_value("right").run()
    half = made.shape[1] // 2
    shown = re.findall(r'small" src="data:image/png;base64,([A-Za-z0-9+/=]+)', html_text(page))
    pixels = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(shown[0]))))
    assert (pixels[:, :half, 3] == 255).all()
    assert (pixels[:, half:, 3] == 0).all()
    press(page, "Put it on the grid")
    [load] = page.session_state["visit"].load.values()
    page.session_state["grid-28x28" if dataset == "mnist5k" else "grid-32x32x3"] = {"ink": load["ink"]}  # as it does
    complete(page)
    body = service.requests[-1][1]
    assert body["observed"] == [[int(column < half) for column in range(made.shape[1])]] * made.shape[0]
    kept = made.copy()
    kept[:, half:] = 0
    assert body["image"] == kept.tolist()


def test_address_that_is_none(open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELCNN_SERVICE_URL", "localhost:3000")
    page = open_page()
    assert not page.exception
    assert page.error[0].value == (
        "PIXELCNN_SERVICE_URL must be an address like http://127.0.0.1:3000, got 'localhost:3000'. Set it anew."
    )


def go_to(page: AppTest, page_name: str) -> None:
    page._page_hash = calc_hash(page_name.lower())  # `switch_page` goes to pages in files of their own alone
    page.run()


def at(open_page: OpenPage, page_name: str) -> AppTest:
    """Open the page and go to one of its pages."""
    page = open_page()
    go_to(page, page_name)
    assert not page.exception
    return page


def press(page: AppTest, label: str) -> None:
    next(button for button in page.button if button.label == label).click().run()
    assert not page.exception


def test_endings_can_be_sorted_and_hold_what_a_click_takes_over(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    answer = service.answers[-1]

    def order() -> list[int]:
        shown = re.search(r'<div class="endings.*?</div>', html_text(page)).group(0)
        inks = re.findall(r'data-ink="([0-9a-f]*)"', shown)
        images = [(np.frombuffer(bytes.fromhex(ink), dtype=np.uint8) // 255).reshape(28, 28).tolist() for ink in inks]
        return [answer["completions"].index(image) for image in images]

    assert order() == list(range(9))  # in fixed places
    page.button_group(key="order").set_value("likely").run()
    assert order() == sorted(range(9), key=lambda i: -answer["log_probs"][i])
    page.button_group(key="order").set_value("rare").run()
    assert order() == sorted(range(9), key=lambda i: answer["log_probs"][i])


def test_an_ending_on_the_grid_is_not_completed_live(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    image = np.array(service.answers[-1]["completions"][3])
    page.session_state["grid-28x28"] = {"ink": grid_text(image)}
    page.toggle(key="live").set_value(True).run()
    assert len(service.requests) == 1


def test_blanks_and_holes(service: StubService, open_page: OpenPage) -> None:
    mark = INK.copy()
    mark[2:4] = 1  # known blank
    mark[6, 10:12] = 2  # a hole, with ink below it
    expected = {
        "above": np.where(mark == 2, 0, np.arange(28)[:, None] < 12),
        "ink": np.where(mark == 2, 0, INK),
        "touched": mark == 1,
        "mask": mark != 2,
    }
    page = open_page()
    for mode, observed in expected.items():
        page.session_state["grid-28x28"] = {"ink": drawing_text(Drawing(255 * INK, mark))}
        page.button_group(key="known").set_value(mode).run()
        complete(page)
        body = service.requests[-1][1]
        assert body["observed"] == observed.astype(int).tolist(), mode
        assert body["image"] == np.where(mark == 2, 0, INK).tolist()


def test_link_draws_the_same_at_once(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    first = service.answers[-1]
    link = link_of(page)
    assert link["seed"] == str(first["seed"])
    again = AppTest.from_file(str(PAGE), default_timeout=20)
    for name, value in link.items():
        again.query_params[name] = value
    again.run()
    assert not again.exception
    assert service.requests[-1][1] == service.requests[0][1]
    assert service.answers[-1] == first
    assert len(pictures(again)) == 9
    complete(again)
    assert service.requests[-1][1]["seed"] != first["seed"]  # the next press draws anew


def test_a_link_to_what_is_not_served_labels_nothing_else(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    again = AppTest.from_file(str(PAGE), default_timeout=20)
    for name, value in (link_of(page) | {"dataset": "fashion_mnist", "label": "1"}).items():
        again.query_params[name] = value
    del service.models["fashion_mnist"]
    again.run()
    assert (service.requests[-1][1]["dataset"], service.requests[-1][1]["label"]) == ("mnist5k", -1)


def test_what_was_chosen_since_comes_before_the_address(service: StubService, open_page: OpenPage) -> None:
    """A browser whose canvas is started anew goes on in a new session, at the address of its last endings."""
    page = complete(open_page())
    again = AppTest.from_file(str(PAGE), default_timeout=20)
    for name, value in link_of(page).items():
        page.query_params[name] = again.query_params[name] = value
    page.slider(key="n").set_value(4)
    page.button_group(key="known").set_value("ink").run()
    again._run(page._tree.get_widget_states())
    assert again.slider(key="n").value == 4
    assert again.button_group(key="known").value == "ink"


@pytest.mark.parametrize(("seed", "drawing"), [("x", "AAAA"), ("-1", "%%%"), ("7", "")])
def test_broken_link_is_a_blank_page(service: StubService, open_page: OpenPage, seed: str, drawing: str) -> None:
    page = AppTest.from_file(str(PAGE), default_timeout=20)
    open_page()
    page.session_state["live"] = False
    page.query_params["seed"] = seed
    page.query_params["d"] = drawing
    for name in ("dataset", "known", "label", "temperature", "n"):  # no longer, or never, on offer
        page.query_params[name] = seed
    page.run()
    assert not page.exception
    assert service.requests == []


def test_the_service_can_take_turns_between_visits(service: StubService, open_page: OpenPage) -> None:
    for _ in range(2):
        complete(complete(open_page()))
    first, again, second, _ = service.clients
    assert all(service.clients)
    assert first == again != second


def test_visit_keeps_a_gallery(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    page.text_input(key="typed_seed").set_value("5").run()
    complete(page)
    seeds = [str(answer["seed"]) for answer in service.answers]
    assert re.findall(r'aria-label="Continue from the ending of seed (\d+)', html_text(page)) == seeds[::-1]
    assert seeds[1] == "5"


@pytest.mark.parametrize("number", [1, 9])
def test_an_answer_is_announced_with_its_likeliest(service: StubService, open_page: OpenPage, number: int) -> None:
    page = open_page()
    page.slider(key="n").set_value(number).run()
    assert f"the model shows {'a way' if number == 1 else '9 ways'} it could go on." in html_text(page)
    complete(page)
    best = f"\N{MINUS SIGN}{-max(service.answers[-1]['log_probs']):.1f} nats"
    assert f'role="status">Endings that have come: {number}; the likeliest: {best}<' in html_text(page)


@pytest.mark.parametrize("linked", [False, True])
def test_a_label_is_not_kept_where_its_number_means_another(
    service: StubService, open_page: OpenPage, linked: bool
) -> None:
    page = open_page()
    if linked:
        page = AppTest.from_file(str(PAGE), default_timeout=20)
        page.session_state["live"], page.query_params["label"] = False, "1"
        page.session_state["grid-28x28"] = {"ink": grid_text(INK)}
        page.run()
    else:
        page.selectbox(key="label").set_value(1)
    complete(page)
    page.selectbox(key="dataset").set_value("fashion_mnist").run()
    complete(page)
    sent = [(body["dataset"], body["label"]) for _, body in service.requests]
    assert sent == [("mnist5k", 1), ("fashion_mnist", -1)]


def test_generate(service: StubService, open_page: OpenPage) -> None:
    page = at(open_page, "Generate")
    assert [body["dataset"] for _, body in service.requests] == ["mnist5k"]  # at once
    service.requests.clear()
    service.answers.clear()
    page.selectbox(key="dataset").set_value("cifar10").run()
    page.selectbox(key="label").set_value(1)
    page.text_input(key="generate_seed").set_value("8").run()
    press(page, "Generate")
    settings = {"dataset": "cifar10", "num_samples": 16, "label": 1, "temperature": 0.9, "seed": 8}
    nothing = {"image": [[[0, 0, 0]] * 32] * 32, "observed": [[0] * 32] * 32}
    assert service.requests == [("/complete_stream", settings | nothing)]
    expected = service.answers[0]
    order = sorted(range(16), key=lambda i: -expected["log_probs"][i])
    shown = re.findall(r"base64,([A-Za-z0-9+/=]+)", html_text(page))
    assert len(shown) == 16
    for data, i in zip(shown, order, strict=True):
        pixels = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
        assert (pixels[..., :3] == np.array(expected["completions"][i])).all()
    assert page.code[0].value == "8"
    service.refusal = (429, '{"error": "Too many requests at once."}')
    press(page, "Generate")
    assert page.warning[0].value.startswith("Many are drawing just now")


def test_the_link_to_a_sheet_draws_it_again(service: StubService, open_page: OpenPage) -> None:
    address = at(open_page, "Generate").session_state["visit"].generated.link
    assert "&d=" not in address, "a page that is opened by it would take its blank drawing for the grid's"
    link = dict(parse_qsl(address))
    again = AppTest.from_file(str(PAGE), default_timeout=20)
    for name, value in link.items():
        again.query_params[name] = value
    go_to(again, "Generate")
    assert not again.exception
    assert again.session_state["visit"].generated.seed == int(link["seed"])
    first, second = (body for _, body in service.requests)
    assert second == first | {"seed": int(link["seed"])}
    press(again, "Generate")
    assert "seed" not in service.requests[-1][1]  # the next ones are others


def test_a_french_page_says_in_french_what_keeps_an_answer_away(
    service: StubService, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.canvas.texts.language", lambda: "fr")
    page = open_page()
    said = {429: "Beaucoup dessinent", 400: "Le modèle ne peut pas", 500: "Le modèle ne répond"}
    for status, expected in said.items():
        service.refusal = (status, '{"error": "A sentence in English."}')
        complete(page)
        assert [warning.value[: len(expected)] for warning in page.warning] == [expected]
    service.refusal = None
    go_to(page, "Models")
    assert page.metric[0].label == "NLL de test (dynamic)"


def test_released_weights_were_not_promoted(service: StubService, open_page: OpenPage) -> None:
    for promoted_at, is_shown in (("2025-01-01T00:00:00+00:00", True), ("", False)):
        service.models = {"mnist5k": {**service.models["mnist5k"], "promoted_at": promoted_at}}
        assert ("<th>promoted</th>" in html_text(at(open_page, "Models"))) == is_shown


def test_surprise_of_the_drawing(service: StubService, open_page: OpenPage) -> None:
    page = at(open_page, "Surprise")
    assert service.requests == [("/likelihood", {"dataset": "mnist5k", "image": INK.tolist(), "label": -1})]
    metrics = {metric.label: metric.value for metric in page.metric}
    assert metrics["log-probability"] == f"\N{MINUS SIGN}{INK.sum()}.0 nats"
    assert metrics["per dimension"] == f"{INK.sum() / 784 / math.log(2):.3f} bits/dim"
    assert metrics["a usual test image"] == "\N{MINUS SIGN}98.8 nats"
    size = int(re.search(r"without loss: 11 bytes; as a PNG: (\d+)", " ".join(c.value for c in page.caption)).group(1))
    assert 67 < size < 200, "of one bit per pixel"
    heat = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)", html_text(page))[1]))))
    assert (heat[INK == 1] == (52, 8, 44)).all()
    assert (heat[INK == 0] == (252, 250, 245)).all()
    press(page, "Which label explains it best?")
    assert [request[1]["label"] for request in service.requests[1:]] == list(range(10))
    assert re.findall(r"<th>(\d)</th>", html_text(page))[0] == "4"
    shares = [f"{100 / (1 + 9 * math.exp(-INK.sum() / 2)):.0f} %", *["0 %"] * 9]
    assert re.findall(r"<td>(\d+ %)</td>", html_text(page)) == shares


def test_after_a_picture_that_cannot_be_read_another_one_can_be_pasted(
    open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = at(open_page, "Surprise")
    shown: list[object] = []
    monkeypatch.setattr("app.canvas.views.surprise.companion", shown.append)
    page.get("file_uploader")[0].set_value(("a.png", b"no picture", "image/png")).run()
    assert page.warning[0].value.startswith("This file is no picture")
    assert shown == [""]


def test_a_reload_keeps_what_the_page_of_surprise_is_about(
    service: StubService, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said that nothing was drawn yet: the grid, which remembers, is on another page."""
    page = at(open_page, "Surprise")
    shown: list[str] = []
    monkeypatch.setattr("app.canvas.views.surprise.companion", shown.append)
    page.selectbox(key="label").set_value(4).run()
    again = AppTest.from_file(str(PAGE), default_timeout=20)
    for name, value in parse_qsl(shown[-1]):
        again.query_params[name] = value
    asked = len(service.requests)
    go_to(again, "Surprise")
    assert service.requests[asked:] == [("/likelihood", {"dataset": "mnist5k", "image": INK.tolist(), "label": 4})]
    again.get("file_uploader")[0].set_value(("a.png", b"no picture", "image/png")).run()
    assert shown[-1] == "", "the address would be that of something else"


@pytest.mark.parametrize("shape", [(1, 14, 14), (3, 28, 28)])
def test_examples_are_offered_to_a_model_of_their_shape_alone(
    service: StubService, open_page: OpenPage, shape: tuple[int, int, int]
) -> None:
    service.models = {"mnist5k": served(shape, 16, [], "quantized")}
    page = open_page()
    assert not page.exception
    assert "gallery examples" not in html_text(page)
    go_to(page, "Surprise")
    assert not page.exception
    assert np.shape(service.requests[-1][1]["image"]) == ((14, 14) if shape[0] == 1 else (28, 28, 3))


def test_a_promoted_model_is_asked_for_its_own_surprise(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.toggle(key="surprise_beside").set_value(True).run()
    promoted = {**service.models["mnist5k"]["model"], "weights_sha256": "1" * 64}
    service.models["mnist5k"] = {**service.models["mnist5k"], "model": promoted}
    page.session_state["visit"].models_at = -math.inf
    page.run()
    assert [body["label"] for _, body in service.requests] == [*range(-1, 10)] * 2
    go_to(page, "Surprise")
    asked = len(service.requests)
    service.models["mnist5k"] = {**service.models["mnist5k"], "model": {**promoted, "weights_sha256": "2" * 64}}
    page.session_state["visit"].models_at = -math.inf
    page.run()
    assert [path for path, _ in service.requests[asked:]] == ["/likelihood"]


def test_models(open_page: OpenPage, service: StubService) -> None:
    page = at(open_page, "Models")
    assert [header.value for header in page.header] == ["pixelcnn-mnist5k version 3"] * 3
    text = html_text(page)
    for value in ("d41d8cd98f00b204e9800998ecf8427e", "0123456789abcdef", "0a1b2c"):
        assert value in text
    assert "2025-01-01T00:00:00+00:00" in text
    for number in ("724,850", "17,034.3", "98.765"):  # not 7.248e+05
        assert f"<td>{number}</td>" in text
    assert page.metric[0].label == "test NLL (dynamic)"  # digits first
    assert [metric.value for metric in page.metric] == ["98.77 nats", "3.2100 bits/dim", "3.2100 bits/dim"]
    service.close()
    page.session_state["visit"].retry()
    page.run()
    assert not page.exception
    assert len(page.header) == 3  # as last heard of


def test_a_dataset_of_any_name_is_shown(service: StubService, open_page: OpenPage) -> None:
    service.models = dict.fromkeys(("model", "mnist5k"), service.models["mnist5k"])
    page = open_page()
    assert not page.exception
    assert "model" in page.selectbox(key="dataset").options


def test_other_pages_without_a_service(open_page: OpenPage, service: StubService) -> None:
    service.close()
    page = at(open_page, "Generate")
    assert page.warning[0].value == "The model does not answer just now. Your drawing is kept."
    again = StubService(port=service.port)
    try:
        press(page, "Try again now")
        assert not page.warning
        assert page.selectbox(key="dataset").options[0].startswith("mnist5k")
    finally:
        again.close()


def test_a_line_says_what_the_demo_trains_beside(
    service: StubService, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def beside(page: AppTest) -> list[str]:
        return [
            caption.value for caption in page.caption if "quick start" in caption.value or "Beside" in caption.value
        ]

    page = open_page()
    assert beside(page) == []
    status = tmp_path / "status.json"
    monkeypatch.setenv("PIXELCNN_DEMO_STATUS", str(status))
    assert beside(page.run()) == []
    status.write_text('{"doing": "train", "what": "pixelcnn-mnist5k", "left": "0:32"}')
    assert beside(page.run()) == ["Beside this page: train pixelcnn-mnist5k · 0:32 left"]
    status.write_text('{"doing": "done"}')
    champion = service.models.pop("mnist5k")
    page.session_state["visit"].retry()
    assert beside(page.run()) == []  # the service has yet to load it
    service.models["mnist5k"] = champion
    assert beside(page.run()) == ["The quick start is trained: choose mnist5k to draw with it."]


def test_a_shared_page_admits_who_has_the_token(
    service: StubService, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = "This canvas is shared by a link, and this is another one. Open the link that you were given, whole."

    def opened(token: str | None) -> AppTest:
        page = AppTest.from_file(str(PAGE), default_timeout=20)
        if token is not None:
            page.query_params["token"] = token
        return page.run()

    assert not open_page().error
    monkeypatch.setenv("PIXELCNN_DEMO_SHARE", "http://192.0.2.1:8501/?token=s3cret")
    asked = len(service.requests)
    for token in (None, "", "s3cre", "s3cret2", "\xe9"):
        page = opened(token)
        assert [error.value for error in page.error] == [refusal]
        assert not page.button
    page = opened("s3cret")
    assert not page.error
    assert not page.exception
    assert "http://192.0.2.1:8501/?token=s3cret" in [code.value for code in page.code]
    assert 'alt="The link as a QR code"' in html_text(page)
    told: dict[str, Any] = {}

    def mount(**options: Any) -> SimpleNamespace:
        told[options["key"]] = options["data"]
        return SimpleNamespace(**options.get("default", {}))

    with monkeypatch.context() as patch:
        patch.setattr("streamlit.components.v2.component", lambda *_, **__: mount)
        page.run()
    assert told["companion"]["token"] == "s3cret"  # for the link that is copied
    del page.query_params["token"]  # the page changes its address
    assert not page.run().error
    for kept, refused in (("s3cret", []), ("s3cre", [refusal])):  # by the browser, where an address has lost it
        monkeypatch.setattr("streamlit.runtime.context.ContextProxy.cookies", {"pixelcnn_token": kept})
        assert [error.value for error in opened(None).error] == refused
    assert len(service.requests) == asked


def test_the_grid_serves_other_apps() -> None:
    page = AppTest.from_file(str(PAGE.parent / "grid" / "example.py"), default_timeout=20)
    mark = np.zeros((16, 24), dtype=int)
    mark[2:5, 3:9] = TOUCHED
    page.session_state["sketch"] = {"ink": drawing_text(Drawing(255 * mark * (np.arange(24) < 6), mark))}
    page.run()
    assert not page.exception
    assert page.markdown[0].value == "9 cells of ink, 18 known"


def test_the_grid_obeys_its_side_in_browsers_without_round() -> None:
    """With a variable in it the declaration is no error there, and nothing stands in for it: the width is `auto`."""
    css = re.sub(r"/\*.*?\*/", "", (ROOT / "app/canvas/grid/grid.css").read_text(), flags=re.DOTALL)
    for_all = re.sub(r"@supports \(width: round[^{]*\{[^{}]*\{[^{}]*\}\s*\}", "", css)
    assert "round(" in css
    assert "round(" not in for_all
    assert "width: var(--side);" in for_all


def test_a_picture_of_another_shape_does_not_take_the_place_of_a_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a change of the dataset."""
    given: dict[str, Any] = {}

    def mount(**options: Any) -> SimpleNamespace:
        given.update(options["data"])
        return SimpleNamespace(**options["default"])

    monkeypatch.setattr("streamlit.components.v2.component", lambda *_, **__: mount)
    load = {"revision": "1", "ink": grid_text(INK)}
    for shape, expected in (((28, 28), load), ((32, 32, 3), None)):
        drawing_grid(shape, key="grid", load=load)
        assert given["load"] == expected


def test_a_picture_put_on_one_grid_leaves_others_of_as_many_cells(
    service: StubService, open_page: OpenPage, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.models = {"tall": served((1, 48, 32), 2, [], "threshold"), "wide": served((1, 32, 48), 2, [], "threshold")}
    loads: dict[tuple[int, ...], object] = {}

    def grid(shape: tuple[int, ...], **options: Any) -> Drawing:
        loads[shape] = options["load"]
        return drawing_grid(shape, **options)

    monkeypatch.setattr("app.canvas.views.draw.drawing_grid", grid)
    page = open_page()
    page.button_group(key="source").set_value("model").run()
    press(page, "Make a picture")
    press(page, "Put it on the grid")
    page.selectbox(key="dataset").set_value("wide").run()
    assert not page.exception
    assert loads[48, 32] is not None
    assert loads[32, 48] is None


def test_a_made_picture_goes_with_the_shape_of_its_champion(service: StubService, open_page: OpenPage) -> None:
    """The next champion's images may be of another one."""
    page = open_page()
    page.button_group(key="source").set_value("model").run()
    press(page, "Make a picture")
    service.models["mnist5k"] = {**service.models["mnist5k"], "shape": [1, 32, 48]}
    page.session_state["visit"].models_at = -math.inf
    page.run()
    assert not page.exception
    assert not any(button.label == "Put it on the grid" for button in page.button)


def test_a_label_is_said_in_french_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (say_label("Ankle boot"), say_label("kind 3")) == ("Ankle boot", "kind 3")
    monkeypatch.setattr("app.canvas.texts.language", lambda: "fr")
    assert (say_label("Ankle boot"), say_label("kind 3")) == ("bottine", "kind 3")


def test_each_text_has_the_same_places_in_both_languages() -> None:
    lines = (PAGE.parent / "texts" / "texts.yaml").read_text(encoding="utf-8").partition("\n---\n")[0]
    assert re.findall(r"^(\w+):", lines, re.MULTILINE) == list(TEXTS), "a key stands twice"
    for key, texts in TEXTS.items():
        english, french = ({place for _, place, *_ in string.Formatter().parse(text) if place} for text in texts)
        assert english == french, key


def test_a_figure_that_is_approximate_is_called_so() -> None:
    published = yaml.safe_load((ROOT / "pipelines" / "reports" / "published.yaml").read_text())
    figures = [str(row[0]) for entry in published.values() for row in entry["figures"]]
    approximate = [figure.split()[0] for figure in figures if figure.endswith("(approximate)")]
    said = [text for key, texts in TEXTS.items() if key.startswith("papers_") for text in texts]
    assert any(figure in text for figure in approximate for text in said)
    for figure in approximate:
        assert all("approximat" in text for text in said if f"{figure} " in text), figure


def test_surprise_beside_the_grid_and_named_endings(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    page.toggle(key="surprise_beside").set_value(True).run()
    assert not page.exception
    asked = [body for path, body in service.requests if path == "/likelihood"]
    assert [body["label"] for body in asked] == list(range(-1, 10))
    assert all(body["image"] == INK.tolist() for body in asked)
    text = html_text(page)
    assert text.count('data-p="') == 28 * 28
    assert text.count('data-p="36.8 %"') == INK.sum()  # exp(-1 nat)
    assert re.findall(r"<th>(\d)</th>", text)[0] == "4"
    page.toggle(key="named").set_value(True).run()
    assert "Endings that have come: 9 (4, 4, 4, 4, 4, 4, 4, 4, 4); the likeliest: " in html_text(page)
    assert html_text(page).count("<b>4</b>") == 9
    other = INK.copy()
    other[15, 4:9] = 1
    page.session_state["grid-28x28"] = {"ink": grid_text(other)}
    complete(page)  # one run waits for endings, surprise and names, one after the other
    assert "Endings that have come: 9 (4, 4, 4, 4, 4, 4, 4, 4, 4); the likeliest: " in html_text(page)


def test_endings_of_another_dataset_are_not_named_by_its_labels(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.selectbox(key="dataset").set_value("fashion_mnist").run()
    complete(page)
    page.selectbox(key="dataset").set_value("mnist5k").run()
    page.toggle(key="named").set_value(True).run()
    assert not any(path == "/likelihood" for path, _ in service.requests)
    page.selectbox(key="dataset").set_value("fashion_mnist").run()
    assert page.session_state["visit"].gallery[0].names == ["T-shirt/top"] * 9


def test_what_failed_is_asked_again_and_then_the_warning_goes(service: StubService, open_page: OpenPage) -> None:
    def refused_once(page: AppTest, ask: Callable[[], object], path: str) -> None:
        service.refusal = (429, '{"error": "Too many requests at once."}')
        ask()
        assert page.warning[0].value.startswith("Many are drawing just now")
        asked, service.refusal = len(service.requests), None
        page.run()
        assert len(service.requests) == asked, "it is left alone for a moment"
        press(page, "Try again now")
        assert service.requests[asked][0] == path
        assert not page.warning
        asked = len(service.requests)
        page.run()
        assert len(service.requests) == asked

    page = complete(open_page())
    service.refusal = (429, '{"error": "Too many requests at once."}')
    page.toggle(key="surprise_beside").set_value(True).run()
    page.toggle(key="surprise_beside").set_value(False).run()
    press(page, "Try again now")
    assert not page.warning  # it is no longer wanted
    for toggle in ("surprise_beside", "named"):
        refused_once(page, lambda toggle=toggle: page.toggle(key=toggle).set_value(True).run(), "/likelihood")
        page.toggle(key="surprise_beside").set_value(False).run()
    page = at(open_page, "Generate")
    refused_once(page, lambda: press(page, "Generate"), "/complete_stream")


def test_a_label_that_the_next_dataset_lacks_is_forgotten(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.selectbox(key="label").set_value(7).run()
    page.selectbox(key="dataset").set_value("fashion_mnist").run()
    complete(page)
    assert service.requests[-1][1]["label"] == -1


def test_once_the_page_has_left_no_further_request_is_sent() -> None:
    sent, may_go_on = [], threading.Event()

    def ask() -> Iterator[None]:
        for number in range(5):
            sent.append(number)
            may_go_on.wait(10)
            yield

    before = set(threading.enumerate())
    answers = waiting.in_background(lambda _: ask())
    assert next(answers) is None
    begun = set(threading.enumerate()) - before
    answers.close()
    may_go_on.set()
    for thread in begun:
        thread.join(10)
    assert begun
    assert sent == [0]


def test_an_installed_page_has_the_settings_of_a_clones(tmp_path: Path) -> None:
    """Wherever it is started: no tracebacks for visitors, uploads bounded, nothing sent home."""
    options = ("client.showErrorDetails", "client.toolbarMode", "server.maxUploadSize", "server.address")
    own = ("server.allowedHosts", "browser.gatherUsageStats")
    code = f"""
from streamlit import config
config._main_script_path = {str(PAGE)!r}
config.get_config_options(force_reparse=True)
print(*(config.get_option(name) for name in {(*options, *own)!r}), sep="|")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    hosts = "['127.0.0.1', 'localhost']"
    assert done.stdout.strip().split("|") == ["none", "minimal", "10", "127.0.0.1", hosts, "False"]
    assert widgets.MAX_UPLOAD_MB == 10


def test_what_waits_for_the_service_ends_for_its_own_fragment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the line that tells of a training every other second: a slow answer would never come."""
    redrawn: list[str] = []
    monkeypatch.setattr(waiting, "waiting_fragments", lambda: ["board"])
    for fragment in (None, "line", "board"):
        monkeypatch.setattr(waiting.ThreadState, "get", lambda: SimpleNamespace(fragment_id=fragment))  # noqa: B023
        monkeypatch.setattr(waiting, "redraw", lambda: redrawn.append(fragment))  # noqa: B023
        waiting.look_up()
    assert redrawn == ["board"]
