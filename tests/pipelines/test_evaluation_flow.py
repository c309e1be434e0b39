"""Scoring the champions again."""

from pathlib import Path

import pytest

from pipelines import registry, tracking
from pipelines.evaluation_flow import EXPERIMENT, evaluate_champions
from pipelines.release import release
from pixelcnn import evaluate, load_checkpoint, load_dataset


def test_champions_are_scored_and_the_others_passed_over(weights: Path, prefect_server: str) -> None:
    release("pixelcnn-mnist5k")
    scores = evaluate_champions()
    model, _ = load_checkpoint(weights)
    data = load_dataset("data/mnist5k.safetensors")
    assert scores == {"mnist5k": pytest.approx(evaluate(model, data, num_images=8, batch_size=8))}
    client = tracking.client()
    (run,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    assert run.data.metrics["test/nll_nats"] == pytest.approx(scores["mnist5k"]["test/nll_nats"])
    assert run.data.tags["version"] == "1"
    assert run.data.tags["evaluated_data_hash"] == data.data_hash


def test_a_champion_that_cannot_be_scored_is_named(
    weights: Path,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release("pixelcnn-mnist5k")

    def damaged(*_: object) -> Path:
        raise ValueError("it holds other weights")

    monkeypatch.setattr(registry, "download", damaged)
    with pytest.raises(RuntimeError, match=r"could not be scored: mnist5k version 1 \(it holds other weights\)"):
        evaluate_champions(["mnist5k"])


def test_an_unknown_dataset_is_named(project: Path, prefect_server: str) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'svhn'"):
        evaluate_champions(["svhn"])
