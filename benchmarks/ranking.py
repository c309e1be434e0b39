"""How well `rank` finds strangers: `python -m benchmarks.ranking` hides some among MNIST's test digits.

    python -m benchmarks.ranking weights/gated_pixelcnn-mnist

Twenty of each kind at a time, ten times, among the first 2,000 test digits; printed is the area under each score's ROC
curve, the mean of the ten and the least of them: the share of pairs (a stranger, a digit) that it puts in order.
"""

import io
import math
import sys
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from typer import Argument

from benchmarks.command import command
from pipelines.stages.train import load
from pixelcnn import load_checkpoint, log_prob
from pixelcnn.data import binarize
from pixelcnn.images import to_picture, to_png
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.packing.ranking import beyond_complexity

NUM_DIGITS, NUM_STRANGERS, NUM_DRAWS = 2000, 20, 10


def auroc(score: Tensor, is_stranger: Tensor) -> float:
    """Return the area under the ROC curve of (N,) scores: P(a stranger's is higher); a tie counts half."""
    strangers, others = score[is_stranger][:, None], score[~is_stranger]
    return ((strangers > others).double() + (strangers == others).double() / 2).mean().item()


def webp_bytes(image: Tensor) -> int:
    """Return the bytes of a binary image, (1, H, W), as lossless WebP."""
    buffer = io.BytesIO()
    to_picture(image, 2).convert("RGB").save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.tell()


def measures_of(model: AutoregressiveModel, levels: Tensor) -> Tensor:
    """Return (N, 4) float64: nats, bytes as PNG and as WebP, and bytes of the transposed image as PNG."""
    with torch.inference_mode():
        nats = -torch.cat([log_prob(model, part) for part in torch.split(levels, 50)]).double()
    sizes = [
        [len(to_png(x, 2, optimize=True)), webp_bytes(x), len(to_png(x.mT.contiguous(), 2, optimize=True))]
        for x in levels
    ]
    return torch.cat([nats[:, None], torch.tensor(sizes, dtype=torch.float64)], dim=1)


NATS_PER_BYTE = 8 * math.log(2)
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "nats": lambda m: m[:, 0],
    "nats, far from the median": lambda m: (m[:, 0] - m[:, 0].median()).abs(),
    "nats less the PNG's bits": lambda m: m[:, 0] - NATS_PER_BYTE * m[:, 1],
    "nats less the WebP's bits": lambda m: m[:, 0] - NATS_PER_BYTE * m[:, 2],
    "beyond the line by WebP": lambda m: beyond_complexity(m[:, 0], m[:, 2]),
    "beyond the line by PNG of the transposed image": lambda m: beyond_complexity(m[:, 0], m[:, 3]),
    "**beyond the line by PNG** (`corrected`)": lambda m: beyond_complexity(m[:, 0], m[:, 1]),
}


def measure(folder: Annotated[str, Argument()] = "weights/gated_pixelcnn-mnist") -> None:
    """Print the table of one checkpoint."""
    model, _ = load_checkpoint(folder)
    digits = load("mnist").images["test"].long()
    things = load("fashion_mnist").images["test"][: NUM_STRANGERS * NUM_DRAWS]
    kinds = {
        "clothes, threshold": (things > 127).long(),
        "clothes, Bernoulli": binarize(things, torch.Generator().manual_seed(0)),
        "turned by a quarter": digits[NUM_DIGITS:][: len(things)].rot90(1, dims=(2, 3)),
        "mirrored top to bottom": digits[NUM_DIGITS:][: len(things)].flip(2),
    }
    usual = measures_of(model, digits[:NUM_DIGITS])
    strange = {kind: torch.split(measures_of(model, levels), NUM_STRANGERS) for kind, levels in kinds.items()}
    is_stranger = torch.arange(NUM_DIGITS + NUM_STRANGERS) >= NUM_DIGITS
    print(f"| score | {' | '.join(kinds)} |\n|{' --- |' * (len(kinds) + 1)}")
    for name, score in SCORES.items():
        areas = {kind: [auroc(score(torch.cat([usual, s])), is_stranger) for s in strange[kind]] for kind in kinds}
        cells = [f"{sum(found) / len(found):.3f} ({min(found):.3f})" for found in areas.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(command(measure))
