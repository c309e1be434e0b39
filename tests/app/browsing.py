"""What drives the page in a browser: for tests, pictures and timings."""

import base64
import io

import numpy as np
import PIL.Image
from playwright.sync_api import Locator, Page, expect

CHROMIUM_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# The upper half of a 3, as places in cells.
HALF_DIGIT: list[tuple[float, float]] = [
    (9, 8),
    (10, 6),
    (12, 4.5),
    (15, 4.5),
    (17.5, 6),
    (18, 8.5),
    (16.5, 10.5),
    (14, 12),
]


# A visit that was here before, with nothing drawn: no example draws itself.
REMEMBERS_NOTHING_DRAWN = """
for (const shape of ["28x28", "32x32x3", "48x48"]) {
  const key = `pixelcnn-drawing-${shape}`;
  const link = new URLSearchParams(location.search).get("d");
  if (!sessionStorage.getItem(key) && !link) {
    sessionStorage.setItem(key, JSON.stringify({ text: "", linked: null, loaded: null }));
  }
}
"""


def grid(page: Page) -> Locator:
    return page.locator(".drawing canvas")


def grid_pixels(page: Page) -> np.ndarray:
    """What the grid shows, (H, W, 4): red, green, blue, and 0 where it is unknown."""
    pixels = grid(page).evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data)"
    )
    return np.array(pixels).reshape(*grid(page).evaluate("canvas => [canvas.height, canvas.width]"), 4)


def points_on_screen(page: Page, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    box = grid(page).bounding_box()
    assert box is not None
    columns, rows = grid(page).evaluate("canvas => [canvas.width, canvas.height]")
    return [(box["x"] + x * box["width"] / columns, box["y"] + y * box["height"] / rows) for x, y in points]


def draw(page: Page, points: list[tuple[float, float]], steps: int = 1, pause_ms: float = 0) -> None:
    """Draw one stroke with the mouse, in `steps` moves from point to point: with one as fast as a hand can be."""
    (x, y), *rest = points_on_screen(page, points)
    page.mouse.move(x, y)
    page.mouse.down()
    for x, y in rest:
        page.mouse.move(x, y, steps=steps)
        if pause_ms:
            page.wait_for_timeout(pause_ms)
    page.mouse.up()


def tool(page: Page, name: str) -> Locator:
    """A tool of the grid; *More* is opened for those behind it."""
    if name in ("Blank", "Hole", "Soft") and page.locator(".tools .further").is_hidden():
        tool(page, "More").click()
    return page.locator(".tools").get_by_role("button", name=name)


def choose_mode(page: Page, name: str) -> None:
    """Choose what the model must keep, which stands behind *Advanced*."""
    mode = page.get_by_role("radio", name=name)
    if not mode.is_visible():
        page.get_by_text("Advanced").click()
    mode.click()


def press_complete(page: Page) -> None:
    """Press the main button, whatever it says: it completes, or draws other endings of the same drawing."""
    page.locator(".st-key-main button").click()


def wait_for_endings(page: Page, number: int = 9, timeout_s: float = 15) -> None:
    captions = page.locator(".endings:visible figcaption").filter(has_text="nats")
    expect(captions).to_have_count(number, timeout=1000 * timeout_s)
    expect(page.locator(".live .endings")).to_have_count(0)  # the page has them, too


def wait_until_still(page: Page) -> None:
    """Wait until the page is not being redrawn: a click on what is about to be replaced can be lost."""
    page.locator('.stApp[data-test-script-state="notRunning"]').wait_for()


def shown_endings(page: Page) -> list[np.ndarray]:
    """The endings as the browser has them, each (H, W, 3), once the page is not being redrawn."""
    wait_until_still(page)
    sources = page.locator(".endings:visible button img").evaluate_all("images => images.map(image => image.src)")
    pictures = [PIL.Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in sources]
    return [np.array(picture)[..., :3] for picture in pictures]
