import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pixelcnn import log_prob, naive_sample, sample
from pixelcnn.models.outputs import draw_level
from tests.core.tiny import ARCHITECTURES, all_images, exactly, interval_noise, tiny_model

SAMPLERS = pytest.mark.parametrize("sampler", [naive_sample, sample])
SPACES = [((1, 2, 2), 2), ((1, 1, 3), 3), ((1, 4, 1), 2), ((2, 1, 2), 2), ((3, 1, 1), 3), ((3, 2, 1), 2)]


def noise(shape, num, seed=0):
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@SAMPLERS
@pytest.mark.parametrize(("shape", "num_levels"), SPACES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise_inside_an_images_interval_gives_that_image(architecture, shape, num_levels, sampler):
    images = all_images(shape, num_levels)
    model = tiny_model(architecture, shape, num_levels, num_labels=2)
    for label in (None, 0, 1, -1):
        tensor = None if label is None else torch.full((len(images),), label)
        log_probs = log_prob(model, images, tensor).detach()
        for where in (0.5, 1e-6, 1 - 1e-6):  # and just inside both of its ends
            assert torch.equal(sampler(model, interval_noise(log_probs, images, where), tensor), images)


def test_interval_noise_by_hand():
    # Two pixels: p(1st = 0) = 0.4; given 0 the 2nd is 0 with 0.75, given 1 with 0.5.
    images = all_images((1, 1, 2), 2)
    u = interval_noise(torch.tensor([0.3, 0.1, 0.3, 0.3]).double().log(), images)
    expected = torch.tensor([[0.2, 0.375], [0.2, 0.875], [0.7, 0.25], [0.7, 0.75]]).double()
    torch.testing.assert_close(u.flatten(1), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frequencies_are_the_probabilities(architecture):
    images, num = all_images((1, 2, 2), 2), 20_000
    model = tiny_model(architecture, (1, 2, 2), 2, seed=1)
    probs = log_prob(model, images).exp().detach()
    samples = naive_sample(model, noise((1, 2, 2), num))
    counts = (samples.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(dim=1).bincount(minlength=16)
    chi_squared = ((counts - num * probs) ** 2 / (num * probs)).sum().item()
    assert chi_squared < 37.7  # the 0.1 % point for 15 degrees of freedom


@SAMPLERS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_temperature_zero_takes_the_most_likely_level_of_each_sub_pixel(architecture, sampler):
    shape = (2, 2, 2)
    model = tiny_model(architecture, shape, 3)
    drawn = sampler(model, noise(shape, 3), temperature=0)
    # A fixed point: every level is the most likely one given those before it.
    assert torch.equal(model(drawn).argmax(dim=1), drawn)
    assert torch.equal(drawn[0], drawn[1])  # the noise plays no part
    assert draw_level(torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([0.99]), 0).tolist() == [1]  # lowest of a tie


@SAMPLERS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_temperature_divides_the_logits(architecture, sampler):
    shape, u = (1, 3, 3), noise((1, 3, 3), 50)
    model = tiny_model(architecture, shape, 4)
    plain = sampler(model, u)
    for temperature in (0.5, 3.0):
        assert not torch.equal(sampler(model, u, temperature=temperature), plain)
        with torch.no_grad():
            model.logits.weight.mul_(temperature)
            model.logits.bias.mul_(temperature)
        assert torch.equal(sampler(model, u, temperature=temperature), plain)
        with torch.no_grad():
            model.logits.weight.div_(temperature)
            model.logits.bias.div_(temperature)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-310])
def test_temperature_near_zero_is_the_limit(temperature):
    logits = torch.tensor([[0.0, 5.0, 4.0], [-3.0, -1.0, -2.0], [700.0, -700.0, 0.0]])
    assert draw_level(logits, torch.tensor([0.0, 0.5, 0.999]), temperature).tolist() == [1, 1, 0]


def test_a_boundary_belongs_to_the_level_above():
    logits = torch.zeros(6, 4)  # a quarter each, exactly
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75])
    assert draw_level(logits, u, 1.0).tolist() == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_at_its_ends(dtype):
    last = torch.nextafter(torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype))
    u = torch.stack([torch.zeros((), dtype=dtype), last])
    assert draw_level(torch.tensor([0.3, -1.0, 2.0, 0.5]).repeat(2, 1), u, 1.0).tolist() == [0, 3]
    # A level of probability zero is never drawn, not even by a noise of exactly 0.
    assert draw_level(torch.tensor([-math.inf, 0.0, 0.0]).repeat(2, 1), u, 1.0).tolist() == [1, 2]
    model = tiny_model("gated_pixelcnn", (1, 2, 2), 3)
    drawn = naive_sample(model, u[:, None, None, None].expand(2, 1, 2, 2))
    assert drawn.flatten(1).tolist() == [[0] * 4, [2] * 4]


def test_many_levels_that_round_to_less_than_one():
    u = torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    for seed in range(50):
        logits = torch.randn(1, 256, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert draw_level(logits, u, 1.0).tolist() == [255]


@SAMPLERS
@settings(derandomize=True, deadline=None, max_examples=25)
@given(data=st.data())
def test_an_image_depends_on_its_own_noise_alone(sampler, data):
    shape = (3, 2, 2)
    model = tiny_model("gated_pixelcnn", shape, 3, num_labels=2)
    u, label = noise(shape, 4, seed=data.draw(st.integers(0, 1000))), torch.tensor([0, 1, -1, 0])
    drawn = sampler(model, u, label)
    order = torch.tensor(data.draw(st.permutations(range(4))))
    assert torch.equal(sampler(model, u[order], label[order]), drawn[order])
    one = data.draw(st.integers(0, 3))
    assert torch.equal(sampler(model, u[one : one + 1], label[one : one + 1])[0], drawn[one])
    assert torch.equal(sampler(model, u, label), drawn)  # a second call is the same call


@SAMPLERS
def test_samples_are_ordinary_tensors(sampler):
    """They can be scored while gradients are on."""
    model = tiny_model("pixelcnn", (1, 2, 2), 2)
    drawn = sampler(model, noise((1, 2, 2), 2))
    log_prob(model, drawn).sum().backward()
    assert not drawn.is_inference()


GOOD = torch.full((2, 1, 2, 3), 0.5)
IMAGE = torch.zeros(2, 1, 2, 3, dtype=torch.int64)
OBSERVED = torch.ones(2, 1, 2, 3, dtype=torch.bool)
BAD = [
    ({"u": GOOD.numpy()}, "u must be a tensor, got ndarray: torch.as_tensor makes one of an array."),
    ({"u": GOOD[0]}, "u must have shape (B, 1, 2, 3), got (1, 2, 3)."),
    ({"u": GOOD.transpose(2, 3)}, "u must have shape (B, 1, 2, 3), got (2, 1, 3, 2)."),
    ({"u": GOOD.to("meta")}, "u must be on the model's device, cpu, got meta."),
    ({"u": GOOD.long()}, "u must be uniform noise of a float dtype, got torch.int64."),
    ({"u": GOOD + 0.5}, "u must lie in [0, 1), as torch.rand gives it."),
    ({"u": GOOD - 0.51}, "u must lie in [0, 1), as torch.rand gives it."),
    ({"u": GOOD * math.nan}, "u must lie in [0, 1), as torch.rand gives it."),
    *(
        ({"temperature": bad}, f"temperature must be 0 (the most likely level) or a positive number, got {bad}.")
        for bad in (-0.1, math.nan, math.inf, 10**308, 10**400, np.float32(math.inf), np.complex64(1), "1", None, True)
    ),
    ({"label": torch.tensor([0, 2])}, "label must lie in -1..1 (-1 for none), got 0..2."),
    ({"label": 3}, "label must have shape (2,) and dtype int64, got 3."),
    ({"label": torch.tensor([0])}, "label must have shape (2,) and dtype int64, got (1,) and torch.int64."),
    (
        {"drawing": IMAGE},
        "drawing and observed must be given together: one says what is known, the other where.",
    ),
    (
        {"observed": OBSERVED},
        "drawing and observed must be given together: one says what is known, the other where.",
    ),
    (
        {"drawing": IMAGE[:1], "observed": OBSERVED[:1]},
        "drawing must have the batch size of u, 2, got 1.",
    ),
]


@SAMPLERS
@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_arguments_are_named(sampler, bad, message):
    model = tiny_model("pixelcnn", (1, 2, 3), 2, num_labels=2)
    with pytest.raises(ValueError, match=exactly(message)):
        sampler(model, **{"u": GOOD, **bad})


@SAMPLERS
def test_a_device_without_float64_is_refused(sampler, monkeypatch):
    model = tiny_model("pixelcnn", (1, 2, 3), 2)
    monkeypatch.setattr(type(model.head), "weight", SimpleNamespace(device=torch.device("mps")), raising=False)
    with pytest.raises(ValueError, match="mps has no float64, in which levels are drawn: move the model to the CPU"):
        sampler(model, GOOD)


@SAMPLERS
def test_weights_that_are_no_numbers_are_not_sampled(sampler):
    model = tiny_model("pixelcnn", (1, 2, 3), 2)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="its training diverged"):
        sampler(model, GOOD)
