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
import yaml

# No public way leads to a store other than that of BENTOML_HOME as bentoml found it: the export makes one aside.
from bentoml._internal.models import ModelStore

from pipelines.errors import reason
from pipelines.files import atomic_write, file_lock
from pipelines.settings import Settings
from pixelcnn.checkpoint import CONFIG_FILE, SCORES_FILE, WEIGHTS_FILE, sha256_of

_TEMPORARY = ".promote-"
_REGISTRY_FILE = "pixelcnn-registry.json"  # which registry feeds the store

logger = logging.getLogger(__name__)


def home() -> Path:
    """Return BentoML's folder: BENTOML_HOME, or else `.bentoml` in the current folder."""
    try:
        return Path(os.path.expandvars(Settings().store)).expanduser()
    except RuntimeError as error:  # a ~user whom nobody knows
        raise ValueError(f"BENTOML_HOME, {Settings().store}, names no folder: {error}") from None


def folder_of(tag: str) -> Path:
    """Return the folder of a model, whether or not it is there."""
    return home() / "models" / tag.replace(":", "/")


def tag_of(lineage: Mapping[str, Any]) -> str:
    """Return the tag of a version's model: the same version always has the same."""
    return f"{lineage['name']}:v{lineage['version']}-{lineage['weights_sha256'][:8]}"


def latest(name: str, pointer: str = "latest") -> str | None:
    """Return the tag that is served of a name, or that of another pointer of `serve`; None if there is none."""
    try:
        version = (folder_of(name) / pointer).read_text(errors="replace").strip()  # as the service does
    except FileNotFoundError:
        return None
    return f"{name}:{version}" if version and folder_of(f"{name}:{version}").is_dir() else None


def served() -> list[str]:
    """Return the tags of all of ours that is served: BentoML's store may hold other people's models, too."""
    return [tag for path in sorted((home() / "models").glob("pixelcnn-*/latest")) if (tag := latest(path.parent.name))]


def feeder() -> dict[str, str] | None:
    """Return the `registry` that feeds this store, where it is (`at`) and on which `host`; None if no file says it."""
    try:
        told = dict(json.loads((home() / _REGISTRY_FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # a damaged one says as little as none
        return None
    return told if {"registry", "at", "host"} <= told.keys() else None


def set_feeder(told: Mapping[str, str]) -> None:
    """Write down which registry feeds this store, as `feeder` returns it."""
    if feeder() != told:
        atomic_write(home() / _REGISTRY_FILE, json.dumps(dict(told)))


def metadata_of(tag: str) -> dict[str, Any]:
    """Return what `export` was given with a model; OSError if it is not there, ValueError if its file is damaged."""
    try:
        return dict(yaml.safe_load((folder_of(tag) / "model.yaml").read_text())["metadata"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the model.yaml of {tag} is damaged ({reason(error)}). Promote it again.") from None


def checkout(tag: str, folder: Path) -> Path:
    """Copy the checkpoint of a model into an empty folder; return the folder. ValueError if the model is damaged."""
    if not is_intact(tag, metadata_of(tag)):
        raise ValueError(f"{tag} in {home()} is damaged. Restore a backup, or promote another version.")
    for name in (CONFIG_FILE, WEIGHTS_FILE, SCORES_FILE):
        shutil.copyfile(folder_of(tag) / name, folder / name)
    return folder


def is_intact(tag: str, lineage: Mapping[str, Any]) -> bool:
    """Say whether the store holds this model, whole and with exactly this lineage."""
    try:
        metadata = metadata_of(tag)
        told = {key: value for key, value in metadata.items() if key != "manifest_sha256"}
        manifest = manifest_of(folder_of(tag), told)
    except (ValueError, TypeError, OSError):  # TypeError: of what YAML knows and JSON does not, such as a date
        return False
    return metadata.get("manifest_sha256") == manifest and lineage.items() <= metadata.items()


def manifest_of(folder: Path, metadata: Mapping[str, Any]) -> str:
    """Return one SHA-256 of a model's metadata and of all its files: the service checks it before it serves them."""
    files = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != "model.yaml"}
    text = json.dumps({"files": files, "metadata": dict(metadata)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def export(checkpoint: Path, metadata: Mapping[str, Any]) -> str:
    """Put a checkpoint into the store, not yet served; the same one that is there, whole, stays. Return its tag.

    `metadata` is the lineage, with `name`, `version`, `weights_sha256`, and `dataset`.
    """
    tag = tag_of(metadata)
    target, metadata = folder_of(tag), {**metadata, "manifest_sha256": manifest_of(checkpoint, metadata)}
    if is_intact(tag, metadata):
        return tag
    target.parent.mkdir(parents=True, exist_ok=True)
    # BentoML copies file by file and makes the newest model the served one. A store of its own beside the real one,
    # and then one rename: nobody ever sees half a model, and what is served is for `serve` to say.
    with (
        file_lock(home() / ".export.lock", f"the export of {tag}", logger.warning),
        tempfile.TemporaryDirectory(dir=home(), prefix=_TEMPORARY) as temporary,
    ):
        for left in home().glob(f"{_TEMPORARY}*"):  # by a process that was killed
            if left != Path(temporary):
                shutil.rmtree(left, ignore_errors=True)  # another user may have left it, for nobody else to open
        own = ModelStore(temporary)
        with bentoml.models.create(
            tag, labels={"dataset": metadata["dataset"]}, metadata=dict(metadata), _model_store=own
        ) as model:
            shutil.copytree(checkpoint, model.path, dirs_exist_ok=True)
        if target.exists():  # damaged, or without one of the files
            target.rename(Path(temporary) / "before")
        (Path(temporary) / tag.replace(":", "/")).rename(target)
    return tag


def put_back(folder: Path) -> None:
    """Add the models of a folder, NAME/VERSION each, that this store lacks; what is served stays as it is."""
    with file_lock(home() / ".export.lock", f"the restoring of {home()}", logger.warning):
        for path in folder.glob("*/*"):
            target = home() / "models" / path.relative_to(folder)
            if path.is_dir() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=home(), prefix=_TEMPORARY) as temporary:
                    shutil.copytree(path, Path(temporary) / "model").rename(target)


def serve(tag: str, pointer: str = "latest") -> None:
    """Make a model the one that is served, in one step; or the `challenger`, which scores drawings beside it."""
    name, version = tag.split(":")
    atomic_write(folder_of(name) / pointer, version)
