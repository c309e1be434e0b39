"""MLflow's side of promotion: the versions of a dataset's registered model, their aliases, and the record of decisions.

Decisions are runs of the experiment `promotions`; none is ever changed or removed.
"""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# An HTTP registry that is down must be noticed within seconds: MLflow alone would retry for minutes. Read at each call.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from pipelines import tracking  # noqa: I001  # Sets what MLflow reads when it is imported.
import mlflow
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from pixelcnn.checkpoint import CONFIG_FILE, SCORES_FILE, WEIGHTS_FILE, sha256_of

DECISIONS_EXPERIMENT = "promotions"
ROLLED_BACK_TAG = "rolled_back"
_MOVES_TAG = "moves"  # of a decision's run: begun, then ended
VALIDATION_METRIC = "validation/nll_nats"


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a dataset's registered model.

    Args:
        name: of the registered model.
        version: its number, as text.
        run_id: the training that made it.
        tags: `pair`, `dataset`, `data_hash`, `git_commit`, `weights_sha256`, `protocol`.
        recorded_nll: validation NLL in nats per image as the training measured it; NaN if it recorded none.
    """

    name: str
    version: str
    run_id: str
    tags: dict[str, str]
    recorded_nll: float

    @property
    def rolled_back(self) -> bool:
        return ROLLED_BACK_TAG in self.tags

    def lineage(self) -> dict[str, str]:
        """Return what every answer of the service says about its model."""
        return {
            "name": self.name,
            "version": self.version,
            "run_id": self.run_id,
            **{key: self.tags.get(key, "unknown") for key in ("git_commit", "data_hash", "weights_sha256")},
        }


def versions(dataset: str) -> list[Version]:
    """Return every version of a dataset's registered model, the oldest first; none if nothing was registered."""
    client = tracking.client()
    name = tracking.registered_name(dataset)
    found = sorted(client.search_model_versions(f"name='{name}'"), key=lambda v: int(v.version))
    return [
        Version(
            name=name,
            version=str(v.version),
            run_id=v.run_id or "unknown",
            tags=dict(v.tags),
            recorded_nll=_recorded_nll(client, v.run_id),
        )
        for v in found
    ]


def _recorded_nll(client: mlflow.MlflowClient, run_id: str | None) -> float:
    if not run_id:
        return math.nan
    try:
        return client.get_run(run_id).data.metrics.get(VALIDATION_METRIC, math.nan)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return math.nan
        raise


def datasets() -> list[str]:
    """Return the datasets of which any version was registered."""
    prefix = tracking.registered_name("")
    found = tracking.client().search_registered_models(f"name LIKE '{prefix}%'", max_results=1000)
    return sorted(model.name.removeprefix(prefix) for model in found)


def training_run(version: Version) -> dict[str, Any]:
    """Return what MLflow has of the training of a version: `params`, `metrics` (last values), `tags`, `started` (UTC).

    Raises:
        LookupError: the run was deleted.
    """
    try:
        run = tracking.client().get_run(version.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise LookupError(f"run {version.run_id} of {version.name} version {version.version} was deleted.") from None
    return {
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": dict(run.data.tags),
        "started": _utc(run.info.start_time),
    }


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def aliases(dataset: str) -> dict[str, str]:
    """Return alias -> version of a dataset's registered model."""
    name = tracking.registered_name(dataset)
    found = tracking.client().search_registered_models(f"name='{name}'")
    return {alias: str(version) for model in found for alias, version in model.aliases.items()}


def set_alias(dataset: str, alias: str, version: str) -> None:
    """Point an alias at a version."""
    tracking.client().set_registered_model_alias(tracking.registered_name(dataset), alias, version)


def remove_alias(dataset: str, alias: str) -> None:
    """Remove an alias; one that is not there is fine."""
    if alias in aliases(dataset):
        tracking.client().delete_registered_model_alias(tracking.registered_name(dataset), alias)


def mark_rolled_back(version: Version, when: str) -> None:
    """Tag a version as one that was rolled back: promotion passes over it from now on."""
    tracking.client().set_model_version_tag(version.name, version.version, ROLLED_BACK_TAG, when)


def unmark_rolled_back(version: Version) -> None:
    """Take the tag away."""
    if version.rolled_back:
        tracking.client().delete_model_version_tag(version.name, version.version, ROLLED_BACK_TAG)


def download(version: Version, folder: Path) -> Path:
    """Fetch a version's checkpoint into a folder and check that its weights are those that were registered.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: the version holds no checkpoint, or other weights than its tag says.
    """
    tracking.client()  # sets the URI
    top = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder)))
    checkpoint = top / "artifacts" / tracking.CHECKPOINT_NAME
    if not (checkpoint / WEIGHTS_FILE).is_file():
        raise ValueError(f"{version.name} version {version.version} holds no {WEIGHTS_FILE}. Register it again.")
    found, expected = sha256_of(checkpoint / WEIGHTS_FILE), version.tags.get("weights_sha256", "")
    if found != expected:
        raise ValueError(
            f"{version.name} version {version.version} does not hold the weights that were registered: their SHA-256 "
            f"is {found[:12]}..., its tag says {expected[:12] or 'nothing'}.... Train and register it again."
        )
    # Only a checkpoint's own files go any further: whatever else an artifact folder holds stays behind.
    clean = folder / "checkpoint"
    clean.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE, SCORES_FILE):
        shutil.copyfile(checkpoint / name, clean / name)
    return clean


@contextmanager
def decision_run(dataset: str, kind: str) -> Iterator[str]:
    """Open the run that records a decision; it ends FAILED if the decision could not be carried out.

    A decision is recorded before anything moves (`begin_moves`), so that whoever comes after a process that was killed
    meanwhile can carry it out (`begun`).

    Yields:
        The run's ID.
    """
    client = tracking.client()
    experiment = tracking.experiment_id(DECISIONS_EXPERIMENT)
    run_id = client.create_run(experiment, run_name=f"{kind}-{dataset}", tags={"dataset": dataset, "kind": kind})
    run_id = run_id.info.run_id
    try:
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    end_moves(run_id)


def begin_moves(run_id: str, report: dict[str, Any]) -> None:
    """Record a decision, and that it is being carried out."""
    record_decision(run_id, report)
    tracking.client().set_tag(run_id, _MOVES_TAG, "begun")


def end_moves(run_id: str, status: str = "FINISHED") -> None:
    """Record that a decision was carried out; or, FAILED, that it never will be."""
    client = tracking.client()
    client.set_tag(run_id, _MOVES_TAG, "ended")
    client.set_terminated(run_id, status)


def begun(dataset: str) -> list[tuple[str, dict[str, Any] | None]]:
    """Return the decisions about a dataset that were left where a process was killed, the oldest first.

    Returns:
        Each one's run ID and report; None for the report if it was not yet decided.
    """
    client = tracking.client()
    found: list[tuple[str, dict[str, Any] | None]] = []
    for run in _decision_runs(client, dataset):
        carried_out = run.data.tags.get(_MOVES_TAG)
        if carried_out == "begun":
            found.append((run.info.run_id, mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/report.json")))
        elif carried_out is None and run.info.status == "RUNNING":
            found.append((run.info.run_id, None))
    return found


def record_decision(run_id: str, report: dict[str, Any]) -> None:
    """Write a decision into its run: numbers as metrics, words as tags, the whole report as an artifact."""
    tags = {key: str(report[key]) for key in ("decision", "reason", "data_hash") if report.get(key)}
    metrics = {
        f"{name}/{key}": value
        for name in ("difference", "completion_difference")
        for key, value in (report.get(name) or {}).items()
    }
    for role in ("champion", "candidate", "runner_up"):
        if scored := report.get(role):
            tags[f"{role}_version"] = scored["version"]
            if scored.get("nll_nats") is not None:
                metrics[f"{role}/nll_nats"] = scored["nll_nats"]
    client = tracking.client()
    now_ms = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, now_ms, 0) for key, value in metrics.items()],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    client.log_dict(run_id, report, "report.json")


def decisions(dataset: str) -> list[dict[str, Any]]:
    """Return the reports of all decisions about a dataset, the oldest first.

    Each has `decision`, `kind` (promotion, rollback or release), `when` (UTC) and `decision_run_id`; a decision that
    could not be carried out, or is still under way, has nothing else but a `reason`.
    """
    return [_decision(run) for run in _decision_runs(tracking.client(), dataset)]


def _decision_runs(client: mlflow.MlflowClient, dataset: str) -> list[mlflow.entities.Run]:
    experiment = client.get_experiment_by_name(DECISIONS_EXPERIMENT)
    if experiment is None:
        return []
    return list(
        client.search_runs(
            [experiment.experiment_id],
            f"tags.dataset = '{dataset}'",
            order_by=["attributes.start_time ASC"],
            max_results=10_000,
        )
    )


def _decision(run: mlflow.entities.Run) -> dict[str, Any]:
    report: dict[str, Any] = {"decision": "failed", "reason": "it was cut off before it was recorded"}
    if run.info.status == "FINISHED":
        report = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/report.json")
    elif run.info.status == "RUNNING":
        report = {"decision": "unfinished", "reason": "it is under way, or its process was killed"}
    when = _utc(run.info.start_time)
    return {**report, "kind": run.data.tags["kind"], "when": when, "decision_run_id": run.info.run_id}
