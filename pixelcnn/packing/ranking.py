"""Which pictures are strange: what each costs a model, and how much more that is than its complexity explains.

A likelihood alone calls simple pictures likely, whatever they show (arXiv:1810.09136). As in arXiv:1909.11480, a
general codec says how complex a picture is; but its bytes are set against the model's nats by a line through the
pictures at hand, for a codec has costs of its own, such as a header (docs/ranking.md compares).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.config import ModelConfig
from pixelcnn.evaluation import SCORED_BATCH
from pixelcnn.images import to_png
from pixelcnn.likelihood import log_prob
from pixelcnn.packing.pictures import OnProgress, open_images

FIT_STEPS = 50
NUM_SHOWN = 16  # of each end of a ranking
TUNING = 1.345  # Huber's: 95 % of least squares' efficiency where errors are normal
MAD_TO_STDEV = 1.4826  # of a normal distribution


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """N pictures with their scores, the strangest first."""

    names: list[str]  # of the files, relative to their folder; numbers, counted from 0, where they have none
    nats: Tensor  # (N,) float64, -log p of each, without a label
    png_bytes: Tensor  # (N,) float64, of each as the smallest PNG that Pillow makes
    corrected: Tensor  # (N,) float64 nats, as `beyond_complexity` says; they fall
    ends: Tensor  # (M, C, H, W) int64 levels: the first and the last `NUM_SHOWN`; all where that is all
    config: ModelConfig
    num_left_out: int  # files of the folder that are no PNG


def beyond_complexity(nats: Tensor, png_bytes: Tensor) -> Tensor:
    """Return by how many nats each picture exceeds what one of so many bytes usually costs; all are (N,) float64.

    What is usual is a line through all pictures, by Huber's robust regression, so that the strange ones hardly move it.

    Source: Huber, Robust Statistics, 1981, section 7.8: iteratively reweighted least squares.
    """
    columns = torch.stack([torch.ones_like(png_bytes), png_bytes], dim=1)
    weights, excess = torch.ones_like(nats), nats
    for _ in range(FIT_STEPS):
        weighted = columns * weights[:, None], nats[:, None] * weights[:, None]
        line: Tensor = torch.linalg.lstsq(*weighted, driver="gelsd").solution
        excess = nats - (columns @ line)[:, 0]
        far = excess.abs() / (TUNING * MAD_TO_STDEV * excess.abs().median()).clamp_min(1e-9)
        weights = far.clamp_min(1).rsqrt()
    return excess


@torch.inference_mode()
def rank(
    checkpoint: Path, images: Path, *, split: str = "test", on_progress: OnProgress = lambda done, num: None
) -> Ranking:
    """Rank pictures by how strange a model finds them.

    ValueError if there are none, one does not fit the model, or its likelihoods are no numbers.

    Args:
        images, split: as `pixelcnn.packing.pack` takes them; here levels that the model does not have are rounded.
        on_progress: called with the number of images done, and of all.
    """
    model, _ = load_checkpoint(checkpoint)
    config = model.config
    source = open_images(images, split, config, exact=False)
    nats, png_bytes = torch.empty(source.num, dtype=torch.float64), torch.empty(source.num, dtype=torch.float64)
    for start in range(0, source.num, SCORED_BATCH):
        stop = min(start + SCORED_BATCH, source.num)
        levels = source.read(start, stop)
        nats[start:stop] = -log_prob(model, levels)
        if not bool(nats[start:stop].isfinite().all()):
            raise ValueError("the model's likelihoods are not finite: its training diverged. Use an earlier model.")
        sizes = [len(to_png(image, config.num_levels, optimize=True)) for image in levels]
        png_bytes[start:stop] = torch.tensor(sizes)
        on_progress(stop, source.num)
    corrected = beyond_complexity(nats, png_bytes)
    order = corrected.argsort(descending=True, stable=True)
    ends = order if len(order) <= 2 * NUM_SHOWN else torch.cat([order[:NUM_SHOWN], order[-NUM_SHOWN:]])
    return Ranking(
        names=[source.names[i] if source.names else str(i) for i in order.tolist()],
        nats=nats[order],
        png_bytes=png_bytes[order],
        corrected=corrected[order],
        ends=torch.cat([source.read(i, i + 1) for i in ends.tolist()]),
        config=config,
        num_left_out=source.num_left_out,
    )
