"""Masks: what each kind shows, and that the generator and the levels alone decide."""

import hashlib

import numpy as np
import pytest
import torch

from pixelcnn.observed import (
    SCORED,
    beginnings,
    ink_of,
    pen_noise,
    rectangles,
    scored_masks,
    strokes,
    surroundings,
    training_masks,
)
from tests.core.tiny import random_levels

SHAPE = (1, 28, 28)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def begun(ink: np.ndarray, part: float) -> np.ndarray:
    return beginnings(pen_noise(generator(), *ink.shape), ink, np.full(len(ink), part))


def crosses(num: int) -> torch.Tensor:
    """Return binary images of a plus sign and, apart from it, a bar: 27 + 27 - 1 + 5 pixels of ink at most."""
    levels = torch.zeros(num, *SHAPE, dtype=torch.int64)
    levels[:, 0, 10, 3:20] = 1
    levels[:, 0, 4:17, 12] = 1
    levels[:, 0, 24, 20:25] = 1
    return levels


def test_training_masks_are_a_function_of_generator_and_levels():
    levels = random_levels(SHAPE, 2, num=64)
    masks = training_masks(generator(), levels, 2, 0.75)[0]
    assert masks.shape == (64, 1, 28, 28)
    assert masks.dtype == torch.bool
    assert torch.equal(masks, training_masks(generator(), levels, 2, 0.75)[0])
    assert not torch.equal(masks, training_masks(generator(1), levels, 2, 0.75)[0])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_images_that_are_shown_in_part(share):
    masks = training_masks(generator(), crosses(2000), 2, share)[0]
    shown = masks.flatten(1).any(dim=1).double().mean().item()
    assert share - 0.08 < shown <= (share + 0.04 if share else 0)  # some masks happen to be empty
    # Nearly all of them leave something to be completed.
    assert masks.flatten(1).all(dim=1).double().mean() < 0.05


def test_training_masks_are_those_that_they_were():
    """Rectangles, single pixels and strokes among them. Others are another training, and another end of one begun."""
    masks = training_masks(generator(), crosses(200), 2, 0.75)[0]
    assert hashlib.md5(masks.numpy().tobytes()).hexdigest()[:8] == "0dd85209"


def test_training_masks_say_whether_they_follow_the_ink():
    masks, follow = training_masks(generator(), crosses(600), 2, 0.75)
    moved, as_much = training_masks(generator(), crosses(600).roll(2, dims=3), 2, 0.75)
    assert torch.equal(follow, as_much)
    assert abs(follow.double().mean().item() - 0.75 * 3 / 12) < 0.05
    others = (masks != moved).flatten(1).any(dim=1)
    assert not (others & ~follow).any()
    assert (others & follow).sum() > 0.7 * follow.sum()


def test_training_masks_are_of_every_kind():
    masks = training_masks(generator(), crosses(600), 2, 1.0)[0][:, 0].numpy()
    rows, columns = (masks == masks[:, :, :1]).all(axis=(1, 2)), (masks == masks[:, :1]).all(axis=(1, 2))
    some = masks.any(axis=(1, 2)) & ~masks.all(axis=(1, 2))
    first, last = masks[:, 0, 0], masks[:, -1, -1]
    for kind in (rows & first & ~last, rows & ~first & last, columns & first & ~last, columns & ~first & last):
        assert (kind & some).sum() > 15  # top, bottom, left, right
    ink = ink_of(crosses(1), 2)
    only_ink = (masks & ~ink).sum(axis=(1, 2)) == 0
    assert (only_ink & some).sum() > 25  # beginnings by themselves
    full = masks.all(axis=2)
    ends_in_full_row = full.any(axis=1) & (full.sum(axis=1) == (masks.any(axis=2)).sum(axis=1))
    assert ends_in_full_row.sum() > 50  # parts of the image, and all rows down to the drawing's lowest


def test_halves_are_shown_of_the_share_of_each_image_whatever_else_would_be():
    others, others_follow = training_masks(generator(), crosses(400), 2, 1.0)
    masks, follow = training_masks(generator(), crosses(400), 2, 1.0, torch.arange(400) % 2)
    y, x = torch.arange(28)[:, None].expand(28, 28), torch.arange(28).expand(28, 28)
    halves = [mask for at in (y, x) for mask in (at < 14, at >= 14)]
    counts = [int((masks[1::2, 0] == half).all(dim=(1, 2)).sum()) for half in halves]
    assert sum(counts) == 200
    assert min(counts) > 30
    assert not follow[1::2].any()
    assert torch.equal(masks[::2], others[::2])
    assert torch.equal(follow[::2], others_follow[::2])


@pytest.mark.parametrize(("height", "width"), [(28, 28), (2, 3), (1, 7), (5, 1), (1, 1)])
def test_every_size_has_masks(height, width):
    levels = random_levels((1, height, width), 2, num=100)
    assert training_masks(generator(), levels, 2, 1.0)[0].shape == (100, 1, height, width)
    for name in SCORED:
        assert scored_masks(name, levels, 2).shape == (100, 1, height, width)


def test_rectangles_are_rectangles():
    found = rectangles(generator(), 300, 28, 20)
    for mask in found:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        assert (mask == rows[:, None] & columns).all()
        for line, size in ((rows, 28), (columns, 20)):
            assert np.abs(np.diff(line.astype(int))).sum() <= 2  # in one piece
            assert size // 4 <= line.sum() < size
    assert found.any(axis=0).all()


def test_strokes_are_in_one_piece_and_all_over():
    found = strokes(generator(), 300, 28, 28)
    part = found.mean(axis=(1, 2))
    assert 0.02 < part.mean() < 0.6
    assert found.any(axis=0).all()
    for mask in found[:50]:
        assert pieces(mask) <= 1


def pieces(mask: np.ndarray) -> int:
    """Count the parts of a mask that hang together, diagonals included."""
    left, count = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        count, todo = count + 1, [left.pop()]
        while todo:
            y, x = todo.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
    return count


def test_a_beginning_grows_along_the_strokes_from_an_outermost_pixel():
    ink = ink_of(crosses(200), 2)
    total = ink[0].sum()
    for part in (0.0, 0.1, 0.5, 0.7):
        laid = begun(ink, part)
        assert not (laid & ~ink).any()
        assert (laid.sum(axis=(1, 2)) == max(1, np.ceil(part * total))).all()
        # The bar stands apart: a pen that began there jumps to the cross once the bar is laid.
        for mask in laid[:20]:
            assert pieces(mask) <= 1 + (part > 0.1)
    whole = begun(ink, 1)
    assert (whole == ink).all()
    first = begun(ink, 0)
    places = {tuple(np.argwhere(mask)[0]) for mask in first}
    ends = {(10, 3), (10, 19), (4, 12), (16, 12), (24, 20), (24, 24)}
    assert places <= ends
    assert len(places) > 3


def test_a_longer_beginning_holds_the_shorter_one():
    ink = ink_of(crosses(50), 2)
    laid = [begun(ink, part) for part in (0.2, 0.4)]
    # Pixels of one step of the search come in random order; up to one step they agree.
    assert (laid[0] & ~laid[1]).sum(axis=(1, 2)).max() <= 4


def test_an_image_without_ink_has_no_beginning():
    assert not begun(np.zeros((3, 5, 5), dtype=bool), 0.5).any()
    assert not surroundings(generator(), np.zeros((40, 5, 5), dtype=bool)).any()


def test_surroundings_hold_the_drawing_and_follow_from_it():
    drawn = begun(ink_of(crosses(400), 2), 0.4)
    known = surroundings(generator(1), drawn)
    assert not (drawn & ~known).any()
    alone = (known == drawn).all(axis=(1, 2))
    lowest = np.array([np.argwhere(mask)[:, 0].max() for mask in drawn])
    above = np.array([mask[: y + 1].all() and not mask[y + 1 :].any() for mask, y in zip(known, lowest, strict=True)])
    assert (alone.sum() > 60) & (above.sum() > 60)
    assert (~alone & ~above).sum() > 120


def test_ink_is_what_exceeds_a_quarter_of_the_range():
    levels = torch.tensor([[[[0, 1, 2, 3]], [[0, 63, 64, 255]], [[0, 0, 0, 0]]]])
    assert ink_of(levels, 256).tolist() == [[[False, False, True, True]]]
    assert ink_of(torch.tensor([[[[0, 1]]]]), 2).tolist() == [[[False, True]]]


def test_scored_masks_hide_what_their_name_says():
    levels = crosses(500)
    masks = {name: scored_masks(name, levels, 2)[:, 0] for name in SCORED}
    assert not masks["top"][:, :14].any()
    assert masks["top"][:, 14:].all()
    assert not masks["bottom"][:, 14:].any()
    assert masks["bottom"][:, :14].all()
    assert not masks["left"][:, :, :14].any()
    assert masks["left"][:, :, 14:].all()
    assert abs(masks["pixels50"].double().mean() - 0.5) < 0.01
    for mask in ~masks["rectangles"][:20]:
        assert torch.equal(mask, mask.any(dim=1)[:, None] & mask.any(dim=0))
    ink = levels[:, 0].sum(dim=(1, 2))
    assert torch.equal(masks["beginnings"].sum(dim=(1, 2)), (ink * 0.3).ceil().long())
    assert levels[:, 0][masks["beginnings"]].all()


def test_scored_masks_are_those_that_the_published_scores_were_measured_on():
    """Others give other figures, which do not compare with those of the released weights."""
    found = {name: scored_masks(name, crosses(20), 2, first=990).numpy().tobytes() for name in SCORED[3:]}
    digests = {name: hashlib.md5(mask).hexdigest()[:8] for name, mask in found.items()}
    assert digests == {"rectangles": "7c50c756", "pixels50": "0503007a", "beginnings": "6b8994b5"}


@pytest.mark.parametrize("name", SCORED)
def test_a_scored_mask_depends_on_its_image_alone(name):
    levels = torch.cat([crosses(6), random_levels(SHAPE, 2, num=6)])
    whole = scored_masks(name, levels, 2)
    for size in (1, 5):
        starts = range(0, len(levels), size)
        parts = [scored_masks(name, levels[i : i + size], 2, first=i) for i in starts]
        assert torch.equal(torch.cat(parts), whole)
    if name in ("rectangles", "pixels50", "beginnings"):
        assert not torch.equal(whole[0], whole[1]), "the same image, another index"
