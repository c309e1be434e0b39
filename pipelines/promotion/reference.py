"""The reference of a champion's drawings: what beginnings of validation images are like, as the service measures them.

It is a file of the model in the store. The service compares with it what people draw (app/service/operation/drift.py).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from pipelines.registry.provenance import prepared_file
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.completion import complete, drawing_bits_per_dim, shares_of_drawing
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.observed import beginnings, ink_of, pen_noise

REFERENCE_FILE = "beginnings.json"
NUM_DRAWINGS = 200
BATCH = 20
PARTS = (0.1, 0.7)  # of the ink, as in training


def reference_of(checkpoint: Path, data: Dataset) -> dict[str, list[float]]:
    """Return each statistic's values: of beginnings, as the canvas sends them by default, completed by the model."""
    model, _ = load_checkpoint(checkpoint)
    levels = data.levels("validation", slice(0, NUM_DRAWINGS))
    rng = np.random.default_rng(0)
    ink = ink_of(levels, data.num_levels)
    drawn = beginnings(pen_noise(rng, *ink.shape), ink, rng.uniform(*PARTS, len(ink)))
    rows = np.logical_or.accumulate(drawn[:, ::-1], axis=1)[:, ::-1].any(axis=2, keepdims=True)  # down to the lowest
    is_ink_alone = model.config.context_features or data.image_shape[0] == 3  # as in app/canvas/widgets.py
    observed = torch.from_numpy(drawn if is_ink_alone else drawn | rows)[:, None]
    levels = levels * torch.from_numpy(drawn)[:, None]  # what is known and not drawn is blank
    u = torch.rand(levels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batches = zip(*(torch.split(tensor, BATCH) for tensor in (levels, observed, u)), strict=True)
    bits = [drawing_bits_per_dim(model, complete(model, one, known, noise), known) for one, known, noise in batches]
    values = {"bits_per_dim": torch.cat(bits), **shares_of_drawing(levels, observed, data.num_levels)}
    is_drawn = observed.flatten(1).any(dim=1)  # an image without ink has no beginning
    return {name: [round(value, 5) for value in found[is_drawn].tolist()] for name, found in values.items()}


def write_reference(checkpoint: Path, dataset: str, data_hash: str, known: Path | None = None) -> bool:
    """Write the reference beside a checkpoint, if it can be had; return whether it could.

    It is copied from the file `known`, if somebody has made it, or else made of the data that the checkpoint was
    trained on, those of `data_hash`, if they are here.
    """
    if known is not None and known.exists():
        shutil.copyfile(known, checkpoint / REFERENCE_FILE)
        return True
    try:
        data = load_dataset(prepared_file(dataset))
    except ValueError:  # they are not here, or damaged: nobody waits for a rollback because of that
        return False
    if data.data_hash == data_hash:
        (checkpoint / REFERENCE_FILE).write_text(json.dumps(reference_of(checkpoint, data)))
    return data.data_hash == data_hash
