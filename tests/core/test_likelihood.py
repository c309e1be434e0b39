import math
import re

import pytest
import torch

from pixelcnn import Dataset, TrainConfig, bits_per_dim, evaluate, evaluation, fit, log_prob, pixel_log_prob
from pixelcnn.evaluation import checked_score, evaluate_completion, per_image_completion_nll, per_image_nll
from pixelcnn.likelihood import count_leaks, expected_log_prob, level_probs
from tests.core.tiny import ARCHITECTURES, all_images, exactly, random_levels, tiny_model, toy_dataset

SPACES = [
    ((1, 2, 2), 2),
    ((1, 2, 3), 2),
    ((1, 1, 3), 3),
    ((2, 1, 2), 2),
    ((2, 2, 1), 3),
    ((3, 1, 1), 3),
    ((3, 1, 2), 2),
]


@pytest.mark.parametrize("num_labels", [0, 3])
@pytest.mark.parametrize(("shape", "num_levels"), SPACES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probabilities_of_all_images_sum_to_one(architecture, shape, num_levels, num_labels):
    images = all_images(shape, num_levels)
    for seed in range(2):
        model = tiny_model(architecture, shape, num_levels, num_labels, seed=seed)
        labels = [None, *range(-1, num_labels)]
        results = []
        for label in labels:
            tensor = None if label is None else torch.full((len(images),), label)
            results.append(log_prob(model, images, tensor))
            assert abs(results[-1].exp().sum().item() - 1) < 1e-12
        assert torch.equal(results[0], results[1])
        assert results[0].std() > 0.01  # not uniform: the sum is no accident of equal probabilities
        distances = [(a - b).abs().max() for i, a in enumerate(results[1:]) for b in results[1:][:i]]
        assert all(distance > 0.01 for distance in distances)  # each label is a distribution of its own


@pytest.mark.parametrize(("shape", "num_levels"), SPACES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_expectation_is_the_mean_over_the_sub_pixel_itself(architecture, shape, num_levels):
    model, levels = tiny_model(architecture, shape, num_levels), random_levels(shape, num_levels, num=2)
    weights = torch.rand(2, num_levels, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probabilities = weights / weights.sum(dim=1, keepdim=True)
    expected = torch.zeros(levels.shape, dtype=torch.float64)
    for here in torch.eye(math.prod(shape), dtype=torch.bool).view(-1, *shape):
        for level in range(num_levels):
            changed = pixel_log_prob(model, torch.where(here, level, levels))
            expected += here * probabilities[:, level] * changed
    torch.testing.assert_close(expected_log_prob(model, levels, probabilities), expected)


@pytest.mark.parametrize("num_levels", [2, 3, 256])
@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 2)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_zero_output_layer_is_uniform(architecture, shape, num_levels):
    model = tiny_model(architecture, shape, num_levels)
    torch.nn.init.zeros_(model.logits.weight)
    torch.nn.init.zeros_(model.logits.bias)
    nats = -log_prob(model, random_levels(shape, num_levels, num=5))
    torch.testing.assert_close(bits_per_dim(nats, shape), torch.full((5,), math.log2(num_levels), dtype=torch.float64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_constant_biases_give_a_product_done_by_hand(architecture):
    model = tiny_model(architecture, (2, 1, 2), 3)
    torch.nn.init.zeros_(model.logits.weight)
    # First channel: 0.2, 0.3, 0.5. Second channel: 0.7, 0.2, 0.1.
    model.logits.bias.data = torch.tensor([2.0, 3.0, 5.0, 7.0, 2.0, 1.0], dtype=torch.float64).log()
    levels = torch.tensor([[[[0, 2]], [[1, 0]]], [[[1, 1]], [[2, 2]]]])  # (2, 2, 1, 2)
    expected = torch.tensor([[[[0.2, 0.5]], [[0.2, 0.7]]], [[[0.3, 0.3]], [[0.1, 0.1]]]], dtype=torch.float64)
    torch.testing.assert_close(pixel_log_prob(model, levels).exp(), expected)
    torch.testing.assert_close(
        log_prob(model, levels).exp(), torch.tensor([0.2 * 0.5 * 0.2 * 0.7, 0.3 * 0.3 * 0.1 * 0.1]).double()
    )


def test_bits_per_dim():
    assert bits_per_dim(784 * math.log(2), (1, 28, 28)) == pytest.approx(1.0)
    assert bits_per_dim(math.log(256) * 3072, (3, 32, 32)) == pytest.approx(8.0)
    nats = torch.tensor([0.0, math.log(2)])
    assert bits_per_dim(nats, (2, 1, 1)).tolist() == pytest.approx([0.0, 0.5])


def test_log_prob_is_at_least_float32():
    model = tiny_model("pixelcnn", (1, 2, 2), 2)
    levels = random_levels((1, 2, 2), 2, num=1)
    assert log_prob(model, levels).dtype == torch.float64
    assert log_prob(model.bfloat16(), levels).dtype == torch.float32
    assert level_probs(model, levels).dtype == torch.float32
    with pytest.raises(ValueError, match=r"levels must lie in 0..1, got 2..2."):
        log_prob(model, torch.full((1, 1, 2, 2), 2))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_short_training_comes_close_to_the_entropy_and_never_below(architecture):
    """The training split lists a source's 16 images in proportion to their probability: its mean is an expectation."""
    images = all_images((1, 2, 2), 2)
    times = torch.tensor([1, 9, 2, 2, 4, 1, 1, 1, 12, 2, 1, 3, 1, 1, 8, 15])  # 64 in all
    source = images.repeat_interleave(times, dim=0).to(torch.uint8)
    probs = times.double() / 64
    entropy = -(probs * probs.log()).sum().item()
    splits = dict.fromkeys(("train", "validation", "test"), source)
    data = Dataset(
        name="source", num_levels=2, protocol="8-bit", label_names=["only"],
        images=splits, labels={split: torch.zeros(64, dtype=torch.int64) for split in splits},
    )  # fmt: skip
    model = tiny_model(architecture, (1, 2, 2), 2, num_features=8)
    before = evaluate(model, data, ("train",))["train/nll_nats"]
    scores = []
    config = TrainConfig(
        batch_size=64, learning_rate=0.02, max_epochs=250, warmup_steps=5, ema_decay=0.9, num_validations=25
    )
    best = fit(model, data, config, on_step=lambda report: scores.append(report.validation_nll_nats))
    scores = [score for score in scores if score is not None]
    assert min(scores) == best == pytest.approx(evaluate(model, data, ("train",))["train/nll_nats"], abs=1e-12)
    assert min(scores) >= entropy - 1e-12
    assert best < entropy + 0.02 < before


def test_a_long_evaluation_says_how_far_it_is(monkeypatch, caplog):
    data = toy_dataset()
    model = tiny_model("gated_pixelcnn", (1, 3, 3), 3, num_labels=2, context_features=4, context_width=4)
    with caplog.at_level("INFO", "pixelcnn.evaluation"):
        quiet = evaluate(model, data, batch_size=2)
        assert not caplog.messages, "a short one says nothing"
        monkeypatch.setattr(evaluation, "PROGRESS_S", -1.0)
        assert evaluate(model, data, batch_size=2) == quiet
        evaluate_completion(model, data, batch_size=5, num_images=6)
    assert re.fullmatch(r"validation, whole: 2 of 6 images, about \d\.\d min left", caplog.messages[0])
    assert [line.split(", about")[0] for line in caplog.messages[-4:]] == [
        *(f"test, given the label: {done} of 7 images" for done in (2, 4, 6)),
        "test, completion: 5 of 6 images",
    ]


def test_what_is_to_be_scored_must_be_there():
    data = toy_dataset()
    model = tiny_model("pixelcnn", data.image_shape, data.num_levels).train()
    for wrong, message in (
        ({"num_images": 0}, "num_images must be a whole number of at least 1, got 0."),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0."),
        ({"splits": ("tests",)}, "split must be one of train, validation, test, got 'tests'."),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            evaluate(model, data, **wrong)
        assert model.training  # as it came


def test_masks_do_not_depend_on_the_batch():
    model, data = tiny_model("pixelcnn", (1, 3, 3), 3), toy_dataset()
    one, all_ = (per_image_completion_nll(model, data, "test", batch_size=n)["pixels50"] for n in (2, 7))
    torch.testing.assert_close(one, all_)


def test_what_is_checked_is_the_beginning_of_the_test_split(monkeypatch):
    model, data = tiny_model("pixelcnn", (1, 3, 3), 3), toy_dataset()
    assert checked_score(model, data) == per_image_nll(model, data, "test").mean().item()
    monkeypatch.setattr(evaluation, "CHECKED_IMAGES", 3)
    assert checked_score(model, data) == per_image_nll(model, data, "test")[:3].mean().item()


def test_counting_leaks_leaves_the_model():
    model = tiny_model("pixelcnn", (1, 2, 2), 2).float().train()
    count_leaks(model, random_levels((1, 2, 2), 2, 1)[0])
    assert model.training
    assert model.head.weight.dtype == torch.float32
