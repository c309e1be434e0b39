"""reports/comparison.html: the trained pairs beside each other, on one page that needs no other file."""

import base64
import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from pipelines.files import write_whole
from pipelines.model_card import score_text
from pipelines.params import DATASETS, DatasetSpec

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
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; border-bottom: 1px solid #ccc; text-align: left; }
td { white-space: nowrap; }
figure { display: inline-block; margin: 1rem 1rem 0 0; vertical-align: top; } img { max-width: 100%; }
figcaption { color: #666; } .failed { color: #a00; }
"""


@dataclass(frozen=True, kw_only=True)
class PairReport:
    """What the training of a pair left in its report's folder."""

    pair: str
    dataset: str
    metrics: Mapping[str, Any]
    folder: Path

    @property
    def spec(self) -> DatasetSpec:
        return DATASETS[self.dataset]

    def row(self) -> dict[str, str]:
        """Return its scores as text, with their protocol."""
        levels = {"num_levels": self.spec.num_levels}
        return {
            "dataset": self.dataset,
            "pair": self.pair,
            "protocol": self.spec.protocol,
            "test": score_text(self.metrics, "test", levels),
            "validation": score_text(self.metrics, "validation", levels),
            "parameters": f"{self.metrics['num_parameters']:,}",
            "trained": f"{self.metrics['train_minutes']:.1f} min",
            "command": f"dvc repro train@{self.pair}",
        }


def read_reports(folder: Path, without: Collection[str] = ()) -> list[PairReport]:
    """Read the reports of pairs, `folder/MODEL-DATASET/`: by dataset, the best test score first.

    Args:
        without: pairs whose report, if there is one, may be half written.

    Raises:
        ValueError: the metrics of one are damaged.
    """
    reports = []
    for path in folder.glob("*/metrics.json"):
        pair, dataset = path.parent.name, path.parent.name.partition("-")[2]
        if dataset not in DATASETS or pair in without:
            continue
        try:
            report = PairReport(pair=pair, dataset=dataset, metrics=json.loads(path.read_text()), folder=path.parent)
            report.row()
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} has no readable scores ({error!r}). Train the pair again: dvc repro train@{pair}"
            ) from None
        reports.append(report)
    order = list(DATASETS)
    return sorted(reports, key=lambda r: (order.index(r.dataset), r.metrics["test/nll_nats"], r.pair))


def write_comparison(
    reports: Sequence[PairReport],
    failures: Mapping[str, str] | None = None,
    promotions: Path = PROMOTIONS_FOLDER,
    page: Path = PAGE,
) -> Path:
    """Write the page.

    Args:
        reports: of `read_reports`.
        failures: why a pair has no report, by pair.
        promotions: folder of the promotions' reports.

    Returns:
        The page's path.

    Raises:
        ValueError: there is nothing to compare, or the report of a promotion is damaged.
    """
    if not reports and not failures:
        raise ValueError("no pair has a report to compare. Train one: dvc repro")
    parts = ["<h1>Comparison</h1>", *_failed(failures or {})]
    for dataset in dict.fromkeys(report.dataset for report in reports):
        parts += _dataset(dataset, [report for report in reports if report.dataset == dataset])
    parts += _promotions(promotions)
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Comparison</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{chr(10).join(parts)}\n</body></html>\n"
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, text)
    return page


def _failed(failures: Mapping[str, str]) -> list[str]:
    return [f'<p class="failed">{escape(pair)} failed: {escape(why)}</p>' for pair, why in failures.items()]


def _dataset(dataset: str, reports: Sequence[PairReport]) -> list[str]:
    """Return the part of one dataset: a table, the curves in one picture, and each pair's own pictures."""
    rows = [{name: text for name, text in report.row().items() if name != "dataset"} for report in reports]
    parts = [
        f"<h2>{escape(dataset)}</h2>",
        "<p>Negative log-likelihood with its standard error. Figures of different protocols do not compare.</p>",
        "<table>",
        _table_row("th", rows[0]),
        *(_table_row("td", row.values()) for row in rows),
        "</table>",
    ]
    curves = {report.pair: _read_curve(report.folder / "curve.csv") for report in reports}
    if any(curves.values()):
        parts.append(_figure(_draw_curves(curves), f"{dataset}: validation NLL of every pair"))
    for report in reports:
        parts.append(f"<h3>{escape(report.pair)}</h3>")
        for name, caption in PICTURES.items():
            if (report.folder / name).exists():
                parts.append(_figure((report.folder / name).read_bytes(), f"{report.pair}: {caption}"))
    return parts


def _table_row(cell: str, texts: Any) -> str:
    return "<tr>" + "".join(f"<{cell}>{escape(text)}</{cell}>" for text in texts) + "</tr>"


def _figure(png: bytes, caption: str) -> str:
    caption = escape(caption)
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _read_curve(path: Path) -> list[tuple[float, float]]:
    """Return (epoch, validation NLL in nats) of each validation; none where there is no curve."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [(float(row["epoch"]), float(row["validation_nll_nats"])) for row in csv.DictReader(file)]


def _draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for pair, points in curves.items():
        axes.plot([epoch for epoch, _ in points], [nats for _, nats in points], label=pair, marker=".")
    axes.set(xlabel="epoch", ylabel="validation NLL, nats per image")
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return buffer.getvalue()


def _promotions(folder: Path) -> list[str]:
    parts = ["<h2>Promotion decisions</h2>"]
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text())
            parts.append(f"<p><b>{escape(report['decision'])}</b>: {escape(report['text'])}</p>")
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is no report of a promotion ({error!r}). Make it again: dvc repro promote@{path.stem}"
            ) from None
    return parts if len(parts) > 1 else [*parts, "<p>None yet.</p>"]
