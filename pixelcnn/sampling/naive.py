"""Sampling: slow, obvious, the reference that every faster sampler must equal.

A sampler is a function of (model, u): the noise is an argument, so the same `u` gives the same image.
"""

import itertools
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelcnn.models.base import AutoregressiveModel, check_label, check_observed, check_tensor
from pixelcnn.models.outputs import draw_level

# Called with a row's index and its levels, (B, C, W) int64, once the row is finished in every image.
OnRow = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Canvas:
    """Images to be completed: what a sampler starts from, and works on."""

    u: Tensor  # (B, C, H, W) uniform noise in [0, 1); for the compiled sampler also level + 1: score it, do not draw
    label: Tensor  # (B,) int64, -1 for none
    temperature: float  # divides the logits
    levels: Tensor  # (B, C, H, W) int64, contiguous, 0 where missing: completed in place
    missing: Tensor  # (B, H, W) bool
    on_row: OnRow | None = None
    label_log_probs: Tensor | None = None  # (B, 1 + num_labels) float64, what a label network's labels were drawn from

    def part(self, index: Tensor | slice, on_row: OnRow | None) -> "Canvas":
        """Return some of the images: the same memory for a slice, a copy for indices."""
        u, label, levels, missing = (x[index] for x in (self.u, self.label, self.levels, self.missing))
        return Canvas(u, label, self.temperature, levels, missing, on_row)


def new_canvas(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
    on_row: OnRow | None = None,
) -> Canvas:
    """Check a sampler's arguments, as `naive_sample` describes them; return what it starts from.

    Labels that are not given are drawn here, where the model has a label network and something is known.
    """
    config, device = model.config, model.head.weight.device
    if device.type == "mps":
        raise ValueError("mps has no float64, in which levels are drawn: move the model to the CPU.")
    check_tensor("u", u)
    if u.device != device:
        raise ValueError(f"u must be on the model's device, {device}, got {u.device}.")
    if u.dim() != 4 or tuple(u.shape[1:]) != config.image_shape:
        raise ValueError(f"u must have shape (B, {', '.join(map(str, config.image_shape))}), got {tuple(u.shape)}.")
    if not u.is_floating_point():
        raise ValueError(f"u must be uniform noise of a float dtype, got {u.dtype}.")
    # Image by image, and zeros by numpy: nothing here is for torch's threads, for which a compiled sampler would pay.
    if not all(bool(((image >= 0) & (image < 1)).all()) for image in u):
        raise ValueError("u must lie in [0, 1), as torch.rand gives it.")
    is_number = isinstance(temperature, numbers.Real) and not isinstance(temperature, bool)
    if not is_number or not 0 <= temperature < math.inf or int(temperature) > 10**38:
        raise ValueError(f"temperature must be 0 (the most likely level) or a positive number, got {temperature}.")
    if label is None:
        label = torch.full((len(u),), -1, device=u.device)
    else:
        check_label(label, len(u), config)
    if (drawing is None) != (observed is None):
        raise ValueError("drawing and observed must be given together: one says what is known, the other where.")
    label_log_probs, levels = None, torch.from_numpy(np.zeros(u.shape, np.int64)).to(device)
    missing = torch.ones_like(u[:, 0], dtype=torch.bool)
    if drawing is not None and observed is not None:
        if len(drawing) != len(u):
            raise ValueError(f"drawing must have the batch size of u, {len(u)}, got {len(drawing)}.")
        check_observed(drawing, observed, config)
        levels, missing = torch.where(observed, drawing, 0), ~observed[:, 0]
        if model.label_network is not None:
            label_log_probs = model.label_log_probs(levels, observed, label)
            label, u = _drawn_labels(label_log_probs, u, temperature)
    # In memory all alike: compiled code is compiled anew for other strides.
    label, levels, missing = label.contiguous(), levels.contiguous(), missing.contiguous()
    return Canvas(u, label, temperature, levels, missing, on_row, label_log_probs)


def _drawn_labels(log_probs: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw (B,) labels with the noise of pixel (0, 0), known or not: a small change of a drawing seldom changes them.

    Within its label's interval the noise is uniform again: rescaled to [0, 1), it replaces that pixel's noise in the
    noise that is returned.
    """
    noise = u[:, 0, 0, 0].double()
    column = draw_level(log_probs, noise, temperature)
    if temperature:
        probs = ((log_probs - log_probs.amax(dim=1, keepdim=True)) / temperature).softmax(dim=1)
        below, width = ((x.gather(1, column[:, None])[:, 0]) for x in (probs.cumsum(dim=1) - probs, probs))
        u = u.clone()
        u[:, 0, 0, 0] = ((noise - below) / width).clamp(0, 1 - torch.finfo(u.dtype).eps)
    return column - 1, u


def sample_by_network(
    sampler: Callable[[AutoregressiveModel, Canvas], Tensor | None], model: AutoregressiveModel, canvas: Canvas
) -> tuple[Tensor, Tensor | None]:
    """Let a sampler complete the images of each network that they need, one after the other.

    It completes a canvas in place and returns (B,) float64 nats, the log-probability of what it drew, or None. Rows are
    handed out while the last network's images are sampled.

    Returns:
        (B, C, H, W) int64 levels; and what the sampler returned, (B,).
    """
    levels, scores, parts = canvas.levels, list[Any](), model.networks(~canvas.missing[:, None])
    if len(parts) == 1:
        return levels, sampler(parts[0][0], canvas)

    def hand_out(row: int, values: Tensor) -> None:  # of the last network's images
        levels[parts[-1][1], :, row] = values
        if canvas.on_row is not None:
            canvas.on_row(row, levels[:, :, row])

    for network, index in parts:
        part = canvas.part(index, hand_out if canvas.on_row is not None and network is parts[-1][0] else None)
        scores.append(sampler(network, part))
        levels[index] = part.levels
    order = torch.cat([index for _, index in parts]).argsort()
    return levels, None if scores[0] is None else torch.cat(scores)[order]


@torch.no_grad()  # not inference_mode: its tensors cannot be scored by log_prob while gradients are on
def naive_sample(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Sample images, (B, C, H, W) int64 levels in [0, K), in raster order, with a full forward pass per sub-pixel.

    Args:
        u: (B, C, H, W) uniform noise in [0, 1), the only randomness.
        label: (B,) int64, -1 for none; None for no labels.
        temperature: divides the logits, and with a label network the label's log-probabilities; 1 samples the model
            itself, 0 takes the most likely level of each sub-pixel.
        drawing: (B, C, H, W) int64 levels that are kept where observed; ignored elsewhere. A model with a context
            network sees all of it at every pixel; one without sees of it what lies before the pixel.
        observed: (B, 1, H, W) bool, True where the pixel of `drawing` is known. Given together with `drawing`.

    Raises:
        ValueError: a shape, dtype or range differs from the above.
    """
    canvas = new_canvas(model, u, label, temperature, drawing, observed)
    levels, seen = canvas.levels, (drawing, observed) if model.config.context_features else (None, None)
    channels, height, width = model.config.image_shape
    for row, column in itertools.product(range(height), range(width)):
        here = canvas.missing[:, row, column]  # (B,)
        for channel in range(channels if here.any() else 0):
            parameters = model(levels, canvas.label, *seen)[..., row, column]
            logits = model.output.level_logits(parameters, channel, levels[:, :channel, row, column])  # (B, K)
            if logits.isnan().any():
                raise ValueError("the model's logits are not numbers: its training diverged. Use an earlier model.")
            drawn = draw_level(logits, canvas.u[:, channel, row, column], temperature)
            levels[:, channel, row, column] = torch.where(here, drawn, levels[:, channel, row, column])
    return levels
