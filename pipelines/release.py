"""Released weights: the checkpoints in `weights/PAIR/`, which come with the repository, as first champions.

They are registered like any training, and become champion only where a dataset has none: from then on they compete by
the rule of promotion. Where the prepared data are there, the model is scored afresh on the images that its card names,
so that a wrong file cannot pass.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from pipelines import registry, tracking
from pipelines.params import load_params
from pipelines.promotion_flow import RELEASED, Report, alone_with, carry_out, complete_moves, ensure_served, export
from pixelcnn.checkpoint import CONFIG_FILE, load_checkpoint
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.evaluation import per_image_nll
from pixelcnn.model import AutoregressiveModel

WEIGHTS_FOLDER = Path("weights")
DATA_FOLDER = Path("data")
TOLERANCE_NATS = 0.05  # rounding differs between processors; another file differs by whole nats
# What pipelines/training_flow.py calls CHECKED_SCORE; older checkpoints name another split.
_STATED = re.compile(r"(validation|test)/nll_nats_first_(\d+)")

logger = logging.getLogger(__name__)


def release_all() -> list[str]:
    """Release every pair of `weights/`; return one sentence for each.

    The likeliest on its validation split comes first: it becomes champion where several pairs share a dataset.

    Raises:
        ValueError: a checkpoint is damaged, or does not score what it says.
    """
    folders = sorted(folder for folder in WEIGHTS_FOLDER.glob("*") if (folder / CONFIG_FILE).exists())
    nats = {folder: load_checkpoint(folder)[1]["validation/nll_nats"] for folder in folders}
    return [release(folder.name) for folder in sorted(folders, key=nats.__getitem__)]


def release(pair: str) -> str:
    """Register a pair's released weights; make them champion and serve them if their dataset has no champion.

    Returns:
        What was done, in one sentence.

    Raises:
        ValueError: the pair is unknown, its checkpoint is damaged, or it does not score what it says.
    """
    folder = WEIGHTS_FOLDER / pair
    dataset = load_params().pair(pair).dataset
    model, scores = load_checkpoint(folder)
    checked = _checked(folder, model, scores, dataset)
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    sha256 = config["weights_sha256"]
    known = [v for v in registry.versions(dataset) if v.tags.get("weights_sha256") == sha256]
    params = {f"network.{key}": value for key, value in config.items()}
    tags = {
        "git_commit": scores.get("git_commit", "unknown"),
        "protocol": scores["protocol"],
        "weights_sha256": sha256,
        "released": "true",
    }
    run: dict[str, Any] = {"pair": pair, "dataset": dataset, "data_hash": scores["data_hash"], "params": params}
    if known:
        run_id = known[0].run_id
    else:
        # A release that was killed goes on with its run.
        run_id = tracking.start_training_run(**run, tags=tags, key=f"released-{sha256}")
        pictures = sorted(folder.glob("*.png"))
        run |= {"folder": folder, "scores": scores, "curves": [], "pictures": pictures}
        tracking.log_training_run(**run, tags=tags, run_id=run_id)
    number = tracking.register(run_id, folder, pair, dataset)
    with alone_with(dataset):
        complete_moves(dataset)
        became = _make_champion(dataset, number, scores["data_hash"])
    return f"{pair}: released weights are version {number} of {tracking.registered_name(dataset)} ({checked}); {became}"


def _make_champion(dataset: str, number: str, data_hash: str) -> str:
    """Make a version champion if its dataset has none; return what became of it."""
    version = next(v for v in registry.versions(dataset) if v.version == number)
    champion = registry.aliases(dataset).get(tracking.CHAMPION)
    if champion == number:
        ensure_served(version)
        return "champion already."
    if champion is not None:
        return f"version {champion} stays champion until a promotion decides otherwise."
    text = "champion, as the first of its dataset."
    with registry.decision_run(dataset, "release") as run:
        report: Report = {
            "decision": RELEASED,
            "reason": "there was no champion",
            "text": text,
            "served": export(version),
        }
        report |= {"new": number, "old": None, "candidate": version.lineage(), "data_hash": data_hash}
        registry.begin_moves(run, report)
        carry_out(dataset, report, version, None)
    return text


def _checked(folder: Path, model: AutoregressiveModel, scores: dict[str, Any], dataset: str) -> str:
    """Score the model where the data that its scores name are there; return what was checked."""
    path = DATA_FOLDER / f"{dataset}.safetensors"
    if not path.exists():
        return "checksum checked, not scored: the prepared data are not here"
    data = load_dataset(path)
    if data.data_hash != scores["data_hash"]:
        return "checksum checked, not scored: the prepared data are others than those it was measured on"
    return f"checksum checked, scored afresh on {check_scores(str(folder), model, scores, data)}"


def check_scores(what: str, model: AutoregressiveModel, scores: dict[str, Any], data: Dataset) -> str:
    """Score the model on the few images whose score its scores state, as `SPLIT/nll_nats_first_NUMBER`.

    Args:
        what: is scored; named in the error.
        data: those that the scores were measured on.

    Returns:
        Which images these are.

    Raises:
        ValueError: it scores something else, or its scores state nothing of the kind.
    """
    split, num, recorded = stated_score(what, scores)
    found = per_image_nll(model, data, split, num_images=num).mean().item()
    if not abs(found - recorded) <= TOLERANCE_NATS:
        raise ValueError(
            f"{what} does not score what it says: {found:.2f} nats on the first {num} {split} images, "
            f"its scores.json says {recorded:.2f}. Fetch the weights again."
        )
    return f"{num} {split} images"


def stated_score(what: str, scores: dict[str, Any]) -> tuple[str, int, float]:
    """Return the score of the first few images that a checkpoint's scores state: split, number, nats per image.

    Raises:
        ValueError: they state none.
    """
    for key, value in scores.items():
        if match := _STATED.fullmatch(key):
            return match[1], int(match[2]), value
    raise ValueError(f"the scores.json of {what} states no score of the first few images. Train the pair again.")
