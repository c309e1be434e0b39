"""Time the canvas in a real browser, as a person's hand sees it: `make demo`, then `python -m benchmarks.canvas`.

Stroke to ink: from the pointer's event to the frame that shows its ink. Then, with *As I draw*: from the end of a
stroke to the first pixels of the model that answer the whole stroke, to nine endings without a missing pixel, and to
their probabilities; and how long the frames are that a live stroke is drawn in.

    python -m benchmarks.canvas --clone              # from a fresh clone's `make demo` to the first nine endings
    python -m benchmarks.canvas --clone --venv .venv # with packages that are there, not yet compiled to bytecode
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
from playwright.sync_api import Page
from typer import Option, run

from benchmarks import interrupts
from tests.app.browsing import HALF_DIGIT, draw, grid, tool, wait_for_endings
from tools.pictures import chromium, clean_page

# The browser's own clock; what Playwright adds on its way is not counted.
WATCH = """
(canvas) => {
  const times = (window.times = { ink: [], frames: [], end: null, known: null, done: null });
  let [last, isPressed] = [null, false];
  const frame = (now) => {
    if (last !== null && isPressed) times.frames.push(now - last);
    last = now;
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  addEventListener("pointerdown", () => (isPressed = true), true);
  addEventListener("pointerup", () => (isPressed = false), true);
  const sources = () => [...document.querySelectorAll(".endings img")].map((image) => image.src).join();
  let before = "";
  let seen = {}; // when endings of a drawing with so many known cells were first seen
  canvas.addEventListener("pointermove", (event) => {
    if (!event.buttons) return;
    requestAnimationFrame(() => {
      // The first task after the frame was handed on.
      const channel = new MessageChannel();
      channel.port1.onmessage = () => times.ink.push(performance.now() - event.timeStamp);
      channel.port2.postMessage(null);
    });
  }, true);
  addEventListener("pointerup", (event) => {
    [before, times.end, times.known, times.done] = [sources(), event.timeStamp, null, null];
    seen = {};
  }, true);
  new MutationObserver(() => {
    if (times.end === null || !sources() || sources() === before) return;
    const endings = document.querySelector(".endings");
    if (endings.matches(".earlier, .stale")) return;
    const { known, drawn } = endings.dataset;
    seen[known] ??= { first: performance.now() };
    if (drawn === "1") seen[known].drawn ??= performance.now();
    const captions = [...document.querySelectorAll(".endings figcaption")].map((caption) => caption.textContent);
    if (captions.length !== 9 || !captions.every((text) => text.includes("nats")) || known === times.known) return;
    // What is finished first may answer a part of the stroke: the last counts.
    Object.assign(times, seen[known], { known, done: performance.now() });
  }).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
}
"""


def percentiles(values: list[float]) -> str:
    """Return median and 95th percentile of milliseconds as text."""
    p50, p95 = np.percentile(values, [50, 95])
    return f"p50 {p50:.0f} ms, p95 {p95:.0f} ms, of {len(values)}"


def time_ink(page: Page, num_strokes: int) -> list[float]:
    """Return the milliseconds from each move of a pressed pointer to the frame with its ink."""
    grid(page).evaluate(WATCH)
    for i in range(num_strokes):
        draw(page, [(a + i % 5, b + i % 7) for a, b in HALF_DIGIT], steps=4)
    page.wait_for_timeout(100)
    times: list[float] = page.evaluate("window.times.ink")
    return times


def time_frames(page: Page, num_strokes: int) -> list[float]:
    """Return how many milliseconds each frame took while a stroke of about a second was drawn live."""
    grid(page).evaluate(WATCH)
    for i in range(num_strokes):
        if i:
            tool(page, "Clear").click()
        draw(page, [(a, b + i % 6) for a, b in HALF_DIGIT], steps=8, pause_ms=120)
    frames: list[float] = page.evaluate("window.times.frames")
    return frames


def time_endings(page: Page, num_strokes: int) -> dict[str, list[float]]:
    """Return the milliseconds from a stroke's end to what comes of it, by what that is."""
    grid(page).evaluate(WATCH)
    found: dict[str, list[float]] = {"first": [], "drawn": [], "done": []}
    for i in range(num_strokes + 1):
        if i:
            tool(page, "Clear").click()
            page.wait_for_timeout(500)
        draw(page, [(a, b + i % 6) for a, b in HALF_DIGIT])
        last = "window.times.done !== null && performance.now() - window.times.done > 1000"
        page.wait_for_function(last, timeout=60_000)
        times = page.evaluate("window.times")
        if i:  # the first one warms up
            for what, values in found.items():
                values.append(times[what] - times["end"])
    return found


def time_first_endings(venv: Path | None) -> None:
    """Print how long a fresh clone takes to show nine endings, a browser being open already."""
    with tempfile.TemporaryDirectory() as bytecode, chromium() as browser:
        os.environ["PYTHONPYCACHEPREFIX"] = bytecode
        with interrupts.ready(venv) as (address, installed, _):
            page = browser.new_page()
            page.goto(address)
            # Of the example that draws itself. In its caption each then has how probable it is.
            page.wait_for_selector('.endings[data-drawn="1"]', timeout=120_000)
            print(f"installation to nine endings: {time.time() - installed:.1f} s", flush=True)
            wait_for_endings(page, timeout_s=120)
            print(f"to their probabilities: {time.time() - installed:.1f} s", flush=True)


def main(
    url: Annotated[str, Option(help="of the running canvas")] = "http://127.0.0.1:8501",
    strokes: int = 30,
    clone: Annotated[bool, Option("--clone", help="time the way from a fresh clone, nothing else")] = False,
    venv: Annotated[Path | None, Option(help="for --clone: an environment that `make install` has made")] = None,
) -> None:
    """Print the timings."""
    if clone:
        return time_first_endings(venv)
    with chromium() as browser:
        page = clean_page(browser, url, seed=1)
        grid(page).hover()
        print("stroke to ink:", percentiles(time_ink(page, strokes)))
        page = clean_page(browser, url, seed=1)
        page.get_by_text("As I draw").click()
        frames = time_frames(page, strokes)
        print(f"frames while drawing live: {percentiles(frames)}, longest {max(frames):.0f} ms")
        found = time_endings(page, strokes)
        print("end of a stroke to the model's first pixels:", percentiles(found["first"]))
        print("end of a stroke to nine endings:", percentiles(found["drawn"]))
        print("end of a stroke to their probabilities:", percentiles(found["done"]))


if __name__ == "__main__":
    run(main)
