"""MLflow's side of promotion: the versions of a dataset's registered model, and their aliases."""

import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion

from pipelines.params import load_params
from pipelines.registry import runs as tracking
from pixelcnn.checkpoint import CONFIG_FILE, SCORES_FILE, WEIGHTS_FILE, load_checkpoint, sha256_of
from pixelcnn.data import Dataset
from pixelcnn.evaluation import CHECKED_IMAGES, CHECKED_SCORE, checked_score
from pixelcnn.models.base import AutoregressiveModel

ROLLED_BACK_TAG = "rolled_back"
VALIDATION_METRIC = "validation/nll_nats"
TOLERANCE_NATS = 0.05  # of a score: rounding differs between processors; another file differs by whole nats
RESTORE = (
    "Promote another version (if this is the champion: roll back), or restore the whole registry: python -m "
    "pipelines.steps restore FILE --replace."
)


class _Tags(dict[str, str]):
    """The tags of a version; MLflow's own pages register one without those that a training gives it."""

    def __init__(self, version: ModelVersion) -> None:
        super().__init__(version.tags)
        self._of = f"{version.name} version {version.version}"

    def __missing__(self, key: str) -> str:
        raise ValueError(
            f"{self._of} was not registered by this pipeline: it has no tag {key!r}. Name another version, or point "
            "its alias in MLflow at one."
        )


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of a dataset's registered model."""

    name: str  # of the registered model
    version: str  # its number, as text
    run_id: str  # the training that made it
    tags: dict[str, str]  # pair, dataset, data_hash, git_commit, weights_sha256, protocol, scores

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"

    @property
    def dataset(self) -> str:
        return self.name.removeprefix(tracking.registered_name(""))

    @property
    def recorded_nll(self) -> float:
        """Its validation NLL in nats per image as the training measured it; NaN if its tag is missing or no number."""
        try:
            return float(self.tags.get(VALIDATION_METRIC, math.nan))
        except ValueError:  # edited in MLflow's pages
            return math.nan

    @property
    def rolled_back(self) -> bool:
        return ROLLED_BACK_TAG in self.tags

    @property
    def identity(self) -> tuple[str, str]:
        """Its weights' SHA-256 and the hash of the data they were measured on: no two versions share both."""
        return self.tags.get("weights_sha256", ""), self.tags.get("data_hash", "")

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
    name = tracking.registered_name(dataset)
    found = sorted(tracking.client().search_model_versions(f"name='{name}'"), key=lambda v: int(v.version))
    return [Version(name=name, version=str(v.version), run_id=v.run_id or "unknown", tags=_Tags(v)) for v in found]


def datasets() -> list[str]:
    """Return the datasets of which any version was registered."""
    prefix = tracking.registered_name("")
    found = tracking.client().search_registered_models(f"name LIKE '{prefix}%'", max_results=1000)
    return sorted(model.name.removeprefix(prefix) for model in found)


def check_known(dataset: str) -> None:
    """Raise ValueError for a dataset that neither params.yaml nor the registry knows."""
    params = load_params()
    if dataset not in params.datasets and dataset not in datasets():
        params.dataset(dataset)


def utc(milliseconds: int) -> str:
    """Return a time of MLflow's, in milliseconds since 1970, as text."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def aliases(dataset: str) -> dict[str, str]:
    """Return alias -> version of a dataset's registered model."""
    name = tracking.registered_name(dataset)
    found = tracking.client().search_registered_models(f"name='{name}'")
    return {alias: str(version) for model in found for alias, version in model.aliases.items()}


def champion(dataset: str) -> Version | None:
    number = aliases(dataset).get(tracking.CHAMPION)
    return next((version for version in versions(dataset) if version.version == number), None)


def set_alias(dataset: str, alias: str, version: str) -> None:
    tracking.client().set_registered_model_alias(tracking.registered_name(dataset), alias, version)


def remove_alias(dataset: str, alias: str, version: str) -> None:
    """Remove an alias if it points at this version."""
    if aliases(dataset).get(alias) == version:
        tracking.client().delete_registered_model_alias(tracking.registered_name(dataset), alias)


def mark_rolled_back(version: Version, when: str) -> None:
    """Tag a version as one that was rolled back: promotion passes over it from now on."""
    tracking.client().set_model_version_tag(version.name, version.version, ROLLED_BACK_TAG, when)


def unmark_rolled_back(version: Version) -> None:
    if version.rolled_back:
        tracking.client().delete_model_version_tag(version.name, version.version, ROLLED_BACK_TAG)


def download(version: Version, folder: Path) -> Path:
    """Fetch a version's checkpoint into a folder; return its own. ValueError if that is not what was registered."""
    tracking.client()  # sets the URI
    top = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=str(folder)))
    checkpoint = top / "artifacts" / tracking.CHECKPOINT_NAME
    clean = folder / "checkpoint"
    clean.mkdir()
    for name in (WEIGHTS_FILE, CONFIG_FILE, SCORES_FILE):  # whatever else an artifact folder holds goes no further
        if not (checkpoint / name).is_file():
            raise ValueError(f"{version} holds no {name}. {RESTORE}")
        shutil.copyfile(checkpoint / name, clean / name)
    found, expected = sha256_of(clean / WEIGHTS_FILE), version.tags.get("weights_sha256", "")
    if found != expected:
        raise ValueError(
            f"{version} does not hold the weights that were registered: their SHA-256 is {found[:12]}..., its tag says "
            f"{expected[:12] or 'nothing'}.... {RESTORE}"
        )
    return clean


def load(version: Version) -> tuple[AutoregressiveModel, dict[str, Any]]:
    """Fetch a version, checked as `download` does; return its model and scores."""
    with tempfile.TemporaryDirectory() as folder:
        return load_checkpoint(download(version, Path(folder)))


def check_scores(what: str, model: AutoregressiveModel, scores: Mapping[str, Any], data: Dataset) -> None:
    """Raise ValueError, naming `what` it is, unless a model has on its data the score that its `scores` state."""
    recorded = scores.get(CHECKED_SCORE)
    if recorded is None:
        raise ValueError(f"the scores.json of {what} states no score of the first few images. Train the pair again.")
    found = checked_score(model, data)
    if not abs(found - recorded) <= TOLERANCE_NATS:
        raise ValueError(
            f"{what} does not score what it says: {found:.2f} nats on up to {CHECKED_IMAGES} test images, "
            f"its scores.json says {recorded:.2f}. Fetch the weights again."
        )
