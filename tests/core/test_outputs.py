"""Mixtures of logistics: exact probabilities, exact samples, for any architecture."""

import dataclasses

import pytest
import torch

from pixelcnn import bits_per_dim, build_model, complete, level_probs, log_prob, naive_sample, pixel_log_prob, sample
from pixelcnn.completion import complete_and_score, completion_log_prob, score_completions
from pixelcnn.likelihood import count_leaks
from pixelcnn.sampling.cached import cached_sample
from tests.core.tiny import ARCHITECTURES, all_images, random_levels, sample_and_score, tiny_config

MIXTURE = {"output": "logistic_mixture", "num_mixtures": 3, "num_features": 4}


def mixture_model(architecture: str, shape, num_levels: int, num_labels: int = 0, seed: int = 0, **changes):
    """Return a network in float64 whose components lie apart, some of them narrow."""
    torch.manual_seed(seed)
    model = build_model(tiny_config(architecture, shape, num_levels, num_labels, **MIXTURE, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        model.logits.bias.normal_(std=1.5)
    return model


@pytest.mark.parametrize(("shape", "num_levels"), [((1, 2, 2), 3), ((3, 1, 1), 4), ((2, 1, 2), 3)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probabilities_of_all_images_sum_to_one(architecture, shape, num_levels):
    model, images = mixture_model(architecture, shape, num_levels, 2), all_images(shape, num_levels)
    for label in (None, torch.ones(len(images), dtype=torch.int64)):
        log_probs = log_prob(model, images, label)
        assert abs(log_probs.exp().sum().item() - 1) < 1e-12
        assert log_probs.std() > 0.1


@pytest.mark.parametrize("num_levels", [2, 5, 256])
@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 3, 4)])
def test_level_probabilities_are_those_of_the_likelihood(shape, num_levels):
    model, levels = mixture_model("gated_pixelcnn", shape, num_levels), random_levels(shape, num_levels, num=3)
    probs = level_probs(model, levels)
    assert probs.shape == (3, num_levels, *shape)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones_like(probs[:, 0]), rtol=0, atol=1e-12)
    own = probs.gather(1, levels[:, None])[:, 0].log()
    torch.testing.assert_close(own, pixel_log_prob(model, levels), rtol=0, atol=1e-9)


def test_level_probabilities_of_a_categorical_model_are_its_softmax():
    model = build_model(tiny_config("pixelcnn", (3, 2, 2), 4)).double()
    levels = random_levels((3, 2, 2), 4, num=2)
    torch.testing.assert_close(level_probs(model, levels), model(levels).softmax(dim=1))


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 4, 5)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_sampler_gives_the_same_levels(architecture, shape):
    model = mixture_model(architecture, shape, 17, 2, context_features=3)
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
    label, drawing = torch.tensor([-1, 0, 1]), torch.randint(17, u.shape, generator=generator)
    observed = torch.rand(3, 1, *shape[1:], generator=generator) < 0.5
    for temperature in (1.0, 0.6, 0.0):
        for seen in ({}, {"drawing": drawing, "observed": observed}):
            expected = naive_sample(model, u, label, temperature, **seen)
            assert torch.equal(sample(model, u, label, temperature, **seen), expected)
            assert torch.equal(cached_sample(model, u, label, temperature, **seen), expected)
    levels, score = complete_and_score(model, drawing, observed, u, label)
    torch.testing.assert_close(score(), completion_log_prob(model, levels, observed, label), rtol=0, atol=1e-9)
    assert torch.equal(levels, complete(model, drawing, observed, u, label))


def test_components_narrower_and_wider_than_the_levels():
    """Log-scales below their least, and so large that a component's sigmoids differ by rounding alone."""
    model = mixture_model("gated_pixelcnn", (3, 3, 4), 17)
    with torch.no_grad():
        model.logits.bias[12:21] = torch.tensor([-12.0, 0.0, 16.0]).repeat(3)
    u = torch.rand(3, 3, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in (1.0, 0.6, 0.0):
        assert torch.equal(sample(model, u, temperature=temperature), naive_sample(model, u, temperature=temperature))
    levels, score = sample_and_score(model, u)
    torch.testing.assert_close(score(), log_prob(model, levels).detach(), rtol=0, atol=1e-9)
    torch.testing.assert_close(level_probs(model, levels).sum(dim=1), torch.ones(3, 3, 3, 4, dtype=torch.float64))


def test_levels_far_from_all_components_have_their_own_probability():
    """Their logs, down to thousands below zero, count at high temperatures and where such levels are scored."""
    model = mixture_model("gated_pixelcnn", (3, 2, 3), 17)
    with torch.no_grad():
        model.logits.bias[3:12], model.logits.bias[12:21] = torch.linspace(1.5, 3.0, 9), -7.0
    u = torch.rand(4, 3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(sample(model, u, temperature=100.0), naive_sample(model, u, temperature=100.0))
    levels, nothing = random_levels((3, 2, 3), 17, num=4), torch.zeros(4, 1, 2, 3, dtype=torch.bool)
    expected = log_prob(model, levels).detach()
    assert expected.max() < -10_000
    torch.testing.assert_close(score_completions(model, levels, nothing), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_leaks(architecture):
    model = mixture_model(architecture, (3, 3, 4), 8)
    leaks, reaching = count_leaks(model, random_levels((3, 3, 4), 8, num=1)[0])
    assert (leaks, reaching) == (0, 35)


@pytest.mark.parametrize("parameter", [0, 9, 18, 21])  # a weight, a mean, a log-scale, a coefficient
def test_a_leak_into_any_parameter_is_counted(parameter):
    model, levels = mixture_model("gated_pixelcnn", (3, 2, 2), 8), random_levels((3, 2, 2), 8, num=1)[0]
    forward = model.forward

    def leaky(x, *arguments, **words):
        parameters = forward(x, *arguments, **words).clone()
        parameters[:, parameter, 0, 0] += 0.01 * x[:, 2, 1, 1]
        return parameters

    model.forward = leaky
    assert count_leaks(model, levels)[0] == 1


def test_float32_is_stable_at_the_ends_and_far_from_the_means():
    model = mixture_model("gated_pixelcnn", (1, 3, 3), 256).float()
    with torch.no_grad():
        model.logits.bias[3:6], model.logits.bias[6:] = torch.tensor([-30.0, 0.0, 30.0]), -6.9  # narrow, far away
        for level in (0, 1, 128, 254, 255):
            levels = torch.full((1, 1, 3, 3), level)
            exact = pixel_log_prob(mixture_copy(model), levels)
            torch.testing.assert_close(pixel_log_prob(model, levels).double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_compiled_loss_of_wide_components_is_the_same():
    output = mixture_model("gated_pixelcnn", (1, 5, 5), 256).float().output
    parameters = torch.full((2, output.num_parameters, 5, 5), 12.0)  # some ten million levels wide
    levels = random_levels((1, 5, 5), 256, num=2)

    def loss(parameters):
        return output.log_prob(parameters, levels).sum()

    found = [torch.autograd.functional.vjp(function, parameters) for function in (loss, torch.compile(loss))]
    for plain, compiled in zip(*found, strict=True):
        assert plain.isfinite().all()
        assert torch.allclose(plain, compiled, atol=1e-5)

    def of_a_level(parameters):
        return output.level_logits(parameters, 0, levels).log_softmax(dim=1)[:, 7].sum()

    for value in torch.autograd.functional.vjp(of_a_level, parameters):  # nobody compiles it
        assert value.isfinite().all()


def mixture_copy(model):
    copied = build_model(model.config).double().eval()
    copied.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    return copied


def test_parameters_are_not_rounded_in_mixed_precision():
    model = mixture_model("gated_pixelcnn", (1, 4, 4), 256).float()
    with torch.autocast("cpu", torch.bfloat16):
        parameters = model(random_levels((1, 4, 4), 256, num=1))
    assert parameters.dtype == torch.float32
    assert not torch.equal(parameters, parameters.bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "gaussian"}, "output must be categorical or logistic_mixture, got 'gaussian'"),
        ({"output": "logistic_mixture"}, "num_mixtures must be a whole number of at least 1, got 0"),
        ({"num_mixtures": 2}, "num_mixtures must be 0 where output is categorical, got 2"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config("pixelcnn", (1, 2, 2), 2), **changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_leave_the_levels_normalised(dtype):
    model = mixture_model("gated_pixelcnn", (1, 2, 2), 6).to(dtype)
    log_probs = log_prob(model, all_images((1, 2, 2), 6))
    assert log_probs.dtype == torch.float32
    assert abs(log_probs.exp().sum().item() - 1) < 1e-5


def test_a_uniform_start_is_about_eight_bits():
    model = build_model(tiny_config("gated_pixelcnn", (3, 4, 4), 256, **MIXTURE))
    levels = random_levels((3, 4, 4), 256, num=8)
    nats = -log_prob(model, levels).mean().item()
    assert 7 < bits_per_dim(nats, (3, 4, 4)) < 12
