"""MLflow's side of training: one run per training, one registered model per dataset, one version per set of weights.

The tracking URI is MLFLOW_TRACKING_URI: an MLflow server, or a database such as PostgreSQL; or else a SQLite file in
the current folder. Artifacts of a SQLite store lie beside it in `mlruns/`, those of another database in the current
folder's `mlruns/`; a server keeps them where it was told to.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import alone
from pixelcnn.checkpoint import CONFIG_FILE, SCORES_FILE

# Read when mlflow is imported: no usage reports, and no progress bars in the flow's log.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that is away is asked for seconds, not minutes: a training waits meanwhile, and the flow's tasks try again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

import mlflow
import mlflow.pyfunc
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModel, LoggedModelStatus, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
MODEL_NAME = "model"  # of the logged model within its run
CHECKPOINT_NAME = "checkpoint"  # of the folder within the logged model's `artifacts/`
_LOGGED_MODEL_CODE = Path(__file__).with_name("logged_model.py")
_URI_VARIABLE = "MLFLOW_TRACKING_URI"
_KEY_TAG = "training_key"
INPUTS_TAG = "inputs_sha256"  # of a run: what its training followed from

logger = logging.getLogger(__name__)

_ready: set[str] = set()


def tracking_uri() -> str:
    """Return the URI of the tracking store and registry."""
    return os.environ.get(_URI_VARIABLE) or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def _lock_file(uri: str) -> Path:
    """Return the lock of a database's making: two processes that create the schema of one at once would break it."""
    database = _sqlite_file(uri)
    if database is not None:
        return database.with_name(f"{database.name}.lock")
    return Path(tempfile.gettempdir()) / f"mlflow-{hashlib.sha256(uri.encode()).hexdigest()[:12]}.lock"


def client() -> mlflow.MlflowClient:
    """Return a client of the tracking store; the schema of a new database is created first, safely."""
    # A new database announces each step of its making otherwise, and a model each step of being logged.
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    uri = tracking_uri()
    mlflow.set_tracking_uri(uri)
    database = _sqlite_file(uri)
    missing = database is not None and not database.exists()
    if not uri.startswith("http") and (uri not in _ready or missing):
        with alone(_lock_file(uri), "the making of MLflow's database", logger.info):
            mlflow.MlflowClient(uri).search_experiments(max_results=1)
        _ready.add(uri)
    return mlflow.MlflowClient(uri)


def experiment_id(name: str) -> str:
    """Return the ID of an experiment, which is created if there is none of this name."""
    c = client()
    uri = tracking_uri()
    database = _sqlite_file(uri)
    folder = database.parent if database is not None else Path.cwd()
    location = None if uri.startswith("http") else (folder / "mlruns").as_uri()  # a server has its own
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
    key: str,
    run_id: str | None = None,
) -> str:
    """Begin the MLflow run of a training, or go on with the one that it began before it was stopped.

    Args:
        key: of this training and no other. It is a tag of the run, which is so found again if the training was killed
            before it knew the run's ID.
        run_id: of the run that it began; another one is begun if the store has lost it or the settings have changed.

    Returns:
        The run's ID; the run is shown as running.
    """
    c = client()
    settings = {name: str(value) for name, value in params.items()}
    experiment = experiment_id(dataset)
    if run_id is None:
        begun = c.search_runs([experiment], f"tags.{_KEY_TAG} = '{key}'", max_results=1)
        run_id = begun[0].info.run_id if begun else None
    if run_id is not None:
        try:
            run = c.get_run(run_id)
            known = run.data.params
            if run.info.lifecycle_stage == "active" and all(settings.get(k) == v for k, v in known.items()):
                c.log_batch(run_id, params=[Param(k, v) for k, v in settings.items() if k not in known])
                c.update_run(run_id, status="RUNNING")
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    identity = {**tags, "pair": pair, "dataset": dataset, "data_hash": data_hash, _KEY_TAG: key}
    run = c.create_run(experiment, run_name=pair, tags=identity)
    c.log_batch(run.info.run_id, params=[Param(name, value) for name, value in settings.items()])
    return run.info.run_id


def log_curve(run_id: str, curve: Sequence[Mapping[str, float]]) -> None:
    """Log the rows of a training curve that the run does not have yet, as `curve/NAME` at their steps."""
    c = client()
    there = {m.step for m in c.get_metric_history(run_id, f"curve/{list(curve[0])[-1]}")} if curve else set()
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
    curves: Sequence[Sequence[Mapping[str, float]]],
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
        curves: rows of step and values, logged as `curve/NAME` at their steps; no name is in two of them.
        pictures: files to keep with the run.
        tags: what else identifies the run.
        run_id: the run that `start_training_run` began; None for a new one.

    Returns:
        The run's ID.
    """
    c = client()
    now_ms = int(time.time() * 1000)
    last_step = int(curves[0][-1]["step"]) if curves and curves[0] else 0
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
        for curve in curves:
            log_curve(run_id, curve)
        c.log_batch(run_id, metrics=metrics)
        c.log_inputs(run_id, [data_input])
        for picture in pictures:
            mlflow.log_artifact(str(picture))
        mlflow.log_artifact(str(folder / SCORES_FILE))
        _log_model(c, run_id, folder)
    return run_id


def log_evaluation(experiment: str, name: str, scores: Mapping[str, float], tags: Mapping[str, str]) -> str:
    """Record scores of a model that was trained before, as a run of its own; return the run's ID."""
    client()
    with mlflow.start_run(experiment_id=experiment_id(experiment), run_name=name, tags=dict(tags)) as run:
        mlflow.log_metrics(dict(scores))
    return run.info.run_id


def log_more(run_id: str, scores: Mapping[str, float]) -> None:
    """Add scores to a run that is recorded already."""
    now_ms = int(time.time() * 1000)
    client().log_batch(run_id, metrics=[Metric(name, value, now_ms, 0) for name, value in scores.items()])


def _log_model(c: mlflow.MlflowClient, run_id: str, folder: Path) -> None:
    """Log the model of the run under way, unless the run has it: a process before this one may have been killed."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    sha256 = config["weights_sha256"]
    for model in _logged_models(c, run_id):
        if model.status != LoggedModelStatus.READY:
            c.delete_logged_model(model.model_id)
        elif model.tags.get("weights_sha256") == sha256:
            return
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
            tags={"weights_sha256": sha256},
        )


def _logged_models(c: mlflow.MlflowClient, run_id: str) -> list[LoggedModel]:
    """Return the logged models of a run, whole or not, the newest first."""
    experiment = c.get_run(run_id).info.experiment_id
    return list(c.search_logged_models([experiment], f"source_run_id = '{run_id}'"))


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
    version = _only_version(c, name, sha256)
    if version is None:
        tags = {
            "pair": pair,
            "dataset": dataset,
            "data_hash": scores["data_hash"],
            "protocol": scores["protocol"],
            "weights_sha256": sha256,
            # Of the run: the model's code is that of its training, not of a later registration.
            "git_commit": c.get_run(run_id).data.tags.get("git_commit", "unknown"),
        }
        mlflow.register_model(f"models:/{_logged_model_id(c, run_id, sha256)}", name, tags=tags)
        # Somebody else may have registered the same a moment ago: both see both now, and keep the same one.
        version = _only_version(c, name, sha256)
        assert version is not None
    if str(c.get_registered_model(name).aliases.get(CHAMPION)) != version:
        c.set_registered_model_alias(name, CHALLENGER, version)
    return version


def _only_version(c: mlflow.MlflowClient, name: str, sha256: str) -> str | None:
    """Return the first version that holds these weights, and remove any later one; None if there is none."""
    every = c.search_model_versions(f"name='{name}'")
    same = sorted(int(v.version) for v in every if v.tags.get("weights_sha256") == sha256)
    aliases = c.get_registered_model(name).aliases if len(same) > 1 else {}
    promoted = {str(aliases.get(alias)) for alias in (CHAMPION, PREVIOUS)}
    for number in same[1:]:
        if str(number) in promoted:
            continue
        try:
            c.delete_model_version(name, str(number))
        except MlflowException as error:  # whoever made it may remove it, too
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return str(same[0]) if same else None


def _logged_model_id(c: mlflow.MlflowClient, run_id: str, sha256: str) -> str:
    whole = [model for model in _logged_models(c, run_id) if model.status == LoggedModelStatus.READY]
    mine = [model.model_id for model in whole if model.tags.get("weights_sha256") == sha256]
    if not mine:
        raise ValueError(f"run {run_id} has no logged model of these weights. Train the pair again.")
    return mine[0]


def version_of_inputs(dataset: str, inputs: str) -> str | None:
    """Return the version whose training followed from these inputs; None if none was registered."""
    c = client()
    query = f"tags.{INPUTS_TAG} = '{inputs}' and attributes.status = 'FINISHED'"
    done = {run.info.run_id for run in c.search_runs([experiment_id(dataset)], query)}
    every = c.search_model_versions(f"name='{registered_name(dataset)}'")
    return next((str(v.version) for v in every if v.run_id in done), None)


def download_files(run_id: str, folder: Path) -> None:
    """Copy the files that a run keeps, those in its folders left out, into a folder."""
    c = client()
    folder.mkdir(parents=True, exist_ok=True)
    for artifact in c.list_artifacts(run_id):
        if not artifact.is_dir:
            c.download_artifacts(run_id, artifact.path, str(folder))
