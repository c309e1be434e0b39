"""A network whose logits are added to the completer's."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from pixelcnn import build_model, completion_log_prob, load_checkpoint, naive_sample, sample, save_checkpoint
from pixelcnn.completion import score_completions
from pixelcnn.likelihood import count_leaks, pixel_log_prob
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.sampling.cached import cached_sample
from pixelcnn.training import fit, read_state
from tests.core.test_context_training import config, mirrored_dataset
from tests.core.tiny import ARCHITECTURES, random_levels, tiny_config, tiny_model

SHAPE = (1, 4, 5)
WIDTHS = {"context_features": 3, "context_width": 4, "completer_features": 6, "added_features": 3}


def both(architecture: str = "gated_pixelcnn", shape=SHAPE, num_labels: int = 0, **changes) -> AutoregressiveModel:
    return tiny_model(architecture, shape, 2, num_labels, **{**WIDTHS, **changes})


def mask(num: int, shape=SHAPE, seed: int = 0) -> Tensor:
    return torch.rand(num, 1, *shape[1:], generator=torch.Generator().manual_seed(seed)) < 0.5


def alone(network: AutoregressiveModel) -> AutoregressiveModel:
    network = copy.deepcopy(network)
    network.added = None
    return network


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_the_sum_of_both_each_with_its_own_map_of_the_drawing(architecture: str) -> None:
    completer = both(architecture, num_labels=2, added_context_width=2, context_scales=2).completer
    levels, observed, label = random_levels(SHAPE, 2, 3), mask(3), torch.tensor([0, -1, 1])
    given = (levels, label, levels, observed)
    added = completer.added(*given)
    assert torch.allclose(completer(*given), alone(completer)(*given) + added, atol=1e-12)
    assert completer.added.context_network.unet.__class__ is torch.nn.Identity
    assert completer.added.context_network.first.out_channels == 2
    assert count_leaks(completer, levels[0]) == (0, 19)
    completer.added.context_network.last.weight.data.zero_()
    assert not torch.allclose(completer.added(*given), added)


def test_an_added_network_does_not_attend() -> None:
    model = both("attentive_pixelcnn")
    names = [name for name, _ in model.completer.named_modules() if name.endswith("attention")]
    assert names
    assert not [name for name in names if name.startswith("added")]


@pytest.mark.parametrize("sampler", [sample, cached_sample])
@pytest.mark.parametrize("changes", [{}, {"shape": (3, 3, 4), "output": "logistic_mixture", "num_mixtures": 2}])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samplers_follow_the_sum(architecture: str, sampler, changes) -> None:
    changes = {"shape": SHAPE, **changes}
    model = both(architecture, num_labels=2, **changes)
    shape, num = changes["shape"], 20
    u = torch.rand(num, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawing, observed = random_levels(shape, 2, num), mask(num, shape)
    observed[0] = False  # the joint model's
    label = torch.tensor([0, 1, -1, 0]).repeat(5)
    expected = naive_sample(model, u, label, 1.0, drawing, observed)
    assert torch.equal(sampler(model, u, label, 1.0, drawing, observed), expected)
    without = copy.deepcopy(model)
    without.completer.added = None
    assert not torch.equal(naive_sample(without, u, label, 1.0, drawing, observed), expected)


def test_weights_changed_in_place_are_drawn_by() -> None:
    model, num = both(), 20
    u = torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawing, observed = random_levels(SHAPE, 2, num), mask(num)
    before = sample(model, u, None, 1.0, drawing, observed)
    with torch.no_grad():
        model.completer.added.logits.bias.add_(torch.tensor([2.0, -2.0]))
    after = sample(model, u, None, 1.0, drawing, observed)
    assert torch.equal(after, naive_sample(model, u, None, 1.0, drawing, observed))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_endings_are_scored_by_the_sum(architecture: str) -> None:
    model = both(architecture, num_labels=2, label_features=4)
    levels, observed = random_levels(SHAPE, 2, 4), mask(4)
    log_probs = completion_log_prob(model, levels, observed)
    assert torch.allclose(score_completions(model, levels, observed), log_probs, atol=1e-10)
    of_label = [
        (pixel_log_prob(model.completer, levels, torch.full((4,), k), levels, observed) * ~observed).sum((1, 2, 3))
        for k in (0, 1)
    ]
    weights = model.label_log_probs(levels, observed, torch.full((4,), -1))[:, 1:]
    expected = torch.logsumexp(weights + torch.stack(of_label, dim=1), dim=1)
    assert torch.allclose(log_probs, expected, atol=1e-10)


def test_it_begins_as_a_trained_network_with_a_part_of_its_logits() -> None:
    model = both("attentive_pixelcnn")
    trained = tiny_model("gated_pixelcnn", SHAPE, 2, seed=7, num_features=3, context_features=3)
    levels, observed = random_levels(SHAPE, 2, 3), mask(3)
    own = alone(model.completer)(levels, None, levels, observed)
    model.completer.begin_added(trained)
    expected = 0.73 * own + 0.25 * trained(levels, None, levels, observed)
    assert torch.allclose(model.completer(levels, None, levels, observed), expected)


def test_a_new_one_adds_nothing_at_first() -> None:
    completer = both().completer
    levels, observed = random_levels(SHAPE, 2, 3), mask(3)
    own = alone(completer)(levels, None, levels, observed)
    completer.begin_added(None)
    assert torch.equal(completer(levels, None, levels, observed), own)


def test_what_cannot_begin_is_refused_and_nothing_changed() -> None:
    completer = both().completer
    before = copy.deepcopy(completer.state_dict())
    with pytest.raises(ValueError, match="of other sizes"):
        completer.begin_added(tiny_model("gated_pixelcnn", SHAPE, 2, num_features=4, context_features=3))
    with pytest.raises(ValueError, match="of other sizes"):
        completer.begin_added(tiny_model("pixelcnn", SHAPE, 2, num_features=3, context_features=3))
    dilated = tiny_model("gated_pixelcnn", SHAPE, 2, num_features=3, context_features=3, max_dilation=2)
    with pytest.raises(ValueError, match="of other sizes or dilations than"):
        completer.begin_added(dilated)
    assert all(torch.equal(weight, before[name]) for name, weight in completer.state_dict().items())
    with pytest.raises(ValueError, match="added_features"):
        alone(completer).begin_added(None)


def test_it_alone_is_trained_in_the_sum(tmp_path) -> None:
    data = mirrored_dataset()
    torch.manual_seed(0)
    model = build_model(tiny_config("gated_pixelcnn", (1, 4, 4), 2, **WIDTHS)).double()
    model.completer.begin_added(None)
    others = {n: w.clone() for n, w in model.state_dict().items() if not n.startswith("completer.added.")}
    settings = config(batch_size=64, context_share=1.0, ema_decay=0)
    state, longer = tmp_path / "state", dataclasses.replace(settings, max_epochs=20, learning_rate=0.02)
    before = fit(model.completer, data, dataclasses.replace(settings, max_epochs=0.1, learning_rate=1e-9), None, state)
    fixed = {n: w.clone() for n, w in model.completer.added.context_network.state_dict().items()}
    after = fit(model.completer, data, dataclasses.replace(longer, context_network_share=0), None, tmp_path / "other")
    assert after < before - 0.5
    assert all(torch.equal(model.state_dict()[n], w) for n, w in others.items())
    assert all(torch.equal(model.completer.added.context_network.state_dict()[n], w) for n, w in fixed.items())
    num = sum(name.startswith("weights/") for name in read_state(state)[1])
    assert num == len(list(model.completer.added.parameters())), "the state holds what learns, and no more"
    with pytest.raises(ValueError, match="of a run that differs"):
        fit(alone(model.completer), data, longer, None, state)


def test_a_checkpoint_holds_both(tmp_path) -> None:
    model = both("attentive_pixelcnn", num_labels=2, label_features=4, added_context_width=2).float()
    save_checkpoint(tmp_path / "model", model, {})
    loaded, _ = load_checkpoint(tmp_path / "model")
    levels, observed = random_levels(SHAPE, 2, 4), mask(4)
    assert torch.equal(completion_log_prob(loaded, levels, observed), completion_log_prob(model, levels, observed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completer_features": 0}, "added_features must be 0 where completer_features is 0"),
        ({"added_features": 0, "added_context_width": 3}, "added_context_width must be 0 where added_features is 0"),
        ({"added_features": -1}, "added_features must be a whole number"),
        ({"shape": (3, 3, 4), "added_features": 4}, "added_features must be a multiple of the 3 colour channels"),
    ],
)
def test_impossible_widths_are_refused(changes: dict, message: str) -> None:
    shape = changes.get("shape", SHAPE)
    widths = {**WIDTHS, **{name: value for name, value in changes.items() if name != "shape"}}
    with pytest.raises(ValueError, match=message):
        tiny_config("gated_pixelcnn", shape, 2, **widths)
