"""Released weights: the checkpoints in `weights/PAIR/`, which come with the repository, as first champions.

They are registered like any training, and become champion only where a dataset has none: from then on they compete by
the rule of promotion. Where the prepared data are there, the model is scored afresh on the images that its card names,
so that a wrong file cannot pass.
"""

import json
import logging
from pathlib import Path
from typing import Any

from pipelines import registry, store, tracking
from pipelines.params import load_params
from pipelines.promotion_flow import ensure_served, export
from pipelines.training_flow import CHECKED_IMAGES, CHECKED_SCORE
from pixelcnn.checkpoint import CONFIG_FILE, load_checkpoint
from pixelcnn.data import load_dataset
from pixelcnn.training import per_image_nll

WEIGHTS_FOLDER = Path("weights")
DATA_FOLDER = Path("data")
TOLERANCE_NATS = 0.05  # rounding differs between processors; another file differs by whole nats

logger = logging.getLogger(__name__)


def release_all() -> list[str]:
    """Release every pair of `weights/`; return one sentence for each.

    Raises:
        ValueError: a checkpoint is damaged, or does not score what it says.
    """
    return [release(folder.name) for folder in sorted(WEIGHTS_FOLDER.glob("*")) if (folder / CONFIG_FILE).exists()]


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
    checked = check_scores(folder, model, scores, dataset)
    config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text())
    sha256 = config["weights_sha256"]
    known = [v for v in registry.versions(dataset) if v.tags.get("weights_sha256") == sha256]
    if known:
        run_id = known[0].run_id
    else:
        run_id = tracking.log_training_run(
            pair=pair,
            dataset=dataset,
            data_hash=scores["data_hash"],
            folder=folder,
            params={f"network.{key}": value for key, value in config.items()},
            scores=scores,
            curve=[],
            pictures=sorted(folder.glob("*.png")),
            tags={
                "git_commit": scores.get("git_commit", "unknown"),
                "protocol": scores["protocol"],
                "weights_sha256": sha256,
                "released": "true",
            },
        )
    number = tracking.register(run_id, folder, pair, dataset)
    name = tracking.registered_name(dataset)
    text = f"{pair}: released weights are version {number} of {name} ({checked})"
    aliases = registry.aliases(dataset)
    version = next(v for v in registry.versions(dataset) if v.version == number)
    if tracking.CHAMPION not in aliases:
        with registry.decision_run(dataset, "release") as run:
            tag = export(version)
            registry.set_alias(dataset, tracking.CHAMPION, number)
            registry.remove_alias(dataset, tracking.CHALLENGER)
            store.serve(tag)
            text += "; champion, as the first of its dataset."
            report = {"decision": "released", "reason": "there was no champion", "text": text, "served": tag}
            registry.record_decision(run, report | {"candidate": version.lineage(), "data_hash": scores["data_hash"]})
    elif aliases[tracking.CHAMPION] == number:
        ensure_served(version)
        text += "; champion already."
    else:
        text += f"; version {aliases[tracking.CHAMPION]} stays champion until a promotion decides otherwise."
    return text


def check_scores(folder: Path, model: Any, scores: dict[str, Any], dataset: str) -> str:
    """Score the model on the images that its scores name, where their data are there; return what was checked.

    Raises:
        ValueError: it scores something else.
    """
    path = DATA_FOLDER / f"{dataset}.safetensors"
    if not path.exists():
        return "checksum checked, not scored: the prepared data are not here"
    data = load_dataset(path)
    if data.data_hash != scores["data_hash"]:
        return "checksum checked, not scored: the prepared data are others than those it was measured on"
    found = per_image_nll(model, data, "test", num_images=CHECKED_IMAGES).mean().item()
    if abs(found - scores[CHECKED_SCORE]) > TOLERANCE_NATS:
        raise ValueError(
            f"{folder} does not score what it says: {found:.2f} nats on the first {CHECKED_IMAGES} test images, "
            f"its scores.json says {scores[CHECKED_SCORE]:.2f}. Fetch the weights again."
        )
    return f"checksum checked, scored afresh on {CHECKED_IMAGES} test images"
