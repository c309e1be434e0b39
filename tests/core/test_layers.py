import pytest
import torch
from torch.nn import functional as F

from pixelcnn.models.gated_pixelcnn import GatedLayer, GatedPixelCNNConfig
from pixelcnn.models.layers import LabelBias, MaskedConv2d, UNet, gate, masked_1x1, shift_down
from pixelcnn.models.masks import colour_groups, raster_mask, row_mask
from pixelcnn.models.pixelcnn import PixelCNNConfig, ResidualBlock
from tests.core.test_masks import full_mask

SIZES = [(4, 4), (3, 5), (1, 5), (5, 1), (1, 1)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("num_colours", [1, 3])
def test_cropped_kernel_equals_full_masked_kernel(num_colours, mask_type, kernel_size, height, width):
    torch.manual_seed(0)
    inputs, outputs = colour_groups(num_colours, num_colours), colour_groups(2 * num_colours, num_colours)
    half = kernel_size // 2
    x = torch.randn(2, num_colours, height, width, dtype=torch.float64)
    for mask, right, kernel_height in (
        (raster_mask(mask_type, kernel_size, inputs, outputs), half, kernel_size),
        (row_mask(mask_type, kernel_size, inputs, outputs), 0, 1),
    ):
        conv = MaskedConv2d(mask, right).double()
        torch.nn.init.normal_(conv.bias)
        # The taps that cropping removed are random here: the full mask alone must silence them.
        kernel = torch.randn(*mask.shape[:2], kernel_height, kernel_size, dtype=torch.float64)
        kernel[:, :, : mask.shape[2], : mask.shape[3]] = conv.weight.detach()
        kernel = kernel * full_mask(mask_type, kernel_height, kernel_size, inputs, outputs)
        expected = F.conv2d(x, kernel, conv.bias, padding=(kernel_height // 2, half))
        torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-12)


def test_a_mask_may_be_of_any_dtype():
    torch.manual_seed(0)
    mask = raster_mask("A", 3, colour_groups(1, 1), colour_groups(2, 1))
    convs = [MaskedConv2d(mask.to(dtype), right=1) for dtype in (torch.float32, torch.bool, torch.int64, torch.float64)]
    x = torch.randn(1, 1, 3, 3)
    for conv in convs:
        conv.load_state_dict(convs[0].state_dict())
        assert torch.equal(conv(x), convs[0](x))


@pytest.mark.parametrize("right", [-1, 3, 4])
def test_a_centre_outside_of_the_kernel_is_refused(right):
    """With 4 it saw the pixel itself and later ones, and described itself as causal."""
    mask = raster_mask("A", 3, colour_groups(1, 1), colour_groups(2, 1))
    with pytest.raises(ValueError, match=f"right must be from 0 to 2, for the mask has 3 columns, got {right}."):
        MaskedConv2d(mask, right)


def test_masked_weights_are_never_used():
    torch.manual_seed(0)
    groups = colour_groups(3, 3)
    conv = MaskedConv2d(raster_mask("A", 3, groups, groups), right=1)
    x = torch.randn(1, 3, 3, 3)
    before = conv(x)
    with torch.no_grad():
        conv.weight[conv.mask == 0] = 1e9
    assert torch.equal(conv(x), before)


def test_fresh_kernel_keeps_unit_variance_over_the_open_taps():
    torch.manual_seed(0)
    conv = MaskedConv2d(raster_mask("A", 7, colour_groups(1, 1), colour_groups(400, 1)), right=3)
    y = conv(torch.randn(1, 1, 30, 30))[:, :, 3:, 3:-3]  # away from the zero padding
    assert 0.9 < y.std().item() < 1.1
    assert not conv.bias.any()


def test_a_fresh_block_of_a_unet_adds_nothing():
    x = torch.randn(1, 4, 3, 5)
    assert torch.equal(UNet(4, num_scales=1)(x), x)


def test_shift_down_by_hand():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])[None, None]
    assert shift_down(x)[0, 0].tolist() == [[0, 0], [1, 2], [3, 4]]
    assert shift_down(torch.ones(1, 1, 1, 3)).tolist() == [[[[0, 0, 0]]]]


def test_gate_is_tanh_of_the_first_half_times_sigmoid_of_the_second():
    x = torch.tensor([0.3, -2.0, 1.5, 0.1])[None, :, None, None]
    expected = torch.tensor([0.3, -2.0]).tanh() * torch.tensor([1.5, 0.1]).sigmoid()
    torch.testing.assert_close(gate(x).flatten(), expected)


def test_label_bias_adds_the_class_row_and_nothing_for_no_label():
    torch.manual_seed(0)
    bias = LabelBias(3, 5)
    assert bias.table.abs().min() > 0
    y = bias(torch.tensor([2, -1, 0]))
    assert y.shape == (3, 5, 1, 1)
    assert torch.equal(y[0].flatten(), bias.table[2])
    assert not y[1].any()
    assert torch.equal(y[2].flatten(), bias.table[0])


def changed_maps(layer, x: torch.Tensor, in_map: int) -> list[int]:
    """Return the output maps that a change of one input map at the centre of a 3x3 image changes, at the centre."""
    other = x.clone()
    other[:, in_map, 1, 1] += 1
    return (layer(x) != layer(other))[0, :, 1, 1].nonzero().flatten().tolist()


def gated_layer(num_colours: int, num_features: int, number: int = 1) -> GatedLayer:
    shape = (num_colours, 3, 3)
    config = GatedPixelCNNConfig(
        image_shape=shape, num_levels=2, num_features=num_features, num_layers=2, kernel_size=3
    )
    return GatedLayer(config, 0, number)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        # What each input map changes at its own pixel: of three colours, by mask A; of two maps per colour, by mask B.
        (0, [[2, 3, 4, 5], [4, 5], []]),
        (1, [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [2, 3, 4, 5], [4, 5], [4, 5]]),
    ],
)
def test_colour_groups_of_the_gated_layer(number, expected):
    torch.manual_seed(0)
    layer = gated_layer(3, 6, number).double()
    x = torch.randn(1, len(expected), 3, 3, dtype=torch.float64)
    assert [changed_maps(lambda h: layer(x, h, None, None)[1], x, i) for i in range(len(expected))] == expected


def test_colour_groups_of_the_residual_block_and_the_1x1s():
    torch.manual_seed(0)
    config = PixelCNNConfig(image_shape=(3, 3, 3), num_levels=2, num_features=3, num_blocks=1)
    block = ResidualBlock(config, 0, 0).double()
    x = torch.rand(1, 6, 3, 3, dtype=torch.float64) + 0.1
    with torch.no_grad():
        for conv in (block.reduce, block.conv, block.expand, block.skip):
            conv.weight.abs_()  # no ReLU is shut
    later = [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5], [2, 3, 4, 5], [4, 5], [4, 5]]
    assert [changed_maps(lambda y: block(y, None, None)[0], x, i) for i in range(6)] == later
    assert [changed_maps(lambda y: block(y, None, None)[1], x, i) for i in range(6)] == later
    conv = masked_1x1("A", colour_groups(3, 3), colour_groups(3, 3)).double()
    assert [changed_maps(conv, x[:, :3], i) for i in range(3)] == [[1, 2], [2], []]


def test_residual_is_on_the_horizontal_stack_and_not_in_the_first_layer():
    torch.manual_seed(0)
    v, h = torch.randn(2, 1, 4, 3, 3)
    for number in (0, 1):
        layer = gated_layer(4, 4, number)
        with torch.no_grad():
            layer.h_out.weight.zero_()
        assert torch.equal(layer(v, h, None, None)[1], h if number else torch.zeros_like(h))
        with torch.no_grad():
            layer.v_conv.weight.zero_()
        assert not layer(v, h, None, None)[0].any()


def test_link_shows_the_rows_above_only():
    torch.manual_seed(0)
    layer = gated_layer(1, 4).double()
    v, h = torch.randn(2, 1, 4, 4, 3, dtype=torch.float64)
    other = v.clone()
    other[:, :, 1] += 1
    changed = (layer(v, h, None, None)[1] != layer(other, h, None, None)[1])[0].any(dim=(0, 2))
    assert changed.tolist() == [False, False, True, True]  # the kernel reaches one row further up


def test_vertical_stack_does_not_read_the_horizontal_one():
    torch.manual_seed(0)
    layer = gated_layer(1, 4)
    v, h = torch.randn(2, 1, 4, 3, 3)
    assert torch.equal(layer(v, h, None, None)[0], layer(v, torch.randn_like(h), None, None)[0])
