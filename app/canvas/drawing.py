"""A drawing: ink or paint on a grid, its texts, and what of it the model is given. Arrays alone."""

import base64
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

NO_MARK, TOUCHED, HOLE = 0, 1, 2  # a cell's mark, as in app/canvas/grid/grid.js


@dataclass(frozen=True)
class Drawing:
    """What is on the grid, int64."""

    strength: np.ndarray  # (H, W), of the ink, 0 to 255; or (H, W, 3), the colour of the paint
    mark: np.ndarray  # (H, W), NO_MARK, TOUCHED or HOLE


def blank_drawing(shape: tuple[int, ...]) -> Drawing:
    """Return an empty grid: (H, W) for ink, (H, W, 3) for paint; so are the shapes below."""
    return Drawing(np.zeros(shape, dtype=np.int64), np.zeros(shape[:2], dtype=np.int64))


def per_cell(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return (H, W) values with an axis more if the image is in colour, so that the two go together."""
    return values[..., None] if image.ndim == 3 else values


def drawing_text(drawing: Drawing) -> str:
    """Return a drawing as the grid's state: all strengths, then all marks, two hexadecimal digits each."""
    return np.concatenate([drawing.strength.ravel(), drawing.mark.ravel()]).astype(np.uint8).tobytes().hex()


def parse_drawing(text: Any, shape: tuple[int, ...]) -> Drawing:
    """Return the grid's state as a drawing; blank if it is no drawing of this shape."""
    try:
        found, size = np.frombuffer(bytes.fromhex(text), dtype=np.uint8).astype(np.int64), math.prod(shape)
        drawing = Drawing(found[:size].reshape(shape), found[size:].reshape(shape[:2]))
    except (TypeError, ValueError):
        return blank_drawing(shape)
    return drawing if drawing.mark.max() <= HOLE else blank_drawing(shape)


def encode_drawing(drawing: Drawing) -> str:
    """Return a drawing as short text for an address; empty for a blank one."""
    values = bytes.fromhex(drawing_text(drawing))
    return base64.urlsafe_b64encode(zlib.compress(values, 9, -15)).decode().rstrip("=") if any(values) else ""


def decode_drawing(text: str, shape: tuple[int, ...]) -> Drawing:
    """Undo `encode_drawing`; blank if the text is no drawing of this shape."""
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        too_many = math.prod(shape) + math.prod(shape[:2]) + 1  # bytes
        return parse_drawing(zlib.decompressobj(wbits=-15).decompress(packed, too_many).hex(), shape)
    except (ValueError, zlib.error):
        return blank_drawing(shape)


def levels_of(drawing: Drawing, num_levels: int) -> np.ndarray:
    """Return the levels, rounded as the grid shows them; 0 in holes, whatever ink is below."""
    levels = np.floor(drawing.strength * (num_levels - 1) / 255 + 0.5).astype(np.int64)
    return np.where(per_cell(drawing.mark == HOLE, levels), 0, levels)


def strength_of(levels: np.ndarray, num_levels: int) -> np.ndarray:
    """Return the strengths, 0 to 255, that `levels_of` turns into these levels."""
    return np.rint(levels * 255 / (num_levels - 1)).astype(np.int64)


def known_cells(drawing: Drawing, mode: str, num_levels: int) -> np.ndarray:
    """Return (H, W) int64, 1 where a cell counts as known; `isKnown` in `app/canvas/grid/grid.js` shows the same.

    By mode: "above": every row down to the lowest ink; "ink": what is not 0, or paint of any colour, black too;
    "touched": ink and known blanks; "mask": all but holes.
    """
    ink: np.ndarray = drawing.mark == TOUCHED if drawing.strength.ndim == 3 else levels_of(drawing, num_levels) > 0
    is_above = np.arange(len(ink))[:, None] <= np.nonzero(ink)[0].max(initial=-1)  # (H, 1), down to the lowest ink
    known = {"above": is_above, "ink": ink, "touched": drawing.mark == TOUCHED, "mask": True}[mode]
    return np.asarray(known & (drawing.mark != HOLE), dtype=np.int64)


def without(drawing: Drawing, part: str) -> Drawing:
    """Return a drawing whose "lower", "upper", "left" or "right" half is a hole; unchanged for any other `part`."""
    rows, columns = np.indices(drawing.mark.shape)
    is_lower, is_right = rows >= drawing.mark.shape[0] // 2, columns >= drawing.mark.shape[1] // 2
    parts = {"lower": is_lower, "upper": ~is_lower, "left": ~is_right, "right": is_right}
    hole = parts.get(part, np.zeros_like(is_lower))
    strength = np.where(per_cell(hole, drawing.strength), 0, drawing.strength)
    return Drawing(strength, np.where(hole, HOLE, drawing.mark))
