"""Exact log-likelihoods, in nats per image, their conversion to bits per dimension, and what would cheat them.

A leak is a change of a sub-pixel that reaches the logits of an earlier one, or its own. Raster order: rows, columns,
then channels. In float64; what moves by more than rounding does is a change.
"""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pixelcnn.models.base import AutoregressiveModel, check_label, check_levels, check_observed, check_tensor

ROUNDING = 1e-12  # in float64: where an image lies in a batch may move the last bits


def pixel_log_prob(
    model: AutoregressiveModel,
    levels: Tensor,
    label: Tensor | None = None,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Return log p(x_i | x_1, ..., x_{i-1}) of every sub-pixel: (B, C, H, W) nats, in float32 or better.

    The arguments are those of the model's forward pass. Given a drawing, too, only the missing sub-pixels' values mean
    anything.
    """
    return model.output.log_prob(model(levels, label, drawing, observed), levels)


def level_probs(
    model: AutoregressiveModel,
    levels: Tensor,
    label: Tensor | None = None,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Return the probability of every level of every sub-pixel given all earlier ones: (B, K, C, H, W).

    The arguments are those of `pixel_log_prob`.
    """
    return _level_logits(model, levels, label, drawing, observed).softmax(dim=1)


def expected_log_prob(
    model: AutoregressiveModel,
    levels: Tensor,
    probabilities: Tensor,
    label: Tensor | None = None,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Return the mean of log p(x_i | x_1, ..., x_{i-1}) over what sub-pixel i may be: (B, C, H, W) nats.

    Where levels are drawn, each sub-pixel by itself, it is the mean of `pixel_log_prob` over the draw of x_i alone.

    Args:
        levels: (B, C, H, W) int64 in [0, K), the ones drawn: what later sub-pixels see.
        probabilities: (B, K, C, H, W), with which each level of each sub-pixel is drawn.

    The others are those of `pixel_log_prob`.
    """
    logits = _level_logits(model, levels, label, drawing, observed)
    return (probabilities * logits.log_softmax(dim=1)).sum(dim=1)


def _level_logits(model: AutoregressiveModel, levels: Tensor, *given: Tensor | None) -> Tensor:
    """Return the log-probability of every level of every sub-pixel, up to a constant: (B, K, C, H, W)."""
    parameters = model(levels, *given)
    parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
    return torch.stack([model.output.level_logits(parameters, c, levels) for c in range(levels.shape[1])], dim=2)


def log_prob(model: AutoregressiveModel, levels: Tensor, label: Tensor | None = None) -> Tensor:
    """Return the exact log-probability of each image, (B,) nats: van den Oord et al. 2016, arXiv:1601.06759, eq. 1.

    Args:
        levels: (B, C, H, W) int64 in [0, K).
        label: (B,) int64, -1 for none; None for no labels.

    Raises:
        ValueError: a shape, dtype or range differs from the above.
    """
    return pixel_log_prob(model, levels, label).sum(dim=(1, 2, 3))


@torch.inference_mode()
def completion_log_prob(
    model: AutoregressiveModel, levels: Tensor, observed: Tensor, label: Tensor | None = None
) -> Tensor:
    """Return the log-probability with which `complete` (temperature 1) fills in these missing pixels: (B,) nats.

    It is the sum over the missing sub-pixels of log p(x_i | x_1, ..., x_{i-1}), given the drawing too if the model has
    a context network: a normalised distribution over them. With a label network, and no label given, it is that of the
    mixture over labels.

    Args:
        levels: (B, C, H, W) int64 in [0, K), the finished images.
        observed: (B, 1, H, W) bool, True where the pixel was known.
        label: (B,) int64, -1 for none; None for no labels.

    Raises:
        ValueError: a shape, dtype or range differs from the above.
    """
    check_observed(levels, observed, model.config, "levels")

    def given(levels: Tensor, observed: Tensor, label: Tensor | None) -> Tensor:
        seen = (levels, observed) if model.config.context_features else (None, None)
        return (pixel_log_prob(model, levels, label, *seen) * ~observed).sum(dim=(1, 2, 3))

    if model.label_network is None:
        return given(levels, observed, label)
    label = torch.full((len(levels),), -1, device=levels.device) if label is None else label
    check_label(label, len(levels), model.config)
    terms = model.label_log_probs(levels, observed, label)
    for column, possible in enumerate(terms.isfinite().T):
        if possible.any():
            index = possible.nonzero()[:, 0]
            terms[index, column] += given(levels[index], observed[index], torch.full_like(index, column - 1))
    return terms.logsumexp(dim=1)


def bits_per_dim(nats: float | Tensor, shape: Sequence[int]) -> float | Tensor:
    """Convert an image's negative log-likelihood in nats into bits per dimension: nats / (C * H * W * ln 2)."""
    return nats / (math.prod(shape) * math.log(2))


def packed_bytes(log_prob: float) -> int:
    """Return how many bytes an image of this log-probability, in nats, takes in a packed file (docs/packing.md).

    Its share of the file's header and of its block's checksums, less than a thousandth in a large file, comes on top.
    """
    return math.ceil(-log_prob / math.log(256))


@torch.inference_mode()
def logits_that_follow(model: AutoregressiveModel, levels: Tensor, changed: Tensor) -> Tensor:
    """Change sub-pixels of an image and see which logits follow, (B, H*W*C) bool; all in raster order.

    Args:
        model: in float64, on the CPU.
        levels: (C, H, W) int64 in [0, K).
        changed: (B, H*W*C) bool, what to change in each trial.

    Raises ValueError if a logit is not a finite number.
    """
    (channels, height, width), num_levels = levels.shape, model.config.num_levels
    where = changed.reshape(-1, height, width, channels).permute(0, 3, 1, 2)  # (B, C, H, W)
    others = torch.where(where, (levels + num_levels // 2) % num_levels, levels)
    before, *after = model(torch.cat([levels[None], others]))

    def distributions(parameters: Tensor, levels: Tensor) -> Tensor:  # (P, ...), (C, ...) -> (any, C, ...)
        found = [model.output.distribution(parameters[None], c, levels[None])[0] for c in range(channels)]
        return torch.stack(found, dim=1)

    distributions_before = distributions(before, levels)
    follow = torch.zeros_like(where)
    for trial, parameters in enumerate(after):
        # Where neither these nor a level moved, no logit can have.
        moved = (parameters != before).flatten(0, -3).any(dim=0) | where[trial].any(dim=0)  # (H, W)
        change = distributions(parameters[..., moved], others[trial][..., moved]) - distributions_before[..., moved]
        if not bool(change.isfinite().all()):
            raise ValueError(
                "the model's logits are not finite numbers: its weights are damaged, or its training diverged."
            )
        follow[trial, :, moved] = (change.abs() > ROUNDING).any(dim=0)
    return follow.permute(0, 2, 3, 1).flatten(1)


def count_leaks(
    model: AutoregressiveModel,
    levels: Tensor,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, num: None,
) -> tuple[int, int]:
    """Change every sub-pixel of an image, (C, H, W) int64, one at a time, and see which logits follow, in float64.

    Args:
        batch_size: changes per forward pass.
        on_progress: called with how many sub-pixels have been changed, and of how many.

    Returns:
        How many sub-pixels reach their own or an earlier logit: 0 for a correct model. And how many reach a later one:
        all but the last, unless its weights are dead there.

    Raises ValueError if a logit is not a finite number, or for levels as `log_prob` does.
    """
    check_tensor("levels", levels)
    check_levels(levels[None], model.config)
    model = copy.deepcopy(model).cpu().double().eval()
    every = torch.arange(levels.numel())
    leaks = reaching = 0
    for indices in torch.split(every[:, None], batch_size):
        follow = logits_that_follow(model, levels, every == indices)
        leaks += int((follow & (every <= indices)).any(dim=1).sum())
        reaching += int((follow & (every > indices)).any(dim=1).sum())
        on_progress(int(indices[-1]) + 1, len(every))
    return leaks, reaching
