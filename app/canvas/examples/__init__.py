"""Real test images whose beginnings one can go on from; `python -m tools.write_examples` writes them."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from app.canvas.drawing import NO_MARK, TOUCHED, Drawing, per_cell

FILES = {"mnist": "mnist", "mnist5k": "mnist", "fashion_mnist": "fashion_mnist", "cifar10": "cifar10"}


@cache
def real_images(dataset: str) -> list[np.ndarray]:
    """Return five test images as strengths, (H, W) or (H, W, 3) int64 of 0 to 255; none of a dataset without any."""
    if dataset not in FILES:
        return []
    with Image.open(Path(__file__).with_name(f"{FILES[dataset]}.png")) as file:
        strip = np.asarray(file, dtype=np.int64)
    return np.split(strip, strip.shape[1] // strip.shape[0], axis=1)


@cache
def beginnings_of(dataset: str) -> list[Drawing]:
    """Return the upper halves of a dataset's test images as somebody would have drawn them: their ink, or all paint."""
    beginnings = []
    for image in real_images(dataset):
        is_upper = np.indices(image.shape[:2])[0] < image.shape[0] // 2
        is_drawn = is_upper & (image > 0) if image.ndim == 2 else is_upper
        beginnings.append(Drawing(image * per_cell(is_drawn, image), np.where(is_drawn, TOUCHED, NO_MARK)))
    return beginnings
