"""A sampler follows from any network made of the blocks; what none can follow from is refused by name."""

import operator
import os
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelcnn import PixelCNNConfig, build_model, naive_sample, sample
from pixelcnn.config import ModelConfig
from pixelcnn.models import registry
from pixelcnn.models.attention import BlockAttention
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.layers import (
    Block,
    LabelBias,
    MaskedConv2d,
    Pointwise,
    context_projection,
    gate,
    masked_1x1,
    shift_down,
)
from pixelcnn.models.maps import NEVER_WAITS, Map
from pixelcnn.models.masks import colour_groups, raster_mask, row_mask
from pixelcnn.models.outputs import Categorical
from pixelcnn.sampling.cached import cached_sample
from pixelcnn.sampling.plan import Plan


@dataclass(frozen=True, kw_only=True)
class RandomConfig(ModelConfig):
    """Random networks: the seed decides what is connected with what."""

    seed: int


class RandomLayer(nn.Module):
    """A vertical and a horizontal convolution, and by chance all else that there is."""

    def __init__(self, rng: np.random.Generator, config: RandomConfig, context_features: int, is_first: bool) -> None:
        super().__init__()
        colours, height, width = config.image_shape
        p, k = config.num_features, int(rng.choice([3, 5]))
        groups = colour_groups(p, colours)
        inputs, kind = (torch.arange(colours), "A") if is_first else (groups, "B")

        def chance(probability: float) -> bool:
            return bool(rng.random() < probability)

        def holed(mask: Tensor, right: int) -> MaskedConv2d:
            holes = torch.from_numpy(rng.random(mask.shape[2:]) < 0.6) if chance(0.3) else torch.ones(mask.shape[2:])
            return MaskedConv2d(mask * holes, right, dilation=int(rng.integers(1, 4)))

        self.v_unit, self.h_unit = (gate if chance(0.5) else F.relu for _ in range(2))
        v_groups, h_groups = (groups.repeat(2 if unit is gate else 1) for unit in (self.v_unit, self.h_unit))
        self.v_conv = holed(torch.ones(len(v_groups), len(inputs), k // 2 + 1, k), k // 2)
        if chance(0.5):
            self.h_conv = holed(row_mask(kind, k, inputs, h_groups), 0)
        else:
            self.h_conv = holed(raster_mask(kind, k, inputs, h_groups), k // 2)
        self.link = Pointwise(len(v_groups), len(h_groups)) if chance(0.7) else None
        self.labels, self.contexts = (
            [make(maps) if there and chance(0.5) else None for maps in (len(v_groups), len(h_groups))]
            for there, make in (
                (config.num_labels, lambda maps: LabelBias(config.num_labels, maps)),
                (context_features, lambda maps: context_projection(context_features, maps)),
            )
        )
        self.extras = nn.ModuleList(block for block in (*self.labels, *self.contexts) if block is not None)
        self.attention = self.enter = self.out = None
        if not is_first and chance(0.5):
            self.attention = BlockAttention(p, colours, 1, 3, height, width)
            self.enter = masked_1x1("B", colour_groups(3 * colours, colours), h_groups)
        if chance(0.5):
            self.out = masked_1x1("B", groups, groups)
        self.v_residual, self.h_residual = (not is_first and chance(0.4) for _ in range(2))

    def forward(self, v, h, label, context):
        found = [self.v_conv(v), self.h_conv(h)]
        if self.link is not None:
            found[1] = found[1] + self.link(shift_down(found[0]))
        for i in range(2):
            if self.labels[i] is not None and label is not None:
                found[i] = found[i] + self.labels[i](label)
            if self.contexts[i] is not None and context is not None:
                found[i] = found[i] + self.contexts[i](context)
        if self.attention is not None and self.enter is not None:
            found[1] = found[1] + self.enter(self.attention(v, h))
        v_new, h_new = self.v_unit(found[0]), self.h_unit(found[1])
        if self.out is not None:
            h_new = self.out(h_new)
        return v + v_new if self.v_residual else v_new, h + h_new if self.h_residual else h_new


class RandomNetwork(AutoregressiveModel):
    """Random layers, and by chance the sum of all of them instead of the last."""

    def __init__(self, config: RandomConfig) -> None:
        super().__init__(config, in_maps=config.num_features)
        rng, context_features = np.random.default_rng(config.seed), self.layer_config.context_features
        self.layers = nn.ModuleList(
            RandomLayer(rng, config, context_features, is_first=i == 0) for i in range(int(rng.integers(1, 5)))
        )
        self.is_sum = bool(rng.random() < 0.5)

    def features(self, x, label, context):
        v = h = x
        skips = []
        for layer in self.layers:
            v, h = layer(v, h, label, context)
            skips.append(h)
        for skip in skips[:-1] if self.is_sum else []:
            h = h + skip
        return h


@pytest.fixture(autouse=True)
def _random_networks():
    registry.register("random", RandomConfig)(RandomNetwork)
    yield
    del registry._ARCHITECTURES["random"]


def random_network(seed: int) -> AutoregressiveModel:
    rng = np.random.default_rng([seed, 1])
    colours = int(rng.integers(1, 4))
    torch.manual_seed(seed)
    model = build_model(
        RandomConfig(
            image_shape=(colours, int(rng.integers(1, 7)), int(rng.integers(1, 7))),
            num_levels=int(rng.choice([2, 3, 5])),
            num_features=colours * int(rng.integers(1, 7)),
            num_labels=int(rng.choice([0, 2])),
            context_features=int(rng.choice([0, 0, 3])),
            seed=seed,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.mark.repeated
def test_random_architectures_are_sampled_exactly() -> None:
    for seed in range(int(os.environ.get("PIXELCNN_TEST_NETWORKS", 12))):
        model = random_network(seed)
        config = model.config
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(2, *config.image_shape, generator=generator, dtype=torch.float64)
        label = torch.tensor([-1, 1]) if config.num_labels else None
        drawing = torch.randint(0, config.num_levels, u.shape, generator=generator)
        observed = torch.rand(2, 1, *config.image_shape[1:], generator=generator) < 0.5
        for seen in ({}, {"drawing": drawing, "observed": observed}):
            expected = naive_sample(model, u, label, **seen)
            assert torch.equal(sample(model, u, label, **seen), expected), f"compiled, seed {seed}"
            assert torch.equal(cached_sample(model, u, label, **seen), expected), f"torch, seed {seed}"


class Layer(nn.Module):
    """Maps `make`s of features and of blocks."""

    def __init__(self, make, *blocks: nn.Module) -> None:
        super().__init__()
        self.make, self.blocks = make, nn.ModuleList(blocks)

    def forward(self, x):
        return self.make(x, *self.blocks)


class Refused(AutoregressiveModel):
    """A network whose features go through `layer`."""

    def __init__(self, config: ModelConfig, layer) -> None:
        p = config.num_features
        super().__init__(config, in_maps=p)
        self.first = MaskedConv2d(raster_mask("A", 3, torch.arange(1), colour_groups(p, 1)), right=1)
        self.layer = layer

    def features(self, x, label, context):
        return self.layer(self.first(x))


CONFIG = ModelConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4)


class Halved(Pointwise):
    """Computes something else than the block whose description it inherits."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Doubling:
    """Changes what a block computes, from the side."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


class Doubled(Doubling, Pointwise):
    pass


class Unmasked(MaskedConv2d):
    def masked_weight(self):
        return self.weight


def changed(change) -> Pointwise:
    layer = Pointwise(4, 4)
    change(layer)
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4), "no sampler follows from '.*' of a feature map|no sampler follows from batch_norm"),
        (nn.Conv2d(4, 4, 3, padding=1), "no sampler follows from conv2d"),
        (torch.tanh, "no sampler follows from tanh"),
        (lambda x: x.flip(1), "no sampler follows from '.flip' of a feature map"),
        (MaskedConv2d(torch.ones(4, 4, 1, 3), right=1), "is not causal"),
        (lambda x: x + 1, "can only be added to another one"),
        (nn.ReLU(inplace=True), "no sampler follows from relu with inplace of a feature map"),
        (lambda x: torch.add(x, x, alpha=2), "no sampler follows from add with alpha of a feature map"),
        (lambda x: operator.iadd(x, x), "no sampler follows from other arithmetic than"),
        (lambda x: sum([x, x]), "no sampler follows from other arithmetic than"),
        (lambda x: 2 * x - x, "no sampler follows from other arithmetic than"),
        (lambda x: x[:, :2], "no sampler follows from other arithmetic than"),
        (lambda x: nn.Parameter(torch.zeros(4, 4, 4)) + x, "no sampler follows from add|can only be added"),
        (lambda x: x + torch.zeros(4, 4, 4), "can only be added to another one, got Tensor"),
        (Pointwise(8, 4), "Pointwise of 8 channels got a map of 4"),
        (Halved(4, 4), "no sampler follows from Halved: it does not say what it computes."),
        (Doubled(4, 4), "no sampler follows from Doubled: it does not say what it computes."),
        (lambda x: x + gate(x), "a map of 4 channels can only be added to another one, got one of 2"),
        (lambda x: x**2, "no sampler follows from other arithmetic than"),
        (lambda x: F.relu(x) > 0, "no sampler follows from other arithmetic than"),
        (lambda x: {0: x}[x == 0], "no sampler follows from other arithmetic than"),
        (lambda x: gate(gate(gate(x))), "a gate's maps must have two halves, got 1."),
        (lambda x: x if x else F.relu(x), "no sampler follows from other arithmetic than"),
        (lambda x: x if len(x) else F.relu(x), "no sampler follows from other arithmetic than"),
        (Unmasked(torch.zeros(4, 4, 1, 1), 0), "no sampler follows from Unmasked: its masked_weight exceeds its taps."),
        (lambda x: None, "features of Refused must return a Map for a Map, got NoneType."),
        *(
            (changed(change), "no sampler follows from Pointwise: its forward has hooks, or is replaced.")
            for change in (
                lambda layer: layer.register_forward_hook(lambda layer, inputs, output: 2 * output),
                lambda layer: layer.register_forward_pre_hook(lambda layer, inputs: F.relu(inputs[0])),
                lambda layer: setattr(layer, "forward", F.relu),
            )
        ),
        (
            Layer(lambda x, attend: attend(x, x), BlockAttention(4, 1, 1, 4, 4, 5)),
            "Refused has attention, or a bias by place, for images of another size",
        ),
    ],
    ids=[
        *("batch norm", "open convolution", "tanh", "flip", "sees the right", "constant"),
        *("relu in place", "weighted sum", "sum in place", "sum from 0", "factor", "part", "to a tensor", "a tensor"),
        *("a layer of other channels", "a layer that computes something else", "a layer changed from the side"),
        *("a sum of other channels", "power", "comparison", "equality", "a gate of one channel", "truth"),
        *("length", "no mask", "nothing"),
        *("hook", "hook before", "another forward", "other size"),
    ],
)
def test_what_no_sampler_follows_from_is_refused_by_name(layer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Refused(CONFIG, layer).described()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda net, x, label, context: x + shift_down(net.bias(label)), "a shift or attention on a label's bias"),
        (lambda net, x, label, context: x + net.window(net.bias(label)), "a shift or attention on a label's bias"),
        (lambda net, x, label, context: x + net.attend(x, net.bias(label)), "a shift or attention on a label's bias"),
        (lambda net, x, label, context: net.bias(label), "Entering does not look at the image"),
        (lambda net, x, label, context: x + net.few(label), "Entering has a LabelBias of fewer than its 2 labels"),
        (lambda net, x, label, context: x + net.enter(context), "Pointwise got None: leave it out where"),
        (
            lambda net, x, label, context: net.layer(x) if context is None else x + net.enter(context),
            "Entering is another network without a drawing",
        ),
        (
            lambda net, x, label, context: x if context is None else x + net.layer(F.relu(x + net.enter(context))),
            "Entering is another network without a drawing",
        ),
        (lambda net, x, label, context: x + net.bias(label), "LabelBias got None: leave it out where"),
        (
            lambda net, x, label, context: net.layer(x) if label is None else x + net.bias(label),
            "Entering is another network without labels than with the label -1",
        ),
        (
            lambda net, x, label, context: x if label is None else x + net.layer(net.bias(label)),
            "Entering is another network without labels than with the label -1",
        ),
    ],
    ids=[
        *("shift", "window", "attention", "label alone", "few labels", "no drawing", "another path", "a path more"),
        *("no label", "another path without a label", "a bias of the label -1"),
    ],
)
def test_labels_and_drawings_that_enter_in_other_ways_are_refused(features, message: str) -> None:
    class Entering(Refused):
        def features(self, x, label, context):
            return features(self, self.first(x), label, context)

    model = Entering(replace(CONFIG, num_labels=2, context_features=3), Pointwise(4, 4))
    model.bias, model.few, model.enter = LabelBias(2, 4), LabelBias(1, 4), Pointwise(3, 4, bias=False)
    model.window, model.attend = MaskedConv2d(torch.ones(4, 4, 2, 1), right=0), BlockAttention(4, 1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match=message):
        model.described()


def test_a_block_that_says_that_it_looks_down_is_refused() -> None:
    with pytest.raises(ValueError, match="a conv looks at rows below its own: no sampler can know it in time"):
        Map("conv", (), None, 4, 1)


class Place(Block):
    """A number for each cell and map."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 4, 4))

    def forward(self, x=None):
        return self.table

    def described(self, x):
        return Map("constant", (), self, 8, NEVER_WAITS)


def pixelwise() -> nn.Module:
    return masked_1x1("B", colour_groups(8, 1), colour_groups(8, 1))


def vertical() -> nn.Module:
    return MaskedConv2d(torch.ones(8, 8, 2, 3), right=1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Layer(lambda x, a, b, c: b(F.relu(a(x))) + c(F.relu(x)), pixelwise(), pixelwise(), pixelwise()),
        lambda: Layer(lambda x, up, place: shift_down(up(x) + place(x)) + x, vertical(), Place()),
    ],
    ids=["a rectified map beside one that is read rectified", "a bias by place of a row that is known late"],
)
def test_what_a_network_may_add_up_is_sampled_exactly(layer) -> None:
    torch.manual_seed(0)
    model = Refused(replace(CONFIG, num_features=8), layer()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    u = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for images in (u, u[:1]):
        assert torch.equal(sample(model, images), naive_sample(model, images))
        assert torch.equal(cached_sample(model, images), naive_sample(model, images))


def test_a_gate_of_rows_that_moved_down_is_sampled_exactly() -> None:
    """Of a map whose channels lie in the order of the colours' turns, and of the map of a drawing."""

    class Moved(AutoregressiveModel):
        def __init__(self, config: ModelConfig) -> None:
            super().__init__(config, in_maps=4)
            groups = colour_groups(4, 2)
            self.first = MaskedConv2d(raster_mask("A", 3, torch.arange(2), groups.repeat(2)), right=1)
            self.out, self.context = masked_1x1("B", groups.repeat(2), groups), Pointwise(2, 4, bias=False)

        def features(self, x, label, context):
            h = self.first(x)
            y = self.out(h) + gate(shift_down(h))
            return y if context is None else y + self.context(gate(shift_down(context)))

    torch.manual_seed(0)
    model = Moved(ModelConfig(image_shape=(2, 4, 4), num_levels=3, num_features=4, context_features=4)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(32, 2, 4, 4, generator=generator, dtype=torch.float64)
    drawing = torch.randint(0, 3, u.shape, generator=generator)
    observed = torch.rand(32, 1, 4, 4, generator=generator) < 0.5
    for seen in ({}, {"drawing": drawing, "observed": observed}):
        expected = naive_sample(model, u, **seen)
        assert torch.equal(sample(model, u, **seen), expected)
        assert torch.equal(cached_sample(model, u, **seen), expected)


def test_a_block_may_be_called_without_what_is_left_out() -> None:
    class Entering(Block):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.enter = Pointwise(4, 4), Pointwise(3, 4, bias=False)

        def forward(self, x, context):
            return self.out(x) if context is None else self.out(x) + self.enter(context)

        def described(self, x, context):
            return self.forward(x, context)

    class Entered(Refused):
        def features(self, x, label, context):
            return self.layer(self.first(x), context)

    model = Entered(replace(CONFIG, context_features=3), Entering()).double().eval()
    u = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(sample(model, u), naive_sample(model, u))


@pytest.mark.parametrize("is_by_row", [True, False])
def test_biases_by_label_and_by_place_may_be_added_at_once(is_by_row: bool) -> None:
    class Biased(Refused):
        def features(self, x, label, context):
            h = self.first(x)
            y = (self.layer(h) if is_by_row else h) + self.place(h)
            y = y if label is None else y + self.label_bias(label)
            return h + shift_down(y) if is_by_row else y

    torch.manual_seed(0)
    for num_labels in (2, 15):  # as many rows as there are cells, too
        config = replace(CONFIG, num_features=8, num_labels=num_labels)
        model = Biased(config, vertical())
        model.place, model.label_bias = Place(), LabelBias(num_labels, 8)
        with torch.no_grad():
            for parameter in model.double().eval().parameters():
                parameter.copy_(0.5 * torch.randn_like(parameter))
        u = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        label = torch.arange(64) % (num_labels + 1) - 1
        assert torch.equal(sample(model, u, label), naive_sample(model, u, label))
        assert torch.equal(cached_sample(model, u, label), naive_sample(model, u, label))


def test_the_default_device_is_not_the_plans() -> None:
    model, u = random_network(1), torch.rand(2, *random_network(1).config.image_shape, dtype=torch.float64)
    expected = naive_sample(model, u)
    with torch.device("meta"):  # as with CUDA, tensors that are made without a device lie elsewhere
        assert torch.equal(cached_sample(model, u), expected)


def test_weights_that_are_no_numbers_are_not_sampled() -> None:
    model, u = random_network(0), torch.zeros(1, *random_network(0).config.image_shape)
    with torch.no_grad():
        model.logits.bias[0] = torch.nan
    for sampler in (sample, cached_sample):
        with pytest.raises(ValueError, match="the model's weights are not finite numbers"):
            sampler(model, u)


def test_a_name_is_registered_once_and_fits_into_a_file_name() -> None:
    for name, message in (
        ("pixelcnn", "named 'pixelcnn' exists already"),
        ("a b", "'a b' is no name"),
        ("a/b", "no name"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.register(name, ModelConfig)(RandomNetwork)
    with pytest.raises(ValueError, match="PixelCNNConfig already belongs to an architecture: give 'other' its own"):
        registry.register("other", PixelCNNConfig)(RandomNetwork)


def test_a_sum_is_known_once_all_of_it_is() -> None:
    one, other = (Map("image", (), None, 2, 0, torch.tensor(turns)) for turns in ([1, 2], [2, 1]))
    turns = (one + other).turns
    assert turns is not None
    assert turns.tolist() == [2, 2]


def test_a_gate_of_halves_that_are_known_at_different_turns_is_refused() -> None:
    first = MaskedConv2d(raster_mask("A", 3, torch.arange(3), colour_groups(12, 3)), right=1)
    image = Map("image", (), None, 3, 0, torch.arange(1, 4))
    with pytest.raises(ValueError, match="the halves of a gate's maps must be known at the same turns"):
        gate(first(image))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (lambda: MaskedConv2d(torch.ones(4, 4, 1, 3), right=0), "kernel of several columns"),
        (
            lambda: Layer(lambda x, wide: wide(shift_down(x)), MaskedConv2d(torch.ones(4, 4, 1, 3), right=0)),
            "kernel of several columns",
        ),
        (
            lambda: Layer(lambda x, attention: attention(x, x), BlockAttention(4, 1, 1, 4, 4, 4)),
            "kernel of several columns",
        ),
        (lambda: Pointwise(4, 4), "bias"),  # it would be added where there is no drawing, too
        (lambda: nn.Sequential(Pointwise(4, 4, bias=False), nn.ReLU(), Pointwise(4, 4)), "bias"),
    ],
    ids=["a kernel", "a kernel on rows above", "attention", "a bias", "a bias of a second layer"],
)
def test_what_the_map_of_a_drawing_must_not_enter_by_is_refused(layer, what: str) -> None:
    class Entered(RandomNetwork):
        def features(self, x, label, context):
            h = super().features(x, label, context)
            return h if context is None else h + self.enter(context)

    model = Entered(RandomConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4, context_features=4, seed=0))
    model.enter = layer()
    with pytest.raises(ValueError, match=f"no sampler follows from a {what} on the map of a drawing"):
        model.described()


def test_a_completer_that_no_sampler_follows_from_is_refused_when_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """The joint model beside it, which sees no drawings, is as it should be."""

    @dataclass(frozen=True, kw_only=True)
    class DrawnConfig(ModelConfig):
        """Of a network that a drawing enters with a bias."""

    class Drawn(AutoregressiveModel):
        def __init__(self, config: DrawnConfig) -> None:
            super().__init__(config, in_maps=4)
            self.first = MaskedConv2d(raster_mask("A", 3, torch.arange(1), colour_groups(4, 1)), right=1)
            self.enter = Pointwise(2, 4)

        def features(self, x, label, context):
            return self.first(x) if context is None else self.first(x) + self.enter(context)

    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    registry.register("drawn", DrawnConfig)(Drawn)
    config = DrawnConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4)
    build_model(config)
    with pytest.raises(ValueError, match="no sampler follows from a bias on the map of a drawing"):
        build_model(replace(config, context_features=2, completer_features=4))


def test_a_network_that_sees_its_own_pixel_is_refused_when_it_is_built() -> None:
    @dataclass(frozen=True, kw_only=True)
    class LeakyConfig(ModelConfig):
        """Of a network whose first layer has the wrong mask."""

    class Leaky(AutoregressiveModel):
        def __init__(self, config: LeakyConfig) -> None:
            super().__init__(config, in_maps=4)
            self.first = MaskedConv2d(raster_mask("B", 3, torch.arange(1), colour_groups(4, 1)), right=1)

        def features(self, x, label, context):
            return self.first(x)

    registry.register("leaky", LeakyConfig)(Leaky)
    try:
        with pytest.raises(ValueError, match="Leaky is not causal: its logits see the pixel itself, or later ones"):
            build_model(LeakyConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4))
    finally:
        del registry._ARCHITECTURES["leaky"]


def test_a_network_that_is_too_deep_for_a_plan_is_refused_in_a_sentence() -> None:
    def deep(num_blocks: int) -> AutoregressiveModel:
        config = registry.architectures()["pixelcnn"]
        return build_model(config(image_shape=(1, 4, 4), num_levels=2, num_features=2, num_blocks=num_blocks))

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own: of libraries that another test uses some raise it
    try:
        Plan(deep(200))
        with pytest.raises(ValueError, match="so deep a network: use at most 200 blocks in a row"):
            Plan(deep(600))
    finally:
        sys.setrecursionlimit(before)


def test_rows_and_columns_are_kept_only_as_far_as_they_are_read() -> None:
    model = build_model(registry.architectures()["gated_pixelcnn"](
        image_shape=(1, 9, 9), num_levels=2, num_features=4, num_layers=3, kernel_size=5))  # fmt: skip
    plan = Plan(model)
    assert max(buffer.num_rows for buffer in plan.buffers) == 3
    assert max(max(buffer.left, buffer.right) for buffer in plan.buffers) == 2
    # The vertical stack's rows are read by two layers that each look two rows up, and by a link one row down.
    assert max(buffer.reach for buffer in plan.buffers) == 7


@dataclass(frozen=True, kw_only=True)
class ListedConfig(ModelConfig):
    pass


class Listed(AutoregressiveModel):
    """Keeps its block in a list, where torch does not find it."""

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config, in_maps=4)
        self.blocks = [MaskedConv2d(raster_mask("A", 3, torch.arange(1), colour_groups(4, 1)), right=1)]

    def features(self, x, label, context):
        return F.relu(self.blocks[0](x))


def test_a_block_that_would_not_be_saved_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a network was trained in part, and loaded with other weights than it was saved with."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    registry.register("listed", ListedConfig)(Listed)
    with pytest.raises(ValueError, match="Listed uses a MaskedConv2d that is no part of it, and would be neither"):
        build_model(ListedConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4))


def test_a_config_that_was_not_completed_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class BareConfig(ModelConfig):
        def __post_init__(self) -> None:
            assert self.num_features > 2

    config = BareConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4)
    with pytest.raises(ValueError, match=r"BareConfig.__post_init__ must begin with super\(\).__post_init__\(\)\."):
        Listed(config)


def test_a_network_with_a_forward_of_its_own_is_refused() -> None:
    """Samplers went on drawing from what it overrides."""

    class Colder(Refused):
        def forward(self, *inputs):
            return 2 * super().forward(*inputs)

    replaced = Refused(CONFIG, nn.ReLU())
    replaced.forward = lambda *inputs: 2 * Refused.forward(replaced, *inputs)

    class Called(Refused):
        def __call__(self, *inputs):
            return 2 * super().__call__(*inputs)

    models = (Colder(CONFIG, nn.ReLU()), replaced, Called(CONFIG, nn.ReLU()))
    for model, name in zip(models, ("Colder", "Refused", "Called"), strict=True):
        with pytest.raises(
            ValueError, match=rf"no sampler follows from the forward of {name}: change features instead\."
        ):
            model.described()


def test_a_network_with_hooks_or_an_output_of_its_own_is_refused() -> None:
    for hook in ("register_forward_hook", "register_forward_pre_hook"):
        hooked = Refused(CONFIG, nn.ReLU())
        getattr(hooked, hook)(lambda *arguments: arguments[-1])
        with pytest.raises(ValueError, match="no sampler follows from the hooks of Refused: change features instead"):
            hooked.described()

    class Cold(Categorical):
        def level_logits(self, *arguments):
            return 2 * super().level_logits(*arguments)

    model = Refused(CONFIG, nn.ReLU())
    model.output = Cold(CONFIG)
    with pytest.raises(ValueError, match=r"no sampler follows from the output of Refused: choose one of models/out"):
        model.described()
