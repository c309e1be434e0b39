"""From the wire to tensors and back: what a request says of an image, checked against its champion's `ModelConfig`."""

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.service.wire import RequestError, quoted
from pixelcnn.config import ModelConfig
from pixelcnn.images import from_png


def _read_numbers(name: str, value: Any, shape: tuple[int, ...]) -> list[int]:
    """Flatten nested lists of exactly this shape, in row-major order; `name` is the field's, for error messages."""
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list of {shape[0]} entries, got {quoted(value)}.")
    if len(value) != shape[0]:
        raise RequestError(f"{name} must have {shape[0]} entries, got {len(value)}.")
    if len(shape) > 1:
        return [number for i, row in enumerate(value) for number in _read_numbers(f"{name}[{i}]", row, shape[1:])]
    if set(map(type, value)) != {int}:  # True is none
        i = next(i for i, number in enumerate(value) if type(number) is not int)
        raise RequestError(f"{name}[{i}] must be a whole number, got {quoted(value[i])}.")
    return value


def _read_levels(
    name: str, value: Any, shape: tuple[int, ...], num_levels: int, expected: str, observed: Tensor | None = None
) -> Tensor:
    """Return nested lists as (*shape) int64 levels, 0 where not observed; refuse the first that is not `expected`."""
    # -1 stands for an integer of any size that is out of range.
    numbers = [n if 0 <= n < num_levels else -1 for n in _read_numbers(name, value, shape)]
    levels = torch.from_numpy(np.array(numbers, dtype=np.int64).reshape(shape))  # faster than torch.tensor
    if observed is not None:
        levels[~observed[0, 0]] = 0
    if bool((levels < 0).any()):
        row, column, *_ = (levels < 0).nonzero()[0].tolist()
        raise RequestError(f"{name}[{row}][{column}] must be {expected}, got {quoted(value[row][column])}.")
    return levels


def read_observed(value: Any, config: ModelConfig) -> Tensor:
    """Return the field `observed` as (1, 1, H, W) bool; RequestError if it is not H x W of 0 and 1."""
    return _read_levels("observed", value, config.image_shape[1:], 2, "0 or 1").bool()[None, None]


def read_image(value: Any, config: ModelConfig, observed: Tensor | None = None) -> Tensor:
    """Return the field `image` as (1, C, H, W) int64 levels; any where it is not observed.

    Args:
        value: nested lists, H x W or H x W x 3, or a PNG in base64.
        observed: (1, 1, H, W) bool; None where every pixel counts.

    Raises:
        RequestError: another shape, an unreadable PNG, or an observed pixel that is transparent or no level.
    """
    channels, height, width = config.image_shape
    if not isinstance(value, str):
        shape = (height, width) if channels == 1 else (height, width, channels)
        expected = f"a level from 0 to {config.num_levels - 1}"
        levels = _read_levels("image", value, shape, config.num_levels, expected, observed)
        return levels.reshape(height, width, channels).permute(2, 0, 1)[None]
    try:
        png = base64.b64decode(value, validate=True)
    except ValueError as error:
        raise RequestError(f"image must be a PNG in base64, or nested lists of levels ({error}).") from None
    try:
        levels = from_png(png, config.image_shape, config.num_levels, observed=observed)
    except ValueError as error:
        raise RequestError(str(error)) from None
    return levels[None]


def read_label(label: int | None, config: ModelConfig, num_images: int = 1) -> Tensor | None:
    """Return the field `label` as (num_images,) int64, -1 for none; None for a model without labels.

    RequestError if the model does not know it.
    """
    label = -1 if label is None else label
    if label >= 0 and config.num_labels == 0:
        raise RequestError(f"label must be absent: this model knows no labels, got {quoted(label)}.")
    if label >= config.num_labels > 0:
        raise RequestError(f"label must be from 0 to {config.num_labels - 1}, or -1 for none, got {quoted(label)}.")
    return torch.full((num_images,), label) if config.num_labels else None


def to_lists(levels: Tensor) -> list[Any]:
    """Return (B, C, H, W) levels as B nested lists, H x W or H x W x 3."""
    return (levels[:, 0] if levels.shape[1] == 1 else levels.permute(0, 2, 3, 1)).tolist()
