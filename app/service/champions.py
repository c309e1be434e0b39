"""The champions in BentoML's model store: each is checked, loaded, and served until another one takes over."""

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLConfigException, BentoMLException
from bentoml.models import BentoModel
from pydantic import ValidationError

from app.environment import setting
from app.service.metrics import metrics
from app.service.wire import Identity, RequestError, quoted
from pixelcnn.checkpoint import SCORES_FILE, load_with_hash, released, sha256_of
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
    """Check that a model's folder holds plain files of the known kinds, those that were promoted.

    Args:
        metadata: where `manifest_sha256` is the SHA-256 of the rest and of each file's SHA-256, as JSON.

    Raises:
        ValueError: it does not.
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


def load_champion(store: Path, tag: str) -> Champion:
    """Load a model of the store, and check that it is what was promoted.

    Raises:
        ValueError: the model is damaged, holds what does not belong there, or lacks its lineage.
        OSError, BentoMLException: its files cannot be read.
    """
    name, _, version = tag.partition(":")
    if not VERSION.fullmatch(version):
        raise ValueError(f"{quoted(version)} is no name of a version. Promote it again.")
    folder = store / name / version
    metadata: dict[str, Any] = dict(bentoml.Model.from_path(folder).info.metadata)
    try:
        identity = Identity(**{name: metadata[name] for name in Identity.model_fields})
        told = {"labels": list(metadata["label_names"]), "protocol": str(metadata["protocol"])}
    except (KeyError, ValidationError) as error:
        raise ValueError(f"its metadata lacks the lineage ({error}). Promote it again.") from None
    check_files(folder, metadata)
    model, scores, found = load_with_hash(folder)
    if found != identity.weights_sha256:
        raise ValueError(
            f"its weights are not those that were promoted: their SHA-256 is {found[:12]}..., "
            f"the metadata say {identity.weights_sha256[:12]}.... Promote it again."
        )
    champion = _champion(model, scores, identity, told | {"promoted_at": str(metadata.get("promoted_at", ""))})
    reference = folder / REFERENCE_FILE
    return replace(champion, reference=json.loads(reference.read_text())) if reference.exists() else champion


def _champion(model: AutoregressiveModel, scores: dict[str, Any], identity: Identity, told: dict[str, Any]) -> Champion:
    """Make a model ready to be served; `told` are the names of its labels, its protocol, and when it was promoted."""
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
        **told,
        "labels": told["labels"] if config.num_labels else [],
    }
    return Champion(model, identity, description)


def load_released(folder: Path) -> Champion:
    """Load a checkpoint that no registry knows: its version is `released`.

    Raises:
        ValueError: it is damaged, or does not say what it is.
        OSError: its files cannot be read.
    """
    model, scores, weights_sha256 = load_with_hash(folder)
    try:
        name = NAME_PREFIX + scores["dataset"]
        lineage = {key: scores.get(key, "") for key in ("run_id", "git_commit", "data_hash")}
        told = {"labels": scores["label_names"], "protocol": scores["protocol"], "promoted_at": ""}
    except KeyError as error:
        raise ValueError(f"{folder} does not say its {error}: take the weights as they were released.") from None
    identity = Identity(name=name, version=RELEASED, weights_sha256=weights_sha256, **lineage)
    return _champion(model, scores, identity, told)


def released_by_dataset(first: tuple[str, ...] = ()) -> dict[str, Path]:
    """Return each dataset's best released weights, the likeliest on its validation images; `first` come first."""
    scores = {folder: json.loads((folder / SCORES_FILE).read_text()) for folder in released().values()}
    best = {scores[f]["dataset"]: f for f in sorted(scores, key=lambda f: -scores[f]["validation/nll_nats"])}
    return dict(sorted(best.items(), key=lambda item: item[0] not in first))


def store_folder() -> Path:
    """Return where the models are: in BENTOML_HOME, or else in `.bentoml` of this folder, where a promotion puts them.

    A Bento without BENTOML_HOME has them where `bentoml import` put it and them.

    Raises:
        BentoMLConfigException: the environment that PIXELCNN_ENVIRONMENT names is unknown, or has another store.
    """
    default = "~/bentoml" if BENTO_FILE.exists() else ".bentoml"
    try:
        home = setting("BENTOML_HOME", "store") or default
    except LookupError as error:
        raise BentoMLConfigException(str(error)) from None
    return Path(os.path.expandvars(home)).expanduser() / "models"


class _PinnedModel(BentoModel):
    """A served model that a Bento which is built now pins and holds, by version and hash."""

    def to_info(self, alias: str | None = None) -> Any:
        """Describe it to a build.

        Where BentoML's own commands look for another store than ours, it is copied there: `bentoml export` reads it.
        """
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
    """How the last version of a dataset that was found on disk was taken up."""

    fingerprint: tuple[object, ...]  # the version, and time and size of each file
    error: str = ""  # why it could not be loaded
    delay_s: float = RETRY_S / 2  # before the last attempt
    next_at: float = 0.0  # time.monotonic() of the next attempt


class Champions:
    """The latest model of each dataset in the store; a new one takes over between two requests.

    A request keeps the champion it began with. A new model that cannot be loaded is logged, and tried again at growing
    intervals, for a disk or a network may have failed for a moment; the old one is served meanwhile.

    Args:
        folder: of the store's models.
        on_poll: called each time that the store was looked through.
        role: `champion`, or `challenger` for those that score drawings beside them.
        released: checkpoints, by dataset, to serve from the start until the store has a champion.
    """

    def __init__(
        self,
        folder: Path,
        on_poll: Callable[[], None] = lambda: None,
        role: str = "champion",
        released: Mapping[str, Path] | None = None,
    ) -> None:
        self.folder, self._on_poll, self.role, self._released = folder, on_poll, role, released or {}
        self._by_dataset: dict[str, Champion] = {}
        self._attempts: dict[str, _Attempt] = {}
        self._is_unreadable = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="champions", daemon=True)

    def start(self) -> None:
        """Load what is there, then poll the store about once a second.

        Where the store has nothing, the sampler is compiled before its first champion comes; beside released weights,
        which are served at once, aside.
        """
        self.refresh()
        if not self._by_dataset and self._released:
            compile_in_background()
        elif not self._by_dataset and self.role == "champion":  # a challenger comes beside one
            threading.Thread(target=compile_sampler, name="compile", daemon=True).start()
        for dataset, folder in self._released.items():
            if dataset not in self._by_dataset:
                try:
                    self._swap(dataset, load_released(folder))
                except (ValueError, OSError) as error:
                    logger.error("%s cannot be served: %s", folder, error)
        self._on_poll()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.refresh()
                self._on_poll()
            except Exception:  # Whatever was put into the store, the next change must be seen.
                logger.exception("the model store could not be looked through")

    def get(self, dataset: str) -> Champion:
        """Return the champion of a dataset.

        Raises:
            RequestError: there is none (404).
        """
        champion = self._by_dataset.get(dataset)
        if champion is None:
            known = ", ".join(sorted(self._by_dataset)) or "none"
            raise RequestError(
                f"there is no champion for dataset {quoted(dataset)} (served: {known}): promote a model first, "
                "python -m pipelines.steps promote DATASET.",
                HTTPStatus.NOT_FOUND,
            )
        return champion

    def find(self, dataset: str) -> Champion | None:
        """Return the champion of a dataset, if there is one."""
        return self._by_dataset.get(dataset)

    def describe(self) -> dict[str, Any]:
        """Return what `GET /models` answers."""
        return {dataset: champion.description for dataset, champion in sorted(self._by_dataset.items())}

    def _swap(self, dataset: str, champion: Champion | None) -> None:
        """Serve this champion from now on, or none."""
        old = self._by_dataset.pop(dataset, None) if champion is None else self._by_dataset.get(dataset)
        if champion is not None:
            self._by_dataset[dataset] = champion
        for served, value in ((old, 0), (champion, 1)):
            if served is not None:
                metrics().champion.labels(dataset, served.identity.version, self.role).set(value)

    def refresh(self) -> None:
        """Take up every champion that changed on disk; a failure leaves the one that was served."""
        try:
            found = [Path(entry) for entry in os.scandir(self.folder) if entry.is_dir()]
        except OSError as error:
            # A store that cannot be read is no order to stop serving.
            if self._by_dataset and not self._is_unreadable:
                logger.error("the model store cannot be read (%s); what was loaded is still served.", error)
            self._is_unreadable = True
            metrics().store_readable.set(0)
            return
        self._is_unreadable = False
        metrics().store_readable.set(1)
        folders = {f.name.removeprefix(NAME_PREFIX): f for f in found if f.name.startswith(NAME_PREFIX)}
        for dataset in set(self._attempts) - set(folders):
            del self._attempts[dataset]
            metrics().refused.labels(dataset, self.role).set(0)
            served = self._by_dataset.get(dataset)
            if served is not None and served.identity.version != RELEASED:
                self._swap(dataset, None)
                logger.warning("%s%s was removed from the model store; it is no longer served.", NAME_PREFIX, dataset)
        for dataset, folder in folders.items():
            try:
                version = (folder / POINTERS[self.role]).read_text(errors="replace").strip()
            except FileNotFoundError:  # no version yet
                continue
            except OSError as error:  # it names none: the load then says so, and why
                version = str(error)
            if not version:  # being rewritten
                continue
            fingerprint: tuple[object, ...] = (version,)  # if its files cannot be listed: the load then says why
            with contextlib.suppress(OSError):
                files = sorted((folder / version).iterdir()) if VERSION.fullmatch(version) else []
                fingerprint += tuple((stat.st_mtime_ns, stat.st_size) for stat in (f.stat() for f in files))
            attempt = self._attempts.get(dataset)
            if attempt is None or attempt.fingerprint != fingerprint:
                attempt = self._attempts[dataset] = _Attempt(fingerprint)
            if time.monotonic() >= attempt.next_at:
                self._take_up(dataset, f"{folder.name}:{ascii(version)[1:-1]}", attempt)

    def _take_up(self, dataset: str, tag: str, attempt: _Attempt) -> None:
        """Load a model and serve it; log a failure once, and set when to try again."""
        attempt.next_at = math.inf
        try:
            self._swap(dataset, load_champion(self.folder, tag))
        except Exception as error:  # Whatever is wrong with a new model, the old one must go on answering.
            if str(error) != attempt.error:
                kept = self._by_dataset.get(dataset)
                kept_text = f"version {kept.identity.version} is still served" if kept else "nothing is served for it"
                logger.error("%s cannot be served: %s %s.", tag, error, kept_text)
            metrics().refused.labels(dataset, self.role).set(1)
            attempt.error, attempt.delay_s = str(error), min(2 * attempt.delay_s, MAX_RETRY_S)
            attempt.next_at = time.monotonic() + attempt.delay_s
        else:
            logger.info("serving %s as %s.", tag, self.role)
            metrics().refused.labels(dataset, self.role).set(0)
