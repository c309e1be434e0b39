"""The score of the first few images that a checkpoint states: quick to measure again, so that a wrong file is found."""

from collections.abc import Mapping
from typing import Any

from pixelcnn.data import Dataset
from pixelcnn.evaluation import CHECKED_IMAGES, CHECKED_SCORE, checked_score
from pixelcnn.models.base import AutoregressiveModel

TOLERANCE_NATS = 0.05  # rounding differs between processors; another file differs by whole nats


def check_scores(what: str, model: AutoregressiveModel, scores: Mapping[str, Any], data: Dataset) -> None:
    """Check that a model has the score `CHECKED_SCORE` that its scores state.

    Args:
        what: is scored; named in the error.
        data: those that the scores were measured on.

    Raises:
        ValueError: it scores something else, or its scores state nothing of the kind.
    """
    recorded = scores.get(CHECKED_SCORE)
    if recorded is None:
        raise ValueError(f"the scores.json of {what} states no score of the first few images. Train the pair again.")
    found = checked_score(model, data)
    if not abs(found - recorded) <= TOLERANCE_NATS:
        raise ValueError(
            f"{what} does not score what it says: {found:.2f} nats on the first {CHECKED_IMAGES} test images, "
            f"its scores.json says {recorded:.2f}. Fetch the weights again."
        )
