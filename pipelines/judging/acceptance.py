"""Acceptance: how often a judge takes what a model draws for an image of the dataset.

It is what a likelihood does not tell: a digit that falls apart costs few nats.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pipelines.judging.judge import Judge
from pixelcnn.completion import complete
from pixelcnn.data import Dataset, generator_for
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.observed import beginnings, ink_of, pen_noise, scored_masks

# What is known of each drawing, and what is judged then.
KNOWN = {
    "nothing": "whole samples",
    "ink45": "endings of the first 45 % of the ink",
    "right": "endings of the right half",
    "top": "endings of the upper half",
}
NUM_SHOWN, NUM_SEVERAL = 9, 60  # endings of a drawing beside each other; drawings of which as many are counted
SEED = 0  # of what is known, and of the endings


def known_part(known: str, levels: Tensor, num_levels: int) -> Tensor:
    """Return what is known of each drawing: (B, C, H, W) int64 -> (B, 1, H, W) bool."""
    num, _, height, width = levels.shape
    if known == "ink45":
        noise = pen_noise(np.random.default_rng(SEED), num, height, width)
        return torch.from_numpy(beginnings(noise, ink_of(levels, num_levels), np.full(num, 0.45)))[:, None]
    if known == "nothing":
        return torch.zeros(num, 1, height, width, dtype=torch.bool)
    return scored_masks({"right": "left", "top": "bottom"}[known], levels, num_levels)  # which names what is missing


def judged_images(model: AutoregressiveModel, data: Dataset, num_images: int | None) -> dict[str, Tensor]:
    """Return what judges look at: real images, a model's whole images, and its endings of real images' parts.

    Args:
        model: on the CPU, in eval mode.
        num_images: the first so many of the test split, from which neither the model nor a judge of the same dataset
            has learned; None for all. One ending each, without label, at temperature 1.

    Returns:
        (N, C, H, W) int64 levels by name: `real`; for each of `KNOWN` the endings; and as `several`, nine endings each
        of some drawings' first 45 % of ink, one drawing after the other.
    """
    levels = data.levels("test", slice(num_images))

    def ended(drawings: Tensor, observed: Tensor) -> Tensor:
        u = torch.rand(drawings.shape, generator=generator_for(SEED), dtype=torch.float64)
        return complete(model, drawings * observed, observed, u)

    several = levels[:NUM_SEVERAL]
    part = known_part("ink45", several, data.num_levels)
    return {
        "real": levels,
        **{known: ended(levels, known_part(known, levels, data.num_levels)) for known in KNOWN},
        "several": ended(*(x.repeat_interleave(NUM_SHOWN, dim=0) for x in (several, part))),
    }


def acceptance(images: Mapping[str, Tensor], num_levels: int, judge: Judge) -> dict[str, float]:
    """Return the shares of what `judged_images` returned that a judge accepts.

    They are `test/accepted_real` and, for each of `KNOWN`, e.g. `test/accepted_nothing` (of whole images: nothing was
    known); and `test/labels_among_nine`: how many different labels the judge sees, on average, in those that it accepts
    of nine endings of a drawing's first 45 % of ink.
    """
    shares = {name: judge.look(images[name], num_levels)[0].float().mean().item() for name in ("real", *KNOWN)}
    accepted, label = (found.view(-1, NUM_SHOWN) for found in judge.look(images["several"], num_levels))
    seen = [set(labels[good].tolist()) for good, labels in zip(accepted, label, strict=True)]
    return {
        **{f"test/accepted_{name}": share for name, share in shares.items()},
        "test/labels_among_nine": sum(map(len, seen)) / len(seen),
    }
