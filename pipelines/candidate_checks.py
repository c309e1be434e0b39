"""What a candidate must pass before it is compared with the champion: a leak would win them all by cheating."""

import copy
import math
import time

import torch

from pixelcnn.fast_sampling import sample, warm_up
from pixelcnn.model import AutoregressiveModel

NUM_CUTS = 12  # a few seconds for 32x32x3 images, where pixelcnn.causality.count_leaks takes minutes


def check_candidate(model: AutoregressiveModel, levels: torch.Tensor, max_sample_s: float) -> None:
    """Check that a model gives numbers, does not look ahead, and samples an image in time.

    Args:
        model: on the CPU, in eval mode.
        levels: (C, H, W) int64 in [0, K), any image.
        max_sample_s: seconds that one image may take.

    Raises:
        ValueError: it fails one of these; the message says which.
    """
    leaks = sum(count_leaking_cuts(network, levels) for network in (model, model.completer) if network is not None)
    if leaks:
        raise ValueError(f"it leaks: at {leaks} of the sub-pixels tried, logits follow what they are to predict.")
    check_sampling_time(model, max_sample_s)


@torch.inference_mode()
def count_leaking_cuts(model: AutoregressiveModel, levels: torch.Tensor) -> int:
    """Change a whole rest of the image, from some sub-pixel on, and see whether earlier logits or its own follow.

    All networks here are convolutions: whatever reaches too far does so at every place that is not at a border. A few
    cuts, among them all colours of each pixel cut at, therefore tell as much as changing every sub-pixel by itself.

    Args:
        levels: (C, H, W) int64 in [0, K).

    Returns:
        How many cuts leak, 0 for a correct model. Bit for bit: in float64, images of one batch do not mix.

    Raises:
        ValueError: a logit is not a finite number.
    """
    model = copy.deepcopy(model).cpu().double().eval()
    channels, height, width = levels.shape
    num_pixels, num_levels = height * width, model.config.num_levels
    order = torch.randperm(num_pixels, generator=torch.Generator().manual_seed(0))
    # Of the first logits nothing at all may be seen; the middle is far from every border.
    pixels = [0, num_pixels // 2 + width // 2, *order.tolist()][: max(NUM_CUTS // channels, 2)]
    # Sub-pixels are numbered in raster order: rows, columns, then channels.
    cuts = torch.tensor([min(p, num_pixels - 1) * channels + c for p in pixels for c in range(channels)])
    rest = torch.arange(num_pixels * channels) >= cuts[:, None]  # (B, H*W*C)
    rest = rest.reshape(-1, height, width, channels).permute(0, 3, 1, 2)  # (B, C, H, W)
    changed = torch.where(rest, (levels + max(num_levels // 2, 1)) % num_levels, levels)
    logits = model(torch.cat([levels[None], changed]))  # (1 + B, K, C, H, W)
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite numbers.")
    moved = (logits[1:] != logits[:1]).any(dim=1).permute(0, 2, 3, 1).flatten(1)  # (B, H*W*C)
    predicted = torch.arange(num_pixels * channels) <= cuts[:, None]
    return int((moved & predicted).any(dim=1).sum())


def check_sampling_time(model: AutoregressiveModel, max_sample_s: float) -> None:
    """Sample one image, and stop as soon as it takes too long.

    Raises:
        ValueError: it took too long.
    """
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
