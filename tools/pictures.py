"""Make the pictures of the docs from the running demo: `make demo`, then in another terminal `make pictures`.

docs/canvas.png is the page with a half-drawn digit; docs/drawing.png an animation of a digit that is finished while it
is drawn.
"""

import argparse
import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import PIL.Image
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from tests.app import browsing

DOCS = Path(__file__).parents[1] / "docs"
FRAME_S = 0.08  # of the animation
MAX_BYTES = 2_000_000

Points = list[tuple[float, float]]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; without one, say what to install."""
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("error: there is no `chromium` on the PATH. Install the Debian package: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=browsing.CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


def clean_page(browser: Browser, url: str, seed: int) -> Page:
    """Open the page as somebody who was never here, with a seed, so that the pictures come out the same again."""
    for context in browser.contexts:
        context.close()
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script(browsing.REMEMBERS_NOTHING_DRAWN)
    page = context.new_page()
    try:
        page.goto(url)
    except Error as error:
        raise SystemExit(f"error: no page at {url}. Start it in another terminal: make demo") from error
    browsing.grid(page).wait_for()
    expect(page.get_by_text("Serving pixelcnn-mnist")).to_be_visible()
    page.get_by_text("As I draw").click()
    page.get_by_text("Advanced").click()
    page.get_by_role("textbox", name="Seed").fill(str(seed))
    page.keyboard.press("Enter")
    page.get_by_text("Advanced").click()
    page.get_by_role("heading", level=1).scroll_into_view_if_needed()
    return page


def make_canvas(browser: Browser, url: str) -> None:
    """Write docs/canvas.png."""
    page = clean_page(browser, url, seed=3)
    browsing.draw(page, browsing.HALF_DIGIT)
    browsing.press_complete(page)
    browsing.wait_for_endings(page)
    page.mouse.move(5, 5)
    time.sleep(0.5)
    PIL.Image.open(io.BytesIO(page.screenshot())).quantize(128).save(DOCS / "canvas.png", optimize=True)


def make_animation(browser: Browser, url: str) -> None:
    """Write docs/drawing.png, an animated PNG: a hand draws, and after each stroke the endings follow."""
    page = clean_page(browser, url, seed=1)
    page.get_by_text("As I draw").click()
    frames: list[PIL.Image.Image] = []

    def frame() -> None:
        picture = PIL.Image.open(io.BytesIO(page.screenshot()))
        frames.append(picture.resize((768, 540), PIL.Image.Resampling.LANCZOS).convert("RGB"))

    # The upper half of a 3 and then its lower half, in three strokes.
    lower_half: Points = [(14, 12), (17, 13), (18.5, 16), (17, 20), (13, 22), (9, 20)]
    for points in (browsing.HALF_DIGIT[:4], browsing.HALF_DIGIT[3:], lower_half):
        (x, y), *rest = browsing.points_on_screen(page, points)
        page.mouse.move(x, y)
        page.mouse.down()
        frame()
        for x, y in rest:
            page.mouse.move(x, y, steps=2)
            frame()
        page.mouse.up()
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            frame()
    seen = PIL.Image.new("RGB", (768, 540 * (len(frames) // 4)))  # dimmed endings, too, have colours
    for i, picture in enumerate(frames[3::4]):
        seen.paste(picture, (0, 540 * i))
    palette = seen.quantize(96)
    small = [picture.quantize(palette=palette, dither=PIL.Image.Dither.NONE) for picture in frames]
    durations = [int(1000 * FRAME_S)] * (len(small) - 1) + [2500]
    out = DOCS / "drawing.png"
    small[0].save(out, save_all=True, append_images=small[1:], duration=durations, loop=0, optimize=True)
    print(f"{out.name}: {len(small)} frames, {out.stat().st_size:,} bytes")
    if out.stat().st_size > MAX_BYTES:
        raise SystemExit(f"error: {out} has more than {MAX_BYTES:,} bytes: shorten the animation.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8501", help="of the running canvas")
    url = parser.parse_args().url
    with chromium() as browser:
        for make in (make_canvas, make_animation):
            make(browser, url)
            print(make.__doc__.splitlines()[0] if make.__doc__ else make.__name__)


if __name__ == "__main__":
    main()
