"""The context network: any drawing counts as a whole, the distribution stays normalised, the joint model stays."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import pixelcnn.completion as completion
import pixelcnn.sampling.fast as fast_sampling
from pixelcnn import (
    GatedPixelCNNConfig,
    PixelCNNConfig,
    build_model,
    complete,
    completion_log_prob,
    load_checkpoint,
    log_prob,
    naive_sample,
    sample,
    save_checkpoint,
)
from pixelcnn.checkpoint import load_joint_weights
from pixelcnn.completion import complete_and_score, score_completions
from pixelcnn.config import ModelConfig
from pixelcnn.models.base import joint_parameters
from pixelcnn.models.layers import ContextNetwork
from pixelcnn.sampling.cached import cached_sample
from tests.core.test_fast_sampling import model_of, name
from tests.core.tiny import (
    ARCHITECTURES,
    all_images,
    exactly,
    fillings,
    interval_noise,
    random_levels,
    tiny_config,
    tiny_model,
)

SHAPE = (1, 2, 3)


def context_model(architecture: str, shape=SHAPE, num_levels=2, num_labels=0, seed=0, **changes):
    return tiny_model(architecture, shape, num_levels, num_labels, seed, context_features=3, context_width=4, **changes)


def random_mask(num: int, shape, seed: int = 0) -> Tensor:
    return torch.rand(num, 1, *shape[1:], generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("completer", [0, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completions_of_every_mask_are_a_normalised_distribution(architecture, completer):
    model = context_model(architecture, num_labels=2, completer_features=completer)
    for bits in itertools.product([False, True], repeat=6):
        observed = torch.tensor(bits).reshape(1, *SHAPE)
        image = random_levels(SHAPE, 2, num=1, seed=sum(2**i for i, bit in enumerate(bits) if bit))
        filled = fillings(image, observed, 2)
        masks = observed.expand(len(filled), -1, -1, -1)
        for label in (None, torch.ones(len(filled), dtype=torch.int64)):
            log_probs = completion_log_prob(model, filled, masks, label)
            assert abs(log_probs.exp().sum().item() - 1) < 1e-10
            u = interval_noise(log_probs, filled)
            assert torch.equal(complete(model, image.expand_as(filled), masks, u, label), filled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completions_of_colour_images_are_normalised(architecture):
    shape = (3, 1, 3)
    model = context_model(architecture, shape)
    for bits in itertools.product([False, True], repeat=3):
        observed = torch.tensor(bits).reshape(1, 1, 1, 3)
        filled = fillings(random_levels(shape, 2, num=1), observed, 2)
        log_probs = completion_log_prob(model, filled, observed.expand(len(filled), -1, -1, -1))
        assert abs(log_probs.exp().sum().item() - 1) < 1e-10


@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 4)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_observed_pixel_counts_everywhere_and_no_other_does(architecture, shape):
    levels, height, width = random_levels(shape, 3, num=1), *shape[1:]
    reached = torch.zeros(height, width, *shape, dtype=torch.bool)
    for seed in range(20):  # several, because a unit can be off whatever the drawing
        model = context_model(architecture, shape, 3, seed=seed)
        observed, drawing = random_mask(1, shape, seed), random_levels(shape, 3, num=1, seed=seed)
        before = model(levels, None, drawing, observed)
        for y, x in itertools.product(range(height), range(width)):
            changed = drawing.clone()
            changed[0, seed % shape[0], y, x] = (changed[0, seed % shape[0], y, x] + 1) % 3
            after = model(levels, None, changed, observed)
            if observed[0, 0, y, x]:
                reached[y, x] |= (after != before).any(dim=1)[0]
            else:
                assert torch.equal(after, before)
    assert reached.all()  # from each pixel above, left, below, right, and its own place


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_pixels_are_observed_counts_too(architecture):
    model = context_model(architecture, num_levels=3, seed=2)
    levels = drawing = torch.ones(1, *SHAPE, dtype=torch.int64)  # scaled, the level in the middle is 0
    logits = {tuple(m.flatten().tolist()): model(levels, None, drawing, m) for m in (all_images(SHAPE, 2) > 0)[:, None]}
    for a, b in itertools.combinations(logits.values(), 2):
        assert not torch.equal(a, b)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_completed_pixel_sees_earlier_ones_and_the_drawing_alone(architecture):
    model = context_model(architecture, (1, 4, 4), 2)
    levels, observed = random_levels((1, 4, 4), 2, num=1), random_mask(1, (1, 4, 4), 3)
    before = model(levels, None, levels, observed)
    for i in range(16):
        changed = levels.clone().flatten()
        changed[i] = 1 - changed[i]
        after = model(changed.reshape(levels.shape), None, levels, observed)
        same = (after == before).all(dim=1).flatten()
        assert same[: i + 1].all()


@pytest.mark.parametrize("completer", [0, 6])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 4)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_observed_is_the_joint_model(architecture, shape, completer):
    model = context_model(architecture, shape, 3, num_labels=2, completer_features=completer)
    levels, label = random_levels(shape, 3, num=3), torch.tensor([0, -1, 1])
    nothing = torch.zeros(3, 1, *shape[1:], dtype=torch.bool)
    joint = model(levels, label)
    assert torch.equal(model(levels, label, levels, nothing), joint)
    # Beside images that do have a drawing, too.
    mixed = nothing.clone()
    mixed[1] = True
    logits = model(levels, label, levels, mixed)
    torch.testing.assert_close(logits[::2], joint[::2], rtol=0, atol=1e-12)
    assert not torch.equal(logits[1], joint[1])
    u = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = complete(model, levels, nothing, u, label)
    assert torch.equal(drawn, sample(model, u, label))
    assert torch.equal(completion_log_prob(model, drawn, nothing, label), log_prob(model, drawn, label))
    everything = ~nothing
    assert torch.equal(complete(model, levels, everything, u, label), levels)
    assert completion_log_prob(model, levels, everything, label).tolist() == [0, 0, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_context_network_changes_nothing_and_can_learn(architecture):
    config = tiny_config(architecture, (1, 4, 4), 2, context_features=3)
    assert config.context_width == 3
    torch.manual_seed(0)
    model = build_model(config).double()
    levels, observed = random_levels((1, 4, 4), 2, num=4), random_mask(4, (1, 4, 4))
    logits = model(levels, None, levels, observed)
    assert torch.equal(logits, model(levels))
    logits.square().sum().backward()
    gradients = [p.grad for key, p in model.named_parameters() if key.endswith("context.weight")]
    # The last vertical stack feeds nothing beside its link.
    assert [bool(g is not None and g.any()) for g in gradients].count(False) == (architecture != "pixelcnn")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_joint_weights_are_the_start_of_a_model_with_context(architecture, tmp_path):
    joint = tiny_model(architecture, (1, 4, 4), 3, num_labels=2).float()
    save_checkpoint(tmp_path / "joint", joint, {})
    torch.manual_seed(7)
    model = build_model(tiny_config(architecture, (1, 4, 4), 3, 2, context_features=3))
    load_joint_weights(model, tmp_path / "joint")
    levels, label, observed = random_levels((1, 4, 4), 3, num=2), torch.tensor([1, -1]), random_mask(2, (1, 4, 4))
    assert torch.equal(model(levels, label, levels, observed), joint(levels, label))
    # A completer starts from the same weights.
    both = build_model(tiny_config(architecture, (1, 4, 4), 3, 2, context_features=3, completer_features=4))
    load_joint_weights(both, tmp_path / "joint")
    assert torch.equal(both(levels, label, levels, observed), joint(levels, label))
    assert torch.equal(both(levels, label), joint(levels, label))
    # Of a checkpoint with a completer and a label network the joint weights are taken.
    drawing = tiny_config(architecture, (1, 4, 4), 3, 2, context_features=3, completer_features=4, label_features=2)
    complete = build_model(drawing)
    load_joint_weights(complete, tmp_path / "joint")
    with torch.no_grad():
        complete.completer.logits.bias += torch.randn(complete.completer.logits.bias.shape)
    save_checkpoint(tmp_path / "drawing", complete, {})
    again = build_model(drawing)
    load_joint_weights(again, tmp_path / "drawing")
    seen = (levels, label, levels, observed)
    assert torch.equal(again(*seen), complete(*seen)), "its completer has learned, and stays what it is"
    alone = build_model(joint.config).float()
    load_joint_weights(alone, tmp_path / "drawing")
    assert torch.equal(alone(levels, label), joint(levels, label))
    # A checkpoint of a network with this context is taken whole.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    save_checkpoint(tmp_path / "whole", model, {})
    other = build_model(model.config)
    load_joint_weights(other, tmp_path / "whole")
    assert torch.equal(other(levels, label, levels, observed), model(levels, label, levels, observed))
    loaded, _ = load_checkpoint(tmp_path / "whole")
    assert loaded.config == model.config

    wider = build_model(tiny_config(architecture, (1, 4, 4), 3, 2, context_features=4))
    folder = tmp_path / "whole"
    message = f"{folder} holds a context or label network of other sizes. Start from a network without."
    with pytest.raises(ValueError, match=exactly(message)):
        load_joint_weights(wider, folder)
    binary = build_model(tiny_config(architecture, (1, 4, 4), 2, 2, context_features=3))
    message = f"{tmp_path / 'joint'} holds a network of num_levels 3, the one to train has 2."
    with pytest.raises(ValueError, match=exactly(message)):
        load_joint_weights(binary, tmp_path / "joint")


@pytest.mark.parametrize("num_scales", [0, 3])
@pytest.mark.parametrize("side", [1, 2, 5, 28, 32])
def test_the_context_network_reaches_from_corner_to_corner(side, num_scales):
    torch.manual_seed(0)
    config = GatedPixelCNNConfig(image_shape=(1, side, side), num_levels=2, num_features=2, num_layers=1, kernel_size=3)
    network = ContextNetwork(config, 2, 2, num_scales).double()
    drawing = torch.randn(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    # Straight through: where all hidden maps are positive no path is cut.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_().add_(0.01)  # some begin at zero
        network.first.bias.add_(100)
    observed = torch.ones(1, 1, side, side, dtype=torch.bool)
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        (gradient,) = torch.autograd.grad(network(drawing, observed)[0, :, y, x].sum(), drawing)
        assert gradient.all()


CONTEXT = {"context_features": 3, "context_width": 5, "num_labels": 3}
UNET = {**CONTEXT, "context_scales": 2}
ENGINE_CONFIGS: list[ModelConfig] = [
    PixelCNNConfig(image_shape=(1, 5, 6), num_levels=2, num_features=4, num_blocks=3, **CONTEXT),
    PixelCNNConfig(image_shape=(3, 4, 5), num_levels=5, num_features=27, num_blocks=2, kernel_size=5, **UNET),
    PixelCNNConfig(image_shape=(2, 1, 4), num_levels=3, num_features=4, num_blocks=1, **CONTEXT),
    GatedPixelCNNConfig(image_shape=(1, 5, 6), num_levels=2, num_features=4, num_layers=3, kernel_size=3, **UNET),
    GatedPixelCNNConfig(image_shape=(3, 4, 5), num_levels=5, num_features=27, num_layers=2, kernel_size=5, **CONTEXT),
    GatedPixelCNNConfig(image_shape=(2, 4, 1), num_levels=3, num_features=4, num_layers=1, kernel_size=3, **CONTEXT),
]
WITH_COMPLETER = [dataclasses.replace(config, completer_features=6) for config in ENGINE_CONFIGS[::2]]


@pytest.mark.parametrize("config", ENGINE_CONFIGS, ids=name)
def test_every_sampler_is_the_naive_one_with_a_drawing(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(4, *config.image_shape, generator=generator, dtype=torch.float64)
        label = torch.tensor([-1, 0, 2, 1])
        drawing = torch.randint(0, config.num_levels, u.shape, generator=generator)
        observed = torch.rand(4, 1, *config.image_shape[1:], generator=generator) < 0.5
        observed[3] = False
        expected = naive_sample(model, u, label, drawing=drawing, observed=observed)
        filler = torch.where(observed, drawing, -9)
        assert torch.equal(cached_sample(model, u, label, 1.0, filler, observed), expected)
        rows: list[Tensor] = []
        assert torch.equal(sample(model, u, label, 1.0, filler, observed), expected)
        streamed = sample(model, u, label, 1.0, filler, observed, lambda _, row, rows=rows: rows.append(row.clone()))
        assert torch.equal(streamed, expected)
        assert torch.equal(torch.stack(rows, dim=2), expected)
        assert torch.equal(naive_sample(model, u, label), sample(model, u, label))  # nothing of it is left behind


@pytest.mark.parametrize("config", WITH_COMPLETER, ids=name)
def test_a_completer_draws_what_has_a_drawing_and_the_joint_model_the_rest(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    assert model.completer is not None
    u = torch.rand(5, *config.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.tensor([-1, 0, 2, 1, -1])
    drawing = torch.randint(0, config.num_levels, u.shape, generator=torch.Generator().manual_seed(1))
    mixed = torch.rand(5, 1, *config.image_shape[1:], generator=torch.Generator().manual_seed(2)) < 0.5
    mixed[[1, 3]] = False
    mixed[[0, 2, 4], :, 0, 0] = True
    joint = naive_sample(model, u, label)
    for observed in (mixed, torch.zeros_like(mixed), torch.ones_like(mixed)):
        drawn = observed.flatten(1).any(dim=1)
        expected = naive_sample(model, u, label, drawing=drawing, observed=observed)
        assert torch.equal(expected[~drawn], joint[~drawn])
        own = naive_sample(model.completer, u, label, drawing=drawing, observed=observed)
        assert torch.equal(expected[drawn], own[drawn])
        for sampler in (sample, cached_sample):
            assert torch.equal(sampler(model, u, label, 1.0, drawing, observed), expected)
            rows: list[Tensor] = []
            streamed = sampler(
                model, u, label, 1.0, drawing, observed, lambda _, row, rows=rows: rows.append(row.clone())
            )
            assert torch.equal(streamed, expected)
            assert torch.equal(torch.stack(rows, dim=2), expected)
    assert not torch.equal(own, joint)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("config", [*ENGINE_CONFIGS[::4], *WITH_COMPLETER], ids=name)
def test_a_completion_comes_with_its_log_probability(config: ModelConfig, compiled, monkeypatch) -> None:
    if not compiled:
        for module in (fast_sampling, completion):
            monkeypatch.setattr(module, "engine_name", lambda model: "cached, in torch")
    u = torch.rand(5, *config.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    label = torch.tensor([-1, 0, 2, 1, -1])
    drawing = torch.randint(0, config.num_levels, u.shape, generator=torch.Generator().manual_seed(1))
    observed = random_mask(5, config.image_shape, seed=2)
    observed[1], observed[3] = False, True
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        model = model_of(config, dtype)
        for temperature in (1.0, 0.5, 0.0):
            for on_row in (None, lambda *_: None):
                levels, score = complete_and_score(model, drawing, observed, u, label, temperature, on_row)
                log_probs = score()
                assert torch.equal(levels, complete(model, drawing, observed, u, label, temperature))
                expected = completion_log_prob(model, levels, observed, label)
                for found in (log_probs, score_completions(model, levels, observed, label)):
                    torch.testing.assert_close(found, expected.double(), rtol=tolerance, atol=tolerance)
                    assert found[3] == 0, "nothing was missing"
        alone = complete_and_score(model, drawing[:1], observed[:1], u[:1], label[:1])[1]()
        crowd = complete_and_score(model, drawing, observed, u, label)[1]()
        assert not compiled or torch.equal(alone, crowd[:1]), "not a bit depends on the images beside it"


@pytest.mark.parametrize("config", ENGINE_CONFIGS[::3], ids=name)
def test_candidates_of_one_drawing_share_the_rows_that_are_known(config: ModelConfig, monkeypatch) -> None:
    """Its known rows are computed once, whatever the other drawings and labels of the batch; no level changes."""
    model = model_of(config, torch.float64)
    _, height, width = config.image_shape
    u = torch.rand(6, *config.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawing = torch.randint(0, config.num_levels, u.shape, generator=torch.Generator().manual_seed(1))
    drawing[1:4] = drawing[0]
    observed = torch.zeros(6, 1, height, width, dtype=torch.bool)
    observed[:, :, :2] = True
    observed[:, :, -1, 0] = True
    observed[5, :, :, 0] = False  # another mask, from the first row on
    label = torch.tensor([1, 1, 1, 0, 1, 1])
    expected = naive_sample(model, u, label, drawing=drawing, observed=observed)
    engine, calls = fast_sampling._engine_of(model), []

    def rows(self, state, work, index, temperature, start, stop) -> None:
        calls.extend([(start, stop)] * len(index))
        sample_rows(self, state, work, index, temperature, start, stop)

    sample_rows = type(engine).rows
    monkeypatch.setattr(type(engine), "rows", rows)
    assert torch.equal(sample(model, u, label, 1.0, drawing, observed), expected)
    assert sorted(calls) == sorted([(0, 2), *[(2, height)] * 3, *[(0, height)] * 3])
    streamed = []
    assert torch.equal(
        sample(model, u, label, 1.0, drawing, observed, lambda _, row: streamed.append(row.clone())), expected
    )
    assert torch.equal(torch.stack(streamed, dim=2), expected)


@pytest.mark.parametrize("config", ENGINE_CONFIGS[1::3], ids=name)
def test_an_image_does_not_depend_on_those_beside_it_in_float32(config: ModelConfig) -> None:
    model = model_of(config, torch.float32)
    num = 3 * fast_sampling.MAX_BATCH_IMAGES
    u, observed = torch.rand(num, *config.image_shape), random_mask(num, config.image_shape)
    drawing = torch.randint(0, config.num_levels, u.shape)
    together = complete_and_score(model, drawing, observed, u)
    for i in range(num):
        one = slice(i, i + 1)
        alone = complete_and_score(model, drawing[one], observed[one], u[one])
        assert torch.equal(alone[0][0], together[0][i])
        assert torch.equal(alone[1]()[0], together[1]()[i])


def test_candidates_of_one_drawing_share_its_map() -> None:
    model, calls = context_model("pixelcnn"), []
    model.context_network.register_forward_hook(lambda *_: calls.append(1))
    drawing = random_levels(SHAPE, 2, num=2).repeat_interleave(4, dim=0)
    observed = torch.ones(8, 1, 2, 3, dtype=torch.bool)
    observed[:, :, 1, 2] = False
    u = torch.rand(8, *SHAPE, dtype=torch.float64)
    completed = complete(model, drawing, observed, u)
    assert len(calls) == 2
    assert torch.equal(completed, naive_sample(model, u, drawing=drawing, observed=observed))


LEVELS = torch.zeros(2, *SHAPE, dtype=torch.int64)
OBSERVED = torch.ones(2, 1, 2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("context_features", "drawing", "observed", "message"),
    [
        (0, LEVELS, OBSERVED, "drawing and observed must be None: this model has no context network."),
        (0, None, OBSERVED, "drawing and observed must be None: this model has no context network."),
        (3, LEVELS, None, "drawing and observed must be given together: one says what is known, the other where."),
        (3, None, OBSERVED, "drawing and observed must be given together: one says what is known, the other where."),
        (3, LEVELS[:1], OBSERVED[:1], "drawing must have the batch size of levels, 2, got 1."),
        (3, LEVELS + 2, OBSERVED, "drawing (where observed) must lie in 0..1, got 2..2."),
        (
            3,
            LEVELS,
            OBSERVED.long(),
            "observed must be bool of shape (2, 1, 2, 3), True where a pixel is known, "
            "got torch.int64 of shape (2, 1, 2, 3).",
        ),
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wrong_drawing_is_named(architecture, context_features, drawing, observed, message):
    model = tiny_model(architecture, SHAPE, 2, context_features=context_features)
    with pytest.raises(ValueError, match=exactly(message)):
        model(LEVELS, None, drawing, observed)


def test_a_completer_of_the_joint_width_has_a_head_of_its_width():
    """Or it could not begin with its weights."""
    config = tiny_config("gated_pixelcnn", (1, 3, 3), 2, context_features=3, head_features=10)
    config = dataclasses.replace(config, completer_features=config.num_features)
    model = build_model(config)
    assert model.completer.head.weight.shape == model.head.weight.shape
    model.begin_completer()
    assert torch.equal(model.completer.head.weight, model.head.weight)
    assert config.of_completer().head_features == 10
    assert dataclasses.replace(config, completer_features=2).of_completer().head_features == 4


def test_a_network_without_context_has_the_parameters_it_always_had():
    for architecture in ARCHITECTURES:
        assert not [key for key in tiny_model(architecture, SHAPE, 2).state_dict() if "context" in key]


def test_the_networks_of_a_config_with_all_parts():
    sizes = {"image_shape": SHAPE, "num_levels": 2, "num_features": 4, "num_labels": 2}
    drawn = {"context_features": 3, "context_width": 5, "label_features": 6}
    without = ModelConfig(**sizes, **drawn)
    assert without.of_joint() == ModelConfig(**sizes, **{**drawn, "label_features": 0})  # it completes, too
    both = ModelConfig(**sizes, **drawn, completer_features=8)
    assert both.of_joint() == ModelConfig(**sizes)
    completer = ModelConfig(**{**sizes, "num_features": 8}, **{**drawn, "label_features": 0})
    assert both.of_completer() == completer


def test_the_size_of_a_model_is_that_of_its_joint_network():
    changes = {"context_features": 3, "completer_features": 8, "label_features": 2}
    model = tiny_model("gated_pixelcnn", SHAPE, 2, 2, **changes)
    joint = tiny_model("gated_pixelcnn", SHAPE, 2, 2)
    assert sum(p.numel() for p in joint_parameters(model)) == sum(p.numel() for p in joint.parameters())
