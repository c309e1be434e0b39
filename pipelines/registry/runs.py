"""MLflow's side of training: a run per training, a registered model per dataset, a version per weights and data.

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
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import pixelcnn
from pipelines.errors import without_passwords
from pipelines.files import file_lock
from pipelines.registry.provenance import prepared_file
from pipelines.settings import Settings, one_spelling
from pixelcnn.checkpoint import CONFIG_FILE, OWN_FILES, SCORES_FILE
from pixelcnn.evaluation import format_nll

# Read when mlflow is imported: no usage reports, and no progress bars in the flow's log.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# A server that is away is asked for seconds, not minutes: a training waits meanwhile, and the flow's tasks try again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

import mlflow
import mlflow.pyfunc
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelStatus, Metric, Param, Run
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking.context.registry import resolve_tags
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
CHECKPOINT_NAME = "checkpoint"  # of the folder within the logged model's `artifacts/`
_KEY_TAG = "training_key"
_REQUIREMENTS = ("torch", "numpy", "safetensors", "pillow", "numba")  # of the package pixelcnn, pinned as they are here
VERSION_SCORES = ("validation/nll_nats", "validation/bits_per_dim", "test/nll_nats", "test/bits_per_dim")  # tags, too
_DESCRIPTION = (
    "PixelCNN models of {}: they complete, sample and score its images. `champion` is served, `previous` was "
    "before it, `challenger` is the newest. The experiment `promotions` says why."
)
INPUTS_TAG = "inputs_sha256"  # of a run: what its training followed from

logger = logging.getLogger(__name__)
# A new database announces each step of its making otherwise, and a model each step of being logged.
for _talker in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
    logging.getLogger(_talker).setLevel(logging.WARNING)

_ready: set[str] = set()


def location() -> str:
    """Return where the registry is: the file of a SQLite database, or else its host and path, without a password."""
    parts = urlsplit(without_passwords(Settings().registry))
    return str(sqlite_file() or one_spelling(f"{parts.netloc}{parts.path}"))


def is_shared() -> bool:
    """Say whether the registry is a server whose address means the same on every machine."""
    host = urlsplit(without_passwords(Settings().registry)).hostname
    return host is not None and host not in ("localhost", "::1") and not host.startswith("127.")


def sqlite_file() -> Path | None:
    """Return the registry's file, if it is a SQLite database; None for another one, or a server."""
    uri = Settings().registry
    path = uri.removeprefix("sqlite:///").partition("?")[0]  # SQLAlchemy's options follow
    return Path(path).resolve() if uri.startswith("sqlite:///") else None


def client() -> mlflow.MlflowClient:
    """Return a client of the tracking store; the schema of a new database is created first, safely.

    ValueError where MLflow is to keep registered models elsewhere: backups and the store's feeder know one place.
    """
    settings = Settings()
    uri = settings.registry
    database = sqlite_file()
    if settings.registry_uri not in (None, uri):
        raise ValueError("MLFLOW_REGISTRY_URI names another place than MLFLOW_TRACKING_URI. Unset it.")
    if database is not None and not database.parent.is_dir():
        raise ValueError(f"the registry's folder {database.parent} does not exist: make it, or name another registry.")
    mlflow.set_tracking_uri(uri)
    if not uri.startswith("http") and (uri not in _ready or (database is not None and not database.exists())):
        # Two processes that create the schema of one database at once would break it.
        key = hashlib.sha256(uri.encode()).hexdigest()[:12]
        lock = Path(tempfile.gettempdir(), f"mlflow-{os.getuid()}-{key}.lock")  # another user's cannot be opened
        # Not by TMPDIR, of which each demo has its own; but where nothing can be written, one may still read.
        if database is not None and os.access(database.parent, os.W_OK):
            lock = database.with_name(f"{database.name}.lock")
        with file_lock(lock, "the making of MLflow's database", logger.info):
            if database is not None and not database.exists():
                # Made aside: a process killed during the migrations, which take seconds, leaves what nobody can open.
                with tempfile.TemporaryDirectory(prefix=f"{database.name}.", dir=database.parent) as folder:
                    new = Path(folder) / database.name
                    mlflow.MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
                    new.replace(database)
            mlflow.MlflowClient(uri).search_experiments(max_results=1)
        _ready.add(uri)
    return mlflow.MlflowClient(uri)


def experiment_id(name: str) -> str:
    """Return the ID of an experiment, which is created if there is none of this name; ValueError for a deleted one."""
    c = client()
    experiment = c.get_experiment_by_name(name)
    if experiment is None:
        folder = database.parent if (database := sqlite_file()) else Path.cwd()
        is_server = Settings().registry.startswith("http")  # which has a place of its own
        artifacts = None if is_server else (folder / "mlruns").as_uri()
        try:
            return c.create_experiment(name, artifact_location=artifacts)
        except MlflowException:  # another process was first
            experiment = c.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise ValueError(
            f"the experiment {name} was deleted in MLflow, where its name stays taken. Bring it back, with "
            f"MLFLOW_TRACKING_URI set: mlflow experiments restore --experiment-id {experiment.experiment_id}."
        )
    return experiment.experiment_id


def find_run(run_id: str) -> Run | None:
    """Return a run; None if the store does not have it."""
    try:
        return client().get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def create_run(experiment: str, name: str, tags: Mapping[str, str], start_ms: int | None = None) -> str:
    """Create a run in an experiment, with who ran what among its tags as `mlflow.start_run` does; return its ID."""
    commit = {MLFLOW_GIT_COMMIT: tags["git_commit"]} if "git_commit" in tags else {}
    tags = {**resolve_tags(), **commit, **tags}
    run = client().create_run(experiment_id(experiment), start_time=start_ms, run_name=name, tags=tags)
    return str(run.info.run_id)


def monitor_machine(run_id: str) -> SystemMetricsMonitor | None:
    """Log the machine's load to a run until `finish()`, if MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is true; else None."""
    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return None
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=Settings().registry)
    monitor.start()
    return monitor


def registered_name(dataset: str) -> str:
    """Return the name of a dataset's registered model."""
    return f"pixelcnn-{dataset}"


@dataclass(frozen=True, kw_only=True)
class Training:
    """What MLflow is told of a training."""

    pair: str  # names the run
    dataset: str  # names the experiment
    data_hash: str  # MD5 of the prepared file
    params: Mapping[str, str] = field(default_factory=dict)  # settings by name
    tags: Mapping[str, str] = field(default_factory=dict)  # what else identifies the run

    def all_tags(self) -> dict[str, str]:
        return {**self.tags, "pair": self.pair, "dataset": self.dataset, "data_hash": self.data_hash}


def start_training_run(training: Training, key: str, run_id: str | None = None) -> str:
    """Begin the MLflow run of a training, or go on with the one that it began before it was stopped; return its ID.

    Args:
        key: of this training and no other: a tag by which the run is found if it was killed before it knew the ID.
        run_id: of the run that it began; another one is begun if the store has lost it, or settings or data differ.
    """
    c, settings = client(), training.params
    begun = c.search_runs([experiment_id(training.dataset)], f"tags.{_KEY_TAG} = '{key}'", max_results=1)
    for run in filter(None, (find_run(run_id) if run_id else None, *begun)):
        known, known_id = run.data.params, str(run.info.run_id)
        is_ours = run.info.lifecycle_stage == "active" and run.data.tags.get("data_hash") == training.data_hash
        if is_ours and all(settings.get(k) == v for k, v in known.items()):
            c.log_batch(known_id, params=[Param(k, v) for k, v in settings.items() if k not in known])
            c.update_run(known_id, status="RUNNING")
            return known_id
    new_id = create_run(training.dataset, training.pair, {**training.all_tags(), _KEY_TAG: key})
    c.log_batch(new_id, params=[Param(name, value) for name, value in settings.items()])
    return new_id


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
    c.log_batch(run_id, metrics=metrics)


def log_training_run(
    run_id: str,
    training: Training,
    folder: Path,
    scores: Mapping[str, Any],
    curves: Sequence[Sequence[Mapping[str, float]]] = (),
    pictures: Sequence[Path] = (),
) -> str:
    """Complete the run that `start_training_run` began, with its model; return the logged model's ID.

    Args:
        folder: the checkpoint; its own files, and nothing else that lies there, become the logged model.
        scores: measured values; the numbers among them become metrics.
        curves: as `log_curve` takes them; no name is in two of them.
        pictures: files to keep with the run.
    """
    c = client()
    now_ms = int(time.time() * 1000)
    last_step = int(curves[0][-1]["step"]) if curves and curves[0] else 0
    source = json.dumps({"uri": str(prepared_file(training.dataset))})
    data_input = DatasetInput(
        Dataset(name=training.dataset, digest=training.data_hash, source_type="local", source=source),
        tags=[InputTag("mlflow.data.context", "training")],
    )
    # As a context: a failure in here leaves a run that says FAILED.
    with mlflow.start_run(run_id, tags=training.all_tags()):
        for curve in curves:
            log_curve(run_id, curve)
        c.log_inputs(run_id, [data_input])
        for file in (*pictures, folder / SCORES_FILE):
            mlflow.log_artifact(str(file))
        model_id = _log_model(c, run_id, folder)
        metrics = [
            Metric(name, float(value), now_ms, last_step, model_id=model_id)  # of the run and of its model
            for name, value in scores.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        c.log_batch(run_id, metrics=metrics)
    return model_id


def log_evaluation(experiment: str, name: str, scores: Mapping[str, float], tags: Mapping[str, str]) -> str:
    """Record scores of a model that was trained before, as a run of its own; return the run's ID."""
    with mlflow.start_run(experiment_id=experiment_id(experiment), run_name=name, tags=dict(tags)) as run:
        mlflow.log_metrics(dict(scores))
    return str(run.info.run_id)


def _log_model(c: mlflow.MlflowClient, run_id: str, folder: Path) -> str:
    """Log the model of the run under way, unless one that was killed before has; return the logged model's ID."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    sha256 = config["weights_sha256"]
    experiment = c.get_run(run_id).info.experiment_id
    for model in c.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status != LoggedModelStatus.READY:
            c.delete_logged_model(model.model_id)
        elif model.tags.get("weights_sha256") == sha256:
            return str(model.model_id)
    levels = np.zeros((1, *config["image_shape"]), dtype=np.int64)
    with tempfile.TemporaryDirectory() as temporary:
        # MLflow keeps the folder's own name, which differs from run to run; readers want to know it.
        checkpoint = Path(temporary) / CHECKPOINT_NAME
        shutil.copytree(folder, checkpoint, ignore=lambda _, names: {*names} - OWN_FILES)
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("logged_model.py")),
            artifacts={CHECKPOINT_NAME: str(checkpoint)},
            signature=infer_signature(levels, np.zeros(1, dtype=np.float32)),
            input_example=levels,
            # With these it loads anywhere, without this project.
            code_paths=[str(Path(pixelcnn.__file__).parent)],
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS],
            tags={"weights_sha256": sha256},
        )
    return str(logged.model_id)


def register(run_id: str, model_id: str, folder: Path, pair: str, dataset: str) -> str:
    """Make the logged model of a checkpoint a version of its dataset's registered model, and the challenger.

    Return the version. Weights that are registered already, measured on the same data, keep theirs: doing the same work
    twice makes no second one. The same weights on new data are another version, which can compete there.
    """
    c, name = client(), registered_name(dataset)
    config, scores = (json.loads((folder / file).read_text()) for file in (CONFIG_FILE, SCORES_FILE))
    known_by = {"weights_sha256": config["weights_sha256"], "data_hash": scores["data_hash"]}
    version = _only_version(c, name, known_by)
    if version is None:
        tags = {
            **known_by,
            "pair": pair,
            "dataset": dataset,
            "protocol": scores["protocol"],
            # Of the run: the model's code is that of its training, not of a later registration.
            "git_commit": c.get_run(run_id).data.tags.get("git_commit", "unknown"),
            **{key: f"{scores[key]:.6g}" for key in VERSION_SCORES if key in scores},
        }
        mlflow.register_model(f"models:/{model_id}", name, tags=tags)
        # Somebody else may have registered the same a moment ago: both see both now, and keep the same one.
        version = _only_version(c, name, known_by)
        assert version is not None
        nll = format_nll(scores[VERSION_SCORES[0]], tuple(config["image_shape"]), config["num_levels"])
        text = f"{pair}: validation {nll} ({scores['protocol']}). The model card is README.md of its run."
        c.update_model_version(name, version, text)
    registered = c.get_registered_model(name)
    if not registered.description:  # a person's own stays
        c.update_registered_model(name, _DESCRIPTION.format(dataset))
    if str(registered.aliases.get(CHAMPION)) != version:
        c.set_registered_model_alias(name, CHALLENGER, version)
    return version


def identity(folder: Path) -> tuple[str, str]:
    """Return the weights' SHA-256 and the hash of the data they were measured on; each empty where no file says it."""
    paths = (folder / CONFIG_FILE, folder / SCORES_FILE)
    config, scores = (json.loads(path.read_text()) if path.exists() else {} for path in paths)
    return config.get("weights_sha256", ""), scores.get("data_hash", "")


def _only_version(c: mlflow.MlflowClient, name: str, known_by: Mapping[str, str]) -> str | None:
    """Return the first version of these weights and data, and remove any later one; None if there is none."""
    every = c.search_model_versions(f"name='{name}'")
    same = sorted((str(v.version) for v in every if known_by.items() <= v.tags.items()), key=int)
    aliases = c.get_registered_model(name).aliases if len(same) > 1 else {}
    promoted = {str(aliases.get(alias)) for alias in (CHAMPION, PREVIOUS)}
    for number in (later for later in same[1:] if later not in promoted):
        try:
            c.delete_model_version(name, number)
        except MlflowException as error:  # whoever made it may remove it, too
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return same[0] if same else None


def runs_of_inputs(dataset: str, inputs: str) -> set[str]:
    """Return the IDs of the runs that are done and whose training followed from these inputs."""
    query = f"tags.{INPUTS_TAG} = '{inputs}' and attributes.status = 'FINISHED'"
    return {run.info.run_id for run in client().search_runs([experiment_id(dataset)], query)}


def download_files(run_id: str, folder: Path) -> None:
    """Copy the files that a run keeps, those in its folders left out, into a folder."""
    c = client()
    folder.mkdir(parents=True, exist_ok=True)
    for artifact in c.list_artifacts(run_id):
        if not artifact.is_dir:
            c.download_artifacts(run_id, artifact.path, str(folder))
