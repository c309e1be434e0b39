"""Live endings bend with the pen: a tiny stroke changes little of each, in the released network and by its seeds."""

from pathlib import Path

import numpy as np
import torch

from app.service.jobs import noise
from pixelcnn import load_checkpoint
from pixelcnn.completion import complete

WEIGHTS = Path(__file__).parents[2] / "weights" / "gated_pixelcnn-mnist"


def test_a_tiny_stroke_changes_at_most_45_cells_of_an_ending() -> None:
    model, _ = load_checkpoint(WEIGHTS)
    drawing = torch.zeros(1, 1, 28, 28, dtype=torch.int64)
    drawing[..., 4:6, 10:19] = 1  # a bar, then down
    drawing[..., 6:12, 17:19] = 1
    more = drawing.clone()
    more[..., 12:14, 16:18] = 1
    changes = []
    for seed in range(4):
        u = noise(seed, 9, (1, 28, 28))
        pair = [
            complete(model, ink.repeat(9, 1, 1, 1), ink.repeat(9, 1, 1, 1).bool(), u, None, 0.9)
            for ink in (drawing, more)
        ]
        changes.append((pair[0] != pair[1]).double().sum((1, 2, 3)).mean().item())
    assert np.median(changes) <= 45, changes
