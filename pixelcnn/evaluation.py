"""Evaluation: the exact likelihood of a dataset's images and of their missing parts, image by image and on average."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pixelcnn.config import ModelConfig, check_int
from pixelcnn.data import Dataset
from pixelcnn.likelihood import bits_per_dim, completion_log_prob, log_prob, pixel_log_prob
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.observed import SCORED, scored_masks

CHECKED_IMAGES = 200  # the first of the test split: their score is quick to measure again, and finds a wrong file
CHECKED_SCORE = f"test/nll_nats_first_{CHECKED_IMAGES}"
SCORED_BATCH = 50  # images at once: larger ones spend more time in getting memory than in computing, on a CPU
PROGRESS_S = 30.0  # between lines of the log

logger = logging.getLogger(__name__)


def format_nll(nats: float, dataset_shape: tuple[int, int, int], num_levels: int) -> str:
    """Return a negative log-likelihood in the unit the field uses: nats for binary images, else bits/dim."""
    if num_levels == 2:
        return f"{nats:.2f} nats"
    return f"{bits_per_dim(nats, dataset_shape):.4f} bits/dim"


def check_fit(config: ModelConfig, data: Dataset) -> None:
    """Raise ValueError unless a network is for images and labels such as a dataset's."""
    if (config.image_shape, config.num_levels) != (data.image_shape, data.num_levels):
        raise ValueError(
            f"the model is for images {config.image_shape} of {config.num_levels} levels, "
            f"{data.name} has {data.image_shape} of {data.num_levels}."
        )
    if config.num_labels not in (0, len(data.label_names)):
        raise ValueError(f"the model has {config.num_labels} labels, {data.name} has {len(data.label_names)}.")


def in_batches(
    score: Callable[..., Tensor], model: AutoregressiveModel, levels: Tensor, *others: Tensor | None
) -> Tensor:
    """Return score(model, levels, *others), (B,), in batches of `SCORED_BATCH`, so that memory does not grow with B."""
    parts = [slice(i, i + SCORED_BATCH) for i in range(0, max(len(levels), 1), SCORED_BATCH)]
    return torch.cat([score(model, levels[p], *(None if x is None else x[p] for x in others)) for p in parts])


def _batches(
    model: AutoregressiveModel, data: Dataset, split: str, batch_size: int, num_images: int | None, what: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a split's first images, on the model's device; log now and then how far they are, and how long still."""
    check_int("batch_size", batch_size, 1)
    if num_images is not None:
        check_int("num_images", num_images, 1)
    if split not in data.images:
        raise ValueError(f"split must be one of {', '.join(data.images)}, got {split!r}.")
    device = next(model.parameters()).device
    total, done = len(data.images[split][:num_images]), 0
    start = last = time.monotonic()
    for levels, label in data.batches(split, batch_size, num_images):
        yield levels.to(device), label.to(device)
        done, now = done + len(levels), time.monotonic()
        if now - last > PROGRESS_S and done < total:
            last, minutes_left = now, (now - start) / done * (total - done) / 60
            logger.info("%s, %s: %d of %d images, about %.1f min left", split, what, done, total, minutes_left)


@torch.inference_mode()
def per_image_nll(
    model: AutoregressiveModel,
    data: Dataset,
    split: str,
    with_label: bool = False,
    num_images: int | None = None,
    batch_size: int = SCORED_BATCH,
) -> Tensor:
    """Return the nats of a split's images one by one, (N,) float64.

    Args:
        with_label: tell the model the true label.
        num_images: the first so many; None for all.
        batch_size: images at once: a matter of speed, not of the scores.
    """
    batches = _batches(model, data, split, batch_size, num_images, "given the label" if with_label else "whole")
    nlls = [-log_prob(model, levels, label if with_label else None) for levels, label in batches]
    return torch.cat(nlls).double().cpu()


@torch.inference_mode()
def per_image_marginal_nll(
    model: AutoregressiveModel, data: Dataset, split: str, num_images: int | None = None, batch_size: int = SCORED_BATCH
) -> Tensor:
    """Do what `per_image_nll` does with the label summed out: -log of the mean of p(x | y) over the labels y.

    It is an exact likelihood, too, of as many passes as there are labels. No label can gain more than log(num_labels)
    over it, whatever the network makes of images without a label.
    """
    num_labels = model.config.num_labels
    nlls = []
    for levels, label in _batches(model, data, split, batch_size, num_images, "label summed out"):
        given = [log_prob(model, levels, torch.full_like(label, y)) for y in range(num_labels)]
        nlls.append(math.log(num_labels) - torch.stack(given).double().logsumexp(dim=0))
    return torch.cat(nlls).cpu()


def checked_score(model: AutoregressiveModel, data: Dataset, batch_size: int = SCORED_BATCH) -> float:
    """Return the mean nats of the first test images, the score named `CHECKED_SCORE`."""
    return per_image_nll(model, data, "test", num_images=CHECKED_IMAGES, batch_size=batch_size).mean().item()


@contextmanager
def _scoring(model: AutoregressiveModel, data: Dataset) -> Iterator[None]:
    """Put a model that fits the data into eval mode for the time of a `with` block."""
    check_fit(model.config, data)
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _mean_and_stderr(name: str, nats: Tensor) -> dict[str, float]:
    stderr = (nats.std() / math.sqrt(len(nats))).item() if len(nats) > 1 else 0.0
    return {name: nats.mean().item(), f"{name}_stderr": stderr}


def evaluate(
    model: AutoregressiveModel,
    data: Dataset,
    splits: tuple[str, ...] = ("validation", "test"),
    num_images: int | None = None,
    batch_size: int = SCORED_BATCH,
    per_image: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """Measure the exact likelihood of a model on a dataset, whose `protocol` belongs beside every figure.

    Args:
        num_images, batch_size: as `per_image_nll` takes them, for each split.
        per_image: filled, if given, with each split's (N,) nats of the images one by one, without label.

    Returns:
        Scores by name, for each split: `test/nll_nats` (mean per image, without label), `test/nll_nats_stderr` (its
        standard error), `test/bits_per_dim`, `test/num_images`, and for models with labels
        `test/nll_nats_given_label`.

    Raises:
        ValueError: model and dataset do not fit.
    """
    scores: dict[str, float] = {}
    with _scoring(model, data):
        for split in splits:
            nll = per_image_nll(model, data, split, num_images=num_images, batch_size=batch_size)
            if per_image is not None:
                per_image[split] = nll
            scores |= _mean_and_stderr(f"{split}/nll_nats", nll)
            scores[f"{split}/bits_per_dim"] = float(bits_per_dim(nll.mean().item(), data.image_shape))
            scores[f"{split}/num_images"] = len(nll)
            if model.config.num_labels:
                given = per_image_nll(model, data, split, True, num_images, batch_size)
                scores[f"{split}/nll_nats_given_label"] = given.mean().item()
    return scores


@torch.inference_mode()
def per_image_completion_nll(
    model: AutoregressiveModel,
    data: Dataset,
    split: str,
    num_images: int | None = None,
    batch_size: int = SCORED_BATCH,
    score: Callable[..., Tensor] = completion_log_prob,
) -> dict[str, Tensor]:
    """Return the nats of the missing parts of a split's images one by one: -log p(missing | observed), without label.

    For each mask of `observed.SCORED` that is (N,) float64 as e.g. `top`; and as `top_raster` for raster clamping on
    the same masks: the joint model, in which a missing pixel sees of the known ones only those that come before it. A
    model without a context network has that alone: both are the same. `score` is `completion_log_prob`, or what equals
    it, as `completion.score_completions` does; the other arguments are those of `per_image_nll`.
    """
    found: dict[str, list[Tensor]] = {}
    first = 0
    for levels, _ in _batches(model, data, split, batch_size, num_images, "completion"):
        joint = pixel_log_prob(model, levels)
        for name in SCORED:
            observed = scored_masks(name, levels, data.num_levels, first)
            raster = (joint * ~observed).sum(dim=(1, 2, 3))
            given = score(model, levels, observed) if model.config.context_features else raster
            for key, log_probs in ((name, given), (f"{name}_raster", raster)):
                found.setdefault(key, []).append(-log_probs.double().cpu())
        first += len(levels)
    return {key: torch.cat(parts) for key, parts in found.items()}


def evaluate_completion(
    model: AutoregressiveModel,
    data: Dataset,
    split: str = "test",
    num_images: int | None = None,
    batch_size: int = SCORED_BATCH,
    score: Callable[..., Tensor] = completion_log_prob,
) -> dict[str, float]:
    """Measure -log p(missing | observed), without label, and beside each figure that of raster clamping.

    Return scores by name, for each mask of `observed.SCORED`: e.g. `test/completion_top_nats` (mean per image),
    `test/completion_top_nats_stderr` (its standard error), `test/completion_top_raster_nats` and its standard error;
    and `test/completion_num_images`. ValueError if model and dataset do not fit.
    """
    scores: dict[str, float] = {}
    with _scoring(model, data):
        for name, nats in per_image_completion_nll(model, data, split, num_images, batch_size, score).items():
            scores |= _mean_and_stderr(f"{split}/completion_{name}_nats", nats)
            scores[f"{split}/completion_num_images"] = len(nats)
    return scores
