"""What a candidate must pass before it is compared with the champion: a leak would win them all by cheating."""

import copy
import math
import time

import torch

from pixelcnn.likelihood import logits_that_follow
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.sampling.fast import sample, warm_up

NUM_CUTS = 12  # a few seconds for 32x32x3 images, where pixelcnn.likelihood.count_leaks takes minutes


def check_candidate(model: AutoregressiveModel, levels: torch.Tensor, max_sample_s: float) -> None:
    """Raise ValueError unless a model gives numbers, does not look ahead, and samples an image in time.

    It is on the CPU, in eval mode; `levels` are any image, (C, H, W) int64 in [0, K).
    """
    leaks = sum(count_leaking_cuts(network, levels) for network in (model, model.completer) if network is not None)
    if leaks:
        raise ValueError(f"it leaks: at {leaks} of the sub-pixels tried, logits follow what they are to predict.")
    check_sampling_time(model, max_sample_s)


def count_leaking_cuts(model: AutoregressiveModel, levels: torch.Tensor) -> int:
    """Change a whole rest of the image, from some sub-pixel on; return how often earlier logits or its own follow.

    A convolution that reaches too far does so everywhere but at a border, so that a few cuts, among them all colours of
    each pixel cut at, find it. Attention can leak at some rows alone: for it the cuts are a sample, and
    `pixelcnn.likelihood.count_leaks` is the full test. ValueError if a logit is not a finite number.
    """
    model = copy.deepcopy(model).double()
    channels, height, width = levels.shape
    num_pixels = height * width
    order = torch.randperm(num_pixels, generator=torch.Generator().manual_seed(0))
    # Of the first logits nothing at all may be seen; the middle is far from every border.
    pixels = [0, num_pixels // 2 + width // 2, *order.tolist()][: max(NUM_CUTS // channels, 2)]
    # Sub-pixels are numbered in raster order: rows, columns, then channels.
    cuts = torch.tensor([min(p, num_pixels - 1) * channels + c for p in pixels for c in range(channels)])[:, None]
    every = torch.arange(num_pixels * channels)
    follow = logits_that_follow(model, levels, every >= cuts)
    return int((follow & (every <= cuts)).any(dim=1).sum())


def check_sampling_time(model: AutoregressiveModel, max_sample_s: float) -> None:
    """Sample one image; raise ValueError as soon as that takes too long."""
    warm_up(model)  # compiling is not sampling
    u = torch.rand((1, *model.config.image_shape), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()

    def on_row(row: int, levels: torch.Tensor) -> None:
        took = time.monotonic() - start
        if took > max_sample_s:
            done = math.ceil(100 * (row + 1) / u.shape[2])
            raise ValueError(
                f"it samples too slowly: {done} % of one image took {took:.2f} s, promote.max_sample_s allows "
                f"{max_sample_s:g} s for the whole."
            )

    sample(model, u, on_row=on_row)
