"""The page in Streamlit's own test harness, with a stand-in for the service. Drawing itself: test_browser.py."""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from streamlit.testing.v1 import AppTest
from stub_service import StubService

PAGE = Path(__file__).parents[2] / "app" / "canvas.py"
INK = np.zeros((28, 28), dtype=int)
INK[5:12, 10:12] = 1  # a stroke that ends in row 11

OpenPage = Callable[[], AppTest]


@pytest.fixture
def open_page(service: StubService, monkeypatch: pytest.MonkeyPatch) -> OpenPage:
    """Open the page with a stroke on its grid."""
    monkeypatch.setenv("PIXELCNN_SERVICE_URL", service.url)

    def open_it() -> AppTest:
        page = AppTest.from_file(str(PAGE), default_timeout=20)
        page.session_state["grid-28x28"] = {"ink": "".join(map(str, INK.ravel()))}
        return page.run()

    return open_it


def complete(page: AppTest) -> AppTest:
    page.button[0].click().run()
    assert not page.exception
    return page


def pictures(page: AppTest) -> list[np.ndarray]:
    """The endings on the page as (28, 28, 4) pixels, one per cell."""
    body = "".join(element.proto.body for element in page.get("html"))
    found = []
    for data in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", body):
        pixels = np.array(PIL.Image.open(io.BytesIO(base64.b64decode(data))))
        assert pixels.shape == (224, 224, 4)
        found.append(pixels[4::8, 4::8])
    return found


def html_text(page: AppTest) -> str:
    return " ".join(element.proto.body for element in page.get("html"))


def test_complete_shows_endings_that_keep_the_drawing(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    path, body = service.requests[-1]
    assert path == "/complete_stream"
    assert body["image"] == INK.tolist()
    assert body["observed"] == [[int(row <= 11)] * 28 for row in range(28)]
    assert (body["dataset"], body["num_samples"], body["label"], body["temperature"]) == ("mnist5k", 6, -1, 1.0)
    assert "seed" not in body
    shown = pictures(page)
    assert len(shown) == 6
    for pixels in shown:
        assert (pixels[:12][INK[:12] == 1] == (28, 31, 43, 255)).all()
        assert (pixels[:12][INK[:12] == 0] == 255).all()
        added = pixels[12:].reshape(-1, 4)
        assert {tuple(map(int, pixel)) for pixel in added} == {(217, 72, 15, 255), (255, 246, 240, 255)}
    log_probs = sorted(service.answers[-1]["log_probs"], reverse=True)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html_text(page))
    assert captions == [f"\N{MINUS SIGN}{-value:.1f} nats" for value in log_probs]
    assert "by pixelcnn-mnist5k version 3, seed 4711" in html_text(page)


def test_model_line_names_version_score_and_protocol(open_page: OpenPage) -> None:
    line = open_page().caption[-1].value
    assert line == (
        "Serving **pixelcnn-mnist5k** version 3 · test NLL 98.77 nats per image (protocol: dynamic, 500 test images)"
        " · commit 0123456"
    )


def test_only_my_ink_leaves_everything_else_to_the_model(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.button_group[0].set_value("ink").run()
    complete(page)
    assert service.requests[-1][1]["observed"] == INK.tolist()
    for pixels in pictures(page):
        assert (pixels[INK == 1] == (28, 31, 43, 255)).all()


def test_settings_reach_the_service(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.selectbox[1].set_value(7)
    page.slider[0].set_value(4)
    page.slider[1].set_value(0.8)
    page.text_input[0].set_value("9223372036854775807").run()
    complete(page)
    body = service.requests[-1][1]
    assert (body["label"], body["num_samples"], body["temperature"], body["seed"]) == (7, 4, 0.8, 2**63 - 1)


def test_ink_of_a_grey_dataset_is_its_highest_level(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    assert page.selectbox[0].options == ["mnist5k", "fashion_mnist"]  # digits first; no colour images
    page.selectbox[0].set_value("fashion_mnist").run()
    complete(page)
    assert service.requests[-1][1]["image"] == (255 * INK).tolist()
    assert "test NLL 3.21 bits/dim (protocol: 8-bit" in page.caption[-1].value


def test_one_colour_when_asked(open_page: OpenPage) -> None:
    page = complete(open_page())
    page.toggle[1].set_value(False).run()
    colours = {tuple(map(int, pixel)) for pixels in pictures(page) for pixel in pixels.reshape(-1, 4)}
    assert colours == {(28, 31, 43, 255), (255, 255, 255, 255)}


def test_as_i_draw_needs_no_button_and_asks_once(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    assert service.requests == []
    page.toggle[0].set_value(True).run()
    assert len(service.requests) == 1
    assert len(pictures(page)) == 6
    page.run()
    assert len(service.requests) == 1
    page.slider[0].set_value(2).run()
    assert len(service.requests) == 2
    assert len(pictures(page)) == 2


def test_wrong_seed_is_said_and_nothing_is_sent(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.text_input[0].set_value("-1").run()
    complete(page)
    assert page.warning[0].value == (
        "The seed must be a whole number from 0 to 9223372036854775807, got '-1'. Empty means a new one."
    )
    assert service.requests == []
    page.text_input[0].set_value("12").run()
    assert not page.warning
    assert len(service.requests) == 1  # Complete was pressed: it is done as soon as it can be


def test_nothing_left_to_fill_in(service: StubService, open_page: OpenPage) -> None:
    page = open_page()
    page.session_state["grid-28x28"] = {"ink": "0" * 783 + "1"}
    complete(page)
    assert "Nothing is left to fill in" in page.warning[0].value
    assert service.requests == []


def test_service_refuses(service: StubService, open_page: OpenPage) -> None:
    service.refusal = (429, '{"error": "Too many requests at once. Try again in a second."}')
    page = complete(open_page())
    assert [warning.value for warning in page.warning] == ["Too many requests at once. Try again in a second."]
    service.refusal = None
    complete(page)
    assert not page.warning
    assert len(pictures(page)) == 6


def test_stream_that_breaks_keeps_the_last_endings(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    before = [pixels.tolist() for pixels in pictures(page)]
    service.break_stream = True
    complete(page)
    assert "stopped in mid-answer. Try again; your drawing is kept." in page.warning[0].value
    assert [pixels.tolist() for pixels in pictures(page)] == before


def test_service_down_then_up_keeps_drawing_and_endings(service: StubService, open_page: OpenPage) -> None:
    page = complete(open_page())
    service.close()
    complete(page)
    assert [warning.value for warning in page.warning] == [
        f"The service at {service.url} does not answer. Start it with `make serve`; your drawing is kept."
    ]
    assert len(pictures(page)) == 6
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
    assert "does not answer. Start it with `make serve`; your drawing is kept." in page.warning[0].value
    again = StubService(port=service.port)
    try:
        complete(page)
        assert not page.warning
        assert again.requests[-1][1]["image"] == INK.tolist()
        assert len(pictures(page)) == 6
    finally:
        again.close()


def test_no_champion_yet(service: StubService, open_page: OpenPage) -> None:
    service.models = {}
    assert open_page().warning[0].value == "No model is promoted yet. Run `make pipeline`, then press Complete again."


def test_only_colour_images_served(service: StubService, open_page: OpenPage) -> None:
    service.models = {"cifar10": service.models["cifar10"]}
    assert "This page draws in one colour; only cifar10 is served." in open_page().warning[0].value


def test_address_that_is_none(open_page: OpenPage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELCNN_SERVICE_URL", "localhost:3000")
    page = open_page()
    assert not page.exception
    assert page.error[0].value == (
        "PIXELCNN_SERVICE_URL must be an address like http://127.0.0.1:3000, got 'localhost:3000'. Set it anew."
    )
