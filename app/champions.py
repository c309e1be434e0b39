"""The champions in BentoML's model store: each is checked, loaded, and served until another one takes over."""

import functools
import hashlib
import json
import logging
import os
import re
import threading
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import bentoml
from bentoml._internal.models import ModelStore
from pydantic import ValidationError

from app.gate import quoted
from app.metrics import metrics
from app.wire import Identity, RequestError
from pixelcnn import load_checkpoint
from pixelcnn.checkpoint import WEIGHTS_FILE, sha256_of
from pixelcnn.config import ModelConfig, model_name
from pixelcnn.fast_sampling import warm_up
from pixelcnn.model import AutoregressiveModel, joint_parameters

logger = logging.getLogger("bentoml.pixelcnn")

NAME_PREFIX = "pixelcnn-"  # model `pixelcnn-DATASET` in the store
VERSION = re.compile(r"[a-z0-9][a-z0-9._-]*")  # no path leads out of the store
MODEL_FILE = "model.yaml"  # BentoML's own, with the metadata
FILE_KINDS = (".safetensors", ".json", ".yaml", ".md", ".png")
POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Champion:
    """A loaded model with all that is told about it."""

    model: AutoregressiveModel
    identity: Identity
    label_names: list[str]
    protocol: str
    scores: dict[str, Any]
    promoted_at: str

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @functools.cached_property
    def num_parameters(self) -> int:
        """Parameters of one of its networks: what a pixel costs."""
        return sum(parameter.numel() for parameter in joint_parameters(self.model))

    def describe(self) -> dict[str, Any]:
        return {
            "shape": list(self.config.image_shape),
            "levels": self.config.num_levels,
            "labels": self.label_names if self.config.num_labels else [],
            "protocol": self.protocol,
            "architecture": model_name(self.config),
            "promoted_at": self.promoted_at,
            "model": self.identity.model_dump(),
            "scores": self.scores,
        }


def check_files(folder: Path, metadata: dict[str, Any]) -> None:
    """Raise ValueError unless a model's folder holds plain files of the known kinds, those that were promoted.

    Args:
        metadata: where `manifest_sha256` is the SHA-256 of the rest and of each file's SHA-256, as JSON.
    """
    if folder.is_symlink() or folder.parent.is_symlink():
        raise ValueError("its folder is a link: put the model itself into the store.")
    for file in folder.iterdir():
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{quoted(file.name)} in its folder is no plain file. Promote it again.")
        if file.suffix not in FILE_KINDS:
            raise ValueError(f"{quoted(file.name)} does not belong into its folder. Promote it again.")
    if "manifest_sha256" in metadata:  # models that were promoted before there was one have it not
        files = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != MODEL_FILE}
        told = {key: value for key, value in metadata.items() if key != "manifest_sha256"}
        text = json.dumps({"files": files, "metadata": told}, sort_keys=True)
        if hashlib.sha256(text.encode()).hexdigest() != metadata["manifest_sha256"]:
            raise ValueError("its files or metadata are not those that were promoted. Promote it again.")


def load_champion(store: Path, tag: str) -> Champion:
    """Load a model of the store, and check that it is what was promoted.

    Raises:
        ValueError: the model is damaged, holds what does not belong there, or lacks its lineage.
    """
    name, _, version = tag.partition(":")
    if not VERSION.fullmatch(version):
        raise ValueError(f"{quoted(version)} is no name of a version. Promote it again.")
    stored = bentoml.models.get(tag, _model_store=ModelStore(store))
    metadata: dict[str, Any] = dict(stored.info.metadata)
    try:
        identity = Identity(**{name: metadata[name] for name in Identity.model_fields})
        label_names, protocol = list(metadata["label_names"]), str(metadata["protocol"])
    except (KeyError, ValidationError) as error:
        raise ValueError(f"its metadata lacks the lineage ({error}). Promote it again.") from None
    folder = store / name / version
    found = sha256_of(folder / WEIGHTS_FILE)
    if found != identity.weights_sha256:
        raise ValueError(
            f"its weights are not those that were promoted: their SHA-256 is {found[:12]}..., "
            f"the metadata say {identity.weights_sha256[:12]}.... Promote it again."
        )
    check_files(folder, metadata)
    model, scores = load_checkpoint(folder)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError("its weights are not all finite numbers. Roll back, or promote another version.")
    warm_up(model)
    return Champion(
        model=model,
        identity=identity,
        label_names=label_names,
        protocol=protocol,
        scores=scores,
        promoted_at=str(metadata.get("promoted_at", "")),
    )


def store_folder() -> Path:
    """Return where BentoML keeps its models."""
    home = os.environ.get("BENTOML_HOME") or Path.home() / "bentoml"
    return Path(os.path.expandvars(home)).expanduser() / "models"


class Champions:
    """The latest model of each dataset in the store; a new one takes over between two requests.

    A request keeps the champion it began with. A damaged new model is logged and not taken up.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_dataset: dict[str, Champion] = {}
        self._seen: dict[str, tuple] = {}  # what was found on disk when a dataset was last looked at
        self._has_failed = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Load what is there, then look again about once a second."""
        self.refresh()
        self._thread = threading.Thread(target=self._poll, name="champions", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.refresh()
            except Exception:  # Whatever was put into the store, the next change must be seen.
                logger.exception("the model store could not be looked through")

    def get(self, dataset: str) -> Champion:
        champion = self._by_dataset.get(dataset)
        if champion is None:
            known = ", ".join(sorted(self._by_dataset)) or "none"
            raise RequestError(
                f"there is no champion for dataset {quoted(dataset)} (served: {known}): promote a model first, "
                "python -m pipelines.steps promote DATASET.",
                HTTPStatus.NOT_FOUND,
            )
        return champion

    def describe(self) -> dict[str, Any]:
        return {dataset: champion.describe() for dataset, champion in sorted(self._by_dataset.items())}

    def _put(self, dataset: str, champion: Champion | None) -> None:
        """Serve this champion from now on."""
        old = self._by_dataset.pop(dataset, None) if champion is None else self._by_dataset.get(dataset)
        if champion is not None:
            self._by_dataset[dataset] = champion
        for served, value in ((old, 0), (champion, 1)):
            if served is not None:
                metrics().champion.labels(dataset, served.identity.version).set(value)

    def refresh(self) -> None:
        """Take up every champion that changed on disk; a failure leaves the one that was served."""
        try:
            found = [Path(entry) for entry in os.scandir(self.folder) if entry.is_dir()]
        except OSError as error:
            # A store that fails is no order to stop serving.
            if self._by_dataset and not self._has_failed:
                logger.error("the model store cannot be read (%s); what was loaded is still served.", error)
            self._has_failed = True
            return
        self._has_failed = False
        folders = {f.name.removeprefix(NAME_PREFIX): f for f in found if f.name.startswith(NAME_PREFIX)}
        for dataset in set(self._seen) - set(folders):
            del self._seen[dataset]
            self._put(dataset, None)
            logger.warning("%s%s was removed from the model store; it is no longer served.", NAME_PREFIX, dataset)
        for dataset, folder in folders.items():
            try:
                version = (folder / "latest").read_text().strip()
                if not version:  # being rewritten
                    continue
                files = sorted((folder / version).iterdir()) if VERSION.fullmatch(version) else []
                seen = (version, *((stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in files)))
            except (OSError, UnicodeDecodeError):  # no version yet, or being replaced: look again in a second
                continue
            if self._seen.get(dataset) == seen:
                continue
            self._seen[dataset] = seen
            tag = f"{folder.name}:{ascii(version)[1:-1]}"
            try:
                self._put(dataset, load_champion(self.folder, tag))
                logger.info("serving %s.", tag)
            except Exception as error:  # Whatever is wrong with a new model, the old one must go on answering.
                kept = self._by_dataset.get(dataset)
                kept_text = f"version {kept.identity.version} is still served" if kept else "nothing is served for it"
                logger.error("%s cannot be served: %s %s.", tag, error, kept_text)
