"""Try `make own` on pictures of several kinds, each from a fresh clone to nine endings of a drawing in the browser.

    python -m benchmarks.own glyphs --minutes 4                       # 2,000 pictures of capitals; installs first
    python -m benchmarks.own digits icons sprites scans --venv .venv  # with an environment that is installed already
    python -m benchmarks.own icons --images /usr/share/icons/oxygen/base/32x32

Writes a picture of the page for each kind, and all of them as one sheet. Icons are those of a theme of Debian's
(`apt-get install oxygen-icon-theme`); the other kinds are made here.
"""

import os
import shutil
import string
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser
from typer import Argument, Option

from benchmarks import interrupts
from benchmarks.command import command
from pipelines.datasets import letters
from pixelcnn.images import to_sheet
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
            (folder / kind.name).mkdir()
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
        texts = random.choice([*string.ascii_lowercase], 2)
        pair = [letters.random_letter(text, font, random)[:, 3:-4] for text in texts]
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
    print(f"## {kind}", flush=True)
    write, wishes = KINDS[kind]
    with tempfile.TemporaryDirectory(prefix="own-") as folder, chromium() as browser:
        write(Path(folder), Random(letters.SEED), images)
        words = {"IMAGES": folder, "NAME": kind, "MINUTES": f"{minutes:g}", **wishes}
        given = [f"{key}={value}" for key, value in words.items()]
        with interrupts.ready(venv, "own", *given) as (address, installed, said):
            print(said[:HEAD], flush=True)
            draw_on(browser, address, out / f"{kind}.png")
            print(f"installation to nine endings of a drawing: {time.time() - installed:.0f} s", flush=True)


def main(
    kinds: Annotated[list[str], Argument(help=f"of {', '.join(KINDS)}")],
    minutes: Annotated[float, Option(help="of training")] = 4,
    images: Annotated[Path, Option(help="the folder of icons")] = ICONS,
    venv: Annotated[Path | None, Option(help="an environment that `make install` has made")] = None,
    out: Annotated[Path, Option(help="where the pictures go")] = Path("reports/own"),
) -> None:
    """Try the kinds that are named."""
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"error: unknown kind {min(unknown)!r}. Known: {', '.join(KINDS)}.")
    out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("PIXELCNN_DATA", None)  # nothing else is there on a fresh machine
    for kind in kinds:
        try_kind(kind, images.resolve(), minutes, venv, out)
    shown = np.stack([np.asarray(Image.open(out / f"{kind}.png").convert("RGB")) for kind in kinds])  # (N, H, W, 3)
    sheet = to_sheet(torch.from_numpy(shown).long().permute(0, 3, 1, 2), 256, num_columns=2, zoom=1, gap=0)
    sheet.reduce(2).quantize(128).save(out / "sheet.png", optimize=True)


if __name__ == "__main__":
    sys.exit(command(main))
