"""Masks against pictures drawn by hand, and against full k x k masks written as loops."""

import pytest
import torch

from pixelcnn.models.masks import centre_mask, colour_groups, raster_mask, row_mask

GREY = torch.zeros(1, dtype=torch.int64)
RGB = torch.arange(3)


def full_mask(mask_type: str, height: int, width: int, in_groups: torch.Tensor, out_groups: torch.Tensor):
    """Return the uncropped (out, in, height, width) mask, tap by tap, from the definition in the paper."""
    mask = torch.zeros(len(out_groups), len(in_groups), height, width)
    for o, i in [(o, i) for o in range(len(out_groups)) for i in range(len(in_groups))]:
        for row, column in [(r, c) for r in range(height) for c in range(width)]:
            if (row, column) < (height // 2, width // 2):
                mask[o, i, row, column] = 1
            if (row, column) == (height // 2, width // 2):
                earlier, same = in_groups[i] < out_groups[o], in_groups[i] == out_groups[o]
                mask[o, i, row, column] = float(earlier or (same and mask_type == "B"))
    return mask


def test_colour_groups_are_equal_runs():
    assert colour_groups(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert colour_groups(4, 1).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="4 maps do not divide into 3 colours: take a multiple of that"):
        colour_groups(4, 3)


def test_centre_of_a_grey_image():
    assert centre_mask("A", GREY, GREY).tolist() == [[0]]
    assert centre_mask("B", GREY, GREY).tolist() == [[1]]
    with pytest.raises(ValueError, match="a mask is of type 'A' or 'B', got 'C'"):
        centre_mask("C", GREY, GREY)


def test_centre_of_a_colour_image():
    # Rows: what red, green and blue may see of (red, green, blue).
    assert centre_mask("A", RGB, RGB).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert centre_mask("B", RGB, RGB).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    two_each = colour_groups(6, 3)
    assert centre_mask("A", RGB, two_each).tolist() == [
        [0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0]
    ]  # fmt: skip


def test_grey_kernels_by_hand():
    assert raster_mask("A", 3, GREY, GREY)[0, 0].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert raster_mask("B", 5, GREY, GREY)[0, 0].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert row_mask("A", 5, GREY, GREY)[0, 0].tolist() == [[1, 1, 0]]
    assert row_mask("B", 5, GREY, GREY)[0, 0].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("num_colours", [1, 2, 3])
def test_cropped_mask_is_the_full_one_without_its_empty_part(mask_type, kernel_size, num_colours):
    inputs, outputs = colour_groups(num_colours, num_colours), colour_groups(2 * num_colours, num_colours)
    half = kernel_size // 2
    full = full_mask(mask_type, kernel_size, kernel_size, inputs, outputs)
    assert torch.equal(raster_mask(mask_type, kernel_size, inputs, outputs), full[:, :, : half + 1])
    assert not full[:, :, half + 1 :].any()
    full = full_mask(mask_type, 1, kernel_size, inputs, outputs)
    assert torch.equal(row_mask(mask_type, kernel_size, inputs, outputs), full[..., : half + 1])
    assert not full[..., half + 1 :].any()
