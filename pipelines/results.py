"""RESULTS.md: the released weights' scores, beside published figures of the same protocol. Written, never edited."""

import json
from pathlib import Path
from typing import Any

from pipelines.files import write_whole
from pipelines.model_card import COMPLETES, COMPLETION_HEAD, completion_rows, score_text, title
from pipelines.params import DATASETS
from pixelcnn.checkpoint import CONFIG_FILE, SCORES_FILE
from pixelcnn.likelihood import bits_per_dim

RESULTS_FILE = Path("RESULTS.md")

_SEED = "van den Oord et al. 2016"
# Dataset, figure, model, source; for each dataset in the unit and the protocol of its own table.
PUBLISHED = {
    "mnist": [
        ("77.56", "LMConv, mixture of 8 orders, about 46 M parameters", "Jain et al. 2020"),
        ("78.47 (approximate)", "LMConv, 1 order, about 46 M parameters", "Jain et al. 2020"),
        ("78.61", "PixelSNAIL", "pytorch-generative"),
        ("81.45", "PixelCNN, 53,569 parameters, 457 epochs", "pytorch-generative"),
        ("81.50", "Gated PixelCNN, 3.36 M parameters", "pytorch-generative"),
    ],
    "fashion_mnist": [
        ("2.958 (approximate)", "Glow (no autoregressive figure is published)", "recalled, not read again"),
        ("3.34 (approximate)", "HCLT", "recalled, not read again"),
        ("3.47 (approximate)", "IDF", "recalled, not read again"),
    ],
    "cifar10": [
        ("2.80", "Sparse Transformer, 59 M parameters", "its paper"),
        ("2.85", "PixelSNAIL", "its paper"),
        ("2.887", "LMConv, 8 orders", "Jain et al. 2020"),
        ("2.909", "LMConv, 1 order", "Jain et al. 2020"),
        ("2.92", "PixelCNN++", "its paper"),
        ("3.00", "PixelRNN", f"{_SEED}, arXiv:1601.06759"),
        ("3.03", "Gated PixelCNN", f"{_SEED}, arXiv:1606.05328"),
        ("3.07", "PixelCNN++, no down-sampling, 15x8", "its paper"),
        ("3.11", "PixelCNN++, no down-sampling, 11x5", "its paper"),
        ("3.14", "PixelCNN", f"{_SEED}, arXiv:1601.06759"),
    ],
}
_COMPLETION_NOTES = {
    "mnist": "LMConv, about 46 M parameters (Jain et al. 2020, approximate), hidden top / left / bottom half: 41.76 / "
    "39.83 / 43.35 nats without what lies below or to the right, 34.82 / 32.25 / 36.36 with it.",
    "cifar10": "LMConv (Jain et al. 2020; top from the paper, the others approximate), bits/dim of the hidden top / "
    "left / bottom half: 3.07 / 3.10 / 3.05 without what lies below or to the right, 2.762 / 2.82 / 2.75 with it.",
}
_NOTES = {
    "mnist": (
        "Of another protocol, **static** (one fixed Bernoulli sample for training, too), hence not comparable: "
        f"PixelCNN 81.30, Row LSTM 80.54, Diagonal BiLSTM 79.20 nats ({_SEED}, arXiv:1601.06759)."
    ),
    "mnist5k": "The quick start: 4,000 training images. Nobody else publishes figures for it.",
}


def _given_label(scores: dict[str, Any], config: dict[str, Any]) -> str:
    nats = scores.get("test/nll_nats_given_label")
    if nats is None:
        return ""
    return f"{nats:.2f}" if config["num_levels"] == 2 else f"{bits_per_dim(nats, config['image_shape']):.4f}"


def results_text(weights: Path) -> str:
    """Return RESULTS.md for the checkpoints in `weights/PAIR/`.

    Raises:
        ValueError: scores or configuration of a checkpoint are damaged.
    """
    released: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for folder in sorted(weights.glob("*")):
        if not (folder / SCORES_FILE).exists():
            continue
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            scores = json.loads((folder / SCORES_FILE).read_text())
            released.setdefault(scores["dataset"], []).append((config, {**scores, "pair": folder.name}))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} has no readable scores ({error!r}). Fetch the weights again.") from None
    lines = [
        "# Results",
        "",
        "Negative log-likelihood on each test set: nats per image for binary images, bits/dim otherwise, with the "
        "standard error of the mean. Knowing the label can truly gain 2.303 nats at most (0.0042 bits/dim at 28x28, "
        "0.0011 at 32x32x3): what is gained beyond shows how far the network without it is from its best. "
        "`python -m pipelines.steps results` makes this file of the scores in `weights/`.",
        "",
    ]
    if not released:
        lines += ["No weights are released yet.", ""]
    for dataset, spec in DATASETS.items():
        if dataset not in released and dataset not in PUBLISHED:
            continue
        unit = "nats" if spec.num_levels == 2 else "bits/dim"
        lines += [
            f"## {dataset}, protocol {spec.protocol}, {unit}",
            "",
            "| test | true label given | model | parameters | trained | source, or command |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for config, scores in released.get(dataset, []):
            figure = score_text(scores, "test", config).removesuffix(f" {unit}")
            lines.append(
                f"| **{figure}** | {_given_label(scores, config)} | {title(scores['pair'], config)} | "
                f"{scores['num_parameters']:,} | {scores['train_minutes']:.0f} min, {scores['hardware']} | "
                f"`dvc repro train@{scores['pair']}` |"
            )
        lines += [f"| {figure} | | {model} | | | {source} |" for figure, model, source in PUBLISHED.get(dataset, [])]
        lines += ["", *([_NOTES[dataset], ""] if dataset in _NOTES else [])]
        completing = [(config, scores) for config, scores in released.get(dataset, []) if COMPLETES in scores]
        for config, scores in completing:
            num = scores["test/completion_num_images"]
            what = f"completion, -log p(missing | known), {num:,} test images"
            lines += [f"### {title(scores['pair'], config)}: {what}", "", COMPLETION_HEAD, *completion_rows(scores), ""]
        if completing and dataset in _COMPLETION_NOTES:
            lines += [_COMPLETION_NOTES[dataset], ""]
    return "\n".join(lines)


def write_results(weights: Path = Path("weights"), path: Path = RESULTS_FILE) -> None:
    """Write RESULTS.md."""
    write_whole(path, results_text(weights))
