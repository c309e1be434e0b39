"""BentoML's model store: where promotion puts champions, and the service finds them.

A model is `pixelcnn-DATASET:vVERSION-SHA8`: the files of a checkpoint, with the lineage as metadata. The one that is
served is the store's `latest` of that name.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import bentoml
from bentoml._internal.models import ModelStore
from bentoml.exceptions import BentoMLException

from pipelines.files import alone, write_whole
from pixelcnn.checkpoint import WEIGHTS_FILE, load_checkpoint, sha256_of

_TEMPORARY = ".promote-"

logger = logging.getLogger(__name__)


def home() -> Path:
    """Return BentoML's folder: BENTOML_HOME, or else `~/bentoml`."""
    folder = os.environ.get("BENTOML_HOME") or Path.home() / "bentoml"
    return Path(os.path.expandvars(folder)).expanduser()


def _models() -> Path:
    return home() / "models"


def tag_of(lineage: Mapping[str, Any]) -> str:
    """Return the tag of a version's model: the same version always has the same."""
    return f"{lineage['name']}:v{lineage['version']}-{lineage['weights_sha256'][:8]}"


def latest(name: str) -> str | None:
    """Return the tag that is served of a name, or None."""
    try:
        version = (_models() / name / "latest").read_text().strip()
    except FileNotFoundError:
        return None
    return f"{name}:{version}" if version and (_models() / name / version).is_dir() else None


def holds(tag: str) -> bool:
    """Say whether the store has a model of this tag, whole or not."""
    return (_models() / tag.replace(":", "/")).is_dir()


def is_intact(tag: str, weights_sha256: str) -> bool:
    """Say whether the store holds this model with exactly these weights."""
    folder = _models() / tag.replace(":", "/")
    try:
        stored = bentoml.models.get(tag, _model_store=ModelStore(_models()))
        load_checkpoint(folder)
    except (BentoMLException, ValueError, OSError):
        return False
    metadata: Mapping[str, Any] = stored.info.metadata
    told = {key: value for key, value in metadata.items() if key != "manifest_sha256"}
    if metadata.get("manifest_sha256") != manifest_of(folder, told):
        return False
    return sha256_of(folder / WEIGHTS_FILE) == weights_sha256 == metadata.get("weights_sha256")


def manifest_of(folder: Path, metadata: Mapping[str, Any]) -> str:
    """Return one SHA-256 of a model's metadata and of all its files: the service checks it before it serves them."""
    files = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != "model.yaml"}
    text = json.dumps({"files": files, "metadata": dict(metadata)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def export(checkpoint: Path, metadata: Mapping[str, Any]) -> str:
    """Put a checkpoint into the store, as one that is not yet served; one that is there, whole, stays as it is.

    Args:
        metadata: the lineage, with `name`, `version` and `weights_sha256`.

    Returns:
        Its tag.
    """
    tag = tag_of(metadata)
    metadata = {**metadata, "manifest_sha256": manifest_of(checkpoint, metadata)}
    if is_intact(tag, metadata["weights_sha256"]):
        return tag
    target = _models() / tag.replace(":", "/")
    target.parent.mkdir(parents=True, exist_ok=True)
    # BentoML copies file by file and makes the newest model the served one. A store of its own beside the real one,
    # and then one rename: nobody ever sees half a model, and what is served is for `serve` to say.
    with (
        alone(home() / ".export.lock", f"the export of {tag}", logger.warning),
        tempfile.TemporaryDirectory(dir=home(), prefix=_TEMPORARY) as temporary,
    ):
        for left in home().glob(f"{_TEMPORARY}*"):  # by a process that was killed
            if left != Path(temporary):
                shutil.rmtree(left)
        own = ModelStore(temporary)
        with bentoml.models.create(
            tag, labels={"dataset": metadata["dataset"]}, metadata=dict(metadata), _model_store=own
        ) as model:
            shutil.copytree(checkpoint, model.path, dirs_exist_ok=True)
        if target.exists():  # damaged, as found above
            target.rename(Path(temporary) / "damaged")
        (Path(temporary) / tag.replace(":", "/")).rename(target)
    return tag


def serve(tag: str) -> None:
    """Make a model of the store the one that is served: `latest` names it from one moment to the next."""
    name, version = tag.split(":")
    write_whole(_models() / name / "latest", version)
