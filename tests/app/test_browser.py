"""The page in a real Chromium: mouse, finger and keyboard, with a stand-in for the service."""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, BrowserType, Page, expect, sync_playwright

from app.canvas.drawing import Drawing, encode_drawing, levels_of
from app.canvas.examples import beginnings_of
from app.canvas.texts import TEXTS
from tests.app.browsing import (
    CHROMIUM_ARGUMENTS,
    HALF_DIGIT,
    REMEMBERS_NOTHING_DRAWN,
    choose_mode,
    draw,
    grid,
    grid_pixels,
    points_on_screen,
    press_complete,
    shown_endings,
    tool,
    wait_for_endings,
    wait_until_still,
)
from tests.app.stub_service import MODELS, StubService, served
from tests.local import free_port, slow_alone

pytestmark = pytest.mark.no_cover  # the page runs in a process of its own

ROOT = Path(__file__).parents[2]
SIZE = 28
EXAMPLE = levels_of(beginnings_of("mnist")[0], 2)  # draws itself on a page that is opened
NUM_STROKES = int(os.environ.get("PIXELCNN_TEST_STROKES", "50"))  # `make test-slow`: 500
expect.set_options(timeout=15_000)  # a loaded machine is no failure


@pytest.fixture(scope="module")
def chromium() -> Iterator[tuple[BrowserType, dict[str, Any]]]:
    """What starts a browser, and its settings."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("There is no `chromium` on the PATH. Install the Debian package `chromium`: apt install chromium.")
    with sync_playwright() as playwright:
        yield playwright.chromium, {"executable_path": path, "args": CHROMIUM_ARGUMENTS}


@pytest.fixture(scope="module")
def browser(chromium: tuple[BrowserType, dict[str, Any]]) -> Iterator[Browser]:
    browser = chromium[0].launch(**chromium[1])
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def window(
    chromium: tuple[BrowserType, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BrowserContext]:
    """A browser that keeps the page's scripts compiled on disk: each further tab opens in two thirds of the work."""
    context = chromium[0].launch_persistent_context(str(tmp_path_factory.mktemp("profile")), **chromium[1])
    yield context
    context.close()


@pytest.fixture(scope="module")
def services() -> Iterator[dict[str, StubService]]:
    """The one service that the page of this module knows; tests may stop it and start another on its port."""
    services = {"now": StubService()}
    yield services
    services["now"].close()


@contextlib.contextmanager
def running_page(port: int, service_url: str, log: Path) -> Iterator[str]:
    """Run the page as a person does, from the repository's root; yield its address once it is healthy."""
    command = [sys.executable, "-m", "streamlit", "run", "app/canvas/main.py", "--server.port", str(port)]
    environment = {**os.environ, "PIXELCNN_SERVICE_URL": service_url}
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
        yield url
        # Of the page's own code: a browser that leaves while it connects makes Streamlit's server log a traceback, in
        # which origins.py passes on what it got.
        passing_on = r'canvas/origins\.py", line \d+, in __call__\n +await self\.app\('
        said = log.read_text()
        assert not re.search(rf'File "{re.escape(str(ROOT))}/app/(?!{passing_on})', said), said
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def page_url(services: dict[str, StubService], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("streamlit") / "log.txt"
    with running_page(free_port(), services["now"].url, log) as url:
        yield url


@pytest.fixture
def service(services: dict[str, StubService]) -> StubService:
    """The service, fresh."""
    stub = services["now"]
    stub.requests.clear()
    stub.answers.clear()
    stub.row_s = 0.0
    stub.hurry.clear()
    return stub


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, window: BrowserContext, page_url: str, service: StubService) -> Iterator[OpenPage]:
    """Open the page; afterwards, check that its scripts ran without errors and asked nobody but this machine.

    It is a new tab; with a browser's `options`, such as `locale`, one of a browser of its own.
    """
    opened: list[Page | BrowserContext] = []
    troubles: list[str] = []

    def open_it(
        width: int = 1280,
        height: int = 900,
        url: str = page_url,
        live: bool = False,
        example: bool = False,
        **options: Any,
    ) -> Page:
        if options:
            opened.append(context := browser.new_context(viewport={"width": width, "height": height}, **options))
            page = context.new_page()
        else:
            opened.append(page := window.new_page())
            page.set_viewport_size({"width": width, "height": height})
        if not example:
            page.add_init_script(REMEMBERS_NOTHING_DRAWN)
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: troubles.append(request.url) if is_elsewhere(request.url) else None)
        page.goto(url)
        grid(page).wait_for()
        expect(page.get_by_text("pixelcnn-mnist5k version 3").first).to_be_visible()
        if not live:
            page.get_by_text("As I draw").click()
            expect(page.get_by_role("switch", name="As I draw")).not_to_be_checked()
            page.wait_for_timeout(200)  # until the page is told
            wait_until_still(page)
        return page

    yield open_it
    for one in opened:
        one.close()
    window.clear_cookies()
    window.clear_permissions()
    assert troubles == []


def is_elsewhere(url: str) -> bool:
    return not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:"))


def cells(page: Page) -> np.ndarray:
    """What the grid shows, (28, 28): 1 ink, 0 known blank, -1 unknown."""
    pixels = grid_pixels(page)
    return np.where(pixels[..., 3] == 0, -1, (pixels[..., 0] < 128).astype(int))


def ink(page: Page) -> np.ndarray:
    return (cells(page) == 1).astype(int)


def draw_by_finger(page: Page, points: list[tuple[float, float]]) -> None:
    client = page.context.new_cdp_session(page)
    for kind, places in (
        ("touchStart", points[:1]),
        *(("touchMove", [point]) for point in points[1:]),
        ("touchEnd", []),
    ):
        touches = [{"x": x, "y": y} for x, y in points_on_screen(page, places)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


def was_sent(service: StubService, drawing: np.ndarray) -> bool:
    """Whether a drawing was, perhaps not as the last: the page may still ask for an earlier one that it was told of."""
    return any(body.get("image") == drawing.tolist() for _, body in service.requests)


def until(condition: Callable[[], Any], failure: str) -> None:
    """Wait for something that the page does by itself."""
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.05)


def go_to(page: Page, name: str) -> None:
    """Go to another page by the bar above."""
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_be_attached()
    wait_until_still(page)


def test_draw_press_see(open_page: OpenPage, service: StubService, tmp_path: Path) -> None:
    page = open_page()
    assert (cells(page) == -1).all()
    draw(page, HALF_DIGIT)
    drawn = cells(page)
    lowest = np.flatnonzero((drawn == 1).any(axis=1))[-1]
    assert lowest == 12
    assert (drawn[: lowest + 1] >= 0).all()
    assert (drawn[lowest + 1 :] == -1).all()
    press_complete(page)
    wait_for_endings(page)
    path, body = service.requests[-1]
    assert path == "/complete_stream"
    assert body["image"] == (drawn == 1).astype(int).tolist()  # seen is sent
    assert body["observed"] == (drawn >= 0).astype(int).tolist()
    for picture in shown_endings(page):
        assert (picture[drawn == 1] == (28, 31, 43)).all()
        assert (picture[drawn == 0] == 255).all()
        assert (picture[drawn == -1] == (217, 72, 15)).all(axis=-1).any()
    captions = page.locator(".endings:visible figcaption").all_inner_texts()
    assert all(re.fullmatch(r"\N{MINUS SIGN}\d+\.\d nats", caption) for caption in captions)
    assert (cells(page) == drawn).all()  # and the drawing is still there
    page.screenshot(path=tmp_path / "canvas.png")
    assert (tmp_path / "canvas.png").stat().st_size > 10_000


@pytest.mark.slow
def test_rows_appear_while_the_model_draws(open_page: OpenPage, service: StubService) -> None:
    service.row_s = 0.1  # what is unfinished stays visible for seconds
    page = open_page()
    draw(page, HALF_DIGIT)
    press_complete(page)
    expect(page.get_by_text("The model is drawing")).to_be_visible()
    expect(page.locator(".endings:visible img")).to_have_count(9)
    assert page.locator(".endings:visible figcaption").first.inner_text().strip() == "\N{HORIZONTAL ELLIPSIS}"
    wait_for_endings(page)
    expect(page.get_by_text("The model is drawing")).not_to_be_visible()
    service.row_s = 0.4
    drawn, endings = ink(page), shown_endings(page)
    press_complete(page)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("The model is drawing")).not_to_be_visible()
    assert (ink(page) == drawn).all()
    assert np.array_equal(shown_endings(page), endings)


def test_undo_redo_eraser_clear(open_page: OpenPage) -> None:
    page = open_page()
    draw(page, HALF_DIGIT)
    first = ink(page)
    tool(page, "Brush 1").click()
    draw(page, [(3.5, 3.5), (3.5, 7.5)])
    second = ink(page)
    assert (np.argwhere(second != first) == [(row, 3) for row in range(3, 8)]).all()
    tool(page, "Eraser").click()
    draw(page, [(0.5, 4.5), (5.5, 4.5)])
    erased = ink(page)
    assert np.argwhere(erased != second).tolist() == [[4, 3]]
    tool(page, "Clear").click()
    assert not ink(page).any()
    expect(tool(page, "Clear")).to_be_disabled()
    for expected in (erased, second, first, np.zeros_like(first)):  # a stroke, and clear, is one step each
        tool(page, "Undo").click()
        assert (ink(page) == expected).all()
    expect(tool(page, "Undo")).to_be_disabled()
    for expected in (first, second, erased):
        page.keyboard.press("Control+Shift+Z")
        assert (ink(page) == expected).all()
    page.keyboard.press("Control+Z")
    assert (ink(page) == second).all()


def test_brush_widths_and_fast_strokes(open_page: OpenPage) -> None:
    page = open_page()
    for brush, column in ((1, 4.5), (2, 11.0), (3, 18.5)):
        tool(page, f"Brush {brush}").click()
        draw(page, [(column, 5), (column, 20)])
    expected = np.zeros(SIZE, dtype=int)
    expected[[4, 10, 11, 17, 18, 19]] = 1
    assert (ink(page)[10] == expected).all()
    tool(page, "Clear").click()
    tool(page, "Brush 1").click()  # from here on: fast strokes have no gaps, and may cross the edge
    draw(page, [(0.5, 3.5), (27.5, 17.5)])
    drawn = ink(page)
    assert drawn.any(axis=0).all()
    columns = [np.flatnonzero(drawn[:, column]) for column in range(SIZE)]
    assert all(b.min() - a.max() <= 1 for a, b in itertools.pairwise(columns))
    tool(page, "Clear").click()
    draw(page, [(20.5, 9.5), (31.0, 9.5), (31.0, 14.5), (20.5, 14.5)])  # out on the right, and in again
    expected = np.zeros((SIZE, SIZE), dtype=int)
    expected[[9, 14], 20:] = 1
    assert (ink(page) == expected).all()


@pytest.mark.slow
def test_keys_can_be_switched_off(open_page: OpenPage, service: StubService) -> None:
    """Who speaks to the machine, or types by a switch, may press letters without meaning a tool."""
    page = open_page()
    draw(page, HALF_DIGIT)
    page.locator("summary", has_text="Keys").click()
    page.locator("label", has_text="Keys choose tools").click()
    expect(page.locator(".st-key-main button")).not_to_contain_text("F")  # its key
    wait_until_still(page)
    for key in ("e", "h", "Delete", "f"):
        page.keyboard.press(key)
    page.wait_for_timeout(300)
    assert ink(page).any()
    expect(tool(page, "Pen")).to_have_attribute("aria-pressed", "true")
    assert service.requests == []


@pytest.mark.slow
def test_what_is_known(open_page: OpenPage, service: StubService) -> None:
    page = open_page()
    draw(page, HALF_DIGIT)
    tool(page, "Blank").click()
    draw(page, [(3, 20), (24, 20)])
    page.keyboard.press("h")  # without the grid being in focus
    page.keyboard.press("3")
    draw(page, [(14, 4.5), (16, 4.5)])
    drawn = ink(page)
    shown = {}
    for number, mode in enumerate(("Only my ink", "All I touched", "Free mask", "All above"), start=1):
        choose_mode(page, mode)
        page.wait_for_timeout(200)  # which a hand needs, too
        wait_until_still(page)
        press_complete(page)
        until(lambda number=number: len(service.answers) == number, "the endings were not asked for")
        wait_for_endings(page)
        shown[mode] = cells(page)
        body = service.requests[-1][1]
        assert body["observed"] == (shown[mode] >= 0).astype(int).tolist(), mode  # seen is sent
        assert body["image"] == drawn.tolist(), mode
        assert (ink(page) == drawn).all()
    blank = np.zeros((SIZE, SIZE), dtype=bool)
    blank[19:21, 2:25] = True
    assert (shown["Only my ink"] == np.where(drawn, 1, -1)).all()
    assert (shown["All I touched"] == np.where(drawn, 1, np.where(blank, 0, -1))).all()
    hole = shown["Free mask"] == -1
    assert hole[3:6, 13:17].all()
    assert hole.sum() == hole[3:6, 12:18].sum()
    assert (shown["All above"][:13][hole[:13]] == -1).all()


@pytest.mark.slow
def test_as_i_draw(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    places = points_on_screen(page, HALF_DIGIT)
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place)
        time.sleep(0.1)
    until(lambda: service.requests, "nothing was sent while the stroke was drawn")
    page.mouse.up()
    first = ink(page)
    wait_for_endings(page)
    tool(page, "Undo").click()
    assert not ink(page).any()  # what was sent on the way is no step of its own
    tool(page, "Redo").click()
    service.row_s = 0.05  # a slow answer to this drawing comes too late: the next stroke is made before
    draw(page, [(14, 12), (16, 15)])
    until(lambda: was_sent(service, ink(page)), "the stroke was never sent")
    service.row_s = 0.0
    draw(page, [(16, 15), (18, 19)])
    last = ink(page)
    assert (last >= first).all()
    until(lambda: was_sent(service, last), "the last stroke was never sent")
    time.sleep(1)  # the slow answer would be complete by now
    wait_for_endings(page)
    for picture in shown_endings(page):
        assert (picture[last == 1] == (28, 31, 43)).all()


def test_unfinished_endings_stay_until_there_is_more(open_page: OpenPage, service: StubService) -> None:
    """A stroke that is drawn on does not bring back the endings of strokes before."""
    page = open_page(live=True)
    draw(page, HALF_DIGIT)
    wait_for_endings(page)
    page.evaluate("""() => {
      window.seen = [];
      new MutationObserver(() => {
        const known = document.querySelector(".live .endings, .endings")?.dataset.known;
        if (known && known !== window.seen.at(-1)) window.seen.push(known);
      }).observe(document.body, { subtree: true, childList: true, attributes: true });
    }""")
    service.row_s = 0.1
    for stroke in ([(14, 12), (16, 15)], [(16, 15), (18, 19)]):
        draw(page, stroke)
        until(lambda: was_sent(service, ink(page)), "the stroke was never sent")
        known = np.sum(service.requests[-1][1]["observed"])
        expect(page.locator(f'.endings[data-known="{known}"]:visible')).to_be_visible()
    service.row_s = 0.0
    wait_for_endings(page)
    expect(page.locator(".endings:visible")).to_have_attribute("data-drawn", "1")
    seen = page.evaluate("window.seen")
    assert seen == sorted({*seen}, key=int)
    assert len(seen) >= 2


def test_a_stroke_is_answered_without_the_page(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    wait_until_still(page)
    service.row_s = 0.2
    draw(page, HALF_DIGIT)
    both = [".live .endings[data-drawn='0']", ".stApp[data-test-script-state='notRunning']"]  # in one moment
    page.wait_for_function("both => both.every((one) => document.querySelector(one))", arg=both)
    go_to(page, "Surprise")  # which knows the drawing, although the page was not told of it
    until(lambda: service.requests[-1][0] == "/likelihood", "nothing was asked")
    *_, stroke = (body for path, body in service.requests if path == "/complete_stream")
    assert service.requests[-1][1]["image"] == stroke["image"]


@pytest.mark.slow
def test_an_order_that_is_chosen_while_endings_come_is_taken(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    draw(page, HALF_DIGIT)
    wait_for_endings(page)
    wait_until_still(page)
    service.row_s = 1.0
    draw(page, [(14, 12), (16, 15)])
    expect(page.locator('.live .endings[data-drawn="0"]')).to_be_visible()
    page.get_by_role("radio", name="Likely first").click()
    service.hurry.set()
    captions = page.locator(f'.endings[data-known="{28 * 16}"]:visible figcaption').filter(has_text="nats")
    expect(captions).to_have_count(9)

    def is_in_order() -> bool:
        values = [float(text[1:].split()[0]) for text in captions.all_inner_texts()]
        return len(values) == 9 and values == sorted(values)

    until(is_in_order, "they stayed as drawn")
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)


@pytest.mark.slow
def test_a_pen_that_is_only_lifted_asks_for_nothing(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    wait_until_still(page)
    service.row_s = 0.1
    first, *rest = points_on_screen(page, HALF_DIGIT)
    page.mouse.move(*first)
    page.mouse.down()
    page.wait_for_timeout(300)  # so that the next move is told of
    page.mouse.move(*rest[0])
    until(lambda: was_sent(service, ink(page)), "nothing was sent while the stroke was drawn")
    page.mouse.up()
    wait_for_endings(page)
    assert len(service.requests) == 1


@pytest.mark.slow
def test_slow_endings_can_be_stopped(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    wait_until_still(page)
    service.row_s = 0.5
    draw(page, HALF_DIGIT)
    stop = page.get_by_role("button", name="Stop")
    expect(stop).to_be_visible()
    colours = "button => [getComputedStyle(button).backgroundColor, getComputedStyle(button.querySelector('p')).color]"
    ground, text = stop.evaluate(colours)
    assert ground != text, "nobody can read it"
    stop.click()
    expect(stop).to_have_count(0)
    expect(page.locator(".live .endings")).to_have_count(0)
    asked = len(service.requests)
    page.wait_for_timeout(1000)
    assert len(service.requests) == asked  # nor are they asked for again


def test_where_that_way_is_closed_the_page_asks(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    page.route("**/live", lambda route: route.abort())
    draw(page, HALF_DIGIT)
    wait_for_endings(page)
    assert page.locator(".live .endings").count() == 0
    until(lambda: was_sent(service, ink(page)), "the stroke was never sent")


@pytest.mark.slow
def test_continue_from_an_ending(open_page: OpenPage, service: StubService, tmp_path: Path) -> None:
    page = open_page()
    draw(page, HALF_DIGIT)
    drawn = ink(page)
    page.keyboard.press("f")
    wait_for_endings(page)
    endings = page.locator(".endings:visible button")
    endings.nth(2).click()
    expect(endings.nth(2)).to_have_attribute("aria-pressed", "true")
    expect(page.locator('.endings button[aria-pressed="true"]')).to_have_count(1)
    answer = service.answers[-1]
    assert ink(page).tolist() == answer["completions"][2]
    page.screenshot(path=tmp_path / "continued.png")
    page.get_by_role("button", name="Save").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    assert json.loads(download.value.path().read_text())["result"]["completions"] == answer["completions"]
    with page.expect_download() as download:
        page.get_by_role("button", name="All of them (PNG)").click()
    assert PIL.Image.open(download.value.path()).size == (1720, 1720)
    with page.expect_download() as download:
        page.get_by_role("button", name="One ending (PNG)").click()
    kept = np.array(PIL.Image.open(download.value.path()))[10::20, 10::20]
    assert (kept[..., 0] < 220).astype(int).tolist() == answer["completions"][2]  # the chosen one
    with page.expect_download() as download:
        page.get_by_role("button", name="GIF").click()
    with PIL.Image.open(download.value.path()) as animation:
        assert animation.n_frames == 120
        animation.seek(animation.n_frames - 1)
        last = np.array(animation.convert("RGB"))[5::10, 5::10].astype(int)
        assert abs(last - kept[..., :3]).max() < 12
    page.keyboard.press("Escape")
    compare = page.get_by_role("button", name="Hold to compare")
    compare.hover()
    page.mouse.down()
    expect(page.locator(".endings:visible")).to_have_class(re.compile("compare"))
    shown = "getComputedStyle(document.querySelector('.endings img')).content"
    assert "data:image/png" in page.evaluate(shown)
    page.mouse.up()
    assert page.evaluate(shown) == "normal"
    page.keyboard.press("h")
    draw(page, [(2, 2), (4, 2)])
    expect(page.locator(".endings.earlier:visible")).to_have_count(1)  # another drawing
    expect(page.locator('.endings button[aria-pressed="true"]')).to_have_count(0)
    page.keyboard.press("Control+z")
    expect(endings.nth(2)).to_have_attribute("aria-pressed", "true")
    tool(page, "Pen").click()
    tool(page, "Brush 1").click()
    y, x = np.argwhere(ink(page))[0] + 0.5
    draw(page, [(x, y), (x, y)])  # on ink that is there
    page.wait_for_timeout(500)
    expect(endings.nth(2)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Control+z")  # one step
    assert (ink(page) == drawn).all()
    endings.nth(0).focus()
    page.keyboard.press("Enter")
    assert (ink(page) != drawn).any()


@pytest.mark.slow
def test_link_and_reload(open_page: OpenPage, service: StubService, page_url: str) -> None:
    page = open_page()
    draw(page, HALF_DIGIT)
    choose_mode(page, "Only my ink")
    press_complete(page)
    wait_for_endings(page)
    page.wait_for_url("**seed=**")
    drawn, endings, link = cells(page), shown_endings(page), page.url
    friend = open_page(url=link, locale="en")  # another browser, without this one's memory
    wait_for_endings(friend)
    assert (cells(friend) == drawn).all()
    until(lambda: np.array_equal(shown_endings(friend), endings), "the link shows other endings")
    assert f"seed={service.requests[-1][1]['seed']}" in link
    draw(page, [(20, 3), (22, 5)])
    more = ink(page)
    go_to(page, "Models")
    expect(page.get_by_text("data hash").first).to_be_visible()
    page.go_back()  # as a browser does
    page.locator('.drawing canvas[width="28"]').wait_for()
    assert (ink(page) == more).all()
    page.reload()
    grid(page).wait_for()
    until(lambda: (ink(page) == more).all(), "the last stroke was lost")
    other = np.zeros((SIZE, SIZE), dtype=int)
    other[3:9, 4:6] = 1
    page.goto(f"{page_url}/?d={encode_drawing(Drawing(255 * other, other))}")  # comes before what is remembered
    until(lambda: (ink(page) == other).all(), "the link was not followed")


@pytest.mark.slow
def test_a_stroke_before_the_address_changes_outlives_a_reload(open_page: OpenPage, page_url: str) -> None:
    page = open_page(url=f"{page_url}/?token=s3cret")
    draw(page, HALF_DIGIT)
    press_complete(page)
    wait_for_endings(page)
    draw(page, [(20, 3), (22, 5)])
    drawn = ink(page)
    page.wait_for_url("**seed=**")  # of the endings, so of the drawing before
    assert "token=s3cret" in page.url  # whoever is given the link can open it
    page.reload()
    grid(page).wait_for()
    until(lambda: (ink(page) == drawn).all(), "the last stroke was lost")


@pytest.mark.slow
def test_another_page_and_back_keeps_the_grid(open_page: OpenPage, service: StubService, page_url: str) -> None:
    page = open_page(live=True)
    draw(page, HALF_DIGIT)
    wait_for_endings(page)
    page.wait_for_url("**d=**")
    page.route("**/live", lambda route: None)  # the server hears nothing of the next stroke
    draw(page, [(20, 3), (22, 5)])
    drawn = ink(page)
    go_to(page, "Models")
    go_to(page, "Draw")
    until(lambda: (ink(page) == drawn).all(), "the last stroke was lost")
    page = open_page()
    draw(page, HALF_DIGIT)  # without an answer
    service.row_s = 1.0  # nor is there one before the page is left
    other = np.zeros((SIZE, SIZE), dtype=int)
    other[3:9, 4:6] = 1
    page.goto(f"{page_url}/?d={encode_drawing(Drawing(255 * other, other))}")
    until(lambda: (ink(page) == other).all(), "the link was not followed")
    go_to(page, "Models")
    service.hurry.set()
    go_to(page, "Draw")
    assert (ink(page) == other).all()


PASTE = """
async ([picture64, text]) => {
  const picture = await (await fetch(`data:image/png;base64,${picture64}`)).blob();
  const clipboardData = new DataTransfer();
  clipboardData.items.add(new File([picture], "a.png", { type: "image/png" }));
  if (text) clipboardData.setData("text", text);
  const paste = new ClipboardEvent("paste", { clipboardData, bubbles: true, cancelable: true });
  return document.activeElement.dispatchEvent(paste);
}
"""


DROP = """
() => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File(["no picture"], "a.txt", { type: "text/plain" }));
  return document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}
"""


def test_picture_and_grey(open_page: OpenPage, service: StubService, page_url: str) -> None:
    page = open_page(url=f"{page_url}/?dataset=fashion_mnist")
    page.locator(".grey input").fill("120")
    tool(page, "Soft").click()
    draw(page, HALF_DIGIT)
    press_complete(page)
    wait_for_endings(page)
    sent = np.array(service.requests[-1][1]["image"])
    assert set(sent.ravel()) == {0, 120}
    photograph = np.full((280, 280), 255, dtype=np.uint8)
    photograph[100:180, 100:180] = 55
    file = io.BytesIO()
    PIL.Image.fromarray(photograph).save(file, "PNG")
    picture = base64.b64encode(file.getvalue()).decode()
    page.get_by_text("Advanced").click()
    page.get_by_role("textbox", name="Seed").focus()
    assert page.evaluate(PASTE, [picture, "7"]), "the text did not come to the field"
    assert not page.evaluate(PASTE, [picture, ""])  # but a picture alone goes where pictures go
    assert not page.evaluate(DROP), "what is no picture would take the place of the page"
    page.get_by_alt_text("The picture, as the grid will show it").wait_for()
    wait_until_still(page)
    page.get_by_role("button", name="Put it on the grid").click()
    until(lambda: cells(page)[10:18, 10:18].sum() == 64, "the picture did not come")
    press_complete(page)
    until(lambda: service.requests[-1][0] == "/complete_stream", "the picture was not sent")  # after its layout
    sent = np.array(service.requests[-1][1]["image"])
    assert (sent[10:18, 10:18] == 200).all()
    assert np.count_nonzero(sent) == 64


def test_soft_pen(open_page: OpenPage, service: StubService, page_url: str, tmp_path: Path) -> None:
    page = open_page(url=f"{page_url}/?dataset=fashion_mnist")
    expect(tool(page, "Soft")).to_have_attribute("aria-pressed", "true")
    for brush, column in ((1, 4.5), (2, 11), (3, 18.5)):
        page.keyboard.press(str(brush))
        draw(page, [(column, 5), (column, 20), (column, 8)])  # there and back: no darker
    draw(page, HALF_DIGIT)
    page.screenshot(path=tmp_path / "soft.png")
    tool(page, "Undo").click()
    press_complete(page)
    wait_for_endings(page)
    row = np.array(service.requests[-1][1]["image"])[10]
    assert row[[4, 10, 11, 17, 18, 19]].tolist() == [213, 213, 213, 213, 255, 213]  # 5/6 where the edge begins
    assert row[[3, 5, 9, 12, 16, 20]].tolist() == [43] * 6
    assert np.count_nonzero(row) == 12
    page.keyboard.press("s")
    expect(tool(page, "Soft")).to_have_attribute("aria-pressed", "false")
    draw(page, [(24.5, 5), (24.5, 20)])
    press_complete(page)
    until(lambda: len(service.requests) == 2, "the endings were not asked for")
    assert np.array(service.requests[-1][1]["image"])[10, 22:].tolist() == [0, 255, 255, 255, 0, 0]


def test_drawing_by_keyboard(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    grid(page).focus()
    page.keyboard.press("1")
    for key in ("ArrowUp", "Shift+ArrowLeft", "Shift+ArrowLeft", "ArrowDown", "Space"):
        page.keyboard.press(key)
    expected = np.zeros((SIZE, SIZE), dtype=int)
    expected[13, 12:15] = 1
    expected[14, 12] = 1
    assert (ink(page) == expected).all()
    expect(page.get_by_role("status").filter(has_text="Row 15, column 13: ink")).to_have_count(1)
    page.screenshot(path=tmp_path / "keyboard.png")
    for _ in range(30):
        page.keyboard.press("ArrowRight")  # stops at the edge
    page.keyboard.press("Space")
    expected[14, 27] = 1
    assert (ink(page) == expected).all()
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    expected[14, [12, 27]] = 0
    assert (ink(page) == expected).all()


@pytest.mark.slow
def test_painting_in_colour(open_page: OpenPage, service: StubService, page_url: str, tmp_path: Path) -> None:
    page = open_page(url=f"{page_url}/?dataset=cifar10")
    expect(tool(page, "Blank")).to_have_count(0)
    assert grid_pixels(page).shape == (32, 32, 4)
    tool(page, "Soft").click()
    page.locator(".paint input").fill("#123456")
    page.keyboard.press("8")
    draw(page, [(4, 4), (28, 4)])
    first = grid_pixels(page)
    assert (first[:8] == (0x12, 0x34, 0x56, 255)).all()
    assert (first[8:, :, 3] == 0).all()
    tool(page, "Black").focus()
    page.keyboard.press("Enter")
    expect(tool(page, "Black")).to_have_attribute("aria-pressed", "true")
    draw(page, [(10, 12), (16, 12)])
    assert (grid_pixels(page)[8:16, 6:20] == (0, 0, 0, 255)).all()  # black is paint, too
    tool(page, "Hole").click()
    tool(page, "Brush 2").click()
    draw(page, [(16, 4), (20, 4)])
    tool(page, "Eraser").click()
    draw(page, [(10, 12), (12, 12)])
    last = grid_pixels(page)
    assert (last[3:5, 15:21, 3] == 0).all()
    assert (last[11:13, 9:13, 3] == 0).all()
    press_complete(page)
    wait_for_endings(page)
    body = service.requests[-1][1]
    assert body["observed"] == (last[..., 3] // 255).tolist()  # seen is sent
    assert body["image"] == last[..., :3].tolist()
    answer = service.answers[-1]
    for picture, completion in zip(shown_endings(page), answer["completions"], strict=True):
        assert picture.tolist() == completion
    page.screenshot(path=tmp_path / "colour.png", full_page=True)
    page.locator(".endings:visible button").nth(3).click()
    assert grid_pixels(page)[..., :3].tolist() == answer["completions"][3]
    tool(page, "Undo").click()
    assert (grid_pixels(page) == last).all()
    page.wait_for_url("**seed=**")
    friend = open_page(url=page.url, locale="en")
    wait_for_endings(friend)
    assert (grid_pixels(friend) == last).all()


def test_soft_paint_mixes_with_paint_alone(open_page: OpenPage, page_url: str) -> None:
    page = open_page(url=f"{page_url}/?dataset=cifar10")
    tool(page, "White").click()
    page.keyboard.press("8")
    draw(page, [(4, 4), (28, 4)])
    tool(page, "Black").click()
    page.keyboard.press("3")
    draw(page, [(10.5, 4), (10.5, 20)])
    pixels = grid_pixels(page)
    assert pixels[3, 10, 0] == 0
    assert (abs(pixels[3, [9, 11], 0] - 43) < 30).all()  # the mouse is in whole pixels, so not quite in the middle
    assert (abs(pixels[3, [8, 12], 0] - 212) < 30).all()
    assert (pixels[14, 9:12] == (0, 0, 0, 255)).all()
    assert (pixels[14, [8, 12], 3] == 0).all()


@slow_alone
def test_each_shape_keeps_its_own_drawing(open_page: OpenPage, page_url: str) -> None:
    page = open_page()
    draw(page, HALF_DIGIT)
    digit = ink(page)

    def choose(dataset: str, columns: int) -> None:
        wait_until_still(page)
        box = page.get_by_role("combobox", name="Dataset")
        box.click()
        box.fill(dataset)
        expect(page.get_by_role("option")).to_have_count(1)
        box.press("Enter")
        expect(page.locator(f'.drawing canvas[width="{columns}"]')).to_be_visible()
        expect(grid(page)).to_have_count(1)  # for a moment Streamlit shows the grid before beside the new one

    choose("cifar10", 32)
    tool(page, "Green").click()
    draw(page, [(4, 4), (28, 20)])
    press_complete(page)
    wait_for_endings(page)
    page.wait_for_url("**seed=**")  # the address now holds a drawing in colour
    painted = grid_pixels(page)
    choose("mnist5k", SIZE)
    until(lambda: (ink(page) == digit).all(), "the digit was lost")
    choose("cifar10", 32)
    until(lambda: (grid_pixels(page) == painted).all(), "the painting was lost")


@pytest.mark.parametrize(
    ("shape", "levels", "brush", "greys"),
    [((1, 48, 32), 2, 2, []), ((1, 16, 16), 4, 1, [85, 170, 255]), ((3, 64, 64), 256, 5, [])],
    ids=["48x32", "16x16", "64x64x3"],
)
def test_grids_of_other_shapes(
    open_page: OpenPage, service: StubService, monkeypatch: pytest.MonkeyPatch, shape, levels, brush, greys
) -> None:
    monkeypatch.setattr(service, "models", {"other": served(shape, levels, [], "toy")})
    page = open_page()
    _, height, width = shape
    expect(page.locator(f'.drawing canvas[width="{width}"][height="{height}"]')).to_be_visible()
    box = grid(page).bounding_box()
    assert box is not None
    assert box["height"] == pytest.approx(box["width"] * height / width, abs=2)
    assert box["y"] + box["height"] <= 900, "the grid is in sight"
    expect(page.locator(f'[data-brush="{brush}"]')).to_have_attribute("aria-pressed", "true")
    if greys:
        slider = page.locator(".grey input")
        values = "input => Array.from({length: 256}, (_, i) => Number((input.value = i, input.value)))"
        assert sorted(set(slider.evaluate(values))) == greys
        slider.fill("170")
        tool(page, "More").click()
        tool(page, "Soft").click()
    draw(page, [(3, 3), (width - 4, 6)])
    press_complete(page)
    wait_for_endings(page)
    sent = np.array(service.requests[-1][1]["image"])
    assert sent.shape == ((height, width) if shape[0] == 1 else (height, width, 3))
    assert set(sent[sent > 0].ravel()) <= ({2} if greys else {1} if levels == 2 else set(range(256)))
    assert sent.any()
    endings = shown_endings(page)
    assert {ending.shape for ending in endings} == {(height, width, 3)}
    picture = page.locator(".endings:visible img").first.bounding_box()
    assert picture is not None
    assert picture["height"] == pytest.approx(picture["width"] * height / width, rel=0.03)


def choose_half(page: Page, name: str) -> None:
    """Choose which half of a picture stays, and wait until it is seen: a button pressed sooner takes the one before."""
    shown = page.get_by_alt_text("The picture, as the grid will show it").last  # two, while the page is redrawn
    shown.wait_for()
    wait_until_still(page)
    before = shown.get_attribute("src")
    page.get_by_role("radio", name=name).click()
    until(lambda: shown.get_attribute("src") != before, "the half was not chosen")
    wait_until_still(page)


@slow_alone
def test_start_from_half_a_generated_picture(
    open_page: OpenPage, service: StubService, page_url: str, tmp_path: Path
) -> None:
    page = open_page(url=f"{page_url}/?dataset=cifar10")
    page.get_by_text("Start from a picture").click()
    page.get_by_role("radio", name="The model makes one").click()
    page.get_by_role("button", name="Make a picture").click()
    choose_half(page, "Upper")
    page.get_by_role("button", name="Put it on the grid").click()
    asked = next(body for path, body in service.requests if path == "/generate")  # live, the grid is sent after it
    made = np.array(service.generated(asked)["images"][0])
    until(lambda: (grid_pixels(page)[16:, :, :3] == made[16:]).all(), "the picture did not come")
    assert (grid_pixels(page)[:16, :, 3] == 0).all()
    page.screenshot(path=tmp_path / "half.png", full_page=True)
    tool(page, "Undo").click()
    assert (grid_pixels(page)[..., 3] == 0).all()  # one step
    photograph = np.zeros((320, 320, 3), dtype=np.uint8)
    photograph[:, :160] = (10, 120, 200)
    file = io.BytesIO()
    PIL.Image.fromarray(photograph).save(file, "PNG")
    page.get_by_role("radio", name="A picture of mine").click()
    page.locator("input[type=file]").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    choose_half(page, "Lower")
    page.get_by_role("button", name="Put it on the grid").click()
    until(lambda: (grid_pixels(page)[:16, :16] == (10, 120, 200, 255)).all(), "the photograph did not come")
    assert (grid_pixels(page)[:16, 16:] == (0, 0, 0, 255)).all()
    assert (grid_pixels(page)[16:, :, 3] == 0).all()


@pytest.mark.slow
def test_a_page_of_surprise_that_waits_says_so(open_page: OpenPage, service: StubService) -> None:
    page = open_page()
    service.row_s = 60
    page.get_by_role("link", name="Surprise").click()
    expect(page.get_by_text("The model is looking at it")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)  # it would ask again
    service.hurry.set()
    expect(page.get_by_text("log-probability")).to_be_visible()
    expect(page.get_by_text("The model is looking at it")).to_have_count(0)


@pytest.mark.slow
def test_generated_rows_appear_and_can_be_stopped(open_page: OpenPage, service: StubService, tmp_path: Path) -> None:
    page = open_page()
    go_to(page, "Generate")
    service.row_s = 0.05
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".sheet img")).to_have_count(16)
    expect(page.locator(".sheet figcaption").first).to_have_text("\N{HORIZONTAL ELLIPSIS}")
    page.screenshot(path=tmp_path / "generate.png")
    expect(page.locator(".sheet figcaption").filter(has_text="nats")).to_have_count(16)
    service.row_s = 0.4
    sources = page.locator(".sheet img").evaluate_all("images => images.map(image => image.src)")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("The model is drawing")).not_to_be_visible()
    expect(page.locator(".sheet figcaption").filter(has_text="nats")).to_have_count(16)
    assert page.locator(".sheet img").evaluate_all("images => images.map(image => image.src)") == sources


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.timeout(600)  # a loaded machine is no failure
def test_no_stroke_is_lost(open_page: OpenPage, service: StubService) -> None:
    page = open_page()
    live = page.get_by_text("As I draw")
    live.click()  # the page is redrawn all the time
    tool(page, "Brush 1").click()
    random = np.random.default_rng(0)
    diagonal = [(i + 0.5, i + 0.5) for i in range(SIZE + 1)]
    places = points_on_screen(page, diagonal)
    expected = np.zeros((SIZE, SIZE), dtype=int)
    for number in range(NUM_STROKES):
        if number == NUM_STROKES // 5:
            live.click()
            places = points_on_screen(page, diagonal)  # the click may have scrolled the page
        if number % 10 == 0:
            page.keyboard.press("e" if number % 30 == 20 else "p")
        row, column, length = random.integers(SIZE, size=3).tolist()
        end = min(column + length, SIZE)
        across = random.random() < 0.5  # a line of one row, else of one column; some go over the edge
        (expected if across else expected.T)[row, column : end + 1] = number % 30 < 20
        for i, act in ((column, page.mouse.down), (end, page.mouse.up)):
            page.mouse.move(places[i if across else row][0], places[row if across else i][1])
            act()
        if number % 50 == 49:
            moved = np.abs(np.subtract(points_on_screen(page, diagonal), places)).max()
            assert moved < 3, "the grid moves under the hand"  # pixels; a cell has a dozen and more
            assert (ink(page) == expected).all(), number
    choose_mode(page, "Only my ink")
    press_complete(page)
    until(lambda: service.requests, "nothing was sent")
    until(lambda: service.requests[-1][1]["image"] == expected.tolist(), "the last stroke was never sent")
    for _ in range(60):
        page.keyboard.press("Control+z")
    for _ in range(60):
        page.keyboard.press("Control+Shift+z")
    assert (ink(page) == expected).all()


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "language"), [("light", "fr"), ("dark", "en")])
def test_axe_finds_nothing(open_page: OpenPage, service: StubService, scheme: str, language: str) -> None:
    page = open_page(live=True, example=True, color_scheme=scheme, locale=language)
    until(lambda: (ink(page) == EXAMPLE).all(), "the example did not draw itself")
    wait_for_endings(page)
    whole = EXAMPLE.tolist()
    until(lambda: whole in (body["image"] for _, body in service.requests), "the example was not completed as a whole")
    assert page.locator("html").get_attribute("lang") == language
    found = set()
    for name in ("draw", "generate", "surprise", "models"):
        go_to(page, TEXTS[name][language == "fr"])
        page.evaluate('document.querySelectorAll("details:not([open]) summary").forEach((opener) => opener.click())')
        wait_until_still(page)
        if name in ("draw", "surprise"):  # whose uploader comes with a role of Streamlit's, until the page mends it
            page.get_by_test_id("stFileUploaderDropzone").wait_for(state="attached")
        expect(page.locator("section[role=presentation]")).to_have_count(0)
        expect(page.locator(".endings:visible:is(.earlier, .stale)")).to_have_count(0)
        found |= {
            f"{name}: {violation['id']}: {node['html'][:120]} {[check['message'] for check in node['any']]}"
            for violation in Axe().run(page).response["violations"]
            for node in violation["nodes"]
        }
    assert found == set(), "\n".join(sorted(found))


def test_in_french(open_page: OpenPage, page_url: str) -> None:
    page = open_page(live=True, locale="fr")
    for title in ("Gomme (E) : enlève l'encre", "Rétablir (Ctrl+Maj+Z)", "Effacer (Suppr) ; annuler"):
        expect(page.get_by_title(title)).to_be_visible()
    page.goto(f"{page_url}/models")
    expect(page.get_by_role("heading", name="Les modèles en service")).to_be_visible()
    expect(page.locator("html")).to_have_attribute("lang", "fr")


def test_finger_on_a_phone(open_page: OpenPage, service: StubService, tmp_path: Path) -> None:
    page = open_page(390, 844, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".stMain").evaluate("main => main.scrollWidth") <= 390
    draw_by_finger(page, HALF_DIGIT)
    by_finger = ink(page)
    assert by_finger.any()
    page.locator(".st-key-main button").tap()
    wait_for_endings(page)
    assert service.requests[-1][1]["image"] == by_finger.tolist()
    page.screenshot(path=tmp_path / "phone.png", full_page=True)
    tool(page, "Clear").tap()
    draw(page, HALF_DIGIT)
    assert (ink(page) == by_finger).all()  # the mouse draws the same cells


@pytest.mark.slow
def test_painting_on_a_phone_in_the_dark(
    open_page: OpenPage, service: StubService, page_url: str, tmp_path: Path
) -> None:
    page = open_page(390, 844, url=f"{page_url}/?dataset=cifar10", has_touch=True, is_mobile=True, color_scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    tool(page, "Green").tap()
    tool(page, "Brush 8").tap()
    draw_by_finger(page, [(0, 30), (32, 28)])
    tool(page, "Blue").tap()
    draw_by_finger(page, [(0, 4), (32, 4)])
    painted = grid_pixels(page)
    assert (painted[4, 16] == (0x4A, 0x90, 0xD9, 255)).all()
    assert (painted[29, 16] == (0x4C, 0x8C, 0x3F, 255)).all()
    page.screenshot(path=tmp_path / "phone-colour.png")
    page.locator(".st-key-main button").tap()
    wait_for_endings(page)
    assert service.requests[-1][1]["image"] == painted[..., :3].tolist()
    sizes = page.locator(".tools").evaluate(
        "tools => [...tools.querySelectorAll('button, input')].filter(e => e.checkVisibility())"
        ".map(e => e.getBoundingClientRect()).map(box => Math.min(box.width, box.height))"
    )
    assert min(sizes) >= 24  # for a finger


@pytest.mark.slow
def test_service_down_keeps_the_drawing(open_page: OpenPage, services: dict[str, StubService], tmp_path: Path) -> None:
    page = open_page()
    draw(page, HALF_DIGIT)
    drawn = ink(page)
    down = services["now"]
    down.close()
    try:
        press_complete(page)
        expect(page.get_by_text("The model does not answer just now. Your drawing is kept.")).to_be_visible()
        expect(page.get_by_text(re.compile("Trying again in \\d s"))).to_be_visible()
        operator = page.get_by_text("Start it with make serve")
        expect(operator).not_to_be_visible()
        page.get_by_text("For whoever runs this page").click()
        expect(operator).to_be_visible()
        draw(page, [(20, 3), (22, 5)])
        drawn = drawn | ink(page)
        assert (ink(page) == drawn).all()
        page.screenshot(path=tmp_path / "service-down.png")
    finally:
        services["now"] = StubService(port=down.port)
    wait_for_endings(page)  # by itself, after 5 s and what a tick and a try take
    expect(page.get_by_text("does not answer")).to_have_count(0)
    assert services["now"].requests[-1][1]["image"] == drawn.tolist()


@pytest.mark.slow
def test_page_restarted_keeps_the_drawing(open_page: OpenPage, service: StubService, tmp_path: Path) -> None:
    port = free_port()
    with running_page(port, service.url, tmp_path / "first.txt") as url:
        page = open_page(url=url)
        draw(page, HALF_DIGIT)
    draw(page, [(20, 3), (22, 5)])  # while nobody listens
    drawn, listed = ink(page), service.num_listed
    with running_page(port, service.url, tmp_path / "second.txt"):
        until(lambda: service.num_listed > listed, "the page did not run anew")
        wait_until_still(page)
        press_complete(page)  # the first press already counts
        wait_for_endings(page)
        assert service.requests[-1][1]["image"] == drawn.tolist()
        assert (ink(page) == drawn).all()


VIEWPORTS = [(1280, 650), (1024, 768), (810, 1080), (1080, 810), (390, 844), (844, 390), (640, 400)]
NEEDED = """
() => {
  const found = [
    document.querySelector(".st-key-main button"),
    document.querySelector(".st-key-live label"),
    ...[...document.querySelectorAll(".endings figure")].filter((figure) => figure.checkVisibility()).slice(0, 3),
  ].map((element) => element.getBoundingClientRect());
  const host = [...document.querySelectorAll("*")].find((element) => element.shadowRoot?.querySelector(".drawing"));
  found.push((host?.shadowRoot ?? document).querySelector("canvas").getBoundingClientRect());
  return found.map((box) => [box.left, box.top, innerWidth - box.right, innerHeight - box.bottom]);
}
"""
CAPTIONS = """
() => [...document.querySelectorAll(".endings figcaption")].filter((caption) => caption.checkVisibility())
  .map((caption) => caption.getBoundingClientRect()).map((box) => [box.left, box.right, box.top])
"""


@pytest.mark.parametrize("dataset", ["mnist5k", "cifar10"])
def test_everything_is_in_one_view(open_page: OpenPage, page_url: str, dataset: str, tmp_path: Path) -> None:
    page = open_page(url=f"{page_url}/?dataset={dataset}", live=True, example=True)
    wait_for_endings(page)
    wait_until_still(page)
    for width, height in VIEWPORTS:
        page.set_viewport_size({"width": width, "height": height})
        page.screenshot(path=tmp_path / f"{dataset}-{width}x{height}.png")
        margins = np.array(page.evaluate(NEEDED))  # (grid, button, switch and three endings; four sides)
        assert margins.shape == (6, 4), "an ending that is not shown is not in view"
        assert margins.min() >= -1, (width, height, margins.round().tolist())
    for width in range(320, 1601, 80):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        captions = page.evaluate(CAPTIONS)
        assert len(captions) == 9
        for (_, right, top), (left, _, next_top) in itertools.pairwise(captions):
            assert right <= left or top < next_top, width
    page.set_viewport_size({"width": 320, "height": 480})
    assert grid(page).bounding_box()["width"] >= 200  # what does not fit in is scrolled to


def test_first_ten_seconds(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True, example=True)
    wait_for_endings(page)  # nobody has touched anything
    until(lambda: (ink(page) == EXAMPLE).all(), "the example did not draw itself")
    shown = ink(page)
    assert shown[:14].any()
    assert not shown[14:].any()
    whole = shown.tolist()
    until(lambda: whole in (body["image"] for _, body in service.requests), "the example was not completed as a whole")
    draw(page, HALF_DIGIT)  # begins a drawing of one's own
    own = ink(page)
    assert (own != shown).any()
    assert not (own[:4]).any()
    tool(page, "Undo").click()
    assert (ink(page) == shown).all()
    beginnings = page.get_by_role("button", name="Go on from test image")
    expect(beginnings).to_have_count(5)
    beginnings.nth(1).click()
    until(lambda: (ink(page) != shown).any(), "the test image did not come")
    assert not ink(page)[14:].any()
    page.reload()
    grid(page).wait_for()
    until(lambda: ink(page).any(), "the drawing was lost")
    go_to(page, "Generate")
    expect(page.locator(".endings:visible figcaption").filter(has_text="nats")).to_have_count(16)


@pytest.mark.slow
def test_the_address_is_that_of_the_answer_and_makes_no_history(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    entries = page.evaluate("history.length")
    page.evaluate("delete URLSearchParams.prototype.size")  # as in Safari 16
    for row in range(16):
        draw(page, [(4, row + 4.5), (20, row + 4.5)])
    last = ink(page)
    until(lambda: was_sent(service, last), "the last stroke was never sent")
    wait_for_endings(page)
    drawing = encode_drawing(Drawing(255 * last, last))
    page.wait_for_url(f"**seed={service.requests[-1][1]['seed']}&d={drawing}**")
    assert page.evaluate("history.length") == entries
    refusing = "{ value: { writeText: () => Promise.reject() }, configurable: true }"  # as in another page's frame
    page.evaluate(f"Object.defineProperty(navigator, 'clipboard', {refusing})")
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    page.evaluate("delete navigator.clipboard")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy link").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == page.url
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as in the local network
    page.get_by_role("button", name="Copy link").press("Enter")
    expect(page.get_by_role("button", name=re.compile("Copy link|Copied"))).to_be_focused()
    page.keyboard.press("Delete")  # the address is still that of what was drawn
    expect(page.get_by_role("button", name=re.compile("Copy link|Copied"))).to_be_hidden()


@pytest.mark.slow
def test_endings_of_something_else_do_not_look_like_the_answer(open_page: OpenPage) -> None:
    page = open_page()
    draw(page, HALF_DIGIT)
    press_complete(page)
    wait_for_endings(page)
    wait_until_still(page)
    endings = page.locator(".endings:visible")
    expect(endings).to_have_class("endings")  # once the page has shown the answer, it is redrawn
    wait_until_still(page)
    draw(page, [(20, 3), (22, 5)])
    expect(endings).to_have_class(re.compile("earlier"))
    page.keyboard.press("Control+z")
    expect(endings).not_to_have_class(re.compile("earlier"))
    choose_mode(page, "Only my ink")
    expect(endings).to_have_class(re.compile("stale"))
    choose_mode(page, "All above")
    expect(endings).not_to_have_class(re.compile("stale"))
    expect(page.locator('.endings [aria-pressed="true"]')).to_have_count(0)
    wait_until_still(page)
    tool(page, "Clear").click()
    expect(page.locator(".endings img:visible")).to_have_count(0)
    expect(page.get_by_text("Endings appear here")).to_be_visible()


@pytest.mark.slow
def test_one_seed_for_a_drawing(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    draw(page, HALF_DIGIT)
    wait_for_endings(page)
    draw(page, [(20, 20), (22, 22)])
    until(lambda: was_sent(service, ink(page)), "the stroke was never sent")
    (seed,) = {body["seed"] for _, body in service.requests}
    expect(page.get_by_role("button", name="Another nine")).to_be_visible()
    press_complete(page)
    until(lambda: service.requests[-1][1]["seed"] != seed, "the same nine were drawn again")
    wait_until_still(page)
    second = service.requests[-1][1]["seed"]
    tool(page, "Clear").click()  # and at once, before the page has heard of it
    draw(page, HALF_DIGIT)
    until(lambda: service.requests[-1][1]["seed"] not in (seed, second), "a new drawing kept the seed")


def touch(page: Page, *steps: tuple[str, list[tuple[float, float]]]) -> None:
    """Put fingers on the grid, move them, take them away: kinds of events, and where the fingers are then, in cells."""
    client = page.context.new_cdp_session(page)
    for kind, places in [(kind, points_on_screen(page, places)) for kind, places in steps]:
        points = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(places)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_two_fingers_never_draw(open_page: OpenPage) -> None:
    page = open_page(390, 844, has_touch=True, is_mobile=True)
    steps = [("touchStart", [(10, 10)]), ("touchStart", [(10, 10), (18, 18)])]
    steps += [("touchMove", [(10 - step, 10 - step), (18 + step, 18 + step)]) for step in range(1, 6)]
    touch(page, *[*steps, ("touchEnd", [])])
    assert not ink(page).any()
    assert page.evaluate("visualViewport.scale") > 1  # they zoom the page instead


@pytest.mark.slow
def test_the_example_stays_until_a_stroke_is_made(open_page: OpenPage) -> None:
    """Two fingers, or an undo of nothing, do not begin a drawing; the page knows what is on the grid."""
    page = open_page(example=True, has_touch=True)
    until(lambda: ink(page).any(), "the example does not draw itself")
    page.keyboard.press("Control+z")
    until(lambda: (ink(page) == EXAMPLE).all(), "an undo has stopped the example")
    wait_until_still(page)
    touch(page, ("touchStart", [(8, 8)]), ("touchStart", [(8, 8), (20, 20)]), ("touchEnd", []))
    assert (ink(page) == EXAMPLE).all()
    press_complete(page)
    wait_for_endings(page)
    tool(page, "Eraser").click()
    draw(page, HALF_DIGIT)
    assert not ink(page).any()
    wait_until_still(page)
    expect(page.locator(".endings:visible figure")).to_have_count(0)
    tool(page, "Undo").click()
    assert (ink(page) == EXAMPLE).all()


def test_nothing_stands_over_the_example_while_it_draws_itself(open_page: OpenPage) -> None:
    page = open_page(example=True)
    page.add_init_script("""  // No frame follows the first that has ink.
      sessionStorage.clear();
      const next = requestAnimationFrame;
      window.requestAnimationFrame = (step) => (document.drawing?.blank === false ? 0 : next(step));
    """)
    page.reload()
    until(lambda: ink(page).any(), "the example does not draw itself")
    expect(page.get_by_text("Draw here")).to_be_hidden()
    expect(tool(page, "Clear")).to_be_enabled()


def test_a_palm_leaves_the_stroke_of_a_pen(open_page: OpenPage) -> None:
    page = open_page(has_touch=True)
    first, *_, last = points_on_screen(page, HALF_DIGIT)
    page.mouse.move(*first)
    page.mouse.down()
    touch(page, ("touchStart", [(8, 20)]), ("touchStart", [(8, 20), (20, 24)]), ("touchEnd", []))
    page.mouse.move(*last)
    page.mouse.up()
    drawn = ink(page)
    assert all(drawn[int(y), int(x)] for x, y in (HALF_DIGIT[0], HALF_DIGIT[-1]))
    assert not drawn[16:].any()


@pytest.mark.parametrize("palm", [[(8, 20)], [(8, 20), (20, 24)]])
def test_a_pen_draws_where_a_palm_was_first(open_page: OpenPage, palm: list[tuple[float, float]]) -> None:
    page = open_page(has_touch=True)
    touch(page, *(("touchStart", palm[: i + 1]) for i in range(len(palm))))
    draw(page, HALF_DIGIT)
    drawn = ink(page)
    assert all(drawn[int(y), int(x)] for x, y in (HALF_DIGIT[0], HALF_DIGIT[-1]))
    assert not drawn[16:].any()


@pytest.mark.slow
def test_a_setting_that_is_changed_while_endings_come_is_taken(open_page: OpenPage, service: StubService) -> None:
    page = open_page(live=True)
    page.get_by_text("Advanced").click()
    wait_until_still(page)
    # With the mouse; and at once by keyboard.
    for press, stroke in (("click", [(9, 8), (10, 6), (12, 4.5)]), ("Space", [(14, 12), (16, 15)])):
        service.row_s = 0.1
        draw(page, stroke)
        page.wait_for_timeout(1500 if press == "click" else 200)
        mode = page.get_by_role("radio", name="Only my ink" if press == "click" else "All above")
        if press == "click":
            mode.click()
        else:
            mode.focus()
            page.keyboard.press(press)
        until(lambda: "Stop" not in page.locator(".stApp").inner_text(), "the page waits for ever")
        service.row_s = 0.0
        known = ink(page) if press == "click" else (np.arange(SIZE)[:, None] <= ink(page).any(axis=1).nonzero()[0][-1])
        expected = (known | np.zeros((SIZE, SIZE), dtype=bool)).astype(int).tolist()
        until(lambda: service.requests[-1][1]["observed"] == expected, "the setting was not taken")  # noqa: B023
        wait_for_endings(page)
        expect(page.locator(".endings.stale:visible")).to_have_count(0)


def test_the_grid_is_drawn_once_a_frame_however_many_moves_it_has(open_page: OpenPage) -> None:
    page = open_page()
    points = points_on_screen(page, HALF_DIGIT)
    page.mouse.move(*points[0])
    page.mouse.down()
    drawn = grid(page).evaluate(
        """(canvas, points) => {
          let drawn = 0;
          const context = canvas.getContext("2d");
          const put = context.putImageData;
          context.putImageData = (...given) => (drawn++, put.apply(context, given));
          for (let i = 0; i < 100; i++) {
            const [clientX, clientY] = points[i % points.length];
            canvas.dispatchEvent(new PointerEvent("pointermove", { pointerId: 1, clientX, clientY, buttons: 1 }));
          }
          const within = drawn;
          return new Promise((done) => requestAnimationFrame(() => done([within, drawn])));
        }""",
        points,
    )
    assert drawn == [0, 1]
    page.mouse.up()
    column, row = (int(place) for place in HALF_DIGIT[3])
    assert tuple(grid_pixels(page)[row, column, :3]) != tuple(grid_pixels(page)[27, 0, :3])


def test_a_large_grid_is_zoomed_by_the_wheel(open_page: OpenPage, service: StubService, page_url: str) -> None:
    service.models = {**service.models, "large": {**service.models["mnist5k"], "shape": [1, 48, 48]}}
    try:
        page = open_page(url=f"{page_url}/?dataset=large")
        page.locator('.drawing canvas[width="48"]').wait_for()
        before = grid(page).bounding_box()
        page.mouse.move(*points_on_screen(page, [(12.5, 12.5)])[0])
        page.mouse.wheel(0, -400)
        until(lambda: grid(page).bounding_box()["width"] > 2 * before["width"], "the wheel did not zoom")
        tool(page, "Brush 1").click()
        draw(page, [(12.5, 12.5), (14.5, 12.5)])  # at the places of the cells as they are shown now
        assert np.argwhere(grid_pixels(page)[..., 0] == 28).tolist() == [[12, 12], [12, 13], [12, 14]]
    finally:
        service.models = dict(MODELS)
