"""Which pixels are observed: masks to train completion with, and the fixed ones that it is scored on.

A mask is (B, 1, H, W) bool, True where the pixel is known. Masks are functions of a generator and, where they follow
the drawing, of the levels: what is hidden never decides which of its pixels are shown, except in that the ink of a
beginning is shown in the order in which a pen would lay it. A scored mask has a generator of its own, so that it does
not depend on the images it is scored with.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Mask = np.ndarray[Any, Any]

# What each scored mask hides: all but `beginnings` are named by what is missing, that one by what is known.
SCORED = ("top", "left", "bottom", "rectangles", "pixels50", "beginnings")
SCORED_INK = 0.3  # part of the ink that a scored beginning shows


def rectangles(rng: np.random.Generator, num: int, height: int, width: int) -> Mask:
    """Return (B, H, W) bool, True inside a rectangle whose sides are a quarter to all but a pixel of the image's."""

    def interval(size: int) -> tuple[Mask, Mask]:
        length = rng.integers(max(1, size // 4), max(2, size), num)
        start = rng.integers(0, size - np.minimum(length, size) + 1)
        at = np.arange(size)
        return at >= start[:, None], at < (start + length)[:, None]

    (after, before), (right, left) = interval(height), interval(width)
    return (after & before)[:, :, None] & (right & left)[:, None]


def strokes(rng: np.random.Generator, num: int, height: int, width: int) -> Mask:
    """Return (B, H, W) bool, True under a brush of random width that was moved along two to five random lines."""
    num_points = 6
    points = rng.random((num, num_points, 2)) * (height, width) - 0.5  # (B, points, 2)
    used = np.arange(num_points - 1) < rng.integers(2, num_points, (num, 1))  # (B, lines)
    radius = rng.uniform(0.04, 0.14, num) * max(height, width)
    pixel = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)  # (H, W, 2)
    start, step = points[:, :-1, None, None], np.diff(points, axis=1)[:, :, None, None]  # (B, lines, 1, 1, 2)
    along = ((pixel - start) * step).sum(-1) / np.maximum((step**2).sum(-1), 1e-9)  # (B, lines, H, W)
    distance = ((pixel - start - along.clip(0, 1)[..., None] * step) ** 2).sum(-1)
    covered: Mask = ((distance <= radius[:, None, None, None] ** 2) & used[:, :, None, None]).any(axis=1)
    return covered


def ink_of(levels: Tensor, num_levels: int) -> Mask:
    """Return (B, H, W) bool, True where the brightest channel exceeds a quarter of the range."""
    ink: Mask = (levels.amax(dim=1) * 4 > num_levels - 1).cpu().numpy()
    return ink


def _spread(mask: Mask) -> Mask:
    """Return the pixels of a mask and their eight neighbours: (B, H, W) -> (B, H, W)."""
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    tall = padded[:, 2:] | padded[:, 1:-1] | padded[:, :-2]
    wide: Mask = tall[:, :, 2:] | tall[:, :, 1:-1] | tall[:, :, :-2]
    return wide


def pen_noise(rng: np.random.Generator, num: int, height: int, width: int) -> tuple[Mask, Mask]:
    """Return the noise of `beginnings`: (B, 1, 1) directions in [0, 2 pi), and (B, H, W) in [0, 1)."""
    return rng.uniform(0, 2 * np.pi, (num, 1, 1)), rng.random((num, height, width))


def beginnings(noise: tuple[Mask, Mask], ink: Mask, part: Mask) -> Mask:
    """Return the first part of the ink, as a pen would lay it: (B, H, W) bool, a subset of `ink`.

    The pen starts at the ink's outermost pixel in a random direction and follows the strokes both ways (a breadth-first
    search); from a stroke's end it jumps to the nearest ink that is left. An image's beginning depends on its own
    noise, ink and part alone.

    `noise`, by `pen_noise`, are the direction and the order of pixels of the same step of the search; `ink` is
    (B, H, W) bool; `part`, (B,) in [0, 1], is how much of it to lay: at least a pixel where there is ink.
    """
    angle, order = noise
    num, height, width = ink.shape
    size = height * width
    y, x = np.mgrid[:height, :width]
    outward = np.where(ink, np.sin(angle) * y + np.cos(angle) * x, -np.inf)
    front = np.zeros_like(ink)
    front.reshape(num, size)[np.arange(num), outward.reshape(num, size).argmax(axis=1)] = True
    laid, searched = front.copy(), front.copy()
    wanted = np.ceil(part * ink.sum(axis=(1, 2))).clip(1, None)
    # When a pixel is laid: the step of the search.
    time = np.where(front, 0.0, np.inf)
    for step in range(1, 2 * size + 1):
        if (laid.sum(axis=(1, 2)) >= np.minimum(wanted, ink.sum(axis=(1, 2)))).all():
            break
        searched = _spread(searched)
        new = searched & ink & ~laid
        time[new] = step
        laid |= new
        # Where ink was found the search goes on from the ink alone; elsewhere it widens over the background.
        found = new.any(axis=(1, 2))
        searched[found] = laid[found]
    time = (time + order).reshape(num, size)
    rank = time.argsort(axis=1).argsort(axis=1).reshape(ink.shape)
    first_part: Mask = (rank < wanted[:, None, None]) & ink
    return first_part


def surroundings(rng: np.random.Generator, drawn: Mask) -> Mask:
    """Add to what is drawn, at random: nothing, its neighbours, its bounding box, or all rows down to its lowest."""
    num = len(drawn)
    kind = rng.integers(0, 4, num)[:, None, None]
    rows: Mask = np.any(drawn, axis=2)
    columns: Mask = np.any(drawn, axis=1)

    def after(occupied: Mask) -> Mask:  # from the first True on
        return np.logical_or.accumulate(occupied, axis=1)

    def until(occupied: Mask) -> Mask:  # up to the last True
        return after(occupied[:, ::-1])[:, ::-1]

    near = _spread(drawn)
    near = np.where(rng.random((num, 1, 1)) < 0.5, near, _spread(near))
    box = (after(rows) & until(rows))[:, :, None] & (after(columns) & until(columns))[:, None]
    return np.choose(kind, [drawn, near, box, until(rows)[:, :, None]])


def _training_parts(rng: np.random.Generator, num: int, height: int, width: int, halves: float = 0.5) -> Mask:
    """Return top, bottom, left or right parts: a share of halves, which people ask for most, or of random size."""
    side = rng.integers(0, 4, num)[:, None, None]
    share = np.where(rng.random((num, 1, 1)) < halves, 0.5, rng.random((num, 1, 1)))
    y, x = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width) + 0.5) / width
    return np.choose(side, [y < share, y > share, x < share, x > share])


def training_masks(
    rng: np.random.Generator, levels: Tensor, num_levels: int, share: float, halves_share: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Draw what is observed of each image of a training batch, (B, 1, H, W) bool, and whether it follows its ink, (B,).

    Where it does, that a pixel is missing says something about its level. Both are on the device of `levels`.

    Of the `share` of images that get a mask six twelfths know a top, bottom, left or right part, every other time a
    half; one the inside or the outside of a rectangle; one random pixels; one the inside or the outside of brush
    strokes; three the beginning of their drawing, 10 to 70 % of the ink, alone or with what surrounds it. Nothing is
    known of the others. `levels` are (B, C, H, W) int64 in [0, num_levels).
    """
    num, _, height, width = levels.shape
    kind = np.where(rng.random(num) < share, rng.integers(0, 12, num), -1)
    observed = np.zeros((num, height, width), dtype=bool)

    def inside_or_outside(mask: Mask) -> Mask:
        return mask ^ (rng.random((len(mask), 1, 1)) < 0.5)

    makers: list[tuple[int, int, Callable[[int], Mask]]] = [
        (0, 6, lambda n: _training_parts(rng, n, height, width)),
        (6, 7, lambda n: inside_or_outside(rectangles(rng, n, height, width))),
        (7, 8, lambda n: rng.random((n, height, width)) < rng.random((n, 1, 1))),
        (8, 9, lambda n: inside_or_outside(strokes(rng, n, height, width))),
    ]
    for first, end, make in makers:
        chosen = (kind >= first) & (kind < end)
        observed[chosen] = make(int(chosen.sum()))
    chosen = kind >= 9
    ink = ink_of(levels[torch.from_numpy(chosen).to(levels.device)], num_levels)
    part = rng.uniform(0.1, 0.7, len(ink))
    observed[chosen] = surroundings(rng, beginnings(pen_noise(rng, *ink.shape), ink, part))
    halved = rng.random(num) < np.asarray(halves_share)
    observed[halved] = _training_parts(rng, int(halved.sum()), height, width, halves=1)
    chosen &= ~halved
    return torch.from_numpy(observed)[:, None].to(levels.device), torch.from_numpy(chosen).to(levels.device)


def scored_masks(name: str, levels: Tensor, num_levels: int, first: int = 0) -> Tensor:
    """Return one of the masks that completion is scored on, (B, 1, H, W) bool, True where observed.

    An image's mask depends on (name, its index) and its ink alone, not on the other images of the batch.

    Args:
        name: what is missing (`top`, `left`, `bottom`: that half; `rectangles`: a random one; `pixels50`: each pixel
            with probability 1/2); or `beginnings`, where only the first 30 % of the ink is known.
        levels: (B, C, H, W) int64 in [0, num_levels).
        first: index of the first image in its split; the others follow it.
    """
    num, _, height, width = levels.shape
    missing = np.zeros((num, height, width), dtype=bool)
    rngs = (np.random.default_rng([0, SCORED.index(name), first + i]) for i in range(num))
    if name == "top":
        missing[:, : height // 2] = True
    elif name == "bottom":
        missing[:, height // 2 :] = True
    elif name == "left":
        missing[:, :, : width // 2] = True
    elif name == "rectangles":
        missing = np.concatenate([rectangles(rng, 1, height, width) for rng in rngs])
    elif name == "pixels50":
        missing = np.stack([rng.random((height, width)) < 0.5 for rng in rngs])
    else:
        angles, orders = zip(*(pen_noise(rng, 1, height, width) for rng in rngs), strict=True)
        noise = np.concatenate(angles), np.concatenate(orders)
        missing = ~beginnings(noise, ink_of(levels, num_levels), np.full(num, SCORED_INK))
    return torch.from_numpy(~missing)[:, None].to(levels.device)
