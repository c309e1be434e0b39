"""The champions in BentoML's model store: each is checked, loaded, and served until another one takes over."""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLConfigException, BentoMLException
from bentoml.models import BentoModel
from pydantic import ValidationError

from app.environment import setting
from app.service.metrics import metrics
from app.service.wire import Identity, RequestError, quoted
from pixelcnn.checkpoint import SCORES_FILE, WEIGHTS_FILE, load_with_hash, released, sha256_of
from pixelcnn.models.base import AutoregressiveModel, joint_parameters
from pixelcnn.models.registry import model_name
from pixelcnn.sampling.fast import compile_in_background, compile_sampler, warm_up

logger = logging.getLogger("bentoml.pixelcnn")

NAME_PREFIX = "pixelcnn-"  # model `pixelcnn-DATASET` in the store
RELEASED = "released"  # in place of a version in a registry
VERSION = re.compile(r"[a-z0-9][a-z0-9._-]*")  # no path leads out of the store
REFERENCE_FILE = "beginnings.json"  # absent where promotion had no data
POINTERS = {"champion": "latest", "challenger": "challenger"}  # the file that names a role's version
MODEL_FILE = "model.yaml"  # BentoML's own, with the metadata
BENTO_FILE = Path(__file__).parents[3] / "bento.yaml"  # there if this code lies in a Bento, in its folder `src`
FILE_KINDS = (".safetensors", ".json", ".yaml", ".md", ".png")
POLL_S = 1.0
RETRY_S, MAX_RETRY_S = 1.0, 60.0  # after a load that failed; the delay doubles with each failure


@dataclass(frozen=True)
class Champion:
    """A loaded model, its lineage, and what `GET /models` tells of it."""

    model: AutoregressiveModel
    identity: Identity
    description: dict[str, Any]
    reference: dict[str, list[float]] = field(default_factory=dict)  # what drawings are like, each statistic's values

    @functools.cached_property
    def num_parameters(self) -> int:
        """Parameters of the joint network alone: the cost of a pixel grows with them."""
        return sum(parameter.numel() for parameter in joint_parameters(self.model))


def check_files(folder: Path, metadata: dict[str, Any]) -> None:
    """Raise ValueError unless a model's folder holds plain files of the known kinds, those that were promoted.

    In `metadata`, `manifest_sha256` is the SHA-256 of the rest and of each file's SHA-256, as JSON.
    """
    if folder.is_symlink() or folder.parent.is_symlink():
        raise ValueError("its folder is a link: put the model itself into the store.")
    for file in folder.iterdir():
        if file.is_symlink() or not file.is_file():
            raise ValueError(f"{quoted(file.name)} in its folder is no plain file. Promote it again.")
        if file.suffix not in FILE_KINDS:
            raise ValueError(f"{quoted(file.name)} does not belong into its folder. Promote it again.")
    files = {file.name: sha256_of(file) for file in folder.iterdir() if file.name != MODEL_FILE}
    told = {key: value for key, value in metadata.items() if key != "manifest_sha256"}
    text = json.dumps({"files": files, "metadata": told}, sort_keys=True)
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("manifest_sha256"):
        raise ValueError("its files or metadata are not those that were promoted. Promote it again.")


def load_champion(folder: Path) -> Champion:
    """Load a model of the store, and check that it is what was promoted.

    Raises:
        ValueError: the model is damaged, holds what does not belong there, or lacks its lineage.
        OSError, BentoMLException: its files cannot be read.
    """
    metadata = dict(bentoml.Model.from_path(folder).info.metadata)
    check_files(folder, metadata)
    return _champion(folder, metadata)


def load_released(dataset: str, folder: Path) -> Champion:
    """Load a checkpoint that no registry knows, as version `released`; the errors are those of `load_champion`."""
    lineage = dict.fromkeys(Identity.model_fields, "") | json.loads((folder / SCORES_FILE).read_text())
    named = {"name": NAME_PREFIX + dataset, "version": RELEASED, "weights_sha256": sha256_of(folder / WEIGHTS_FILE)}
    return _champion(folder, lineage | named)


def _champion(folder: Path, metadata: dict[str, Any]) -> Champion:
    """Make a checkpoint ready to be served; beside the lineage, `metadata` name its labels and its protocol."""
    model, scores, weights_sha256 = load_with_hash(folder)
    try:
        identity = Identity(**{name: metadata[name] for name in Identity.model_fields})
        labels, protocol = list(metadata["label_names"]), str(metadata["protocol"])
    except (KeyError, ValidationError) as error:
        raise ValueError(f"its metadata lacks the lineage ({error}). Promote it again.") from None
    if weights_sha256 != identity.weights_sha256:
        raise ValueError(
            f"its weights are not those that were promoted: their SHA-256 is {weights_sha256[:12]}..., "
            f"the metadata say {identity.weights_sha256[:12]}.... Promote it again."
        )
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise ValueError("its weights are not all finite numbers. Roll back, or promote another version.")
    warm_up(model)
    config = model.config
    description = {
        "shape": list(config.image_shape),
        "levels": config.num_levels,
        "architecture": model_name(config),
        "model": identity.model_dump(),
        "scores": scores,
        "labels": labels if config.num_labels else [],
        "protocol": protocol,
        "promoted_at": str(metadata.get("promoted_at", "")),
    }
    reference = folder / REFERENCE_FILE
    return Champion(model, identity, description, json.loads(reference.read_text()) if reference.exists() else {})


def released_by_dataset() -> dict[str, Path]:
    """Return the folder of each dataset's best released weights, the likeliest on its validation images."""
    scores = {folder: json.loads((folder / SCORES_FILE).read_text()) for folder in released().values()}
    worst_first = sorted(scores, key=lambda folder: -scores[folder]["validation/nll_nats"])
    return {scores[folder]["dataset"]: folder for folder in worst_first}


def store_folder() -> Path:
    """Return where the models are: in BENTOML_HOME, or else in `.bentoml` of this folder, where a promotion puts them.

    BentoMLConfigException if the environment that PIXELCNN_ENVIRONMENT names is unknown, or has another store.
    """
    # A Bento without BENTOML_HOME has them where `bentoml import` put it and them.
    default = "~/bentoml" if BENTO_FILE.exists() else ".bentoml"
    try:
        home = setting("BENTOML_HOME", "store") or default
    except LookupError as error:
        raise BentoMLConfigException(str(error)) from None
    return Path(os.path.expandvars(home)).expanduser() / "models"


class _PinnedModel(BentoModel):
    """A served model that a Bento which is built now pins and holds, by version and hash."""

    def to_info(self, alias: str | None = None) -> Any:
        # Where BentoML's own commands look for another store than ours, it is copied there: `bentoml export` reads it.
        served = store_folder() / self.tag.path()
        if self.stored is None:
            bentoml.Model.from_path(served).save()
        kept = Path(self.stored.path)
        if not kept.samefile(served):
            (kept.parent / POINTERS["champion"]).write_text(served.name)
        return super().to_info(alias)

    def resolve(self, *_: Any, **__: Any) -> None:
        """Find nothing for a server: it looks through its store itself."""


def pinned_models() -> list[BentoModel]:
    """Return the served model of each name in the store."""
    found: list[BentoModel] = []
    for pointer in sorted(store_folder().glob(f"{NAME_PREFIX}*/{POINTERS['champion']}")):
        try:
            found.append(_PinnedModel(f"{pointer.parent.name}:{pointer.read_text().strip()}"))
        except (OSError, UnicodeDecodeError, BentoMLException) as error:  # the other models are served all the same
            logger.warning("%s names no version (%s). Promote it again.", pointer, error)
    return found


@dataclass
class _Attempt:
    """How the last version that a pointer named was taken up."""

    fingerprint: list[object]  # the version, and time and size of each file
    error: str = ""  # why it could not be loaded
    delay_s: float = RETRY_S / 2  # before the last attempt
    next_at: float = 0.0  # time.monotonic() of the next attempt


class Champions:
    """The latest champion of each dataset in the store, and its challenger: a new one takes over between two requests.

    A request keeps the champion it began with. A new model that cannot be loaded is logged, and tried again at growing
    intervals, for a disk or a network may have failed for a moment; the old one is served meanwhile.
    """

    def __init__(self, folder: Path, on_poll: Callable[[], None] = lambda: None) -> None:
        self.folder = folder  # of the store's models
        self._on_poll = on_poll  # called each time that the store was looked through
        self._loaded: dict[tuple[str, str], Champion] = {}  # by dataset and role
        self._attempts: dict[tuple[str, str], _Attempt] = {}
        self._is_readable: bool | None = None  # the store; None before it is there
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="champions", daemon=True)

    def start(self, released: Mapping[str, Path] | None = None) -> None:
        """Load what is there, then poll the store about once a second; `released` checkpoints, by dataset, are served
        where it has no champion, until it has one."""
        self.refresh()
        # Where the store has nothing, the sampler is compiled before its first champion comes; in a process aside
        # for released weights, which are served at once.
        if not self._loaded and released:
            compile_in_background()
        elif not self._loaded:
            threading.Thread(target=compile_sampler, name="compile", daemon=True).start()
        for dataset, folder in (released or {}).items():
            if (dataset, "champion") not in self._attempts:  # one that is refused has no silent substitute
                try:
                    self._put(dataset, "champion", load_released(dataset, folder))
                except (ValueError, OSError) as error:
                    logger.error("%s cannot be served: %s", folder, error)
        self._on_poll()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.refresh()
                self._on_poll()
            except Exception:  # Whatever was put into the store, the next change must be seen.
                logger.exception("the model store could not be looked through")

    def get(self, dataset: str) -> Champion:
        """Return the champion of a dataset; RequestError (404) if there is none."""
        if champion := self.find(dataset):
            return champion
        raise RequestError(
            f"there is no champion for dataset {quoted(dataset)} (served: {', '.join(self.describe()) or 'none'}): "
            "promote a model first, python -m pipelines.steps promote DATASET.",
            404,
        )

    def find(self, dataset: str, role: str = "champion") -> Champion | None:
        """Return the champion or the `challenger` of a dataset, if there is one."""
        return self._loaded.get((dataset, role))

    def describe(self) -> dict[str, Any]:
        """Return what `GET /models` answers."""
        return {dataset: one.description for (dataset, role), one in sorted(self._loaded.items()) if role == "champion"}

    def refresh(self) -> None:
        """Take up every model that changed on disk; a failure leaves the one that was loaded."""
        try:
            found = [f for f in self.folder.iterdir() if f.name.startswith(NAME_PREFIX) and f.is_dir()]
        except OSError as error:
            # A store that cannot be read is no order to stop serving; where there was none nothing was promoted yet.
            is_new = self._is_readable is None and isinstance(error, FileNotFoundError)
            if self._is_readable is not False and not is_new:
                self._is_readable = False
                logger.error("the model store cannot be read (%s); what was loaded is still served.", error)
            metrics().store_readable.set(0)
            return
        self._is_readable = True
        metrics().store_readable.set(1)
        folders = {folder.name.removeprefix(NAME_PREFIX): folder for folder in found}
        for dataset, role in list(self._attempts):
            if dataset not in folders:
                self._forget(dataset, role)
        # Champions first: none waits for a challenger.
        for (role, pointer), (dataset, folder) in itertools.product(POINTERS.items(), folders.items()):
            try:
                version = (folder / pointer).read_text(errors="replace").strip()
            except FileNotFoundError:  # no version yet
                continue
            except OSError as error:  # it names none: the load then says so, and why
                version = str(error)
            champion = self._attempts.get((dataset, "champion")) if role == "challenger" else None
            if champion and champion.fingerprint[0] == version:  # a challenge ends by naming the champion itself
                self._forget(dataset, role)
            elif version:  # otherwise it is being rewritten
                self._take_up(dataset, role, folder, version)

    def _take_up(self, dataset: str, role: str, folder: Path, version: str) -> None:
        """Load a version that has changed; log a failure once, and set when to try again."""
        is_name = VERSION.fullmatch(version)
        fingerprint: list[object] = [version]
        with contextlib.suppress(OSError):  # if its files cannot be listed, the load says why
            files = sorted((folder / version).iterdir()) if is_name else []
            fingerprint += [(stat.st_mtime_ns, stat.st_size) for stat in (file.stat() for file in files)]
        attempt = self._attempts.get((dataset, role))
        if attempt is None or attempt.fingerprint != fingerprint:
            attempt = self._attempts[dataset, role] = _Attempt(fingerprint)
        if time.monotonic() < attempt.next_at:
            return
        attempt.next_at = math.inf
        tag = f"{folder.name}:{ascii(version)[1:-1]}"
        try:
            if not is_name:
                raise ValueError(f"{quoted(version)} is no name of a version. Promote it again.")
            self._put(dataset, role, load_champion(folder / version))
            attempt.error = ""
            logger.info("serving %s as %s.", tag, role)
        except Exception as error:  # Whatever is wrong with a new model, the old one must go on answering.
            text = str(error) or repr(error)
            if text != attempt.error:
                kept = self.find(dataset, role)
                kept_text = f"version {kept.identity.version} is still served" if kept else "nothing is served for it"
                logger.error("%s cannot be served: %s %s.", tag, text, kept_text)
            attempt.error, attempt.delay_s = text, min(2 * attempt.delay_s, MAX_RETRY_S)
            attempt.next_at = time.monotonic() + attempt.delay_s
        metrics().refused.labels(dataset, role).set(attempt.error != "")

    def _put(self, dataset: str, role: str, new: Champion) -> None:
        if old := self.find(dataset, role):
            metrics().champion.labels(dataset, old.identity.version, role).set(0)
        self._loaded[dataset, role] = new
        metrics().champion.labels(dataset, new.identity.version, role).set(1)

    def _forget(self, dataset: str, role: str) -> None:
        """Serve no more what has left the store, or its role; released weights never were there."""
        if self._attempts.pop((dataset, role), None) is None:
            return
        metrics().refused.labels(dataset, role).set(0)
        old = self.find(dataset, role)
        if old and old.identity.version != RELEASED:
            del self._loaded[dataset, role]
            metrics().champion.labels(dataset, old.identity.version, role).set(0)
            logger.warning("the model store has no %s of %s any more; none is served.", role, dataset)
