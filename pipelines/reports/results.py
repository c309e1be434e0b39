"""RESULTS.md: the released weights' scores, beside published figures of the same protocol. Written, never edited."""

import json
from pathlib import Path
from typing import Any

import yaml

from pipelines.params import load_params
from pipelines.reports.card import render
from pixelcnn.checkpoint import CONFIG_FILE, SCORES_FILE

RESULTS_FILE = Path("RESULTS.md")
PUBLISHED_FILE = Path(__file__).with_name("published.yaml")


def results_text(weights: Path) -> str:
    """Return RESULTS.md for the checkpoints in `weights/PAIR/`; ValueError if scores or configuration are damaged."""
    released: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for folder in sorted(path.parent for path in weights.glob(f"[!.]*/{SCORES_FILE}")):
        try:
            config, scores = (json.loads((folder / name).read_text()) for name in (CONFIG_FILE, SCORES_FILE))
            released.setdefault(scores["dataset"], []).append((config, {**scores, "pair": folder.name}))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} has no readable scores ({error!r}). Fetch the weights again.") from None
    # By dataset, its protocol and levels: those of params.yaml, and then those that are known by their weights alone.
    datasets = {name: (spec.protocol, spec.num_levels) for name, spec in load_params().datasets.items()}
    datasets |= {name: (scores["protocol"], config["num_levels"]) for name, ((config, scores), *_) in released.items()}
    published = yaml.safe_load(PUBLISHED_FILE.read_text())
    return render("results.md.j2", released=released, datasets=datasets, published=published).rstrip() + "\n"
