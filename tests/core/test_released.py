"""The weights that come with the repository, on stored test images: without the data, without the pipeline."""

import re
from pathlib import Path

import pytest
import safetensors
import torch

from pixelcnn import complete, completion_log_prob, load_checkpoint, log_prob
from pixelcnn.bench import count_differences
from pixelcnn.likelihood import level_probs
from pixelcnn.observed import scored_masks
from tests.local import ASKED_FOR_ALL
from tools.write_released import FOLDER, NUM_IMAGES
from tools.write_released import main as write_released

WEIGHTS = Path(__file__).parents[2] / "weights"
PAIRS = sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))
# `make test-slow` scores all stored images, as the record did, and so says whether these, of the first ten, are right.
NATS_OF_TEN = {
    "attentive_pixelcnn-cifar10": 7299.308,
    "attentive_pixelcnn-fashion_mnist": 1323.289,
    "attentive_pixelcnn-mnist": 74.3134,
    "gated_pixelcnn-cifar10": 7397.711,
    "gated_pixelcnn-fashion_mnist": 1343.172,
    "gated_pixelcnn-letters": 38.8955,
    "gated_pixelcnn-mnist": 74.1554,
    "pixelcnn-mnist": 76.6181,
}
# Of the first five, the upper halves given the lower ones: what the networks of drawings and labels compute.
NATS_OF_UPPER_HALVES = {
    "attentive_pixelcnn-fashion_mnist": 630.1068,
    "attentive_pixelcnn-mnist": 28.5607,
    "gated_pixelcnn-letters": 15.0169,
    "gated_pixelcnn-mnist": 28.4522,
    "pixelcnn-mnist": 32.0191,
}
SEED_PAIRS = ["gated_pixelcnn-cifar10", "gated_pixelcnn-fashion_mnist", "pixelcnn-mnist"]


def released(pair: str):
    """Return the model, its scores, and the stored images: (N, C, H, W) levels and (N,) labels."""
    model, scores = load_checkpoint(WEIGHTS / pair)
    with safetensors.safe_open(FOLDER / f"{scores['dataset']}.safetensors", framework="pt") as file:
        assert file.metadata()["data_hash"] == scores["data_hash"], "the images are of the data that was scored"
        return model, scores, file.get_tensor("levels").long(), file.get_tensor("label").long()


def mean_nats(model, levels: torch.Tensor, label: torch.Tensor | None = None) -> float:
    labels = [None] * len(levels) if label is None else label.split(50)
    with torch.inference_mode():
        return (
            -torch.cat([log_prob(model, part, given) for part, given in zip(levels.split(50), labels, strict=False)])
            .mean()
            .item()
        )


def test_their_writer_wants_names():
    with pytest.raises(SystemExit, match="error: name the datasets to write"):
        write_released([])


def test_the_seed_pairs_are_released():
    assert set(SEED_PAIRS) <= set(PAIRS)
    size = sum(path.stat().st_size for path in WEIGHTS.glob("*/*"))
    assert size <= 40e6


@pytest.mark.repeated
@pytest.mark.parametrize("pair", PAIRS)
def test_the_weights_score_what_they_say(pair):
    model, scores, levels, label = released(pair)
    assert scores["pair"] == pair
    assert len(levels) == NUM_IMAGES
    few, true = levels[:10], label[:10]
    if ASKED_FOR_ALL:
        assert mean_nats(model, levels) == pytest.approx(scores[f"test/nll_nats_first_{NUM_IMAGES}"], rel=1e-4)
    assert mean_nats(model, few) == pytest.approx(NATS_OF_TEN[pair], rel=1e-4)
    wrong = (true + 1) % len(scores["label_names"])
    assert mean_nats(model, few, true) < mean_nats(model, few, wrong), "it knows the labels"
    assert mean_nats(model, few.flip(-2)) > mean_nats(model, few), "upside down is less probable"


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_known_further_down_tells_as_much_as_it_did(pair):
    model, _, levels, _ = released(pair)
    if model.config.context_features:
        few = levels[:5]
        nats = -completion_log_prob(model, few, scored_masks("top", few, model.config.num_levels)).mean().item()
        assert nats == pytest.approx(NATS_OF_UPPER_HALVES[pair], rel=1e-4)


def test_a_blank_page_costs_what_the_page_on_ranking_says():
    (stated,) = re.findall(
        r"a blank page costs the digits' model (\d+) nats", (WEIGHTS.parent / "docs/ranking.md").read_text()
    )
    model, _, levels, _ = released("gated_pixelcnn-mnist")
    assert mean_nats(model, torch.zeros_like(levels[:1])) == pytest.approx(int(stated), abs=0.5)


@pytest.mark.parametrize("pair", PAIRS)
def test_its_samples_are_the_naive_samplers(pair):
    model, *_ = released(pair)
    counted = count_differences(model, num_images=4 if model.config.num_levels == 2 else 1, dtype=torch.float64)
    assert counted["num_levels_that_differ"] == 0


@pytest.mark.parametrize("pair", PAIRS)
def test_changing_a_pixel_reaches_no_earlier_probability(pair):
    """Some sub-pixels of one image; `python -m pixelcnn check` asks all of them."""
    model, _, levels, _ = released(pair)
    image = levels[0]
    channels, height, width = image.shape
    order = torch.arange(image.numel()).view(height, width, channels).permute(2, 0, 1)  # raster order
    num_places = 12 if model.config.num_levels == 2 else 2
    with torch.inference_mode():
        before = level_probs(model, image[None])[0]  # (K, C, H, W)
        places = torch.randperm(image.numel() - 1, generator=torch.Generator().manual_seed(0))[:num_places]
        for place in places.tolist():
            changed = torch.where(
                order == place, (image + model.config.num_levels // 2) % model.config.num_levels, image
            )
            moved = (level_probs(model, changed[None])[0] != before).any(dim=0)
            assert not moved[order <= place].any()
            assert moved[order > place].any()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_completion_keeps_what_is_known(pair):
    model, _, levels, _ = released(pair)
    observed = torch.zeros(2, 1, *levels.shape[2:], dtype=torch.bool)
    observed[:, :, : levels.shape[2] // 2] = True
    u = torch.rand(2, *levels.shape[1:], generator=torch.Generator().manual_seed(0))
    completed = complete(model, levels[:2], observed, u)
    assert torch.equal(torch.where(observed, completed, 0), torch.where(observed, levels[:2], 0))
    assert not torch.equal(completed, levels[:2])
