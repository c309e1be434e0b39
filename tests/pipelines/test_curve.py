"""The curve of a training, and the sheets of its pictures: each shows what it is said to show."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.params import SampleParams
from pipelines.reports import curve as reports
from pipelines.reports.curve import Curve, read_curve
from pixelcnn import PixelCNNConfig, build_model
from pixelcnn.training import StepReport
from tests.pipelines.projects import tiny_dataset

PARAMS = SampleParams(num_images=1, num_columns=2, num_completions=2, seed=0, temperature=0.5)
MODEL = build_model(PixelCNNConfig(image_shape=(1, 4, 6), num_levels=2, num_features=4, num_blocks=1, num_labels=3))


def after(step: int, nats: float, validated: float | None = None) -> StepReport:
    return StepReport(
        step=step,
        epoch=step / 10,
        train_nll_nats=nats,
        learning_rate=0.1,
        images_per_s=1.0,
        remaining_s=0.0,
        validation_nll_nats=validated,
        train_subset_nll_nats=validated,
    )


def test_a_point_is_the_mean_since_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    curve = Curve(path)
    for report in (after(1, 9.0), after(2, 7.0, 6.0), after(3, 5.0), after(4, 3.0, 2.0)):
        curve.add(report)
    assert [(row["step"], row["train_nll_nats"]) for row in read_curve(path)] == [(2, 8.0), (4, 4.0)]
    resumed = Curve(path)  # from a state of step 3: step 4 is taken again
    resumed.add(after(4, 3.5, 2.5))
    assert [(row["step"], row["train_nll_nats"]) for row in read_curve(path)] == [(2, 8.0), (4, 3.5)]
    assert [row["validation_nll_nats"] for row in read_curve(path)] == [6.0, 2.5]


def test_the_completer_is_validated_by_what_is_missing(tmp_path: Path) -> None:
    curve = Curve(tmp_path / "completer.csv")
    curve.add(replace(after(1, 9.0, 6.0), validation_completion_nats=4.0))
    curve.add(after(2, 7.0, 5.0))
    assert [row["completer_validation_nats"] for row in read_curve(curve.path)] == [4.0, 5.0]
    assert [row["completer_train_nats"] for row in read_curve(curve.path)] == [9.0, 7.0]


def test_each_row_of_a_sheet_is_of_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def drawn(model: object, u: torch.Tensor, label: torch.Tensor | None, temperature: float) -> torch.Tensor:
        asked.append((None if label is None else label.tolist(), temperature))
        return torch.zeros(u.shape, dtype=torch.int64)

    monkeypatch.setattr(reports, "sample", drawn)
    for per_class in (True, False):
        reports.draw_samples(tmp_path / "sheet.png", MODEL, PARAMS, per_class)
    assert asked == [([0, 0, 1, 1, 2, 2], 0.5), (None, 0.5)]


def test_it_is_the_lower_half_that_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def completed(model: object, levels: torch.Tensor, observed: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        asked.append(observed)
        return levels

    monkeypatch.setattr(reports, "complete", completed)
    reports.draw_completions(tmp_path / "sheet.png", MODEL, tiny_dataset(shape=(1, 4, 6)), PARAMS)
    (observed,) = asked
    assert observed.shape == (2 * 8, 1, 4, 6), "twice, of each class that there is"
    assert observed[:, :, :2].all()
    assert not observed[:, :, 2:].any()
