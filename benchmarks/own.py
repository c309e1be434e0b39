"""Try `make own` on pictures of several kinds, each from a fresh clone to nine endings of a drawing in the browser.

    python -m benchmarks.own glyphs --minutes 4                       # 2,000 pictures of capitals; installs first
    python -m benchmarks.own digits icons sprites scans --venv .venv  # with an environment that is installed already
    python -m benchmarks.own icons --images /usr/share/icons/oxygen/base/32x32

Writes a picture of the page for each kind, and all of them as one sheet. Icons are those of a theme of Debian's
(`apt-get install oxygen-icon-theme`); the other kinds are made here.
"""

import argparse
import os
import shutil
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser

from benchmarks import interrupts
from pipelines.datasets import letters
from tests.app.browsing import HALF_DIGIT, draw, grid, wait_for_endings, wait_until_still
from tools.pictures import chromium

NUM = 2000
ICONS = Path("/usr/share/icons/oxygen/base/32x32")
HEAD = 1500  # characters of a log that are shown

Random = np.random.RandomState


def save(folder: Path, label: str, number: int, pixels: np.ndarray) -> None:
    """Write a picture, (H, W) of uint8, into its label's folder."""
    (folder / label).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / label / f"{number}.png")


def write_icons(folder: Path, _: Random, images: Path) -> None:
    """The icons of a theme, 32 x 32 in colour: of each kind that has three, without what links out of the folder."""
    for kind in images.iterdir():
        files = [file for file in kind.glob("*.png") if not file.is_symlink()]
        if len(files) >= 3:
            (folder / kind.name).mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder / kind.name)


def write_glyphs(folder: Path, random: Random, _: Path) -> None:
    """Capitals, 28 x 28."""
    fonts = letters.fonts()
    for i in range(NUM):
        text, font = string.ascii_uppercase[i % 26], letters.random_font(fonts[random.randint(len(fonts))], random)
        save(folder, text, i, letters.random_letter(text, font, random))


def write_digits(folder: Path, _: Random, __: Path) -> None:
    """The handwritten digits of scikit-learn, 8 x 8, seventeen greys."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for i, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        save(folder, str(label), i, np.round(pixels * 255 / 16).astype(np.uint8))


def write_sprites(folder: Path, random: Random, _: Path) -> None:
    """Creatures of a game, 16 x 16 and four greys: half of each at random, grown to one piece, mirrored, outlined."""
    for i in range(NUM):
        half = np.zeros((16, 8), dtype=bool)
        half[2:14, 2:] = random.random_sample((12, 6)) < np.linspace(0.25, 0.75, 6)
        half, lit = (np.hstack([x, x[:, ::-1]]) for x in (half, random.random_sample(half.shape) < 0.2))
        near = sum(np.roll(half, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1))
        body = (near >= 5) | half & (near >= 4)
        edge = ~body & (sum(np.roll(body, shift, axis) for axis in (0, 1) for shift in (-1, 1)) > 0)
        save(folder, "", i, (85 * (edge + 2 * body + (body & lit))).astype(np.uint8))


def write_scans(folder: Path, random: Random, _: Path) -> None:
    """Two small letters on paper, scanned: dark on uneven, noisy light, 48 wide and 32 high."""
    fonts = letters.fonts()
    for i in range(NUM):
        font = letters.random_font(fonts[random.randint(len(fonts))], random)
        pair = [
            letters.random_letter(text, font, random)[:, 3:-4] for text in random.choice([*string.ascii_lowercase], 2)
        ]
        ink = np.asarray(Image.fromarray(np.hstack(pair)).resize((48, 32), Image.Resampling.BICUBIC))
        light = random.uniform(200, 245) + np.linspace(0, random.uniform(-30, 30), 48) + random.normal(0, 6, (32, 48))
        save(folder, "", i, np.clip(light * (1 - 0.85 * ink / 255), 0, 255).astype(np.uint8))


# What writes a kind's pictures into a folder, given the folder of icons, and what `make own` is told beside it.
KINDS: dict[str, tuple[Callable[[Path, Random, Path], None], dict[str, str]]] = {
    "glyphs": (write_glyphs, {}),
    "digits": (write_digits, {}),
    "icons": (write_icons, {}),
    "sprites": (write_sprites, {"LEVELS": "4"}),
    "scans": (write_scans, {"SIDE": "48x32", "COLOUR": "binary"}),
}


def draw_on(browser: Browser, address: str, picture: Path) -> None:
    """Draw a hook into the upper part of the grid, wait for nine endings, and write a picture of the page."""
    page = browser.new_page(viewport={"width": 1280, "height": 760})
    page.goto(address)
    grid(page).wait_for()
    wait_until_still(page)
    columns, rows = grid(page).evaluate("canvas => [canvas.width, canvas.height]")
    draw(page, [(x * columns / 28, y * rows / 28) for x, y in HALF_DIGIT])
    wait_for_endings(page)
    wait_until_still(page)
    page.mouse.move(5, 5)
    page.screenshot(path=picture)
    page.close()


def try_kind(kind: str, images: Path, minutes: float, venv: Path | None, out: Path) -> None:
    """Print how long a kind takes, and what the command said; write `out`/KIND.png."""
    with tempfile.TemporaryDirectory(prefix="own-") as top, chromium() as browser:
        folder, log, pictures = Path(top) / "clone", Path(top) / "log.txt", Path(top) / "pictures"
        interrupts.clone(folder, venv)
        write, wishes = KINDS[kind]
        write(pictures, Random(letters.SEED), images)
        words = {"IMAGES": str(pictures), "NAME": kind, "MINUTES": f"{minutes:g}", **wishes}
        begun = time.time()
        process, mark = interrupts.start(folder, log, "own", *(f"{key}={value}" for key, value in words.items()))
        try:
            address = interrupts.wait_until_ready(process, log)
            print(f"## {kind}\n{log.read_text()[:HEAD]}", flush=True)
            if not address:
                raise SystemExit(f"error: {kind} did not come to the canvas:\n{log.read_text()[-HEAD:]}")
            ready = time.time()
            draw_on(browser, address, out / f"{kind}.png")
            installed = max((folder / ".venv" / "installed").stat().st_mtime, begun)
            print(
                f"{kind}: installed after {installed - begun:.0f} s; then ready after {ready - installed:.0f} s, ",
                end="",
            )
            print(f"nine endings of a drawing after {time.time() - installed:.0f} s", flush=True)
        finally:
            interrupts.interrupt(process, mark, log)


def main() -> None:
    """Try the kinds that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own", description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="+", choices=KINDS)
    parser.add_argument("--minutes", type=float, default=4, help="of training")
    parser.add_argument("--images", type=Path, default=ICONS, help="the folder of icons")
    parser.add_argument("--venv", type=Path, help="an environment that `make install` has made")
    parser.add_argument("--out", type=Path, default=Path("reports/own"), help="where the pictures go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("PIXELCNN_DATA", None)  # nothing else is there on a fresh machine
    for kind in arguments.kinds:
        try_kind(kind, arguments.images.resolve(), arguments.minutes, arguments.venv, arguments.out)
    shown = [Image.open(arguments.out / f"{kind}.png").convert("RGB") for kind in arguments.kinds]
    width, height = shown[0].size
    sheet = Image.new("RGB", (2 * width, -(-len(shown) // 2) * height), "white")
    for i, picture in enumerate(shown):
        sheet.paste(picture, (i % 2 * width, i // 2 * height))
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).quantize(128).save(
        arguments.out / "sheet.png", optimize=True
    )


if __name__ == "__main__":
    main()
