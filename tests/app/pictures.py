"""Make the pictures of the docs from the running demo: `make demo`, then in another terminal `make pictures`.

docs/canvas.png is the page with a half-drawn digit; docs/drawings.png ten drawings as a mouse makes them, each
with its nine endings; docs/drawing.png an animation of a digit that is finished while it is drawn.
"""

import argparse
import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_browser import (
    CHROMIUM_ARGUMENTS,
    HALF_DIGIT,
    draw,
    grid,
    grid_pixels,
    points_on_screen,
    press_complete,
    shown_endings,
    tool,
    wait_for_endings,
)

DOCS = Path(__file__).parents[2] / "docs"
ZOOM, GAP = 4, 10  # of the sheet: pixels per cell, pixels between pictures
UNKNOWN = (232, 234, 240)
FRAME_S = 0.08  # of the animation
MAX_BYTES = 2_000_000

Points = list[tuple[float, float]]
# Name, brush (1 thin to 3 thick), strokes in cells. Sizes, places and pens as people choose them, the odd ones too.
DRAWINGS: list[tuple[str, int, list[Points]]] = [
    ("upper half of a 3", 2, [HALF_DIGIT]),
    ("lower half of an 8", 2, [[(18, 14), (19.5, 17), (18.5, 21), (15, 23), (11.5, 21.5), (10, 18), (12, 14.5)]]),
    ("left stroke of a 4", 2, [[(9.5, 6), (9, 10), (8.5, 14), (12, 14.5)]]),
    ("the bar of a 7", 1, [[(7, 6.5), (12, 6), (20, 6.5)]]),
    ("a slash in the middle", 2, [[(17, 8), (13, 20)]]),
    ("a dot on the right", 3, [[(20, 14), (20.5, 14.5)]]),
    ("a thick ring's left part", 3, [[(14, 5), (9, 8), (7, 14), (9, 20), (14, 23)]]),
    ("a tiny 2 in the corner", 1, [[(2.5, 4), (4, 2.5), (5.5, 4), (3, 7.5), (6, 7.5)]]),
    ("three dots", 2, [[(8, 8), (8.2, 8.2)], [(19, 9), (19.2, 9.2)], [(14, 21), (14.2, 21.2)]]),
    ("a cross, no digit", 2, [[(6, 6), (22, 22)], [(22, 6), (6, 22)]]),
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; without one, say what to install."""
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("error: there is no `chromium` on the PATH. Install the Debian package: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


def clean_page(browser: Browser, url: str, seed: int, known: str = "") -> Page:
    """Open the page as somebody who was never here, with a seed, so that the pictures come out the same again."""
    for context in browser.contexts:
        context.close()
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(url)
    grid(page).wait_for()
    expect(page.get_by_text("Serving pixelcnn-mnist")).to_be_visible()
    page.get_by_role("textbox", name="Seed").fill(str(seed))
    page.keyboard.press("Enter")
    if known:
        page.get_by_role("radio", name=known).click()
    page.get_by_role("heading", level=1).scroll_into_view_if_needed()
    return page


def framed(picture: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(picture.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1))


def drawn_cells(page: Page) -> np.ndarray:
    """The grid as a picture, (H, W, 3) uint8."""
    pixels = grid_pixels(page)
    return np.where(pixels[..., 3:] == 0, UNKNOWN, pixels[..., :3]).astype(np.uint8)


def make_drawings(browser: Browser, url: str) -> None:
    """Write docs/drawings.png: a row for each drawing, its endings behind it, the likely ones first."""
    rows = []
    for number, (_, brush, strokes) in enumerate(DRAWINGS):
        page = clean_page(browser, url, seed=number, known="Only my ink")
        tool(page, f"Brush {brush}").click()
        for points in strokes:
            draw(page, points)
        press_complete(page)
        wait_for_endings(page)
        rows.append([framed(drawn_cells(page)), *map(framed, shown_endings(page))])
    side = rows[0][0].width + GAP
    sheet = PIL.Image.new("RGB", (side * len(rows[0]) + 2 * GAP, side * len(rows) + GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (GAP + x * side + (GAP if x else 0), GAP + y * side))
    sheet.quantize(32).save(DOCS / "drawings.png", optimize=True)


def make_canvas(browser: Browser, url: str) -> None:
    """Write docs/canvas.png."""
    page = clean_page(browser, url, seed=3)
    draw(page, HALF_DIGIT)
    press_complete(page)
    wait_for_endings(page)
    page.mouse.move(5, 5)
    time.sleep(0.5)
    PIL.Image.open(io.BytesIO(page.screenshot())).quantize(128).save(DOCS / "canvas.png", optimize=True)


def make_animation(browser: Browser, url: str) -> None:
    """Write docs/drawing.png, an animated PNG: a hand draws, and after each stroke the endings follow."""
    page = clean_page(browser, url, seed=1)
    page.get_by_text("As I draw").click()
    frames: list[PIL.Image.Image] = []

    def frame() -> None:
        picture = PIL.Image.open(io.BytesIO(page.screenshot(clip={"x": 80, "y": 0, "width": 1120, "height": 900})))
        frames.append(picture.resize((672, 540), PIL.Image.Resampling.LANCZOS).convert("RGB"))

    # The upper half of a 3 and then its lower half, in three strokes.
    for points in (HALF_DIGIT[:4], HALF_DIGIT[3:], [(14, 12), (17, 13), (18.5, 16), (17, 20), (13, 22), (9, 20)]):
        (x, y), *rest = points_on_screen(page, points)
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
    palette = frames[-1].quantize(48)
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
        for make in (make_canvas, make_drawings, make_animation):
            make(browser, url)
            print(make.__doc__.splitlines()[0] if make.__doc__ else make.__name__)


if __name__ == "__main__":
    main()
