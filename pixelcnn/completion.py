"""Fill in the missing pixels of an image, and score what was filled in.

Pixels are visited in raster order and known ones are clamped. A model with a context network draws each missing pixel
from p(x_i | x_1, ..., x_{i-1}, all that is known): for any mask, a sample of a normalised p(missing | observed). With a
label network, too, and no label given, it first draws one from p(label | all that is known), and then all pixels given
it. With a model without a context network, known pixels that come after a missing one do not count: exact only where
every missing pixel comes after every observed one (a lower half, say).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pixelcnn.evaluation import in_batches
from pixelcnn.likelihood import completion_log_prob, log_prob, pixel_log_prob
from pixelcnn.models.base import AutoregressiveModel, check_label, check_levels, check_observed, check_tensor
from pixelcnn.observed import ink_of
from pixelcnn.sampling.fast import draw, engine_name, sample
from pixelcnn.sampling.naive import Canvas, OnRow, new_canvas


def complete(
    model: AutoregressiveModel,
    image: Tensor,
    observed: Tensor,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return images with their missing pixels filled in, in raster order: `sample`, with the image as its drawing.

    Args:
        image: (B, C, H, W) int64 levels in [0, K), kept where observed, ignored elsewhere.
        observed: (B, 1, H, W) bool, True where the pixel is known.
        u, label, temperature: as `naive_sample` takes them.

    Raises:
        ValueError: a shape, dtype or range differs from the above.
    """
    return sample(model, u, label, temperature, drawing=image, observed=observed)


@torch.no_grad()
def complete_and_score(
    model: AutoregressiveModel,
    image: Tensor,
    observed: Tensor,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
    on_row: OnRow | None = None,
) -> tuple[Tensor, Callable[..., Tensor]]:
    """Complete as `complete` does; return also a function that gives the log-probability of the result.

    The compiled sampler has that from the logits that it draws from, equal within rounding to `completion_log_prob`,
    for one more pass for each other label that a drawing may have; with the other samplers it costs forward passes.

    Returns:
        (B, C, H, W) int64 levels; and score(images, on_row) -> (B,) float64 nats, log p(missing | observed) at
        temperature 1, of a slice of the images, all if left out. `on_row` is called after each row of another pass;
        what it raises stops it.
    """
    canvas = new_canvas(model, u, label, temperature, image, observed, on_row)
    levels, nats = draw(model, canvas)

    @torch.no_grad()
    def score(images: slice = slice(None), on_row: OnRow | None = None) -> Tensor:
        if nats is None:
            given = None if label is None else label[images]
            return completion_log_prob(model, levels[images], observed[images], given).double()
        if canvas.label_log_probs is None:
            return nats[images]
        # Drawn with another label the same pixels have another probability.
        terms = canvas.label_log_probs[images].clone()
        drawn = (torch.arange(len(terms)), canvas.label[images] + 1)
        terms[drawn] += nats[images]
        others = terms.isfinite()
        others[drawn] = False
        return _summed_out(model, terms, others, levels[images], canvas.missing[images], on_row)

    return levels, score


def _summed_out(
    model: AutoregressiveModel, terms: Tensor, of: Tensor, levels: Tensor, missing: Tensor, on_row: OnRow | None = None
) -> Tensor:
    """Return (B,) nats, the label summed out of (B, 1 + num_labels) log-probabilities of a label and what is missing.

    Where `of` is true, a term lacks log p(missing | label), which the compiled sampler adds.
    """
    index, column = of.nonzero(as_tuple=True)
    if len(index):
        # Compiled code is compiled anew for other strides.
        missing, done = missing[index].contiguous(), levels[index].contiguous()
        known = torch.where(missing[:, None], 0, done)
        scores = draw(model, Canvas((done + 1).double(), column - 1, 1.0, known, missing, on_row))[1]
        assert scores is not None
        terms[index, column] += scores
    return terms.logsumexp(dim=1)


@torch.no_grad()
def score_completions(
    model: AutoregressiveModel, levels: Tensor, observed: Tensor, label: Tensor | None = None
) -> Tensor:
    """Return what `completion_log_prob` does, (B,) float64 nats, by the compiled sampler's logits where there is one.

    Equal within rounding. It computes of the network what a sampler does, and no row below the last missing pixel.
    """
    if engine_name(model) != "cached, compiled":
        return completion_log_prob(model, levels, observed, label).double()
    check_observed(levels, observed, model.config, "levels")
    check_levels(levels, model.config)
    label = torch.full((len(levels),), -1) if label is None else label
    check_label(label, len(levels), model.config)
    terms = model.label_log_probs(levels, observed, label)
    return _summed_out(model, terms, terms.isfinite(), levels, ~observed[:, 0])


def resample(
    model: AutoregressiveModel, image: Tensor, observed: Tensor, u: Tensor, choice: Tensor, label: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Complete each image by one of M proposals, chosen by importance (Rubin 1987): the joint model's weight of it.

    A proposal, drawn by `complete`, is weighted by p(x) / q(missing | observed), with p the joint model and q the
    probability with which it was proposed. For many proposals the choice is a sample of the joint model's own
    p(missing | observed); for M = 1 it is `complete`. It costs M completions and two forward passes each.

    Args:
        image, observed, label: as `complete` takes them.
        u: (B, M, C, H, W) uniform noise in [0, 1), that of the proposals.
        choice: (B,) uniform noise in [0, 1), that of the choice between them.

    Returns:
        (B, C, H, W) int64 levels; and (B,) float64, the effective number of proposals (Kong 1992): 1 if one has all
        the weight, M if all weigh the same.

    Raises:
        ValueError: a shape, dtype or range differs from the above.
    """
    check_observed(image, observed, model.config)
    if label is not None:
        check_label(label, len(image), model.config)
    check_tensor("u", u)
    check_tensor("choice", choice)
    if u.dim() != 5 or len(u) != len(image) or not u.shape[1] or choice.shape != image.shape[:1]:
        raise ValueError(
            f"u must have shape (B, M, C, H, W) and choice (B,) for {len(image)} images, "
            f"got {tuple(u.shape)} and {tuple(choice.shape)}."
        )
    if not bool(((choice >= 0) & (choice < 1)).all()):
        raise ValueError("choice must lie in [0, 1), as torch.rand gives it.")
    num = u.shape[1]
    repeated = [x.repeat_interleave(num, dim=0) for x in (image, observed)]
    label = None if label is None else label.repeat_interleave(num)
    levels = complete(model, repeated[0], repeated[1], u.flatten(0, 1), label)
    with torch.inference_mode():
        joint = in_batches(log_prob, model, levels, label)
    proposed = in_batches(score_completions, model, levels, repeated[1], label)
    weights = (joint - proposed).double().view(-1, num).softmax(dim=1)
    chosen = (weights.cumsum(dim=1) <= choice[:, None]).sum(dim=1).clamp(max=num - 1)
    return levels.view(-1, num, *levels.shape[1:])[torch.arange(len(chosen)), chosen], 1 / weights.square().sum(dim=1)


def shares_of_drawing(levels: Tensor, observed: Tensor, num_levels: int) -> dict[str, Tensor]:
    """Return `ink_share` and `known_share` of drawings, (B,) float64: what of the image is known ink, and known.

    `levels` are (B, C, H, W) int64 in [0, num_levels), `observed` (B, 1, H, W) bool.
    """
    ink = torch.from_numpy(ink_of(levels, num_levels)) & observed[:, 0].cpu()
    return {"ink_share": ink.double().mean((1, 2)), "known_share": observed.double().mean((1, 2, 3))}


@torch.inference_mode()
def drawing_bits_per_dim(
    model: AutoregressiveModel, completions: Tensor, observed: Tensor, label: Tensor | None = None
) -> Tensor:
    """Return what the known part of drawings costs, (B,) float64 bits per dimension; NaN where nothing is known.

    Each known sub-pixel is scored by the joint model, given what lies before it in `completions`, the drawings
    completed: (B, C, H, W) int64. `observed` is (B, 1, H, W) bool.
    """
    nats = -pixel_log_prob(model, completions, label).double() * observed
    return nats.sum((1, 2, 3)) / (observed.sum((1, 2, 3)) * completions.shape[1] * math.log(2))
