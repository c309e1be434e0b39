"""The label network: an ending is drawn with a label, and its probability is that of the mixture over labels."""

import itertools
import math

import pytest
import torch

import pixelcnn.models.base as base
from pixelcnn import TrainConfig, build_model, complete, completion_log_prob, naive_sample, sample
from pixelcnn.completion import complete_and_score, score_completions
from pixelcnn.evaluation import per_image_completion_nll
from pixelcnn.sampling.cached import cached_sample
from pixelcnn.sampling.naive import new_canvas
from pixelcnn.training import fit
from pixelcnn.training.trainer import LabelTrainer
from tests.core.tiny import ARCHITECTURES, all_images, exactly, random_levels, tiny_config, tiny_model, toy_dataset

SHAPE = (1, 2, 3)
NETWORKS = [{"completer_features": 0}, {"completer_features": 2}]


def label_model(architecture="gated_pixelcnn", shape=SHAPE, num_levels=2, num_labels=3, seed=0, **changes):
    context = {"context_features": 3, "context_width": 4, "label_features": 4}
    model = tiny_model(architecture, shape, num_levels, num_labels, seed, **context, **changes)
    assert model.label_network is not None
    with torch.no_grad():  # or tiny networks find all labels about as likely
        model.label_network.last.weight.mul_(4)
    return model


def masks(num: int, shape=SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.rand(num, 1, *shape[1:], generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("changes", NETWORKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mixture_is_normalised_for_every_mask(architecture, changes):
    model = label_model(architecture, **changes)
    images = all_images(SHAPE, 2)
    for bits in itertools.product([False, True], repeat=6):
        observed = torch.tensor(bits).reshape(1, *SHAPE)
        filled = images[((images == images[37]) | ~observed).flatten(1).all(dim=1)]
        known = observed.expand(len(filled), -1, -1, -1)
        log_probs = completion_log_prob(model, filled, known)
        assert abs(log_probs.exp().sum().item() - 1) < 1e-10
        none = torch.full((len(filled),), -1)
        weights = model.label_log_probs(filled, known, none).exp()
        given = [completion_log_prob(model, filled, known, torch.full_like(none, label)) for label in range(3)]
        if any(bits):
            mixture = sum(weights[:, 1 + label] * given[label].exp() for label in range(3))
            assert torch.allclose(log_probs.exp(), mixture, atol=1e-12)
        else:  # nothing is known: the joint model, without label
            assert torch.equal(log_probs, model_without_labels(model, log_probs, filled, known))


def model_without_labels(model, like, filled, known):
    network, model.label_network = model.label_network, None
    try:
        return completion_log_prob(model, filled, known).to(like.dtype)
    finally:
        model.label_network = network


@pytest.mark.parametrize("changes", NETWORKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 4)])
def test_all_samplers_draw_the_same_labels_and_pixels(architecture, shape, changes):
    changes = {name: 3 * value for name, value in changes.items()}
    model = label_model(architecture, shape, 3, **changes)
    num = 12
    drawing, observed = random_levels(shape, 3, num), masks(num, shape)
    observed[0] = False
    label = torch.tensor([-1, 0, 2, *[-1] * (num - 3)])
    u = torch.rand((num, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for temperature in (0.0, 0.7, 1.0):
        expected = naive_sample(model, u, label, temperature, drawing, observed)
        for sampler in (sample, cached_sample):
            assert torch.equal(sampler(model, u, label, temperature, drawing, observed), expected)
        levels, score = complete_and_score(model, drawing, observed, u, label, temperature)
        assert torch.equal(levels, expected)
        scored = completion_log_prob(model, levels, observed, label)
        assert torch.allclose(score_completions(model, levels, observed, label), scored, atol=1e-10)
        assert torch.allclose(score(), scored, atol=1e-10), "summed over the labels, not that of the one drawn"
        assert torch.equal(score(slice(5, 9)), score()[5:9])


def test_scoring_can_be_stopped_between_rows() -> None:
    shape = (1, 5, 3)
    model = label_model(shape=shape)
    drawing, observed = random_levels(shape, 2, 8), masks(8, shape)
    score = complete_and_score(model, drawing, observed, torch.rand(8, *shape, dtype=torch.float64))[1]
    rows = []

    def stop(row: int, _: torch.Tensor) -> None:
        rows.append(row)
        if row == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        score(on_row=stop)
    assert rows == [0, 1, 2]


def test_a_mixture_of_logistics_is_scored_by_the_sampler_too():
    shape = (3, 3, 4)
    model = label_model(shape=shape, num_levels=5, output="logistic_mixture", num_mixtures=2)
    drawing, observed = random_levels(shape, 5, 8), masks(8, shape)
    u = torch.rand((8, *shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    levels, score = complete_and_score(model, drawing, observed, u)
    assert torch.allclose(score(), completion_log_prob(model, levels, observed), atol=1e-9)


def test_labels_come_as_often_as_the_network_says():
    model, num = label_model(), 4000
    drawing, observed = random_levels(SHAPE, 2, 1), masks(1, seed=3)
    observed[..., 0, 0], observed[..., 1, 1] = (
        False,
        True,
    )  # whose noise serves the label, too
    weights = model.label_log_probs(drawing, observed, torch.tensor([-1]))[0].exp()
    assert weights.max() < 0.9
    u = torch.rand((num, *SHAPE), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    filled = complete(model, drawing.expand(num, -1, -1, -1), observed.expand(num, -1, -1, -1), u)
    kinds, counts = filled.unique(dim=0, return_counts=True)
    expected = completion_log_prob(model, kinds, observed.expand(len(kinds), -1, -1, -1)).exp()
    error = (expected * (1 - expected) / num).sqrt()
    assert ((counts / num - expected).abs() < 5 * error + 1e-9).all()


def test_temperature_divides_the_log_probabilities_of_labels():
    model, num = label_model(), 1000
    drawing, observed = random_levels(SHAPE, 2, 1), masks(1, seed=3) | torch.tensor([True, False, False])
    log_probs = model.label_log_probs(drawing, observed, torch.tensor([-1]))[0, 1:]
    u = torch.full((num, *SHAPE), 0.5, dtype=torch.float64)
    u[:, 0, 0, 0] = torch.arange(num) / num  # the noise that decides about the label

    def shares(temperature):
        some = (x.expand(num, -1, -1, -1) for x in (drawing, observed))
        return new_canvas(model, u, None, temperature, *some).label.bincount(minlength=3) / num

    for temperature in (0.5, 1.0, 3.0):
        assert (shares(temperature) - (log_probs / temperature).softmax(dim=0)).abs().max() < 0.002
    assert shares(0.0)[log_probs.argmax()] == 1


def test_a_drawing_is_looked_at_by_itself():
    model = label_model(shape=(1, 5, 6), num_labels=4).float()
    drawing, observed = random_levels((1, 5, 6), 2, 9), masks(9, (1, 5, 6))
    label = torch.full((9,), -1)
    together = model.label_log_probs(drawing, observed, label)
    alone = [model.label_log_probs(drawing[i : i + 1], observed[i : i + 1], label[:1]) for i in range(9)]
    assert torch.equal(together, torch.cat(alone))
    hidden = torch.where(observed, drawing, 1 - drawing)
    assert torch.equal(model.label_log_probs(hidden, observed, label), together), "what is hidden decides nothing"


def test_improbable_labels_are_left_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "MIN_LABEL_PROB", 0.1)
    model, label = label_model(num_labels=5), torch.full((16,), -1)
    with torch.no_grad():
        model.label_network.last.weight.mul_(40)
    drawing, observed = random_levels(SHAPE, 2, 16), masks(16) | torch.tensor([True, False, False])
    found = model.label_log_probs(drawing, observed, label)
    kept = found.isfinite().sum(dim=1)
    assert (kept < 5).all()
    assert (kept >= 1).all()
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(16, dtype=torch.float64))


@pytest.mark.parametrize("times", [0.9, 1.1])
@pytest.mark.parametrize(("num_labels", "least"), [(2, 0.05), (10, 0.05), (50, 0.01)])
def test_which_labels_are_too_improbable(num_labels, least, times):
    probs = torch.full((num_labels,), (1 - times * least) / (num_labels - 1))
    probs[0] = times * least
    model = label_model(num_labels=num_labels)
    with torch.no_grad():
        model.label_network.last.weight.zero_()
        model.label_network.last.bias.copy_(probs.log())
    everything = torch.ones(1, *SHAPE, dtype=torch.bool)
    found = model.label_log_probs(random_levels(SHAPE, 2, 1), everything, torch.tensor([-1]))
    assert found[0, 1:].isfinite().tolist() == [times > 1] + [True] * (num_labels - 1)


def test_of_many_labels_those_that_are_left_are_drawn():
    """Of fifty that are about as likely none reaches a twentieth."""
    model, label = label_model(num_labels=50), torch.full((4,), -1)
    drawing, observed = random_levels(SHAPE, 2, 4), masks(4) | torch.tensor([True, False, False])
    found = model.label_log_probs(drawing, observed, label)
    assert torch.allclose(found.exp().sum(dim=1), torch.ones(4, dtype=torch.float64))
    u = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    levels, score = complete_and_score(model, drawing, observed, u)
    assert torch.equal(levels, naive_sample(model, u, drawing=drawing, observed=observed))
    assert torch.allclose(score(), completion_log_prob(model, levels, observed).double())
    for temperature in (1e-310, 1e-3, 0.0):
        expected = naive_sample(model, u, None, temperature, drawing, observed)
        assert torch.equal(sample(model, u, None, temperature, drawing, observed), expected)


def test_a_label_network_learns_from_what_is_known_alone(tmp_path):
    data = toy_dataset(shape=(1, 4, 4), num_levels=2, num_labels=2, num_train=64)
    for split, images in data.images.items():  # the label is the level of all pixels
        images[:] = data.labels[split].view(-1, 1, 1, 1).to(images.dtype)
    network = {"context_features": 2, "context_width": 2, "label_features": 4}
    config = TrainConfig(
        batch_size=16, learning_rate=0.02, max_epochs=40, label_dropout=0, ema_decay=0.9, save_minutes=0
    )

    steps: list[int] = []

    def trained(stop_after: int | None = None):
        steps.clear()
        torch.manual_seed(0)
        model = build_model(tiny_config("gated_pixelcnn", (1, 4, 4), 2, 2, **network))
        assert model.label_network is not None

        def on_step(report):
            steps.append(report.step)
            if report.step == stop_after:
                raise KeyboardInterrupt

        nats = fit(model.label_network, data, config, on_step, tmp_path / "state" if stop_after else None)
        return model, nats

    model, nats = trained()
    assert nats < 0.05 < math.log(2)
    with pytest.raises(KeyboardInterrupt):
        trained(stop_after=30)
    resumed, _ = trained(stop_after=1000)
    assert steps[0] == 31, "it went on, not started afresh"
    weights = model.label_network.state_dict()
    assert all(torch.equal(weights[name], w) for name, w in resumed.label_network.state_dict().items())
    levels, observed = torch.ones(2, 1, 4, 4, dtype=torch.int64), torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    levels[0], observed[..., 0, 0] = 0, True
    assert model.label_network(levels, observed).argmax(dim=1).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"^a model with a completer or a label network is trained in parts"):
        fit(model, data, config)
    scores = per_image_completion_nll(model, data, "test")
    assert scores["top"].isfinite().all()


def test_a_label_that_is_withheld_teaches_the_label_network_nothing():
    data, config = toy_dataset(num_levels=2), TrainConfig(batch_size=8, learning_rate=0.01, max_epochs=1)
    model = label_model(shape=data.image_shape, num_labels=2).float()
    trainer = LabelTrainer(model.label_network, data, config)
    levels, observed = random_levels(data.image_shape, 2, 3), masks(3, data.image_shape)
    log_probs = model.label_network(levels, observed).log_softmax(dim=1)
    expected = torch.stack([-log_probs[0, 1], torch.zeros(()), -log_probs[2, 0]])
    torch.testing.assert_close(trainer.nlls(levels, torch.tensor([1, -1, 0]), observed), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_features": 2}, "label_features must be 0 where context_features is 0, got 2."),
        (
            {"label_features": 2, "context_features": 2, "num_labels": 0},
            "label_features must be 0 where num_labels is 0, got 2.",
        ),
        ({"label_features": -1}, "label_features must be a whole number of at least 0, got -1."),
    ],
)
def test_impossible_label_networks_are_refused(changes, message):
    with pytest.raises(ValueError, match=exactly(message)):
        tiny_config("gated_pixelcnn", SHAPE, 2, **{"num_labels": 3, **changes})


def test_the_noise_that_chose_a_label_does_not_choose_the_first_pixel_too():
    num, model = 3000, label_model(shape=(1, 1, 3))
    image = torch.tensor([[[[0, 1, 0]]]])
    observed = torch.tensor([[[[False, True, True]]]])
    u = torch.full((num, 1, 1, 3), 0.5, dtype=torch.float64)
    u[:, 0, 0, 0] = (torch.arange(num) + 0.5) / num
    drawn = complete(model, image.expand(num, -1, -1, -1), observed.expand(num, -1, -1, -1), u)[:, 0, 0, 0]
    filled = image.repeat(2, 1, 1, 1)
    filled[1, 0, 0, 0] = 1
    p = completion_log_prob(model, filled, observed.expand(2, -1, -1, -1)).exp()
    assert abs((drawn == 1).double().mean() - p[1]) < 10 / num, ((drawn == 1).double().mean(), p)
