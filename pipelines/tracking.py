"""MLflow's side of training: one run per training, one registered model per dataset, one version per set of weights.

The tracking URI is MLFLOW_TRACKING_URI, or else a SQLite file in the current folder; artifacts of a SQLite store lie
beside it in `mlruns/`.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pixelcnn.checkpoint import CONFIG_FILE, SCORES_FILE

# Read when mlflow is imported: no usage reports, and no progress bars in the flow's log.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that is away is asked for seconds, not minutes: a training waits meanwhile, and the flow's tasks try again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

import mlflow
import mlflow.pyfunc
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
MODEL_NAME = "model"  # of the logged model within its run
CHECKPOINT_NAME = "checkpoint"  # of the folder within the logged model's `artifacts/`
_LOGGED_MODEL_CODE = Path(__file__).with_name("logged_model.py")
_URI_VARIABLE = "MLFLOW_TRACKING_URI"

_ready: set[str] = set()


def tracking_uri() -> str:
    """Return the URI of the tracking store and registry."""
    return os.environ.get(_URI_VARIABLE) or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


@contextmanager
def _alone(database: Path) -> Iterator[None]:
    """Hold a lock: two processes that create the schema of one new SQLite file at once would break it."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(database.with_name(f"{database.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def client() -> mlflow.MlflowClient:
    """Return a client of the tracking store; the schema of a new SQLite file is created first, safely."""
    # A new database announces each step of its making otherwise, and a model each step of being logged.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    database = _sqlite_file(uri)
    if database is not None and (uri not in _ready or not database.exists()):
        with _alone(database):
            mlflow.MlflowClient(uri).search_experiments(max_results=1)
        _ready.add(uri)
    return mlflow.MlflowClient(uri)


def experiment_id(name: str) -> str:
    """Return the ID of an experiment, which is created if there is none of this name."""
    c = client()
    database = _sqlite_file(tracking_uri())
    location = None if database is None else (database.parent / "mlruns").as_uri()
    experiment = c.get_experiment_by_name(name)
    if experiment is None:
        try:
            return c.create_experiment(name, artifact_location=location)
        except MlflowException:
            # Another process was first.
            experiment = c.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


def registered_name(dataset: str) -> str:
    """Return the name of a dataset's registered model."""
    return f"pixelcnn-{dataset}"


def start_training_run(
    *,
    pair: str,
    dataset: str,
    data_hash: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> str:
    """Begin the MLflow run of a training, or go on with the one that it began before it was stopped.

    Args:
        run_id: of the run that it began; another one is begun if the store has lost it or the settings have changed.

    Returns:
        The run's ID; the run is shown as running.
    """
    c = client()
    settings = {name: str(value) for name, value in params.items()}
    if run_id is not None:
        try:
            run = c.get_run(run_id)
            if run.info.lifecycle_stage == "active" and run.data.params == settings:
                c.update_run(run_id, status="RUNNING")
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    identity = {**tags, "pair": pair, "dataset": dataset, "data_hash": data_hash}
    run = c.create_run(experiment_id(dataset), run_name=pair, tags=identity)
    c.log_batch(run.info.run_id, params=[Param(name, value) for name, value in settings.items()])
    return run.info.run_id


def log_curve(run_id: str, curve: Sequence[Mapping[str, float]]) -> None:
    """Log the rows of a training curve that the run does not have yet, as `curve/NAME` at their steps."""
    c = client()
    there = {m.step for m in c.get_metric_history(run_id, "curve/train_nll_nats")} if curve else set()
    now_ms = int(time.time() * 1000)
    metrics = [
        Metric(f"curve/{name}", float(value), now_ms, int(row["step"]))
        for row in curve
        if row["step"] not in there
        for name, value in row.items()
        if name != "step"
    ]
    for start in range(0, len(metrics), 1000):  # the most that one request may hold
        c.log_batch(run_id, metrics=metrics[start : start + 1000])


def log_picture(run_id: str, picture: Path, folder: str) -> None:
    """Keep a file with a run that is under way."""
    client().log_artifact(run_id, str(picture), folder)


def fail_run(run_id: str) -> None:
    """Show that a run has failed; it can still be gone on with."""
    client().set_terminated(run_id, "FAILED")


def log_training_run(
    *,
    pair: str,
    dataset: str,
    data_hash: str,
    folder: Path,
    params: Mapping[str, Any],
    scores: Mapping[str, Any],
    curve: Sequence[Mapping[str, float]],
    pictures: Sequence[Path],
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> str:
    """Record one training as an MLflow run, with its model.

    Args:
        pair: names the run.
        dataset: names the experiment.
        data_hash: MD5 of the prepared file.
        folder: the checkpoint; its files become the logged model.
        params: settings by name.
        scores: measured values; the numbers among them become metrics.
        curve: rows of step and values, logged as `curve/NAME` at their steps.
        pictures: files to keep with the run.
        tags: what else identifies the run.
        run_id: the run that `start_training_run` began; None for a new one.

    Returns:
        The run's ID.
    """
    c = client()
    now_ms = int(time.time() * 1000)
    last_step = int(curve[-1]["step"]) if curve else 0
    metrics = [
        Metric(name, float(value), now_ms, last_step)
        for name, value in scores.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    identity = {**tags, "pair": pair, "dataset": dataset, "data_hash": data_hash}
    source = json.dumps({"uri": f"data/{dataset}.safetensors"})
    data_input = DatasetInput(
        Dataset(name=dataset, digest=data_hash, source_type="local", source=source),
        tags=[InputTag("mlflow.data.context", "training")],
    )
    # As a context: a failure in here leaves a run that says FAILED.
    with mlflow.start_run(run_id, experiment_id(dataset), run_name=pair, tags=identity) as run:
        run_id = run.info.run_id
        mlflow.log_params(dict(params))
        log_curve(run_id, curve)
        c.log_batch(run_id, metrics=metrics)
        c.log_inputs(run_id, [data_input])
        for picture in pictures:
            mlflow.log_artifact(str(picture))
        mlflow.log_artifact(str(folder / SCORES_FILE))
        _log_model(folder)
    return run_id


def log_evaluation(experiment: str, name: str, scores: Mapping[str, float], tags: Mapping[str, str]) -> str:
    """Record scores of a model that was trained before, as a run of its own; return the run's ID."""
    client()
    with mlflow.start_run(experiment_id=experiment_id(experiment), run_name=name, tags=dict(tags)) as run:
        mlflow.log_metrics(dict(scores))
    return run.info.run_id


def _log_model(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    levels = np.zeros((1, *config["image_shape"]), dtype=np.int64)
    with tempfile.TemporaryDirectory() as temporary:
        # MLflow keeps the folder's own name, which differs from run to run; readers want to know it.
        checkpoint = shutil.copytree(folder, Path(temporary) / CHECKPOINT_NAME)
        mlflow.pyfunc.log_model(
            name=MODEL_NAME,
            python_model=str(_LOGGED_MODEL_CODE),
            artifacts={CHECKPOINT_NAME: str(checkpoint)},
            signature=infer_signature(levels, np.zeros(1, dtype=np.float32)),
            input_example=levels,
            pip_requirements=["torch", "numpy", "safetensors", "pillow"],
        )


def register(run_id: str, folder: str | Path, pair: str, dataset: str) -> str:
    """Make the run's model a version of its dataset's registered model, and the challenger.

    Weights that are registered already keep their version: doing the same work twice makes no second one.

    Args:
        run_id: of `log_training_run`.
        folder: the checkpoint that was logged; its scores name the data it was measured on.

    Returns:
        The version.
    """
    c = client()
    name = registered_name(dataset)
    sha256 = json.loads((Path(folder) / CONFIG_FILE).read_text())["weights_sha256"]
    scores = json.loads((Path(folder) / SCORES_FILE).read_text())
    same = [v for v in c.search_model_versions(f"name='{name}'") if v.tags.get("weights_sha256") == sha256]
    if same:
        version = str(min(same, key=lambda v: int(v.version)).version)
    else:
        tags = {
            "pair": pair,
            "dataset": dataset,
            "data_hash": scores["data_hash"],
            "protocol": scores["protocol"],
            "weights_sha256": sha256,
            # Of the run: the model's code is that of its training, not of a later registration.
            "git_commit": c.get_run(run_id).data.tags.get("git_commit", "unknown"),
        }
        version = str(mlflow.register_model(f"models:/{_logged_model_id(c, run_id)}", name, tags=tags).version)
    if str(c.get_registered_model(name).aliases.get(CHAMPION)) != version:
        c.set_registered_model_alias(name, CHALLENGER, version)
    return version


def _logged_model_id(c: mlflow.MlflowClient, run_id: str) -> str:
    outputs = c.get_run(run_id).outputs
    if outputs is None or not outputs.model_outputs:
        raise ValueError(f"run {run_id} has no logged model. Train the pair again.")
    return outputs.model_outputs[-1].model_id
