"""What the page makes of a drawing, and of the service's answer: no Streamlit here, no model, only arrays and PNG."""

import base64
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

MAX_SEED = 2**63 - 1
ENLARGE = 8  # PNG pixels per cell: crisp when saved, too

# Colours of the endings, red, green, blue.
INK = (28, 31, 43)  # drawn by the person
PAPER = (255, 255, 255)
ADDED_INK = (217, 72, 15)  # added by the model
ADDED_PAPER = (255, 246, 240)  # left blank by the model


@dataclass(frozen=True)
class Request:
    """All that one press of Complete sends; equal requests need not be sent twice. `image` and `observed` as rows."""

    dataset: str
    image: list[list[int]]
    observed: list[list[int]]
    num_samples: int
    label: int | None
    temperature: float
    seed: int | None


@dataclass(frozen=True)
class Ending:
    """What is shown: (N, H, W) levels, -1 where not drawn yet, and the request that they answer."""

    request: Request
    levels: int
    images: np.ndarray
    log_probs: list[float] | None = None
    seed: int | None = None
    model: dict[str, Any] | None = None


def parse_ink(text: Any, shape: tuple[int, int]) -> np.ndarray:
    """Return the grid's state as (H, W) int64 of 0 and 1; blank if it is not such a state."""
    if not isinstance(text, str) or len(text) != math.prod(shape) or set(text) - {"0", "1"}:
        return np.zeros(shape, dtype=np.int64)
    return np.array(list(text), dtype=np.int64).reshape(shape)


def known_cells(ink: np.ndarray, mode: str) -> np.ndarray:
    """Return (H, W) int64, 1 where a cell counts as known. `app/grid/grid.js` shows the same cells as known."""
    if mode == "ink" or not ink.any():
        return ink.copy()
    lowest = int(np.flatnonzero(ink.any(axis=1))[-1])
    known = np.zeros_like(ink)
    known[: lowest + 1] = 1
    return known


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


def picture(image: np.ndarray, known: np.ndarray, levels: int, coloured: bool) -> bytes:
    """Return a PNG of one ending.

    Args:
        image: (H, W) levels in 0..levels-1, -1 where not drawn yet (transparent).
        known: (H, W), 1 where the person drew it.
        coloured: whether what the model added has a colour of its own.
    """
    drawn = (known == 1) | (not coloured)  # (H, W)
    ink = np.where(drawn[..., None], INK, ADDED_INK)  # (H, W, 3)
    paper = np.where(drawn[..., None], PAPER, ADDED_PAPER)
    strength = np.clip(image, 0, None)[..., None] / (levels - 1)
    pixels = np.empty((*image.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.rint(paper + (ink - paper) * strength)
    pixels[..., 3] = np.where(image < 0, 0, 255)
    file = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((ENLARGE, ENLARGE, 1), dtype=np.uint8))).save(file, "PNG")
    return file.getvalue()


def nats(value: float) -> str:
    """Write a log-probability for people, with a real minus sign."""
    return f"{value:.1f} nats".replace("-", "\N{MINUS SIGN}")


def endings_html(ending: Ending, coloured: bool) -> str:
    """Return the endings as a grid of figures, the most likely first once they are scored."""
    known = np.array(ending.request.observed)
    order, captions = list(range(len(ending.images))), ["\N{HORIZONTAL ELLIPSIS}"] * len(ending.images)
    if ending.log_probs is not None:
        order = sorted(order, key=[-value for value in ending.log_probs].__getitem__)
        captions = [nats(value) for value in ending.log_probs]
    figures = []
    for rank, i in enumerate(order, start=1):
        data = base64.b64encode(picture(ending.images[i], known, ending.levels, coloured)).decode()
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" alt="Ending {rank}: {captions[i]}">'
            f"<figcaption>{captions[i]}</figcaption></figure>"
        )
    return f'<div class="endings">{"".join(figures)}</div>'
