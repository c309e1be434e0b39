"""The scores that versions are compared by: NLL image by image, of whole images and of their missing parts."""

import hashlib
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pipelines.files import atomic_write
from pipelines.promotion.rule import Candidate
from pipelines.registry import versions as registry
from pipelines.registry.provenance import core_sha256
from pipelines.registry.versions import Version
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.completion import score_completions
from pixelcnn.data import Dataset
from pixelcnn.evaluation import check_fit, per_image_completion_nll, per_image_nll
from pixelcnn.models.registry import code_beside, model_name
from pixelcnn.observed import SCORED

SCORES_FOLDER = Path("reports/promotions/scores")
NUM_COMPLETED = 1000  # validation images whose completion is scored, six masks each


class MisfitError(ValueError):
    """A version is not for images, or labels, such as those of the data."""


def score(version: Version, data: Dataset, batch_size: int) -> Candidate:
    """Fetch a version, whole, and score it on the validation split, without label.

    What was scored already, by the same code on the same data, is read from `SCORES_FOLDER`.

    Returns:
        Joint NLL of each image, and of the first `NUM_COMPLETED` the mean completion NLL over the masks of
        `observed.SCORED`; of a model without a context network that of clamping in raster order. (N,) and (M,) float64.

    Raises:
        MisfitError: it does not fit the data.
        ValueError: it cannot be fetched or loaded.
    """
    weights_sha256 = version.tags["weights_sha256"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = registry.download(version, Path(folder))  # checked, also where its scores are kept
        model, _ = load_checkpoint(checkpoint)
        code = [core_sha256(), *code_beside(model_name(model.config)), str(NUM_COMPLETED)]
        key = (weights_sha256, data.data_hash, hashlib.sha256(" ".join(code).encode()).hexdigest())
        kept = SCORES_FOLDER / f"{'-'.join(part[:16] for part in key)}.safetensors"
        try:
            nats = load_file(kept)
        except (FileNotFoundError, SafetensorError):
            try:
                check_fit(model.config, data)
            except ValueError as error:
                raise MisfitError(str(error)) from None
            by_mask = per_image_completion_nll(model, data, "validation", NUM_COMPLETED, batch_size, score_completions)
            completion = torch.stack([by_mask[mask] for mask in SCORED]).mean(dim=0)
            nats = {"joint": per_image_nll(model, data, "validation", batch_size=batch_size), "completion": completion}
            with suppress(OSError):  # a full disk: to keep them spares time, and is no part of the score
                atomic_write(kept, save(nats))
    return Candidate(version.version, nats["joint"], nats["completion"])
