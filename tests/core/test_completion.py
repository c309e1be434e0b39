import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pixelcnn.sampling.fast as fast
from pixelcnn import (
    GatedPixelCNNConfig,
    build_model,
    complete,
    completion_log_prob,
    log_prob,
    naive_sample,
    pixel_log_prob,
    resample,
    sample,
)
from pixelcnn.completion import complete_and_score, drawing_bits_per_dim, score_completions, shares_of_drawing
from tests.core.tiny import ARCHITECTURES, all_images, exactly, fillings, interval_noise, random_levels, tiny_model

SHAPE = (1, 2, 3)


def noise(shape, num, seed=0):
    return torch.rand(num, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    shape=st.sampled_from([(1, 2, 3), (3, 2, 2), (2, 1, 3)]),
    filler=st.sampled_from([-1, 0, 3, 2**40, -(2**63)]),
    temperature=st.sampled_from([0, 0.7, 1]),
    data=st.data(),
)
def test_observed_pixels_are_kept_and_the_filler_means_nothing(architecture, shape, filler, temperature, data):
    model = tiny_model(architecture, shape, 3, num_labels=2)
    bits = data.draw(st.lists(st.booleans(), min_size=2 * shape[1] * shape[2], max_size=2 * shape[1] * shape[2]))
    observed = torch.tensor(bits).reshape(2, 1, *shape[1:])
    image, u = random_levels(shape, 3, 2, seed=data.draw(st.integers(0, 999))), noise(shape, 2)
    label = torch.tensor([0, -1])
    given_image = image.clone()
    completed = complete(model, image, observed, u, label, temperature)
    assert torch.equal(image, given_image)
    assert completed.dtype == torch.int64
    assert completed.min() >= 0
    assert completed.max() < 3
    assert torch.equal(torch.where(observed, completed, 0), torch.where(observed, image, 0))
    other = torch.where(observed, image, filler)
    assert torch.equal(complete(model, other, observed, u, label, temperature), completed)
    assert torch.equal(naive_sample(model, u, label, temperature, drawing=other, observed=observed), completed)


@pytest.mark.parametrize(("shape", "num_known"), [((1, 2, 3), 2), ((1, 3, 2), 3), ((2, 1, 3), 1), ((3, 1, 2), 1)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_missing_suffix_is_drawn_from_the_exact_conditional(architecture, shape, num_known):
    model = tiny_model(architecture, shape, 2, num_labels=2)
    width = shape[2]
    observed = (torch.arange(shape[1] * width) < num_known).reshape(1, 1, shape[1], width)
    joint_images = all_images(shape, 2)
    for seed, label in itertools.product(range(3), (None, 1)):
        image = random_levels(shape, 2, num=1, seed=seed)
        filled = fillings(image, observed, 2)
        num = len(filled)
        labels = {n: None if label is None else torch.full((n,), label) for n in (num, len(joint_images))}
        joint = log_prob(model, joint_images, labels[len(joint_images)]).detach()
        agrees = ((joint_images == image) | ~observed).flatten(1).all(dim=1)
        conditional = joint[agrees] - joint[agrees].logsumexp(dim=0)  # Bayes, by enumeration
        torch.testing.assert_close(
            completion_log_prob(model, filled, observed.expand(num, -1, -1, -1), labels[num]),
            conditional, rtol=0, atol=1e-12,
        )  # fmt: skip
        for where in (0.5, 1e-6, 1 - 1e-6):
            u = interval_noise(conditional, filled, where)
            drawn = complete(model, image.expand_as(filled), observed.expand(num, -1, -1, -1), u, labels[num])
            assert torch.equal(drawn, filled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_frequencies_of_a_missing_suffix(architecture):
    model, num = tiny_model(architecture, (1, 2, 2), 2, seed=2), 5_000
    image, observed = torch.tensor([[[[1, 0], [0, 0]]]]), torch.tensor([[[[True, True], [False, False]]]])
    filled = fillings(image, observed, 2)
    joint = log_prob(model, filled).exp().detach()
    probs = joint / joint.sum()
    drawn = complete(
        model, image.expand(num, -1, -1, -1), observed.expand(num, -1, -1, -1), noise((1, 2, 2), num, seed=3)
    )
    counts = (drawn[:, 0, 1] * torch.tensor([2, 1])).sum(dim=1).bincount(minlength=4)
    assert ((counts - num * probs) ** 2 / (num * probs)).sum().item() < 16.3  # 0.1 % point, 3 degrees of freedom


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completion_log_prob_is_normalised_and_belongs_to_complete_for_every_mask(architecture):
    model = tiny_model(architecture, SHAPE, 2, num_labels=2)
    for bits in itertools.product([False, True], repeat=6):
        observed = torch.tensor(bits).reshape(1, *SHAPE)
        image = random_levels(SHAPE, 2, num=1, seed=sum(2**i for i, bit in enumerate(bits) if bit))
        filled = fillings(image, observed, 2)
        assert len(filled) == 2 ** (6 - sum(bits))
        masks = observed.expand(len(filled), -1, -1, -1)
        for label in (None, torch.ones(len(filled), dtype=torch.int64)):
            log_probs = completion_log_prob(model, filled, masks, label)
            assert abs(log_probs.exp().sum().item() - 1) < 1e-12
            for where in (1e-6, 1 - 1e-6):
                u = interval_noise(log_probs, filled, where)
                assert torch.equal(complete(model, image.expand_as(filled), masks, u, label), filled)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_temperature(architecture):
    model, num = tiny_model(architecture, SHAPE, 4), 40
    image, u = random_levels(SHAPE, 4, num), noise(SHAPE, num)
    observed = torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5
    plain = complete(model, image, observed, u)
    coldest = complete(model, image, observed, u, temperature=0)
    assert torch.equal(torch.where(observed, image, model(coldest).argmax(dim=1)), coldest)
    assert not torch.equal(coldest, plain)
    with torch.no_grad():
        model.logits.weight.mul_(3)
        model.logits.bias.mul_(3)
    assert torch.equal(complete(model, image, observed, u, temperature=3.0), plain)
    assert not torch.equal(complete(model, image, observed, u), plain)


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_and_nothing_observed(architecture, shape):
    model = tiny_model(architecture, shape, 3, num_labels=2)
    image, u, label = random_levels(shape, 3, num=3), noise(shape, 3), torch.tensor([1, -1, 0])
    everything = torch.ones(3, 1, *shape[1:], dtype=torch.bool)
    assert torch.equal(complete(model, image, everything, u, label), image)
    assert completion_log_prob(model, image, everything, label).tolist() == [0, 0, 0]
    drawn = complete(model, image, ~everything, u, label)
    assert torch.equal(drawn, sample(model, u, label))
    assert torch.equal(completion_log_prob(model, drawn, ~everything, label), log_prob(model, drawn, label))


def test_every_image_has_its_own_mask():
    model = tiny_model("gated_pixelcnn", SHAPE, 3)
    image, u = random_levels(SHAPE, 3, num=3), noise(SHAPE, 3)
    observed = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    together = complete(model, image, observed, u)
    together_log_prob = completion_log_prob(model, together, observed)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(complete(model, image[one], observed[one], u[one])[0], together[i])
        torch.testing.assert_close(
            completion_log_prob(model, together[one], observed[one])[0], together_log_prob[i], rtol=0, atol=1e-12
        )


IMAGE, OBSERVED = torch.zeros(2, *SHAPE, dtype=torch.int64), torch.ones(2, 1, 2, 3, dtype=torch.bool)
BAD = [
    ({"image": IMAGE.numpy()}, "image must be a tensor, got ndarray: torch.as_tensor makes one of an array."),
    ({"observed": OBSERVED.tolist()}, "observed must be a tensor, got list: torch.as_tensor makes one of an array."),
    (
        {"observed": OBSERVED[:, 0]},
        "observed must be bool of shape (2, 1, 2, 3), True where a pixel is known, got torch.bool of shape (2, 2, 3).",
    ),
    (
        {"observed": OBSERVED.long()},
        "observed must be bool of shape (2, 1, 2, 3), True where a pixel is known, "
        "got torch.int64 of shape (2, 1, 2, 3).",
    ),
    ({"image": IMAGE + 2}, "image (where observed) must lie in 0..1, got 2..2."),
    ({"image": IMAGE - 1}, "image (where observed) must lie in 0..1, got -1..-1."),
    (
        {"image": IMAGE.double()},
        "image (where observed) must be int64 levels 0..1, got dtype torch.float64.",
    ),
    ({"image": IMAGE.expand(2, 3, 2, 3)}, "image must have shape (B, 1, 2, 3), got (2, 3, 2, 3)."),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_arguments_are_named(bad, message):
    model = tiny_model("pixelcnn", SHAPE, 2)
    arguments = {"image": IMAGE, "observed": OBSERVED, **bad}
    with pytest.raises(ValueError, match=exactly(message)):
        complete(model, u=torch.zeros(2, *SHAPE), **arguments)
    arguments["levels"] = arguments.pop("image")
    for score in (completion_log_prob, score_completions):
        with pytest.raises(ValueError, match=exactly(message.replace("image", "levels"))):
            score(model, **arguments)


@pytest.mark.parametrize("changes", [{}, {"context_features": 2, "label_features": 2}])
@pytest.mark.parametrize("score", [completion_log_prob, score_completions])
def test_the_missing_part_and_the_label_are_checked_when_they_are_scored(score, changes):
    model = tiny_model("pixelcnn", SHAPE, 2, num_labels=2, **changes)
    with pytest.raises(ValueError, match=exactly("levels must lie in 0..1, got 5..5.")):
        score(model, IMAGE + 5, ~OBSERVED)
    with pytest.raises(ValueError, match=exactly("label must lie in -1..1 (-1 for none), got 0..2.")):
        score(model, IMAGE, ~OBSERVED, torch.tensor([0, 2]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_proposal_is_complete(architecture):
    model = tiny_model(architecture, SHAPE, 3, num_labels=2, context_features=2)
    image, observed = random_levels(SHAPE, 3, 4), noise((1, 2, 3), 4, seed=5) < 0.4
    u, label = noise(SHAPE, 4), torch.tensor([0, -1, 1, -1])
    levels, effective = resample(model, image, observed, u[:, None], torch.full((4,), 0.999), label)
    assert torch.equal(levels, complete(model, image, observed, u, label))
    assert effective.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("architecture", "wrong"), [("pixelcnn", 5), ("gated_pixelcnn", 80)])
def test_many_proposals_are_the_joint_models_conditional(architecture, wrong):
    """What is known last has its full say, although `complete` alone heeds it only as the context network learned."""
    model = tiny_model(architecture, (1, 2, 2), 2, seed=2, context_features=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("context.weight"):
                weight.mul_(wrong)  # it has learned something that it should not have
    image, observed = torch.tensor([[[[0, 0], [0, 1]]]]), torch.tensor([[[[False, False], [False, True]]]])
    filled = fillings(image, observed, 2)
    joint = log_prob(model, filled).detach()
    expected = (joint - joint.logsumexp(dim=0)).exp()
    proposed = completion_log_prob(model, filled, observed.expand(len(filled), -1, -1, -1)).exp()
    num, num_proposals = 400, 30
    u = noise((num_proposals, 1, 2, 2), num)
    choice = torch.rand(num, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    levels, effective = resample(model, image.repeat(num, 1, 1, 1), observed.repeat(num, 1, 1, 1), u, choice)
    counts = (levels[:, None] == filled[None]).flatten(2).all(dim=2).double().mean(dim=0)
    assert (counts - expected).abs().max() < 0.05
    assert (proposed - expected).abs().max() > 0.075, "the proposals alone are something else"
    weight = (expected / proposed) ** 2
    assert effective.mean().item() == pytest.approx(num_proposals / float((proposed * weight).sum()), rel=0.3)


def test_proposals_are_scored_in_batches():
    model, sizes = tiny_model("pixelcnn", SHAPE, 3, num_labels=2), []
    image, observed = random_levels(SHAPE, 3, 3), noise((1, 2, 3), 3, seed=5) < 0.4
    given = (image, observed, torch.stack([noise(SHAPE, 40)] * 3), torch.rand(3), torch.tensor([0, -1, 1]))
    levels, effective = resample(model, *given)
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    again = resample(model, *given)
    assert sizes == [50, 50, 20], "the joint model's score of each; that by which it was proposed the sampler finds"
    assert torch.equal(again[0], levels)
    torch.testing.assert_close(again[1], effective)
    assert resample(model, *(x[:0] for x in given))[0].shape == (0, *SHAPE)


def test_a_choice_needs_noise_of_its_own():
    model = tiny_model("pixelcnn", SHAPE, 3)
    image, observed = random_levels(SHAPE, 3, 2), torch.zeros(2, 1, 2, 3, dtype=torch.bool)
    message = "u must have shape (B, M, C, H, W) and choice (B,) for 2 images, got (2, 1, 2, 3) and (2,)."
    with pytest.raises(ValueError, match=exactly(message)):
        resample(model, image, observed, noise(SHAPE, 2), torch.rand(2))
    with pytest.raises(ValueError, match=r"for 2 images, got \(2, 0, 1, 2, 3\) and \(2,\)"):
        resample(model, image, observed, torch.rand(2, 0, *SHAPE), torch.rand(2))
    for choice in (torch.tensor([0.5, 1.0]), torch.tensor([-0.1, 0.5]), torch.tensor([math.nan, 0.5])):
        with pytest.raises(ValueError, match=exactly("choice must lie in [0, 1), as torch.rand gives it.")):
            resample(model, image, observed, torch.rand(2, 3, *SHAPE), choice)
    with pytest.raises(ValueError, match="u must be a tensor, got ndarray"):
        resample(model, image, observed, torch.rand(2, 3, *SHAPE).numpy(), torch.rand(2))
    u, choice = torch.rand(2, 3, *SHAPE), torch.rand(2)
    for label in ([0, 1], torch.tensor([0])):
        with pytest.raises(ValueError, match=r"^label must have shape \(2,\) and dtype int64, got "):
            resample(model, image, observed, u, choice, label)
    with pytest.raises(ValueError, match=r"^observed must be bool of shape \(2, 1, "):
        resample(model, image, observed[:1], u, choice)


def test_known_rows_are_not_shared_between_labels():
    config = GatedPixelCNNConfig(
        image_shape=(1, 6, 5), num_levels=3, num_features=4, num_layers=2, kernel_size=3, num_labels=2
    )
    model = build_model(config).double().eval()
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(4, 1, 6, 5, generator=generator, dtype=torch.float64)
    drawing = torch.randint(0, 3, (1, 1, 6, 5), generator=generator).repeat(4, 1, 1, 1)
    observed = torch.zeros(4, 1, 6, 5, dtype=torch.bool)
    observed[:, :, :3] = True
    label = torch.tensor([0, 1, 0, -1])
    levels, score = complete_and_score(model, drawing, observed, u, label)
    torch.testing.assert_close(score(), completion_log_prob(model, levels, observed, label), rtol=1e-12, atol=0)


def test_proposals_are_scored_with_the_label_that_they_were_drawn_with():
    model, shape = tiny_model("gated_pixelcnn", (1, 3, 3), 2, num_labels=2), (1, 3, 3)
    image, observed = random_levels(shape, 2, 4), torch.zeros(4, 1, 3, 3, dtype=torch.bool)
    observed[:, :, :1] = True  # all that is known comes first: a proposal is a sample of the joint model
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(4, 5, *shape, generator=generator, dtype=torch.float64)
    _, effective = resample(model, image, observed, u, torch.rand(4, generator=generator), torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(effective, torch.full((4,), 5.0, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [0, 0.5, 2.0])
def test_the_score_is_that_of_temperature_1(temperature):
    model, shape = tiny_model("pixelcnn", (1, 4, 5), 3), (1, 4, 5)
    observed = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    observed[:, :, 0] = True
    u = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, score = complete_and_score(model, random_levels(shape, 3, 2), observed, u, temperature=temperature)
    torch.testing.assert_close(score(), completion_log_prob(model, levels, observed).double(), rtol=1e-12, atol=0)


def test_a_slice_is_scored_with_its_own_labels(monkeypatch):
    monkeypatch.setattr(fast, "what_compiling_lacks", lambda: "numba is not installed")
    model, label = tiny_model("pixelcnn", (1, 3, 3), 2, num_labels=2), torch.tensor([0, 1, 1])
    observed = torch.zeros(3, 1, 3, 3, dtype=torch.bool)
    u = torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, score = complete_and_score(model, random_levels((1, 3, 3), 2, 3), observed, u, label)
    expected = completion_log_prob(model, levels, observed, label)
    torch.testing.assert_close(score(slice(1, 3)), expected[1:])


def test_bits_are_per_known_sub_pixel():
    model, images = tiny_model("pixelcnn", (3, 2, 2), 3, num_labels=2), random_levels((3, 2, 2), 3, 3)
    known, label = torch.ones(3, 1, 2, 2, dtype=torch.bool), torch.tensor([0, 1, -1])
    known[1, :, 1], known[2] = False, False
    nats = -(pixel_log_prob(model, images, label).detach() * known).sum(dim=(1, 2, 3))
    bits = nats / (torch.tensor([12, 6, 0]) * math.log(2))
    torch.testing.assert_close(drawing_bits_per_dim(model, images, known, label), bits, equal_nan=True)


def test_ink_that_is_not_known_does_not_count():
    known = torch.tensor([[[[True, False]]]])
    assert shares_of_drawing(torch.ones(1, 1, 1, 2, dtype=torch.int64), known, 2)["ink_share"].item() == 0.5
