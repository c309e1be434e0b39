"""What a training shows of itself in its folder of reports: the curve, and pictures."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.files import atomic_write
from pipelines.params import SampleParams
from pixelcnn.completion import complete
from pixelcnn.data import Dataset
from pixelcnn.images import to_sheet
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.sampling.fast import sample
from pixelcnn.training import StepReport

_COLUMNS = ("step", "epoch", "train_nll_nats", "train_subset_nll_nats", "validation_nll_nats", "learning_rate")
# What a model may have beside the joint network, and what its curve shows. Their columns have other names: all are
# curves of one run.
PARTS = {
    "context": "of missing pixels, each by itself, nats per image",
    "completer": "-log p(missing | known), nats per image",
    "halves": "-log p(missing | known), going on with halves",
    "added": "-log p(missing | known), with the added network",
    "labels": "-log p(label | known), nats",
}
NUM_EXTREMES = 8  # best and worst test images on their sheet
CURVE_FILES = {"train": "curve.csv", **{part: f"{part}.csv" for part in PARTS}}


class Curve:
    """The training curve: a row per validation, kept in a file beside the state so that a resumed run has it whole.

    A row's loss in training is the mean since the row before it, or since the run was resumed, if that was later.
    """

    def __init__(self, path: Path) -> None:
        """Begin a curve, or take up the one in the file, which is named as one of `CURVE_FILES`."""
        self.path = path
        self.rows = read_curve(path) if path.exists() else []
        self._nats: list[float] = []

    def add(self, report: StepReport) -> None:
        """Take note of a step; one that was validated becomes a row, and the file is written."""
        self._nats.append(report.train_nll_nats)
        if report.validation_nll_nats is None:
            return
        # Rows from this step on are of work that was lost when the run was stopped, and done again.
        self.rows = [row for row in self.rows if row["step"] < report.step]
        mean = math.fsum(self._nats) / len(self._nats)
        if (part := self.path.stem) in PARTS:
            completion = report.validation_completion_nats
            validated = report.validation_nll_nats if completion is None else completion
            row = {"step": report.step, f"{part}_epoch": report.epoch, f"{part}_train_nats": mean}
            row |= {f"{part}_validation_nats": validated, f"{part}_learning_rate": report.learning_rate}
        else:
            row = {name: getattr(report, name) for name in _COLUMNS} | {"train_nll_nats": mean}
        self.rows.append(row)
        self._nats = []
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        atomic_write(self.path, text.getvalue())


def read_curve(path: Path) -> list[dict[str, float]]:
    """Return the rows of a curve's file; `step` is an int."""
    with open(path, newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows]


def draw_samples(path: Path, model: AutoregressiveModel, params: SampleParams, per_class: bool = False) -> None:
    """Draw whole images into a sheet: without label, or a row for each class."""
    config, device = model.config, next(model.parameters()).device
    num = config.num_labels * params.num_columns if per_class else params.num_images
    u = torch.rand((num, *config.image_shape), generator=torch.Generator().manual_seed(params.seed)).to(device)
    label = torch.arange(config.num_labels, device=device).repeat_interleave(params.num_columns) if per_class else None
    drawn = sample(model, u, label, temperature=params.temperature)
    to_sheet(drawn.cpu(), config.num_levels, params.num_columns).save(path)


def draw_extremes(path: Path, data: Dataset, nll: torch.Tensor) -> None:
    """Draw the test images that the model finds most and least probable, with their nats."""
    from matplotlib.figure import Figure

    order = nll.argsort().tolist()
    figure = Figure(figsize=(1.1 * NUM_EXTREMES, 3.2), layout="constrained")
    grid = figure.subplots(2, NUM_EXTREMES)
    for row, title, indices in ((0, "best", order), (1, "worst", order[::-1])):
        for axes in grid[row]:
            axes.set_axis_off()
        for axes, index in zip(grid[row], indices, strict=False):
            picture = to_sheet(data.levels("test", slice(index, index + 1)), data.num_levels, 1, gap=0)
            axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
            axes.set_title(f"{title} {nll[index]:.1f} nats", fontsize=7)
    figure.savefig(path, dpi=120)


def draw_completions(path: Path, model: AutoregressiveModel, data: Dataset, params: SampleParams) -> None:
    """Draw the first test image of each class with its lower half mid-grey; below, its completions and itself."""
    labels = data.labels["test"].tolist()
    index = torch.tensor([labels.index(label) for label in sorted(set(labels))])
    originals = data.levels("test", index)  # (N, C, H, W)
    observed = torch.zeros(len(index), 1, *data.image_shape[1:], dtype=torch.bool)
    observed[:, :, : data.image_shape[1] // 2] = True
    num = params.num_completions
    u = torch.rand((num * len(index), *data.image_shape), generator=torch.Generator().manual_seed(params.seed))
    completions = complete(model, originals.repeat(num, 1, 1, 1), observed.repeat(num, 1, 1, 1), u)
    # Twice the levels, and one between: that is mid-grey for binary images, too.
    given = torch.where(observed, 2 * originals, data.num_levels - 1)
    rows = torch.cat([given, 2 * completions, 2 * originals])
    to_sheet(rows, 2 * data.num_levels - 1, num_columns=len(index)).save(path)


def draw_curve(path: Path, curves: Mapping[str, list[dict[str, float]]], scores: Mapping[str, Any], title: str) -> None:
    """Draw the curve of the joint model, with its test score across, and beside it those of its `PARTS`.

    `curves` has the rows of each of the `CURVE_FILES` that there is, by part, in their order.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(curves), 4), layout="constrained")
    of_joint, *of_parts = figure.subplots(1, len(curves), squeeze=False)[0]

    def plot(axes: Any, rows: list[dict[str, float]], column: str, **style: Any) -> None:
        axes.plot([row["step"] for row in rows], [row[column] for row in rows], **style)

    (_, joint), *parts = curves.items()
    plot(of_joint, joint, "train_nll_nats", label="train, batches since the last point or stop", color="0.8")
    plot(of_joint, joint, "train_subset_nll_nats", label="train, averaged weights", marker=".")
    plot(of_joint, joint, "validation_nll_nats", label="validation, averaged weights", marker=".")
    of_joint.axhline(scores["test/nll_nats"], label="test, best weights", color="grey", linestyle=":")
    of_joint.set(xlabel="step", ylabel="NLL, nats per image", title=title)
    of_joint.legend()
    for axes, (part, rows) in zip(of_parts, parts, strict=True):
        plot(axes, rows, f"{part}_train_nats", label="train, batches", color="0.8")
        plot(axes, rows, f"{part}_validation_nats", label="validation", marker=".")
        axes.set(xlabel="step", ylabel=PARTS[part], title="drawings, training's masks")
        axes.legend()
    figure.savefig(path, dpi=100)
