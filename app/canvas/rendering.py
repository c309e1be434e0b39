"""Images as pixels, PNG and the page's HTML. No Streamlit here."""

import base64
import functools
import html
import io

import numpy as np
from PIL import Image

from app.canvas.drawing import NO_MARK, Drawing, drawing_text, levels_of, per_cell, strength_of
from app.canvas.endings import Endings, bits_per_dim, nats, order_of
from app.canvas.texts import say

SAVED_CELL = 20  # pixels per cell of a picture to keep
SAVED_GAP = 10
ANIMATED_CELL, MAX_FRAMES, FRAME_MS, LAST_FRAME_MS = 10, 120, 40, 2000  # of an animation
UNKNOWN = (232, 228, 220)  # its cells that are not drawn yet

# Colours of the endings, red, green, blue.
INK = (28, 31, 43)  # drawn by the person
PAPER = (255, 255, 255)
ADDED_INK = (217, 72, 15)  # added by the model
ADDED_PAPER = (255, 246, 240)  # left blank by the model
# Nats of a pixel, from nothing to the most surprising one of the picture.
HEAT = np.array([(252, 250, 245), (253, 208, 140), (238, 115, 43), (165, 28, 48), (52, 8, 44)], dtype=float)


def as_png(picture: Image.Image, optimize: bool = False) -> bytes:
    """Return a picture as a PNG. The page shows small ones enlarged without blur (`image-rendering`)."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=optimize)
    return file.getvalue()


def whole_pixels(image: np.ndarray, levels: int, added: np.ndarray | bool = False) -> np.ndarray:
    """Return an image, (H, W) or (H, W, 3) levels, -1 where not drawn yet, as (H, W, 4) uint8 pixels.

    Grey ones are ink on paper; where they are `added`, (H, W), these have a colour of their own.
    """
    strength = np.clip(image, 0, None) / (levels - 1)
    if image.ndim == 3:
        colours, is_drawn = 255 * strength, image[..., 0] >= 0
    else:
        is_added = np.asarray(added)[..., None]  # (H, W, 1)
        ink, paper = np.where(is_added, ADDED_INK, INK), np.where(is_added, ADDED_PAPER, PAPER)  # (H, W, 3)
        colours, is_drawn = paper + (ink - paper) * strength[..., None], image >= 0
    return np.dstack([np.rint(colours), 255 * is_drawn]).astype(np.uint8)


def ending_pixels(ending: Endings, image: np.ndarray, coloured: bool) -> np.ndarray:
    """Return one image of some endings as `whole_pixels`; with `coloured`, what the model added has its own colour."""
    return whole_pixels(image, ending.levels, coloured & (ending.known == 0))


def png_size(image: np.ndarray, levels: int) -> int:
    """Return the bytes of an image, (H, W) or (H, W, 3) levels, as the smallest PNG that Pillow makes of it."""
    picture = Image.fromarray(strength_of(image, levels).astype(np.uint8))
    return len(as_png(picture.convert("1") if levels == 2 and image.ndim == 2 else picture, optimize=True))


def heat_pixels(surprise: np.ndarray) -> np.ndarray:
    """Return (H, W) nats as (H, W, 3) uint8 pixels: light is expected, dark is the most surprising pixel."""
    place = surprise / max(float(surprise.max()), 1e-9) * (len(HEAT) - 1)
    channels = [np.interp(place, np.arange(len(HEAT)), HEAT[:, channel]) for channel in range(3)]
    return np.asarray(np.rint(np.stack(channels, axis=-1)), dtype=np.uint8)


def enlarged(pixels: np.ndarray, cell: int) -> Image.Image:
    """Return (H, W, 3 or 4) uint8 pixels as a picture to keep: each a crisp square of `cell` x `cell`."""
    return Image.fromarray(pixels.repeat(cell, axis=0).repeat(cell, axis=1))


def saved_picture(ending: Endings, coloured: bool, order: str, columns: int) -> bytes:
    """Return all endings, at most so many side by side, as one large PNG to keep: each cell a crisp square."""
    images = [ending.images[i] for i in order_of(ending, order)]
    tiles = [enlarged(ending_pixels(ending, image, coloured), SAVED_CELL) for image in images]
    columns = min(columns, len(tiles))
    width, height, rows = tiles[0].width + SAVED_GAP, tiles[0].height + SAVED_GAP, -(-len(tiles) // columns)
    paper = Image.new("RGB", (columns * width + SAVED_GAP, rows * height + SAVED_GAP), (226, 226, 226))
    for i, tile in enumerate(tiles):
        paper.paste(tile, (SAVED_GAP + i % columns * width, SAVED_GAP + i // columns * height))
    return as_png(paper)


def large_image(ending: Endings, image: np.ndarray, coloured: bool) -> bytes:
    """Return one image of some endings, (H, W) or (H, W, 3) levels, as a large PNG to keep."""
    return as_png(enlarged(ending_pixels(ending, image, coloured), SAVED_CELL))


def saved_animation(ending: Endings, i: int, coloured: bool) -> bytes:
    """Return how an ending was finished, pixel by pixel in the order of rows, as a GIF that repeats."""
    image, missing = ending.images[i], np.argwhere(ending.known == 0)
    frames = []
    for number in np.linspace(0, len(missing), min(len(missing), MAX_FRAMES - 1) + 1).astype(int):
        shown = image.copy()
        rows, columns = missing[number:].T
        shown[rows, columns] = -1
        pixels = ending_pixels(ending, shown, coloured)
        pixels = np.where(pixels[..., 3:] == 0, UNKNOWN, pixels[..., :3]).astype(np.uint8)
        frames.append(enlarged(pixels, ANIMATED_CELL))
    file, durations = io.BytesIO(), [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file.getvalue()


def img(pixels: np.ndarray, alt: str, css_class: str = "") -> str:
    """Return (H, W, 3 or 4) uint8 pixels as the page's HTML."""
    portrait = f' style="--ratio: {pixels.shape[1] / pixels.shape[0]:.3f}"' if pixels.shape[1] < pixels.shape[0] else ""
    return f'<img class="{css_class}" src="{_address(pixels)}" alt="{html.escape(alt)}"{portrait}>'


def _address(pixels: np.ndarray) -> str:
    return _address_of(pixels.tobytes(), pixels.shape)


@functools.lru_cache(maxsize=1024)  # each redrawing of a page shows most pictures again
def _address_of(raw: bytes, shape: tuple[int, ...]) -> str:
    png = as_png(Image.fromarray(np.frombuffer(raw, dtype=np.uint8).reshape(shape)))
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _continue_button(ink: str, picture: str, label: str, title: str = "", state: str = "") -> str:
    """Return a picture as a button that puts something on the grid: grid.js takes over its `data-ink`."""
    names = f'aria-label="{html.escape(label)}" title="{html.escape(title or label)}"'
    return f'<button type="button" data-ink="{ink}" {names}{state}>{picture}</button>'


def _ink(ending: Endings, i: int) -> str:
    return strength_of(ending.images[i], ending.levels).astype(np.uint8).tobytes().hex()


def endings_html(ending: Endings, coloured: bool, order: str, stale: bool = False, sheet: bool = False) -> str:
    """Return the endings as a grid of figures, in `order` once they are scored.

    They are `stale` where other settings are chosen by now (companion.js does the same for another drawing), and a
    `sheet` where they are whole images, on a page without a grid to continue them on.
    """
    known, kind = ending.known, "image" if sheet else "ending"
    is_drawn = bool((ending.images >= 0).all())
    num_added = int((known == 0).sum()) * (3 if ending.images.ndim == 4 else 1)
    figures = []
    for rank, i in enumerate(order_of(ending, order), start=1):
        alt, caption = say(kind, rank=rank), "\N{HORIZONTAL ELLIPSIS}"
        if ending.log_probs is not None:
            score, bits = nats(ending.log_probs[i]), bits_per_dim(ending.log_probs[i], num_added)
            name = ending.names[i] if ending.names else ""
            alt = f"{alt}: {name} {score}" if name else f"{alt}: {score}"
            caption = (f"<b>{html.escape(name)}</b>" if name else "") + f'<span title="{bits}">{score}</span>'
        elif not is_drawn:
            alt = f"{alt}, {say('being_drawn')}"
        picture = img(ending_pixels(ending, ending.images[i], coloured), alt)
        if not sheet and ending.log_probs is not None:  # what is still drawn cannot be continued from
            label, title = say("continue", rank=rank), say("continue_help")
            picture = _continue_button(_ink(ending, i), picture, label, title, ' aria-pressed="false"')
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    css_class = "endings" + " sheet" * sheet + " stale" * stale
    told = ""
    if not sheet:  # the drawing without its endings is there to compare with
        alone = _address(ending_pixels(ending, ending.request.given, coloured))
        told = f' data-for="{ending.drawing}" style="--alone: url({alone})"'
    state = f'data-known="{int(known.sum())}" data-drawn="{int(is_drawn)}"'
    return f'<div class="{css_class}" {state}{told}>{"".join(figures)}</div>'


def gallery_html(endings: list[Endings]) -> str:
    """Return the likeliest ending of each past request, as small buttons that continue from it."""
    buttons = []
    for ending in endings:
        likeliest = order_of(ending, "likely")[0]
        picture = img(ending_pixels(ending, ending.images[likeliest], coloured=True), "")
        label = say("continue_seed", seed=ending.seed)
        buttons.append(_continue_button(_ink(ending, likeliest), picture, label))
    return f'<div class="gallery">{"".join(buttons)}</div>'


def examples_html(beginnings: list[Drawing], num_levels: int) -> str:
    """Return real test images, begun, as small buttons that put them on the grid."""
    buttons = []
    for number, drawing in enumerate(beginnings, start=1):
        levels = levels_of(drawing, num_levels)
        shown = np.where(per_cell(drawing.mark == NO_MARK, levels), -1 if levels.ndim == 3 else 0, levels)
        picture = img(whole_pixels(shown, num_levels), "")
        buttons.append(_continue_button(drawing_text(drawing), picture, say("example", number=number)))
    return f'<div class="gallery examples"><span>{html.escape(say("examples"))}</span>{"".join(buttons)}</div>'
