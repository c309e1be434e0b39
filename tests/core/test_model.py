"""The networks as a whole: an independent reading of the papers gives the same logits; bad input is refused."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pixelcnn import build_model
from pixelcnn.config import ModelConfig
from tests.core.test_masks import full_mask
from tests.core.tiny import ARCHITECTURES, exactly, random_levels, tiny_config, tiny_model


def masked(weights: dict[str, Tensor], name: str, mask_type: str, x: Tensor, colours: tuple[int, int], full: int):
    """Convolve with an uncropped masked kernel, `full` wide; 1x1 kernels have full = 1.

    Args:
        colours: (number of colours, how often the output maps repeat the colour groups).
    """
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    num_colours, repeats = colours
    out_maps, in_maps = kernel.shape[:2]

    def groups(num: int) -> Tensor:
        return torch.tensor([i * num_colours // num for i in range(num)])

    height = 1 if kernel.shape[2] == 1 else full
    whole = torch.zeros(out_maps, in_maps, height, full, dtype=kernel.dtype)
    whole[:, :, : kernel.shape[2], : kernel.shape[3]] = kernel
    mask = full_mask(mask_type, height, full, groups(in_maps), groups(out_maps // repeats).repeat(repeats))
    return F.conv2d(x, whole * mask, bias, padding=(height // 2, full // 2))


def pixelcnn_logits(w: dict[str, Tensor], config, x: Tensor, label: Tensor) -> Tensor:
    """PixelCNN from arXiv:1601.06759, table 1 and figure 5, with a label's bias before each block's last ReLU."""
    n = (config.image_shape[0], 1)
    x = masked(w, "first", "A", x, n, config.first_kernel_size)
    skips = masked(w, "first_skip", "B", x, n, 1)
    for i in range(config.num_blocks):
        y = masked(w, f"blocks.{i}.reduce", "B", x.relu(), n, 1)
        y = masked(w, f"blocks.{i}.conv", "B", y.relu(), n, config.kernel_size)
        y = (y + w[f"blocks.{i}.label_bias.table"][label][:, :, None, None]).relu()
        x = x + masked(w, f"blocks.{i}.expand", "B", y, n, 1)
        skips = skips + masked(w, f"blocks.{i}.skip", "B", y, n, 1)
    return masked(w, "logits", "B", masked(w, "head", "B", skips.relu(), n, 1).relu(), n, 1)


def gated_pixelcnn_logits(w: dict[str, Tensor], config, x: Tensor, label: Tensor) -> Tensor:
    """Gated PixelCNN from arXiv:1606.05328, figure 2: the whole of a layer, left to right."""
    colours, k, p = config.image_shape[0], config.kernel_size, config.num_features
    v = h = x
    for i in range(config.num_layers):
        name = f"layers.{i}"
        kernel = w[f"{name}.v_conv.weight"]
        n_by_n = torch.cat([kernel, torch.zeros_like(kernel[:, :, : k // 2])], dim=2)
        v_maps = F.conv2d(v, n_by_n, w[f"{name}.v_conv.bias"], padding=k // 2)
        above = torch.cat([torch.zeros_like(v_maps[:, :, :1]), v_maps[:, :, :-1]], dim=2)
        link = F.conv2d(above, w[f"{name}.link.weight"], w[f"{name}.link.bias"])
        h_maps = masked(w, f"{name}.h_conv", "A" if i == 0 else "B", h, (colours, 2), k) + link
        v_maps = v_maps + w[f"{name}.v_label_bias.table"][label][:, :, None, None]
        h_maps = h_maps + w[f"{name}.h_label_bias.table"][label][:, :, None, None]
        v = v_maps[:, :p].tanh() * v_maps[:, p:].sigmoid()
        new = masked(w, f"{name}.h_out", "B", h_maps[:, :p].tanh() * h_maps[:, p:].sigmoid(), (colours, 1), 1)
        h = new if i == 0 else h + new
    y = masked(w, "head", "B", h.relu(), (colours, 1), 1)
    return masked(w, "logits", "B", y.relu(), (colours, 1), 1)


@pytest.mark.parametrize("shape", [(1, 4, 3), (3, 2, 4), (2, 1, 3)])
@pytest.mark.parametrize("architecture", ["pixelcnn", "gated_pixelcnn"])
def test_logits_equal_an_independent_reading_of_the_papers(architecture, shape):
    changes = {"first_kernel_size": 5} if architecture == "pixelcnn" else {"kernel_size": 5, "num_layers": 3}
    model = tiny_model(architecture, shape, num_levels=4, num_labels=3, **changes)
    levels, label = random_levels(shape, 4, num=3), torch.tensor([2, 0, 1])
    reference = {"pixelcnn": pixelcnn_logits, "gated_pixelcnn": gated_pixelcnn_logits}[architecture]
    expected = reference(dict(model.state_dict()), model.config, levels.double() / 3 * 2 - 1, label)
    logits = model(levels, label)
    assert logits.shape == (3, 4, *shape)
    for channel in range(shape[0]):
        for level in range(4):
            torch.testing.assert_close(logits[:, level, channel], expected[:, channel * 4 + level])


def test_a_fresh_attentive_network_is_a_gated_one():
    gated, attentive = (build_model(tiny_config(name, (1, 4, 4), 2)) for name in ARCHITECTURES[1:])
    gated.load_state_dict(attentive.state_dict(), strict=False)
    levels = random_levels((1, 4, 4), 2, num=2)
    assert torch.equal(attentive(levels), gated(levels))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_of_no_images_there_are_no_logits(architecture):
    model = tiny_model(architecture, (1, 3, 4), num_levels=2)
    assert model(random_levels((1, 3, 4), 2, num=0)).shape == (0, 2, 1, 3, 4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_label_is_minus_one(architecture):
    model = tiny_model(architecture, (1, 3, 3), 2, num_labels=2)
    levels = random_levels((1, 3, 3), 2, num=3)
    none = model(levels)
    assert torch.equal(model(levels, torch.tensor([-1, -1, -1])), none)
    mixed = model(levels, torch.tensor([-1, 0, 1]))
    assert torch.equal(mixed[0], none[0])
    assert not torch.equal(mixed[1], none[1])
    assert not torch.equal(mixed[2], none[2])
    # A label reaches every sub-pixel, the first one too.
    given = [model(levels[:1], torch.tensor([label])) for label in (0, 1)]
    assert (given[0] != given[1]).any(dim=1).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_come_in_the_dtype_of_the_weights(architecture):
    model = tiny_model(architecture, (1, 2, 2), 2)
    levels = random_levels((1, 2, 2), 2, num=1)
    assert model(levels).dtype == torch.float64
    assert model.bfloat16()(levels).dtype == torch.bfloat16


BAD_INPUT = [
    ({"levels": [[[[0, 0]]]]}, "levels must be a tensor, got list: torch.as_tensor makes one of an array."),
    ({"levels": torch.zeros(1, 2, 3, dtype=torch.int64)}, r"levels must have shape (B, 1, 2, 3), got (1, 2, 3)."),
    ({"levels": torch.zeros(1, 1, 3, 2, dtype=torch.int64)}, r"levels must have shape (B, 1, 2, 3), got (1, 1, 3, 2)."),
    ({"levels": torch.zeros(1, 1, 2, 3)}, "levels must be int64 levels 0..2, got dtype torch.float32."),
    ({"levels": torch.full((1, 1, 2, 3), 3)}, "levels must lie in 0..2, got 3..3."),
    ({"levels": torch.full((1, 1, 2, 3), -1)}, "levels must lie in 0..2, got -1..-1."),
    ({"label": torch.tensor([0, 1])}, "label must have shape (1,) and dtype int64, got (2,) and torch.int64."),
    ({"label": torch.tensor([0.0])}, "label must have shape (1,) and dtype int64, got (1,) and torch.float32."),
    ({"label": torch.tensor([2])}, "label must lie in -1..1 (-1 for none), got 2..2."),
    ({"label": torch.tensor([-2])}, "label must lie in -1..1 (-1 for none), got -2..-2."),
]


@pytest.mark.parametrize(("bad", "message"), BAD_INPUT)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bad_input_is_named(architecture, bad, message):
    model = tiny_model(architecture, (1, 2, 3), 3, num_labels=2)
    good = {"levels": torch.zeros(1, 1, 2, 3, dtype=torch.int64), "label": torch.tensor([0])}
    model(**good)
    with pytest.raises(ValueError, match=exactly(message)):
        model(**{**good, **bad})


def test_label_for_a_model_without_labels_is_refused():
    model = tiny_model("pixelcnn", (1, 1, 1), 2)
    levels = torch.zeros(1, 1, 1, 1, dtype=torch.int64)
    model(levels, torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"label must be None or -1: this model was built without labels."):
        model(levels, torch.tensor([0]))


def test_unknown_config_is_refused():
    with pytest.raises(
        ValueError,
        match=r"config must be one of AttentivePixelCNNConfig, GatedPixelCNNConfig, PixelCNNConfig, got ModelConfig.",
    ):
        build_model(ModelConfig(image_shape=(1, 1, 1), num_levels=2, num_features=1))


@pytest.mark.parametrize(
    ("architecture", "unused"),
    [
        # What nothing reads: the last block's output beside its skip, the last vertical stack's beside its link.
        ("pixelcnn", {"blocks.1.expand.weight", "blocks.1.expand.bias"}),
        ("gated_pixelcnn", {"layers.1.v_label_bias.table"}),
    ],
)
def test_every_parameter_is_used_but_for_the_known_few(architecture, unused):
    model = tiny_model(architecture, (3, 3, 3), 3, num_labels=2)
    model(random_levels((3, 3, 3), 3, num=8), torch.arange(8) % 2).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()} == unused


def test_size_of_known_networks():
    def num_parameters(config: ModelConfig) -> int:
        return sum(p.numel() for p in build_model(config).parameters())

    # By hand, h = 4: first 4*7*8+8, its skip 8*8+8, a block 8*4+4, 2*3*4*4+4 and twice 4*8+8, head 8*8+8, logits 8*2+2.
    plain = tiny_config("pixelcnn", (1, 5, 5), 2, first_kernel_size=7, num_blocks=3)
    assert num_parameters(plain) == 232 + 72 + 3 * (36 + 100 + 40 + 40) + 72 + 18
    # p = 4, n = 3: v 2*3*8+8 and 2*3*4*8+8, h 2*8+8 and 2*4*8+8, link 8*8+8, out 4*4+4, head 4*8+8, logits 8*2+2.
    gated = tiny_config("gated_pixelcnn", (1, 5, 5), 2, num_layers=3)
    assert num_parameters(gated) == (56 + 24 + 72 + 20) + 2 * (200 + 72 + 72 + 20) + 40 + 18
