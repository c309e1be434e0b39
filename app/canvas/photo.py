"""A photo of something drawn becomes a drawing: its ink is found, and laid as the model's images have theirs.

Arrays, Pillow and texts alone. Ink is high here, 255, and paper 0, whatever the photo has.
"""

import functools
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from app.canvas.texts import say

MAX_PIXELS = 25_000_000  # of a picture that cannot be read at a smaller size; JPEG can
WORK_SIDE = 512  # a larger photo is reduced to it: many pixels for each cell are left
LIGHT_STEPS, LIGHT_PIXELS = 10, 5000
LEAST_CONTRAST = 0.15  # between ink and paper, of the paper's brightness; less is the paper's grain
DARK = 64  # paper that is darker counts as of this brightness
INK = 64  # strengths from here on are ink, where images are measured
MAX_STROKE = 1 / 12  # of the smaller side: images of filled shapes ask for no thicker pen
DUST = 0.002  # share of the ink at each side that a box may leave out


@dataclass(frozen=True)
class Layout:
    """How ink lies in a model's images; by default as in MNIST."""

    fill: float = 20 / 28  # share of the grid's height or width, whichever is larger, that the ink's box takes
    by_mass: bool = True  # whether the middle of the grid is the ink's centre of mass, or that of its box
    stroke: float = 2.0  # width of a stroke, in cells, as `_stroke` measures it
    has_paper: bool = True  # whether there is ink on an empty ground at all, and not a picture up to its edges


def open_picture(data: bytes) -> Image.Image:
    """Return an uploaded picture, upright, as RGBA. Raises ValueError: it cannot be read, or is too large."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as file:
            whole = file.size
            file.draft("RGB", (WORK_SIDE, WORK_SIDE))
            # A progressive JPEG is held as a whole, however small it is read.
            if math.prod(whole if file.info.get("progressive") else file.size) > MAX_PIXELS:
                raise Image.DecompressionBombError
            upright = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I"):  # grey of 16 bits, which `convert` would cut off
                upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
            return upright.convert("RGBA")
    except Image.DecompressionBombError:
        raise ValueError(say("picture_too_large", most=MAX_PIXELS // 10**6)) from None
    except Exception:  # a decoder that is fed with anything may raise anything
        raise ValueError(say("picture_unreadable")) from None


def layout_of(images: np.ndarray) -> Layout:
    """Measure how ink lies in some images, (N, H, W) strengths of 0 to 255."""
    inks = [image >= INK for image in images if (image >= INK).any()]
    if not inks:
        return Layout()
    size = np.array(images.shape[1:])
    edges = [np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]]).mean() for ink in inks]
    fills, off_mass, off_box = [], [], []
    for ink in inks:
        rows, columns = box = _box(ink)
        fills.append(ink[box].shape / size)
        off_mass.append(np.abs(np.argwhere(ink).mean(axis=0) + 0.5 - size / 2).sum())
        off_box.append(np.abs(np.array([rows.start + rows.stop, columns.start + columns.stop]) / 2 - size / 2).sum())
    return Layout(
        fill=float(np.median(np.max(fills, axis=1))),
        by_mass=bool(np.mean(off_mass) < np.mean(off_box)),
        stroke=float(min(np.median([_stroke(ink) for ink in inks]), size.min() * MAX_STROKE)),
        has_paper=bool(np.median(edges) < 0.1),
    )


@functools.lru_cache(maxsize=4)  # a page asks again at each redrawing
def fit_picture(data: bytes, shape: tuple[int, ...], dark_ink: bool) -> np.ndarray:
    """Return an uploaded picture, whole and centred, as (H, W) grey or (H, W, 3) colour, int64 of 0 to 255.

    With `dark_ink` it shows dark ink on light paper, as photographs do: dark becomes high. Raises ValueError as
    `open_picture`.
    """
    height, width = shape[:2]
    paper = "white" if dark_ink else "black"
    flat = _on_paper(open_picture(data), paper, "RGB" if len(shape) == 3 else "L")
    small = _reduced(flat, min(width / flat.width, height / flat.height))
    whole = Image.new(flat.mode, (width, height), paper)
    whole.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    values = np.asarray(whole, dtype=np.int64)
    return 255 - values if dark_ink else values


@functools.lru_cache(maxsize=4)  # as above
def find_ink(data: bytes, shape: tuple[int, int], layout: Layout) -> np.ndarray:
    """Return the ink of a photo as (H, W) int64 strengths of 0 to 255.

    Paper may be lit unevenly, and ink dark on light or light on dark: the light is fitted, a threshold (Otsu's) parts
    ink from paper, and what differs is the ink. It is cropped, thickened to the images' strokes if it is thinner, and
    scaled and centred as `layout` says. Raises ValueError as `open_picture`, and where there is no ink.
    """
    picture = open_picture(data)
    picture.thumbnail((WORK_SIDE, WORK_SIDE))
    beyond = _beyond_light(np.asarray(_on_paper(picture, "white", "L"), dtype=float))
    threshold = _otsu(beyond)
    found = beyond > threshold
    if min(found.shape) >= WORK_SIDE // 4:  # single pixels are grain
        found = np.asarray(Image.fromarray(found).convert("L").filter(ImageFilter.MedianFilter(3))) > 0
    if found.all() or not found.any() or beyond[found].mean() - beyond[~found].mean() < LEAST_CONTRAST:
        raise ValueError(say("picture_no_ink"))
    box = _box(found)
    strength = np.where(found, beyond, 0)[box]
    strength = np.clip(strength / np.quantile(strength[strength > 0], 0.5), 0, 1) * 255
    ink = Image.fromarray(strength.astype(np.uint8))
    scale = min(layout.fill * shape[0] / ink.height, layout.fill * shape[1] / ink.width)
    reach = round((layout.stroke / scale - _stroke(found[box])) / 2)
    if reach > 0:  # a thin pen would fade away when it is scaled down
        ink = ImageOps.expand(ink, reach)
        for _ in range(reach):  # as one of 2 * reach + 1 pixels, whose time would grow with their square
            ink = ink.filter(ImageFilter.MaxFilter(3))
        scale = min(layout.fill * shape[0] / ink.height, layout.fill * shape[1] / ink.width)
    return _placed(np.asarray(_reduced(ink, scale), dtype=np.int64), shape, layout.by_mass)


def _on_paper(picture: Image.Image, paper: str, mode: str) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", picture.size, paper), picture).convert(mode)


def _reduced(picture: Image.Image, scale: float) -> Image.Image:
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BOX)


def _beyond_light(grey: np.ndarray) -> np.ndarray:
    """Return how far each pixel is from the paper towards the ink, as a share of the paper's brightness there, (H, W).

    That brightness is a quadratic surface, fitted so that ink, the smaller part, hardly counts.
    """
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in grey.shape), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], axis=-1).reshape(-1, 6)
    some = slice(None, None, max(1, len(terms) // LIGHT_PIXELS))
    values, weights = grey.ravel()[some], np.ones(len(terms[some]))
    rest = values
    for _ in range(LIGHT_STEPS):
        surface = np.linalg.lstsq(terms[some] * weights[:, None], values * weights, rcond=None)[0]
        rest = values - terms[some] @ surface
        weights = 1 / (1 + (rest / (2 * np.median(np.abs(rest)) + 1)) ** 2)
    # Ink is the smaller part, on one side of the paper.
    side = 1 if (np.clip(rest, -255, 255) ** 3).sum() > 0 else -1
    paper = (terms @ surface).reshape(grey.shape)
    return np.asarray(np.maximum(side * (grey - paper) / np.maximum(paper, DARK), 0))


def _otsu(values: np.ndarray) -> float:
    """Return the threshold that parts values into the two most separate classes (Otsu 1979)."""
    counts, edges = np.histogram(values, bins=256)
    middles = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (total / below - (total[-1] - total) / above) ** 2
    return float(edges[1:][np.nanargmax(between)]) if np.isfinite(between).any() else 0.0


def _box(ink: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and the columns of (H, W) ink, but those of dust."""
    shares = [np.cumsum(ink.sum(axis=axis)) / ink.sum() for axis in (1, 0)]
    rows, columns = (slice(int((one <= DUST).sum()), int((one < 1 - DUST).sum()) + 1) for one in shares)
    return rows, columns


def _stroke(ink: np.ndarray) -> float:
    """Return the usual width of what is drawn in (H, W) ink: twice its area over its outline."""
    padded = np.pad(ink, 1)
    outline = sum(int((padded != np.roll(padded, 1, axis)).sum()) for axis in (0, 1))
    return 2 * int(ink.sum()) / max(outline, 1)


def _placed(ink: np.ndarray, shape: tuple[int, int], by_mass: bool) -> np.ndarray:
    """Put ink onto an empty grid, centred; no ink leaves the grid."""
    size, room = np.array(ink.shape), np.array(shape) - ink.shape
    middle = (np.indices(ink.shape) * ink).sum(axis=(1, 2)) / max(ink.sum(), 1) if by_mass else (size - 1) / 2
    before = np.clip(np.rint((np.array(shape) - 1) / 2 - middle), 0, room).astype(int)
    return np.pad(ink, np.stack([before, room - before], axis=1))
