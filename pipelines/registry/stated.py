"""The score of the first few images that a checkpoint states: quick to measure again, so that a wrong file is found."""

import re
from collections.abc import Mapping
from typing import Any

from pixelcnn.data import Dataset
from pixelcnn.evaluation import per_image_nll
from pixelcnn.models.base import AutoregressiveModel

TOLERANCE_NATS = 0.05  # rounding differs between processors; another file differs by whole nats
# What pipelines/stages/evaluate.py calls CHECKED_SCORE; older checkpoints name another split.
_STATED = re.compile(r"(validation|test)/nll_nats_first_(\d+)")


def stated_score(what: str, scores: Mapping[str, Any]) -> tuple[str, int, float]:
    """Return the score of the first few images that a checkpoint's scores state: split, number, nats per image.

    Args:
        what: they are of; named in the error.

    Raises:
        ValueError: they state none.
    """
    for key, value in scores.items():
        if match := _STATED.fullmatch(key):
            return match[1], int(match[2]), value
    raise ValueError(f"the scores.json of {what} states no score of the first few images. Train the pair again.")


def check_scores(what: str, model: AutoregressiveModel, scores: Mapping[str, Any], data: Dataset) -> str:
    """Score a model on the few images whose score its scores state, as `SPLIT/nll_nats_first_NUMBER`.

    Args:
        what: is scored; named in the error.
        data: those that the scores were measured on.

    Returns:
        Which images these are.

    Raises:
        ValueError: it scores something else, or its scores state nothing of the kind.
    """
    split, num, recorded = stated_score(what, scores)
    found = per_image_nll(model, data, split, num_images=num).mean().item()
    if not abs(found - recorded) <= TOLERANCE_NATS:
        raise ValueError(
            f"{what} does not score what it says: {found:.2f} nats on the first {num} {split} images, "
            f"its scores.json says {recorded:.2f}. Fetch the weights again."
        )
    return f"{num} {split} images"
