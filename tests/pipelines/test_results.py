"""RESULTS.md and the released weights' cards say what the stored scores say."""

import json
import math
import shutil
from pathlib import Path

import pytest

from pipelines import steps
from pipelines.reports.card import model_card
from pipelines.reports.results import results_text
from pixelcnn.observed import SCORED
from tests.pipelines.projects import PAIR, ROOT, write_weights

CARD_SCORES = {
    "pair": PAIR,
    "num_parameters": 1234,
    "train_minutes": 61.4,
    "hardware": "1 CPU thread (AVX512)",
    "weights_dtype": "float32",
    "train_settings": {"learning_rate": 0.01},
    "test/nll_nats_max": 500.0,
    "test/nll_nats_uniform": 543.4,
    "test/nll_nats_independent": 206.0,
}


@pytest.fixture
def scored(weights: Path) -> Path:
    """The tiny released pair, with all that the training flow measures."""
    scores = json.loads((weights / "scores.json").read_text()) | CARD_SCORES
    (weights / "scores.json").write_text(json.dumps(scores))
    return weights


def test_the_committed_table_is_that_of_the_released_weights() -> None:
    """Whoever changes weights/ or the table: `python -m pipelines.steps results` makes them agree."""
    assert (ROOT / "RESULTS.md").read_text() == results_text(ROOT / "weights")


def test_the_committed_cards_are_those_of_their_scores() -> None:
    for path in (ROOT / "weights").glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("weights_sha256")
        scores = json.loads(path.with_name("scores.json").read_text())
        assert path.with_name("README.md").read_text() == model_card(config, scores), path


def test_a_row_for_each_released_pair(scored: Path) -> None:
    shutil.copytree(scored, scored.with_name(f".{PAIR}.new"))  # a save that was cut off
    assert steps.main(["results"]) == 0
    text = Path("RESULTS.md").read_text()
    assert text.count("| PixelCNN on ") == 1
    scores = json.loads((scored / "scores.json").read_text())
    figure = f"{scores['test/nll_nats']:.2f} ± {scores['test/nll_nats_stderr']:.2f}"
    given = f"{scores['test/nll_nats_given_label']:.2f}"
    source = f"1,234 | 61 min, 1 CPU thread (AVX512) | `dvc repro evaluate@{PAIR}` |"
    assert f"| **{figure}** | {given} | PixelCNN on mnist5k | {source}" in text
    assert "## mnist5k, protocol dynamic, nats" in text
    assert "| 81.45 | | PixelCNN, 53,569 parameters, 457 epochs | | | pytorch-generative |" in text
    assert "No weights are released yet" not in text
    assert "Parameters and minutes are those of the network of the test column" in text


def test_a_dataset_that_is_known_by_its_weights_alone_has_a_table(scored: Path) -> None:
    scores = json.loads((scored / "scores.json").read_text()) | {"dataset": "letters", "protocol": "threshold"}
    (scored / "scores.json").write_text(json.dumps(scores))
    scored.rename(scored.with_name("pixelcnn-letters"))
    text = results_text(Path("weights"))
    assert "## letters, protocol threshold, nats" in text
    assert "`dvc repro own/dvc.yaml:evaluate@pixelcnn-letters`" in text


def test_without_weights_the_published_figures_stand_alone(project: Path) -> None:
    text = results_text(Path("weights"))
    assert "No weights are released yet." in text
    assert "## cifar10, protocol 8-bit, bits/dim" in text
    assert "| 3.03 | | Gated PixelCNN |" in text
    assert "mnist5k" not in text


def test_eight_bit_figures_are_in_bits_per_dim(scored: Path) -> None:
    target = scored.with_name("gated_pixelcnn-fashion_mnist")
    shutil.copytree(scored, target)
    config = json.loads((target / "config.json").read_text()) | {"model": "gated_pixelcnn", "num_levels": 256}
    (target / "config.json").write_text(json.dumps(config))
    scores = json.loads((target / "scores.json").read_text())
    scores |= {"dataset": "fashion_mnist", "test/nll_nats": 1600.0, "test/nll_nats_stderr": 8.0}
    scores |= {"test/nll_nats_given_label": 784 * math.log(2) * 2.94}
    (target / "scores.json").write_text(json.dumps(scores | {"test/bits_per_dim": 2.944}))
    assert "| **2.9440 ± 0.0147** | 2.9400 | Gated PixelCNN on fashion_mnist |" in results_text(Path("weights"))


def test_completion_stands_beside_raster_clamping(scored: Path) -> None:
    scores = json.loads((scored / "scores.json").read_text())
    config = json.loads((scored / "config.json").read_text())
    assert "ompletion" not in results_text(Path("weights")) + model_card(config, scores)
    for k, mask in enumerate(SCORED):
        for kind, value in (
            ("nats", 30 + k),
            ("nats_stderr", 0.5),
            ("raster_nats", 40 + k),
            ("raster_nats_stderr", 0.6),
        ):
            scores[f"test/completion_{mask}_{kind}"] = value
    scores["test/completion_num_images"] = 1000
    (scored / "scores.json").write_text(json.dumps(scores))
    for text in (results_text(Path("weights")), model_card(config, scores)):
        assert "| missing | nats given all that is known | raster clamping, the same masks |" in text
        assert "| top half | 30.00 ± 0.50 | 40.00 ± 0.60 |" in text
        assert "| everything but the first 30 % of the ink | 35.00 ± 0.50 | 45.00 ± 0.60 |" in text


def test_the_card_tells_what_the_label_is_worth(scored: Path) -> None:
    scores = json.loads((scored / "scores.json").read_text())
    config = json.loads((scored / "config.json").read_text())
    assert "summed out" not in model_card(config, scores)
    first = "test/nll_nats_first_200"
    scores |= {first: 85.0, f"{first}_label_summed_out": 84.1, f"{first}_given_label": 82.0, "test/num_images": 500}
    text = model_card(config, scores)
    assert "On the first 200 test images: 85.00 nats without a label, 84.10 with the label summed out" in text
    most = math.log(config["num_labels"])
    assert f"82.00 with the true one. Over the label summed out no label can gain more than {most:.2f}." in text


def test_the_card_says_what_holds_of_this_dataset_and_this_training(scored: Path) -> None:
    scores = json.loads((scored / "scores.json").read_text())
    config = json.loads((scored / "config.json").read_text()) | {"num_levels": 256, "completer_features": 2}
    config |= {"label_features": 2}
    for part in ("completer", "labels"):
        scores |= {f"{part}_train_minutes": 61.4, f"{part}_train_settings": {}, f"num_{part}_parameters": 5}
    text = model_card(config, scores | {"protocol": "8-bit", "dataset": "cifar10"})
    assert "256 levels: the official bytes as they are" in text
    assert "commit `0123abc` |" in text
    assert "\n61 minutes on 1 CPU thread" in text
    assert text.count(" 61 minutes.") == 2
    few = {f"test/nll_nats_first_200{what}": 85.0 for what in ("", "_label_summed_out", "_given_label")}
    minutes = {f"{part}train_minutes": 0.41 for part in ("", "completer_", "labels_")}
    own = {"protocol": "8-bit", "dataset": "photos", "git_dirty": "true", "test/num_images": 179}
    text = model_card(config, scores | few | minutes | own)
    assert "256 levels: bytes, once a picture has its size." in text
    assert "official" not in text
    assert "commit `0123abc`, with changes that were not committed |" in text
    assert "On the first 200 test images (or all, if they are fewer): 85.00 nats" in text
    assert "\n0.4 minutes on 1 CPU thread" in text
    assert text.count(" 0.4 minutes.") == 2
    (scored / "scores.json").write_text(json.dumps(scores | minutes))
    assert "| 1,234 | 0.4 min, " in results_text(Path("weights"))


def test_damaged_scores_are_named(weights: Path) -> None:
    write_weights(seed=0)
    for damaged in ("{", "[]"):
        (weights / "scores.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"^weights/pixelcnn-mnist5k has no readable scores .* Fetch the weights"):
            results_text(Path("weights"))
