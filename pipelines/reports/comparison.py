"""reports/comparison.html: the trained pairs beside each other, on one page that needs no other file."""

import base64
import io
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pipelines.files import atomic_write
from pipelines.params import load_params, repro_command
from pipelines.registry.provenance import recorded_hash
from pipelines.reports.card import render, score_text
from pipelines.reports.curve import read_curve

REPORTS_FOLDER = Path("reports")
PROMOTIONS_FOLDER = REPORTS_FOLDER / "promotions"
PAGE = REPORTS_FOLDER / "comparison.html"
PICTURES = {  # of a pair's report, where it has them
    "curve.png": "Training curve",
    "samples.png": "Samples",
    "class_samples.png": "Samples, a row for each class",
    "completions.png": "Lower halves taken away (first row), completed, and the originals (last row)",
    "extremes.png": "Test images that it finds most and least probable",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PairReport:
    """What the training of a pair left in its report's folder."""

    folder: Path
    row: dict[str, str]  # its scores as text, with their protocol
    test_nats: float

    def pictures(self) -> list[tuple[str, str]]:
        """Return the caption and the base64 bytes of each picture that is there."""
        found = [(self.folder / name, caption) for name, caption in PICTURES.items()]
        return [(caption, base64.b64encode(path.read_bytes()).decode()) for path, caption in found if path.exists()]


def read_reports(folder: Path, without: Collection[str] = ()) -> list[PairReport]:
    """Read the reports of pairs, `folder/MODEL-DATASET/`: by dataset, the best test score first.

    Those of other data than DVC recorded are left out: params.yaml does not hold of them any more. So are those of
    `without`, which may be half written. ValueError if the metrics of one are damaged, or a `dvc.lock` is.
    """
    reports, datasets = [], load_params().datasets
    for path in folder.glob("*/metrics.json"):
        pair, dataset = path.parent.name, path.parent.name.rpartition("-")[2]
        if dataset not in datasets or pair in without:
            continue
        spec, now, again = datasets[dataset], recorded_hash(dataset), repro_command("evaluate", pair)
        try:
            metrics = json.loads(path.read_text())
            if now is not None and metrics.get("data_hash", now) != now:
                text = "%s is left out: it was scored on other data than those of now. Train it again: %s"
                logger.warning(text, pair, again)
                continue
            accepted = metrics.get("test/accepted_nothing_by_judge")
            row = {
                "dataset": dataset,
                "pair": pair,
                "protocol": spec.protocol,
                "test": score_text(metrics, "test", spec.model_dump()),
                "validation": score_text(metrics, "validation", spec.model_dump()),
                "whole samples accepted": f"{accepted:.2f}" if accepted is not None else "",
                "parameters": f"{metrics['num_parameters']:,}",
                "trained": f"{metrics['train_minutes']:.1f} min",
                "command": again,
            }
            reports.append(PairReport(path.parent, row, metrics["test/nll_nats"]))
        except (AttributeError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path} has no readable scores ({error!r}). Train the pair again: {again}") from None
    order = list(datasets)
    return sorted(reports, key=lambda one: (order.index(one.row["dataset"]), one.test_nats, one.row["pair"]))


def write_comparison(reports: Sequence[PairReport], failures: Mapping[str, str] | None = None) -> Path:
    """Write the page, for each dataset a table, all curves and each pair's own pictures; return its path.

    `failures` says why a pair has no report. ValueError if there is nothing to compare, or a promotion's is damaged.
    """
    if not reports and not failures:
        raise ValueError("no pair has a report to compare. Train one: dvc repro")
    by_dataset = {dataset: list(found) for dataset, found in groupby(reports, key=lambda report: report.row["dataset"])}
    text = render(
        "comparison.html.j2",
        by_dataset=by_dataset,
        curves={dataset: _draw_curves(found) for dataset, found in by_dataset.items()},
        failures=failures or {},
        promotions=[_read_promotion(path) for path in sorted(PROMOTIONS_FOLDER.glob("*.json"))],
    )
    atomic_write(PAGE, text)
    return PAGE


def _draw_curves(reports: Sequence[PairReport]) -> str:
    """Return the base64 PNG of all pairs' curves; nothing where none has one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for report in reports:
        if (report.folder / "curve.csv").exists():
            rows = read_curve(report.folder / "curve.csv")
            nats = [row["validation_nll_nats"] for row in rows]
            axes.plot([row["epoch"] for row in rows], nats, label=report.folder.name, marker=".")
    if not axes.lines:
        return ""
    axes.set(xlabel="epoch", ylabel="validation NLL, nats per image")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _read_promotion(path: Path) -> dict[str, str]:
    try:
        report = json.loads(path.read_text())
        return {key: report[key] for key in ("decision", "text")}
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no report of a promotion ({error!r}). Make it again: "
            f"python -m pipelines.steps promote {path.stem}"
        ) from None
