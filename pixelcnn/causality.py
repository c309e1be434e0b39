"""Count leaks: changes of a sub-pixel that reach the logits of an earlier one, or its own, and so cheat the likelihood.

Raster order: rows, columns, then channels. Bit for bit: in float64 on the CPU, images of one batch do not mix.
"""

import copy
import math
from collections.abc import Callable

import torch

from pixelcnn.model import AutoregressiveModel


@torch.inference_mode()
def count_leaks(
    model: AutoregressiveModel,
    levels: torch.Tensor,
    batch_size: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> tuple[int, int]:
    """Change every sub-pixel of an image, one at a time, and see which logits follow.

    Args:
        model: any; a float64 copy of it is asked.
        levels: (C, H, W) int64 in [0, K).
        batch_size: changes per forward pass.
        on_batch: called with the number of sub-pixels asked so far.

    Returns:
        How many sub-pixels reach their own or an earlier logit: 0 for a correct model. And how many reach a later one:
        all but the last, unless its weights are dead there.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    channels, _, width = levels.shape
    num = math.prod(levels.shape)
    leaks = reaching = 0
    for start in range(0, num, batch_size):
        indices = torch.arange(start, min(start + batch_size, num))
        # In raster order: (row, column, channel). The first image of the batch is the unchanged one.
        rows, columns, colours = indices // (width * channels), indices // channels % width, indices % channels
        batch = levels.repeat(len(indices) + 1, 1, 1, 1)
        which = torch.arange(1, len(indices) + 1)
        old = batch[which, colours, rows, columns]
        batch[which, colours, rows, columns] = (old + model.config.num_levels // 2) % model.config.num_levels
        logits = model(batch)  # (1 + B, K, C, H, W)
        moved = (logits[1:] != logits[:1]).any(dim=1).permute(0, 2, 3, 1).flatten(1)  # (B, H*W*C), raster order
        later = torch.arange(num) > indices[:, None]
        leaks += int((moved & ~later).any(dim=1).sum())
        reaching += int((moved & later).any(dim=1).sum())
        if on_batch is not None:
            on_batch(int(indices[-1]) + 1)
    return leaks, reaching
