"""Register an evaluated checkpoint: its MLflow run has the model and all scores, and a version is made of it.

DVC has no stage for this: it acts on a registry, and whether that has the version is for the registry to say.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.registry import runs as tracking
from pipelines.registry.runs import Training
from pipelines.registry.versions import VALIDATION_METRIC
from pipelines.reports.comparison import PICTURES
from pipelines.reports.curve import CURVE_FILES, read_curve
from pipelines.stages.train import Log
from pixelcnn.checkpoint import CARD_FILE, CONFIG_FILE, load_checkpoint
from pixelcnn.models.base import AutoregressiveModel

REPORT_FILES = ("metrics.json", *CURVE_FILES.values(), *PICTURES)  # what `evaluate` writes into a folder of reports

logger = logging.getLogger(__name__)


def load_evaluated(folder: Path) -> tuple[AutoregressiveModel, dict[str, Any]]:
    """Load a checkpoint; ValueError if it is damaged, or its scores do not say what it is and how good."""
    model, scores = load_checkpoint(folder)
    kinds: dict[str, Any] = {"dataset": str, "protocol": str, "data_hash": str, "label_names": list}
    kinds |= {VALIDATION_METRIC: int | float, "pair": str, "settings": dict, "run_id": str}
    told = {"pair": "", "settings": {}, "run_id": "", **scores}
    if missing := [key for key, kind in kinds.items() if not isinstance(told.get(key), kind)]:
        raise ValueError(f"the scores.json of {folder} lacks {', '.join(missing)}. Train it by the pipeline.")
    return model, scores


def register(
    folder: Path,
    report: Path | None = None,
    released: bool = False,
    log: Log = logger.info,
    scores: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Complete the MLflow run of a training, or begin one where this registry has none; make its model a version.

    The same checkpoint twice makes no second version, and no second run. Return `run_id`, `version` and `out`, the
    checkpoint's folder.

    Args:
        folder: the checkpoint that `evaluate` wrote, `models/PAIR` say.
        report: its folder of reports, whose curves and pictures the run keeps; None where there is none.
        released: say so in the run's tags.
        scores: those of the checkpoint if `load_evaluated` has returned them already.
    """
    scores = scores or load_evaluated(folder)[1]
    config = json.loads((folder / CONFIG_FILE).read_text())
    known = ("git_commit", "git_dirty", "protocol", tracking.INPUTS_TAG)
    tags = {key: scores[key] for key in known if key in scores} | {"weights_sha256": config["weights_sha256"]}
    if released:
        tags["released"] = "true"
    training = Training(
        pair=scores.get("pair", f"{config['model']}-{scores['dataset']}"),
        dataset=scores["dataset"],
        data_hash=scores["data_hash"],
        params=scores.get("settings") or {f"network.{key}": str(value) for key, value in config.items()},
        tags=tags,
    )
    key = f"registered-{config['weights_sha256']}-{training.data_hash}"
    run_id = tracking.start_training_run(training, key, scores.get("run_id"))
    # Nothing else of the report's folder: it may be the project's own, with registry and passwords.
    reported = [report / name for name in REPORT_FILES] if report else []
    files = [*sorted(folder.glob("*.png")), folder / CARD_FILE, *reported]
    kept = [file for file in files if file.is_file()]
    curves = [read_curve(file) for file in kept if file.name in CURVE_FILES.values()]
    model_id = tracking.log_training_run(run_id, training, folder, scores, curves, kept)
    version = tracking.register(run_id, model_id, folder, training.pair, training.dataset)
    log(f"{tracking.registered_name(training.dataset)} version {version}, run {run_id}")
    return {"run_id": run_id, "version": version, "out": str(folder)}
