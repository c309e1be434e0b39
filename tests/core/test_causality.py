"""What may reach a logit, and what must.

Raster order: rows, then columns, then channels. Sub-pixels are numbered in it, 0 first, throughout this file.
"""

import pytest
import torch
from torch import Tensor

from pixelcnn.likelihood import count_leaks
from tests.core.tiny import ARCHITECTURES, Shape, from_raster_order, in_raster_order, random_levels, tiny_model

SHAPES = [(1, 3, 3), (1, 2, 4), (1, 4, 2), (1, 1, 5), (1, 5, 1), (2, 2, 3), (3, 2, 2), (3, 1, 3), (3, 3, 1)]


def changed_logits(model, levels: Tensor, num_levels: int, label: Tensor | None) -> Tensor:
    """Return (D, D) bool: where changing sub-pixel i of any of these images changes any logit of sub-pixel j.

    Every change is one to another random level, through the public API; unchanged means equal bit for bit.
    """
    num, shape = len(levels), tuple(levels.shape[1:])
    flat = in_raster_order(levels)  # (N, D)
    size = flat.shape[1]
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(1, num_levels, (num, size), generator=generator)
    changed = flat[:, None].repeat(1, size, 1)  # (N, D, D)
    diagonal = torch.arange(size)
    changed[:, diagonal, diagonal] = (flat + step) % num_levels
    batch = torch.cat([flat[:, None], changed], dim=1).flatten(0, 1)  # (N * (1 + D), D)
    label = None if label is None else label.repeat_interleave(1 + size)
    with torch.no_grad():
        logits = in_raster_order(model(from_raster_order(batch, shape), label))  # (N * (1 + D), D, K)
    logits = logits.reshape(num, 1 + size, size, num_levels)
    return (logits[:, 1:] != logits[:, :1]).any(dim=(0, 3))


@pytest.mark.parametrize("num_labels", [0, 3])
@pytest.mark.parametrize("num_levels", [2, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_change_reaches_later_logits_only(architecture, shape, num_levels, num_labels):
    for seed in range(3):
        # Wide enough that no colour's few ReLUs are shut by accident.
        model = tiny_model(architecture, shape, num_levels, num_labels, seed=seed, num_features=24)
        levels = random_levels(shape, num_levels, num=8, seed=seed)
        label = torch.tensor([0, -1, 2, 1] * 2) if num_labels else None
        for training in (True, False):
            reached = changed_logits(model.train(training), levels, num_levels, label)
            leaks = reached.tril().nonzero().tolist()  # own logits (the diagonal) and earlier ones
            assert not leaks, f"(changed sub-pixel, leaked-to sub-pixel): {leaks}"
            assert reached[:-1].any(dim=1).all(), "some sub-pixel reaches no later one"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_red_before_green_before_blue(architecture):
    """Of one pixel, green sees red, blue sees both; of two pixels, the second's colours see all of the first."""
    for seed in range(3):
        model = tiny_model(architecture, (3, 1, 2), 4, seed=seed, num_features=24)
        reached = changed_logits(model, random_levels((3, 1, 2), 4, num=16), 4, None)
        assert reached.int().tolist() == [
            [0, 1, 1, 1, 1, 1],  # red of the first pixel reaches its green and blue, and the whole second pixel
            [0, 0, 1, 1, 1, 1],
            [0, 0, 0, 1, 1, 1],
            [0, 0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0, 1],
            [0, 0, 0, 0, 0, 0],
        ]


@pytest.mark.parametrize("num_labels", [0, 3])
@pytest.mark.parametrize("shape", [(1, 3, 3), (3, 2, 2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_images_of_a_batch_do_not_touch(architecture, shape, num_labels):
    model = tiny_model(architecture, shape, 3, num_labels)
    levels = random_levels(shape, 3, num=4)
    label = torch.tensor([0, 1, 2, -1]) if num_labels else None
    for training in (True, False):
        model.train(training)
        logits = model(levels, label)
        for i in range(4):
            others = random_levels(shape, 3, num=4, seed=9)
            others[i] = levels[i]
            other_label = None if label is None else torch.tensor([2, 2, 0, 0])
            if other_label is not None:
                other_label[i] = label[i]
            assert torch.equal(model(others, other_label)[i], logits[i])
        order = torch.tensor([2, 0, 3, 1])
        assert torch.equal(model(levels[order], None if label is None else label[order]), logits[order])


def gradients(model, num_levels: int, num_images: int) -> Tensor:
    """Return (D, D) bool: which sub-pixels j have a gradient on the logits of sub-pixel i, for any of some images."""
    shape = model.config.image_shape
    leaves: list[Tensor] = []
    features = model.features

    def features_of_a_leaf(x: Tensor, label: Tensor | None, context: Tensor | None) -> Tensor:
        leaves.append(x.detach().requires_grad_())
        return features(leaves[-1], label, context)

    model.features = features_of_a_leaf  # levels are whole numbers: the gradient is that of the scaled ones
    logits = in_raster_order(model(random_levels(shape, num_levels, num_images)))  # (N, D, K)
    # A random projection, or the logits' gradients could cancel in their sum.
    projected = (logits * torch.randn(num_levels, generator=torch.Generator().manual_seed(0)).double()).sum(dim=(0, 2))
    size = logits.shape[1]
    rows = [torch.autograd.grad(projected[i], leaves[0], retain_graph=True)[0] for i in range(size)]
    del model.features
    return torch.stack([in_raster_order(row != 0).any(dim=0) for row in rows])


def influences(architecture: str, shape: Shape, **changes: int) -> Tensor:
    """Return the union of `gradients` over a few networks: a ReLU that is shut in one is open in another."""
    return torch.stack(
        [gradients(tiny_model(architecture, shape, 3, seed=seed, **changes), 3, 24) for seed in range(4)]
    ).any(dim=0)


SubPixel = tuple[int, int, int]  # row, column, channel


def reach_of_a_convolution(
    shape: Shape, before: dict[SubPixel, set[SubPixel]], taps: list[tuple[int, int]], mask_type: str | None
) -> dict[SubPixel, set[SubPixel]]:
    """Return what each feature sees: the union over taps of what the features under them see.

    Args:
        before: what each input feature sees; features are at a row and a column and belong to a channel.
        taps: (rows down, columns right) of the taps other than the centre; they see every channel.
        mask_type: the centre's, or None for no centre.
    """
    channels = shape[0]
    after = {}
    for row, column, channel in before:
        seen: set[SubPixel] = set()
        for down, right in taps:
            for other in range(channels):
                seen |= before.get((row + down, column + right, other), set())
        for other in range(channels):
            if mask_type and (other < channel or (other == channel and mask_type == "B")):
                seen |= before[row, column, other]
        after[row, column, channel] = seen
    return after


def raster_taps(kernel_size: int) -> list[tuple[int, int]]:
    half = kernel_size // 2
    window = [(down, right) for down in range(-half, 1) for right in range(-half, half + 1)]
    return [tap for tap in window if tap < (0, 0)]


def apart(taps: list[tuple[int, int]], dilation: int) -> list[tuple[int, int]]:
    return [(down * dilation, right * dilation) for down, right in taps]


def image_itself(shape: Shape) -> dict[SubPixel, set[SubPixel]]:
    channels, height, width = shape
    return {(r, c, k): {(r, c, k)} for r in range(height) for c in range(width) for k in range(channels)}


def pixelcnn_reach(shape: Shape, first_kernel_size: int, kernel_size: int, dilations: tuple[int, ...]):
    seen = reach_of_a_convolution(shape, image_itself(shape), raster_taps(first_kernel_size), "A")
    for dilation in dilations:
        seen = reach_of_a_convolution(shape, seen, apart(raster_taps(kernel_size), dilation), "B")
    # 1x1 layers with mask B, after the first layer and in every block: earlier colours of the same pixel.
    return reach_of_a_convolution(shape, seen, [], "B")


def gated_pixelcnn_reach(shape: Shape, kernel_size: int, dilations: tuple[int, ...]):
    half = kernel_size // 2
    taps = [(down, right) for down in range(-half, 1) for right in range(-half, half + 1)]
    left = [(0, -i) for i in range(1, half + 1)]
    channels = shape[0]
    vertical = horizontal = image_itself(shape)
    for i, dilation in enumerate(dilations):
        vertical = reach_of_a_convolution(shape, vertical, apart(taps, dilation), None)
        horizontal = reach_of_a_convolution(shape, horizontal, left, "A" if i == 0 else "B")
        for row, column, channel in horizontal:
            for other in range(channels):
                horizontal[row, column, channel] |= vertical.get((row - 1, column, other), set())
    return reach_of_a_convolution(shape, horizontal, [], "B")


def as_matrix(shape: Shape, reach: dict[SubPixel, set[SubPixel]]) -> Tensor:
    order = list(image_itself(shape))
    return torch.tensor([[seen in reach[here] for seen in order] for here in order])


@pytest.mark.parametrize(
    ("shape", "kernel_size", "num_layers"),
    [((1, 5, 5), 3, 4), ((1, 3, 6), 5, 3), ((1, 1, 5), 3, 4), ((1, 5, 1), 3, 4), ((2, 3, 3), 3, 2), ((3, 3, 3), 5, 2)],
)
def test_gated_pixelcnn_sees_every_earlier_sub_pixel(shape, kernel_size, num_layers):
    seen = influences("gated_pixelcnn", shape, kernel_size=kernel_size, num_layers=num_layers)
    assert torch.equal(seen, torch.ones_like(seen).tril(-1))


@pytest.mark.parametrize(
    ("shape", "kernel_size", "num_layers"),
    [((1, 5, 7), 3, 1), ((1, 5, 7), 3, 2), ((1, 7, 5), 3, 3), ((3, 3, 4), 3, 1), ((2, 3, 5), 3, 2), ((1, 4, 7), 5, 1)],
)
def test_shallow_gated_pixelcnn_sees_what_its_kernels_reach(shape, kernel_size, num_layers):
    seen = influences("gated_pixelcnn", shape, kernel_size=kernel_size, num_layers=num_layers)
    expected = as_matrix(shape, gated_pixelcnn_reach(shape, kernel_size, (1,) * num_layers))
    assert 0 < expected.sum() < torch.ones_like(seen).tril(-1).sum()
    assert torch.equal(seen, expected)


@pytest.mark.parametrize(
    ("architecture", "depth", "reach", "kernels"),
    [
        ("gated_pixelcnn", "num_layers", gated_pixelcnn_reach, {"kernel_size": 3}),
        ("pixelcnn", "num_blocks", pixelcnn_reach, {"first_kernel_size": 3, "kernel_size": 3}),
    ],
)
def test_dilated_kernels_reach_as_far_as_they_say(architecture, depth, reach, kernels):
    shape = (1, 9, 9)
    expected = as_matrix(shape, reach(shape, **kernels, dilations=(1, 2, 1)))  # doubled up to 3, and then from 1 again
    assert as_matrix(shape, reach(shape, **kernels, dilations=(1, 1, 1))).sum() < expected.sum()
    assert torch.equal(influences(architecture, shape, max_dilation=3, **kernels, **{depth: 3}), expected)


@pytest.mark.parametrize(
    ("shape", "first_kernel_size", "kernel_size", "num_blocks"),
    [
        ((1, 5, 5), 3, 3, 4),
        ((1, 3, 7), 5, 3, 3),
        ((1, 3, 7), 3, 5, 2),
        ((1, 5, 5), 7, 3, 1),
        ((1, 1, 5), 3, 3, 3),
        ((1, 5, 1), 3, 3, 3),
        ((2, 3, 4), 3, 3, 2),
        ((3, 3, 4), 3, 3, 2),
    ],
)
def test_pixelcnn_sees_everything_earlier_but_its_blind_spot(shape, first_kernel_size, kernel_size, num_blocks):
    seen = influences(
        "pixelcnn", shape, first_kernel_size=first_kernel_size, kernel_size=kernel_size, num_blocks=num_blocks
    )
    expected = as_matrix(shape, pixelcnn_reach(shape, first_kernel_size, kernel_size, (1,) * num_blocks))
    assert torch.equal(seen, expected)


# X looks, # is seen; the dots before X in raster order are the blind spot.
THREE_BY_THREE = """
#######
######.
#####..
####...
##X....
"""
SEVEN_THEN_THREE = """
#######..
######...
##X......
"""


@pytest.mark.parametrize(("picture", "first_kernel_size"), [(THREE_BY_THREE, 3), (SEVEN_THEN_THREE, 7)])
def test_the_blind_spot_as_drawn_by_hand(picture, first_kernel_size):
    rows = picture.split()
    shape = (1, len(rows), len(rows[0]))
    model_reach = influences(
        "pixelcnn", shape, first_kernel_size=first_kernel_size, kernel_size=3, num_blocks=len(rows) + 1
    )
    here = "".join(rows).index("X")
    drawn = "".join("X" if i == here else ".#"[int(seen)] for i, seen in enumerate(model_reach[here]))
    assert drawn == "".join(rows)
    assert torch.equal(
        as_matrix(shape, pixelcnn_reach(shape, first_kernel_size, 3, (1,) * (len(rows) + 1))), model_reach
    )


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 3, 2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_leak_is_counted_in_a_correct_model(architecture, shape, batch_size):
    levels = random_levels(shape, 4, 1)[0]
    found = count_leaks(tiny_model(architecture, shape, 4), levels, batch_size)
    assert found[0] == 0
    assert found[1] >= levels.numel() - 2, "and all but the last reach a later one, unless a ReLU is dead"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_leak_is_counted(architecture):
    shape = (2, 3, 3)
    model = tiny_model(architecture, shape, 4)
    levels = random_levels(shape, 4, 1)[0]
    forward = model.forward

    def leaky(x, *arguments, **words):
        """The last sub-pixel is seen by the first logit, if barely, and the second channel's first pixel by its own."""
        logits = forward(x, *arguments, **words).clone()
        logits[:, 0, 0, 0, 0] += 1e-9 * x[:, 1, 2, 2]
        logits[:, 0, 1, 0, 0] += x[:, 1, 0, 0]
        return logits

    model.forward = leaky
    assert count_leaks(model, levels)[0] == 2


def test_leaks_are_counted_in_a_tensor_of_the_models_levels():
    model, levels = tiny_model("pixelcnn", (1, 3, 3), 4), random_levels((1, 3, 3), 4, 1)[0]
    for wrong, message in (
        (levels.numpy(), "levels must be a tensor, got ndarray"),
        (levels.float(), "levels must be int64 levels 0..3, got dtype torch.float32"),
        (levels + 4, "levels must lie in 0..3"),
    ):
        with pytest.raises(ValueError, match=message):
            count_leaks(model, wrong)
