"""What the page makes of a drawing, and of the service's answers: no Streamlit here, no model, only arrays and PNG."""

import base64
import binascii
import html
import io
import json
import math
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

MAX_SEED = 2**63 - 1
NO_MARK, TOUCHED, HOLE = 0, 1, 2  # a cell's mark, as in app/grid/grid.js
SAVED_CELL = 20  # pixels per cell of a picture to keep
SAVED_GAP = 10

# Colours of the endings, red, green, blue.
INK = (28, 31, 43)  # drawn by the person
PAPER = (255, 255, 255)
ADDED_INK = (217, 72, 15)  # added by the model
ADDED_PAPER = (255, 246, 240)  # left blank by the model
# Nats of a pixel, from nothing to the most surprising one of the picture.
HEAT = np.array([(252, 250, 245), (253, 208, 140), (238, 115, 43), (165, 28, 48), (52, 8, 44)], dtype=float)


@dataclass(frozen=True)
class Drawing:
    """What is on the grid, int64.

    Args:
        strength: (H, W), of the ink, 0 to 255; or (H, W, 3), the colour of the paint.
        mark: (H, W), NO_MARK, TOUCHED or HOLE.
    """

    strength: np.ndarray
    mark: np.ndarray


@dataclass(frozen=True)
class Request:
    """All that one press of Complete sends; equal requests need not be sent twice. `image` and `observed` as rows."""

    dataset: str
    image: list[list[Any]]
    observed: list[list[int]]
    num_samples: int
    label: int | None
    temperature: float
    seed: int | None


@dataclass(frozen=True)
class Ending:
    """What is shown: (N, H, W) or (N, H, W, 3) levels, -1 where not drawn yet, and the request that they answer."""

    request: Request
    levels: int
    images: np.ndarray
    log_probs: list[float] | None = None
    seed: int | None = None
    model: dict[str, Any] | None = None


def blank_drawing(shape: tuple[int, ...]) -> Drawing:
    """Return an empty grid: (H, W) for ink, (H, W, 3) for paint; so are the shapes below."""
    return Drawing(np.zeros(shape, dtype=np.int64), np.zeros(shape[:2], dtype=np.int64))


def per_cell(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return (H, W) values with an axis more if the image is in colour, so that the two go together."""
    return values[..., None] if image.ndim == 3 else values


def text_size(shape: tuple[int, ...]) -> int:
    """Return how many characters `drawing_text` takes."""
    return 2 * math.prod(shape) + math.prod(shape[:2])


def drawing_text(drawing: Drawing) -> str:
    """Return a drawing as the grid's state: per cell two hexadecimal digits for each channel, and the mark."""
    strengths = drawing.strength.astype(np.uint8).reshape(drawing.mark.size, -1)
    cells = zip(strengths, drawing.mark.ravel().tolist(), strict=True)
    return "".join(f"{strength.tobytes().hex()}{mark}" for strength, mark in cells)


def parse_drawing(text: Any, shape: tuple[int, ...]) -> Drawing:
    """Return the grid's state as a drawing; blank if it is not such a state."""
    if not isinstance(text, str) or not text.isascii() or len(text) != text_size(shape):
        return blank_drawing(shape)
    digits = np.array(["0123456789abcdef".find(character) for character in text]).reshape(math.prod(shape[:2]), -1)
    if digits.min() < 0 or digits[:, -1].max() > HOLE:
        return blank_drawing(shape)
    strength = 16 * digits[:, :-1:2] + digits[:, 1:-1:2]  # (H * W, channels)
    return Drawing(strength.reshape(shape), digits[:, -1].reshape(shape[:2]))


def encode_drawing(drawing: Drawing) -> str:
    """Return a drawing as short text for an address; empty for a blank one."""
    if not drawing.strength.any() and not drawing.mark.any():
        return ""
    values = np.concatenate([drawing.strength.ravel(), drawing.mark.ravel()]).astype(np.uint8).tobytes()
    packed = zlib.compress(values, level=9, wbits=-15)
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def decode_drawing(text: str, shape: tuple[int, ...]) -> Drawing:
    """Undo `encode_drawing`; blank if the text is no drawing of this shape."""
    size = math.prod(shape) + math.prod(shape[:2])
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        values = zlib.decompressobj(wbits=-15).decompress(packed, size + 1)
    except (ValueError, binascii.Error, zlib.error):
        return blank_drawing(shape)
    if len(values) != size:
        return blank_drawing(shape)
    found = np.frombuffer(values, dtype=np.uint8).astype(np.int64)
    strength, mark = found[: math.prod(shape)].reshape(shape), found[math.prod(shape) :].reshape(shape[:2])
    return Drawing(strength, mark) if mark.max() <= HOLE else blank_drawing(shape)


def levels_of(drawing: Drawing, num_levels: int) -> np.ndarray:
    """Return the levels, rounded as the grid shows them; 0 in holes, whatever ink is below."""
    levels = np.floor(drawing.strength * (num_levels - 1) / 255 + 0.5).astype(np.int64)
    return np.where(per_cell(drawing.mark == HOLE, levels), 0, levels)


def strength_of(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Return the strengths, 0 to 255, that `levels_of` turns into these levels."""
    return np.rint(levels * 255 / (num_levels - 1)).astype(np.int64)


def known_cells(drawing: Drawing, mode: str, num_levels: int) -> np.ndarray:
    """Return (H, W) int64, 1 where a cell counts as known; `isKnown` in `app/grid/grid.js` shows the same.

    Ink is what is not 0; paint is ink of any colour, black too.

    Args:
        mode: "above": every row down to the lowest ink; "ink"; "touched": ink and known blanks; "mask": all but holes.
    """
    ink = drawing.mark == TOUCHED if drawing.strength.ndim == 3 else levels_of(drawing, num_levels) > 0
    if mode == "mask":
        known = np.ones_like(ink)
    elif mode == "touched":
        known = drawing.mark == TOUCHED
    else:
        known = ink.copy()
        if mode == "above" and ink.any():
            known[: int(np.flatnonzero(ink.any(axis=1))[-1]) + 1] = True
    return (known & (drawing.mark != HOLE)).astype(np.int64)


def without(drawing: Drawing, part: str) -> Drawing:
    """Return a drawing whose "lower", "upper", "left" or "right" half is a hole; unchanged for any other `part`."""
    height, width = drawing.mark.shape
    halves = {
        "lower": np.s_[height // 2 :, :],
        "upper": np.s_[: height // 2, :],
        "left": np.s_[:, : width // 2],
        "right": np.s_[:, width // 2 :],
    }
    strength, mark = drawing.strength.copy(), drawing.mark.copy()
    if part in halves:
        strength[halves[part]], mark[halves[part]] = 0, HOLE
    return Drawing(strength, mark)


def fit_picture(data: bytes, shape: tuple[int, ...], dark_ink: bool) -> np.ndarray:
    """Return an uploaded picture, whole and centred, as (H, W) grey or (H, W, 3) colour, int64 of 0 to 255.

    Args:
        dark_ink: whether a grey picture shows dark ink on light paper, as photographs do; then dark becomes high.

    Raises:
        ValueError: it is no picture that can be read.
    """
    height, width = shape[:2]
    colour = len(shape) == 3
    try:
        with Image.open(io.BytesIO(data)) as file:
            picture = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("This file is no picture that can be read. Upload a PNG or a JPEG.") from None
    invert = dark_ink and not colour
    paper = (255, 255, 255, 255) if invert else (0, 0, 0, 255)
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, paper), picture).convert("RGB" if colour else "L")
    scale = min(width / flat.width, height / flat.height)
    size = max(1, round(flat.width * scale)), max(1, round(flat.height * scale))
    whole = Image.new(flat.mode, (width, height), paper[:3] if colour else paper[0])
    whole.paste(flat.resize(size, Image.Resampling.BOX), ((width - size[0]) // 2, (height - size[1]) // 2))
    values = np.asarray(whole, dtype=np.int64)
    return 255 - values if invert else values


def parse_seed(text: str) -> int | None:
    """Return the seed that a person typed, None for an empty field.

    Raises:
        ValueError: it is no seed; the text says what is.
    """
    text = text.strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text) <= MAX_SEED):
        raise ValueError(f"The seed must be a whole number from 0 to {MAX_SEED}, got '{text}'. Empty means a new one.")
    return int(text)


def as_png(pixels: np.ndarray) -> bytes:
    """Return (H, W, 3 or 4) uint8 pixels as a PNG. The page shows them enlarged without blur (`image-rendering`)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(png: bytes) -> str:
    """Return a PNG as the source of an `img`."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def ending_pixels(image: np.ndarray, known: np.ndarray, levels: int, coloured: bool) -> np.ndarray:
    """Return one ending as (H, W, 4) uint8 pixels.

    Args:
        image: (H, W) or (H, W, 3) levels in 0..levels-1, -1 where not drawn yet (transparent).
        known: (H, W), 1 where the person drew it.
        coloured: whether what the model added has a colour of its own; an image in colour keeps its own.
    """
    strength = np.clip(image, 0, None) / (levels - 1)
    pixels = np.empty((*image.shape[:2], 4), dtype=np.uint8)
    if image.ndim == 3:
        pixels[..., :3] = np.rint(255 * strength)
        pixels[..., 3] = np.where((image < 0).any(axis=-1), 0, 255)
        return pixels
    drawn = (known == 1) | (not coloured)  # (H, W)
    ink = np.where(drawn[..., None], INK, ADDED_INK)  # (H, W, 3)
    paper = np.where(drawn[..., None], PAPER, ADDED_PAPER)
    pixels[..., :3] = np.rint(paper + (ink - paper) * strength[..., None])
    pixels[..., 3] = np.where(image < 0, 0, 255)
    return pixels


def whole_pixels(image: np.ndarray, levels: int) -> np.ndarray:
    """Return an image, (H, W) or (H, W, 3) levels, as (H, W, 4) uint8 pixels: grey ones as ink on paper."""
    return ending_pixels(image, np.ones(image.shape[:2]), levels, coloured=False)


def heat_pixels(surprise: np.ndarray) -> np.ndarray:
    """Return (H, W) nats as (H, W, 3) uint8 pixels: light is expected, dark is the most surprising pixel."""
    place = surprise / max(float(surprise.max()), 1e-9) * (len(HEAT) - 1)
    channels = [np.interp(place, np.arange(len(HEAT)), HEAT[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def sheet(pictures: list[np.ndarray], columns: int) -> bytes:
    """Return (H, W, C) pictures side by side as one large PNG to keep: each cell a crisp square."""
    height, width = SAVED_CELL * pictures[0].shape[0], SAVED_CELL * pictures[0].shape[1]
    rows = -(-len(pictures) // columns)
    paper = np.full(
        (rows * (height + SAVED_GAP) + SAVED_GAP, columns * (width + SAVED_GAP) + SAVED_GAP, 3), 226, dtype=np.uint8
    )
    for i, picture in enumerate(pictures):
        top = SAVED_GAP + i // columns * (height + SAVED_GAP)
        left = SAVED_GAP + i % columns * (width + SAVED_GAP)
        large = picture[..., :3].repeat(SAVED_CELL, axis=0).repeat(SAVED_CELL, axis=1)
        paper[top : top + height, left : left + width] = large
    return as_png(paper)


def record(ending: Ending) -> str:
    """Return the endings as JSON. Its `request`, sent to /complete, gives the same `result` from the same model."""
    assert ending.log_probs is not None
    values = {
        "request": {name: value for name, value in asdict(ending.request).items() if value is not None}
        | {"seed": ending.seed},
        "result": {"completions": ending.images.tolist(), "log_probs": ending.log_probs},
        "model": ending.model,
    }
    return json.dumps(values, indent=1)


def nats(value: float) -> str:
    """Write a log-probability for people, with a real minus sign."""
    return f"{value:.1f} nats".replace("-", "\N{MINUS SIGN}")


def bits_per_dim(log_prob: float, num: int) -> str:
    """Write a log-probability in nats as bits per each of `num` dimensions."""
    return f"{abs(log_prob) / (max(num, 1) * math.log(2)):.3f} bits/dim"


def order_of(ending: Ending, order: str) -> list[int]:
    """Return the endings' indices in the order to show: "likely" or "rare" first, or as "drawn"."""
    found = list(range(len(ending.images)))
    if ending.log_probs is None or order == "drawn":
        return found
    return sorted(found, key=ending.log_probs.__getitem__, reverse=order == "likely")


def endings_html(ending: Ending, coloured: bool, order: str = "likely", drawing: Drawing | None = None) -> str:
    """Return the endings as a grid of figures, in `order` once they are scored: then a click continues from one.

    Args:
        drawing: what is on the grid; an ending that it equals is shown as chosen.
    """
    known = np.array(ending.request.observed)
    num_added = int((known == 0).sum()) * (3 if ending.images.ndim == 4 else 1)
    on_grid = None if drawing is None else levels_of(drawing, ending.levels)
    figures = []
    for rank, i in enumerate(order_of(ending, order), start=1):
        image = ending.images[i]
        source = data_url(as_png(ending_pixels(image, known, ending.levels, coloured)))
        if ending.log_probs is None:
            figures.append(
                f'<figure><img src="{source}" alt="Ending {rank}, being drawn">'
                "<figcaption>\N{HORIZONTAL ELLIPSIS}<small>&nbsp;</small></figcaption></figure>"
            )
            continue
        score, bits = nats(ending.log_probs[i]), bits_per_dim(ending.log_probs[i], num_added)
        ink = strength_of(image, ending.levels).astype(np.uint8).tobytes().hex()
        chosen = on_grid is not None and np.array_equal(on_grid, image)
        figures.append(
            f'<figure><button type="button" data-ink="{ink}" aria-pressed="{str(chosen).lower()}"'
            f' aria-label="Continue from ending {rank}" title="Continue from this ending">'
            f'<img src="{source}" alt="Ending {rank}: {score}"></button>'
            f"<figcaption>{score}<small>{bits}</small></figcaption></figure>"
        )
    return f'<div class="endings" data-known="{int(known.sum())}">{"".join(figures)}</div>'


def gallery_html(endings: list[Ending]) -> str:
    """Return the likeliest ending of each past request, as small buttons that continue from it."""
    figures = []
    for ending in endings:
        image = ending.images[order_of(ending, "likely")[0]]
        source = data_url(as_png(ending_pixels(image, np.array(ending.request.observed), ending.levels, True)))
        ink = strength_of(image, ending.levels).astype(np.uint8).tobytes().hex()
        seed = html.escape(str(ending.seed))
        figures.append(
            f'<button type="button" data-ink="{ink}" title="Continue from this one (seed {seed})"'
            f' aria-label="Continue from the ending of seed {seed}"><img src="{source}" alt=""></button>'
        )
    return f'<div class="gallery">{"".join(figures)}</div>'


def sheet_html(pictures: list[np.ndarray], captions: list[str] | None) -> str:
    """Return (H, W, 4) pictures with captions as a grid; without any while the pictures are being drawn."""
    figures = []
    for i, picture in enumerate(pictures):
        caption = "\N{HORIZONTAL ELLIPSIS}" if captions is None else html.escape(captions[i])
        text = f"Image {i + 1}, being drawn" if captions is None else f"Image {i + 1}: {caption}"
        figures.append(
            f'<figure><img src="{data_url(as_png(picture))}" alt="{text}"><figcaption>{caption}</figcaption></figure>'
        )
    return f'<div class="endings sheet">{"".join(figures)}</div>'
