"""Sampling: slow, obvious, the reference that every faster sampler must equal.

A sampler is a function of (model, u): the noise is an argument, so the same `u` gives the same image.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pixelcnn.model import AutoregressiveModel, check_label, check_observed


def generator_for(seed: int, *path: int) -> torch.Generator:
    """Return a generator that depends on (seed, path) alone."""
    state = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)


def check_noise(u: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless `u` is (B, C, H, W) float in [0, 1)."""
    if u.dim() != 4 or tuple(u.shape[1:]) != image_shape:
        raise ValueError(f"u must have shape (B, {', '.join(map(str, image_shape))}), got {tuple(u.shape)}.")
    if not u.is_floating_point():
        raise ValueError(f"u must be uniform noise of a float dtype, got {u.dtype}.")
    if not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError("u must lie in [0, 1), as torch.rand gives it.")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is a finite number of at least 0."""
    if not math.isfinite(temperature) or temperature < 0:
        raise ValueError(f"temperature must be 0 (the most likely level) or a positive number, got {temperature}.")


def draw_level(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Draw one level per row by inverting the cumulative distribution at `u`.

    Args:
        logits: (..., K).
        u: (...) in [0, 1).
        temperature: divides the logits; 0 takes the most likely level (the lowest one of a tie).

    Returns:
        (...) int64: the smallest level whose cumulative probability exceeds `u`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # float64, so that the same logits give the same level whatever the dtype of the network.
    logits = logits.double()
    # The largest logit becomes 0: divided by a tiny temperature it stays finite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    # Rounding can leave the last entry just below 1: the last level is what remains.
    return (cumulative[..., :-1] <= u.double()[..., None]).sum(dim=-1)


def prepare_canvas(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None,
    temperature: float,
    drawing: Tensor | None,
    observed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check a sampler's arguments, as `naive_sample` describes them; return what it starts from.

    Returns:
        levels: (B, C, H, W) int64, the drawing where observed, else 0.
        missing: (B, H, W) bool.

    Raises:
        ValueError: a shape, dtype or range is wrong.
    """
    config = model.config
    check_noise(u, config.image_shape)
    check_temperature(temperature)
    if label is not None:
        check_label(label, len(u), config)
    if (drawing is None) != (observed is None):
        raise ValueError("drawing and observed must be given together: one says what is known, the other where.")
    if drawing is None or observed is None:
        missing = torch.ones(len(u), *u.shape[2:], dtype=torch.bool, device=u.device)
        return torch.zeros(u.shape, dtype=torch.int64, device=u.device), missing
    if len(drawing) != len(u):
        raise ValueError(f"drawing must have the batch size of u, {len(u)}, got {len(drawing)}.")
    check_observed(drawing, observed, config)
    return torch.where(observed, drawing, 0), ~observed[:, 0]


def sample_in_parts(
    sampler: Callable[..., Tensor],
    parts: list[tuple[AutoregressiveModel, Tensor]],
    u: Tensor,
    label: Tensor | None,
    temperature: float,
    drawing: Tensor,
    observed: Tensor,
    on_row: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """Sample images that need several networks: one after the other, rows being handed out with the last.

    Args:
        parts: each network with the indices of its images, as `AutoregressiveModel.networks` gives them.
    """
    levels = torch.zeros(u.shape, dtype=torch.int64, device=u.device)
    for network, index in parts:

        def hand_out(row: int, values: Tensor, index: Tensor = index) -> None:
            assert on_row is not None
            levels[index, :, row] = values
            on_row(row, levels[:, :, row])

        is_last = network is parts[-1][0]
        some_label = None if label is None else label[index]
        levels[index] = sampler(
            network,
            u[index],
            some_label,
            temperature,
            drawing[index],
            observed[index],
            on_row=hand_out if is_last and on_row is not None else None,
        )
    return levels


@torch.no_grad()  # not inference_mode: its tensors cannot be scored by log_prob while gradients are on
def naive_sample(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Sample images in raster order, with one full forward pass per sub-pixel.

    Args:
        u: (B, C, H, W) uniform noise in [0, 1), the only randomness.
        label: (B,) int64, -1 for none; None for no labels.
        temperature: divides the logits; 1 samples the model itself, 0 takes the most likely level of each sub-pixel.
        drawing: (B, C, H, W) int64 levels that are kept where observed; ignored elsewhere. A model with a context
            network sees all of it at every pixel; one without sees of it what lies before the pixel.
        observed: (B, 1, H, W) bool, True where the pixel of `drawing` is known. Given together with `drawing`.

    Returns:
        (B, C, H, W) int64 levels in [0, K).

    Raises:
        ValueError: a shape, dtype or range differs from the above.
    """
    levels, missing = prepare_canvas(model, u, label, temperature, drawing, observed)
    seen = (drawing, observed) if model.config.context_features else (None, None)
    channels, height, width = model.config.image_shape
    for row in range(height):
        for column in range(width):
            here = missing[:, row, column]  # (B,)
            if not here.any():
                continue
            for channel in range(channels):
                logits = model(levels, label, *seen)[:, :, channel, row, column]  # (B, K)
                drawn = draw_level(logits, u[:, channel, row, column], temperature)
                levels[:, channel, row, column] = torch.where(here, drawn, levels[:, channel, row, column])
    return levels
