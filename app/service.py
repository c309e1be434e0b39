"""The HTTP service: decode a request, call the core, encode the answer. It serves what promotion put into BentoML's
model store, and takes up a new champion without a restart.

Settings (environment):

- `BENTOML_HOME` (the store), `BENTOML_HOST`, `BENTOML_PORT`;
- `PIXELCNN_THREADS`: of a computation; as many as there are cores, at most 4;
- `PIXELCNN_TOKEN`: what callers must send as `Authorization: Bearer ...`; none by default;
- `PIXELCNN_MAX_REQUESTS` (64): requests that are read, wait, are computed or sent; more are refused with 429;
- `PIXELCNN_MAX_QUEUE` (48): those of them that wait for a computation; likewise;
- `PIXELCNN_MAX_SAMPLES` (16): images of a request;
- `PIXELCNN_MAX_BODY_BYTES` (1,000,000), `PIXELCNN_BODY_TIMEOUT_S` (10): size of a request, and the time to send it;
- `PIXELCNN_TIMEOUT_S` (120): from there to the answer, or to a stream's last event;
- `PIXELCNN_SEND_TIMEOUT_S` (30): how long a client may take nothing of its answer.
"""

import asyncio
import base64
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, cast

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import bentoml
import torch
from bentoml._internal.models import ModelStore
from bentoml._internal.utils.analytics import usage_stats
from bentoml.exceptions import BentoMLException
from fastapi import FastAPI
from pydantic import ConfigDict, Field, ValidationError, WithJsonSchema, field_validator
from starlette.requests import Request
from torch import Tensor

from app.batching import Batches, Full, Job
from app.gate import TOKEN_VARIABLE, Gate, quoted, setting
from app.metrics import metrics
from app.openapi import corrected
from pixelcnn import bits_per_dim, complete, completion_log_prob, load_checkpoint, log_prob
from pixelcnn.checkpoint import WEIGHTS_FILE, sha256_of
from pixelcnn.config import ModelConfig, model_name
from pixelcnn.fast_sampling import OnRow, engine_name, warm_up
from pixelcnn.images import from_png
from pixelcnn.likelihood import pixel_log_prob
from pixelcnn.model import AutoregressiveModel
from pixelcnn.training import generator_for

# `bentoml serve` asked before this module was imported, and would report usage to its makers.
usage_stats.do_not_track.cache_clear()

logger = logging.getLogger("bentoml.pixelcnn")

NAME_PREFIX = "pixelcnn-"  # model `pixelcnn-DATASET` in the store
VERSION = re.compile(r"[a-z0-9][a-z0-9._-]*")  # no path leads out of the store
MODEL_FILE = "model.yaml"  # BentoML's own, with the metadata
FILE_KINDS = (".safetensors", ".json", ".yaml", ".md", ".png")
POLL_S = 1.0
WATCH_EVERY_S = 1.0  # drawings are scored for the metrics at most so often
MAX_BATCH_IMAGES = 32  # of requests that share a call
SHORT_CALL = 5e8  # sub-pixels times parameters: some tens of milliseconds on a core
MAX_QUEUE = setting("PIXELCNN_MAX_QUEUE", 48)
TIMEOUT_S = setting("PIXELCNN_TIMEOUT_S", 120)
MAX_SAMPLES = setting("PIXELCNN_MAX_SAMPLES", 16)
MAX_BODY_BYTES = setting("PIXELCNN_MAX_BODY_BYTES", 1_000_000)
BODY_TIMEOUT_S = setting("PIXELCNN_BODY_TIMEOUT_S", 10)
MAX_SEED = 2**63 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0


class RequestError(BentoMLException):
    """What is wrong with a request, in one sentence for whoever sent it."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message, error_code=status)


class _NotForTheLog(logging.Filter):
    """Keep a client's mistakes out of the server's log: BentoML writes a traceback for each."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], RequestError))


logging.getLogger("bentoml._internal.server.http_app").addFilter(_NotForTheLog())


# The wire: requests and answers.


def sentence(error: ValidationError, known: list[str]) -> str:
    """Return the first of pydantic's complaints as one sentence."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{name} is missing: add it to the request."
    if first["type"] == "extra_forbidden":
        return f"unknown field {quoted(name)}. Known: {', '.join(known)}."
    if not name:
        return f"the request must be a JSON object with the fields {', '.join(known)}."
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    message = first["msg"].replace("Input should be", "must be")
    return f"{name} {message[0].lower()}{message[1:]}, got {quoted(first['input'])}."


async def read_body(request: Request) -> bytes:
    """Return the body, counted while it comes in, so that a chunked one cannot be too large either."""
    too_large = RequestError(
        f"the request must have at most {MAX_BODY_BYTES} bytes: send one image, as levels or as a PNG.",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestError(
            f"the request took longer than {BODY_TIMEOUT_S} s to arrive: send it anew, in one go.",
            HTTPStatus.REQUEST_TIMEOUT,
        ) from None
    return bytes(body)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; readers differ in which of two equal keys they believe, so that is a mistake."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise RequestError(f"the field {quoted(twice)} stands twice in the request: send it once.")
    return values


class ApiRequest(bentoml.IODescriptor):
    """A request: a JSON object of exactly the declared fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> "ApiRequest":
        content_type = request.headers.get("content-type", "")
        if content_type.split(";")[0].strip().lower() != "application/json":
            raise RequestError(
                f"the request must have the header Content-Type: application/json, got {quoted(content_type)}.",
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            )
        body = await read_body(request)
        known = list(cls.model_fields)
        if not body.strip():
            raise RequestError(f"the request is empty: send a JSON object with the fields {', '.join(known)}.")
        try:
            # As text: given bytes, Python would read UTF-16 and more.
            values = json.loads(body.decode(), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the request is no readable JSON: {quoted(str(error))}.") from None
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise RequestError(sentence(error, known)) from None


_PIXELS = {"type": "array", "items": {"type": "array", "items": {}}}
# Any to pydantic: the shape and range depend on the champion, so `read_image` and `read_observed` check them.
ImageField = Annotated[
    Any,
    WithJsonSchema({"oneOf": [_PIXELS, {"type": "string", "format": "byte"}]}),
    Field(description="levels 0 to K-1, H x W or H x W x 3; or a PNG of exactly this size in base64"),
]
ObservedField = Annotated[
    Any,
    WithJsonSchema(_PIXELS),
    Field(description="H x W: 1 where the pixel is known, 0 where it is missing"),
]
NumSamples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
Label = Annotated[int | None, Field(ge=-1, description="-1 or absent for none")]
Temperature = Annotated[float, Field(ge=0, le=MAX_TEMPERATURE, description="0 takes the most likely level")]
Seed = Annotated[int | None, Field(ge=0, le=MAX_SEED, description="drawn and returned when absent")]


class GenerateRequest(ApiRequest):
    dataset: str
    num_samples: NumSamples = 1
    label: Label = None
    temperature: Temperature = 1.0
    seed: Seed = None

    @field_validator("temperature")
    @classmethod
    def _not_tiny(cls, value: float) -> float:
        # Logits divided by less than this could overflow.
        if 0 < value < MIN_TEMPERATURE:
            raise ValueError(f"temperature must be 0, or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, got {value}.")
        return value


class CompleteRequest(GenerateRequest):
    image: ImageField
    observed: ObservedField


class LikelihoodRequest(ApiRequest):
    dataset: str
    image: ImageField
    label: Label = None


class Identity(bentoml.IODescriptor):
    """Which model answered: its version in MLflow's registry, and what it was made from."""

    name: str
    version: str
    run_id: str
    git_commit: str
    data_hash: str
    weights_sha256: str


class CompleteAnswer(bentoml.IODescriptor):
    completions: list[list[list[Any]]]
    log_probs: list[float]
    seed: int
    model: Identity


class GenerateAnswer(bentoml.IODescriptor):
    images: list[list[list[Any]]]
    log_probs: list[float]
    seed: int
    model: Identity


class LikelihoodAnswer(bentoml.IODescriptor):
    log_prob: float
    bits_per_dim: float
    surprise: list[list[float]]
    model: Identity


def read_numbers(name: str, value: Any, shape: tuple[int, ...]) -> list[int]:
    """Return nested lists of exactly this shape as one flat list of whole numbers."""
    if not shape:
        if type(value) is not int:
            raise RequestError(f"{name} must be a whole number, got {quoted(value)}.")
        return [value]
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list of {shape[0]} entries, got {quoted(value)}.")
    if len(value) != shape[0]:
        raise RequestError(f"{name} must have {shape[0]} entries, got {len(value)}.")
    return [number for i, item in enumerate(value) for number in read_numbers(f"{name}[{i}]", item, shape[1:])]


def read_observed(value: Any, config: ModelConfig) -> Tensor:
    """Return the field `observed` as (1, 1, H, W) bool."""
    _, height, width = config.image_shape
    numbers = read_numbers("observed", value, (height, width))
    for i, number in enumerate(numbers):
        if number not in (0, 1):
            raise RequestError(f"observed[{i // width}][{i % width}] must be 0 or 1, got {quoted(number)}.")
    return torch.tensor(numbers, dtype=torch.bool).reshape(1, 1, height, width)


def read_png(png: bytes, config: ModelConfig) -> Tensor:
    """Return a PNG as (C, H, W) int64 levels; what would be read as something else than is seen is refused."""
    # The header, which comes first in every PNG, names the bits of a channel. Pillow would cut 16 of them to 8.
    if png[12:16] == b"IHDR" and png[24:25] == b"\x10":
        raise RequestError("image is a PNG of 16 bits per channel: save it with 8.")
    if b"acTL" in png[: png.find(b"IDAT")]:
        raise RequestError("image is an animated PNG: send one picture.")
    try:
        return from_png(png, config.image_shape, config.num_levels)
    except ValueError as error:
        raise RequestError(str(error)) from None
    except Exception:  # A decoder that is fed with anything may raise anything.
        raise RequestError("image is no readable PNG: save it anew.") from None


def read_image(value: Any, config: ModelConfig, observed: Tensor | None = None) -> Tensor:
    """Return the field `image` as (1, C, H, W) int64 levels; 0 where it is not observed."""
    channels, height, width = config.image_shape
    if isinstance(value, str):
        try:
            png = base64.b64decode(value, validate=True)
        except ValueError as error:
            raise RequestError(f"image must be a PNG in base64, or nested lists of levels ({error}).") from None
        levels = read_png(png, config)[None]
    else:
        shape = (height, width) if channels == 1 else (height, width, channels)
        # Out-of-range levels become -1 here: whatever stands under a missing pixel is ignored, however large.
        numbers = [n if 0 <= n < config.num_levels else -1 for n in read_numbers("image", value, shape)]
        levels = torch.tensor(numbers).reshape(height, width, channels).permute(2, 0, 1)[None]
    if observed is not None:
        levels = torch.where(observed, levels, 0)
    if bool((levels < 0).any()):
        _, _, row, column = (levels < 0).nonzero()[0].tolist()
        raise RequestError(
            f"image[{row}][{column}] must be a level from 0 to {config.num_levels - 1}, "
            f"got {quoted(value[row][column])}."
        )
    return levels


def read_label(label: int | None, config: ModelConfig, num_images: int = 1) -> Tensor | None:
    """Return the field `label` as (B,) int64, or None for no label."""
    if label is None or label == -1:
        return None
    if config.num_labels == 0:
        raise RequestError(f"label must be absent: this model knows no labels, got {label}.")
    if label >= config.num_labels:
        raise RequestError(f"label must be from 0 to {config.num_labels - 1}, or -1 for none, got {quoted(label)}.")
    return torch.full((num_images,), label)


def noise(seed: int, num_images: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Return (B, C, H, W) uniform noise; image i depends on (seed, i) alone, not on how many were asked for."""
    return torch.stack(
        [torch.rand(image_shape, generator=generator_for(seed, i), dtype=torch.float64) for i in range(num_images)]
    )


def to_lists(levels: Tensor) -> list:
    """Return (B, C, H, W) levels as B nested lists, H x W or H x W x 3."""
    return (levels[:, 0] if levels.shape[1] == 1 else levels.permute(0, 2, 3, 1)).tolist()


def sse(event: str, data: str) -> str:
    """Return one server-sent event; `data` is JSON on one line."""
    return f"event: {event}\ndata: {data}\n\n"


# The champions in BentoML's model store.


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
        return sum(parameter.numel() for parameter in self.model.parameters())

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


# The service.


class _NobodyWaits(Exception):
    """Everybody who asked for these images has left."""


class SamplingJob(Job):
    """A checked request for completions, or for whole images: those of which nothing is observed.

    Args:
        on_row: is told each finished row and its levels, (num_samples, C, W), from the thread that samples.

    Raises:
        RequestError: the request does not fit the champion.
    """

    def __init__(self, champion: Champion, request: GenerateRequest, on_row: OnRow | None = None) -> None:
        config, num = champion.config, request.num_samples
        self.champion, self.on_row = champion, on_row
        self.levels: Tensor | None = None
        self.is_completion = isinstance(request, CompleteRequest)
        self.observed = torch.zeros(1, 1, *config.image_shape[1:], dtype=torch.bool)
        self.image = torch.zeros(1, *config.image_shape, dtype=torch.int64)
        if isinstance(request, CompleteRequest):
            self.observed = read_observed(request.observed, config)
            self.image = read_image(request.image, config, self.observed)
        self.observed, self.image = self.observed.repeat(num, 1, 1, 1), self.image.repeat(num, 1, 1, 1)
        self.label = read_label(request.label, config, num)
        self.seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        self.temperature = request.temperature
        # The compiled sampler computes each image by itself: not a bit of it depends on what is beside it. The others
        # do not promise that, so with them nobody shares.
        shares = engine_name(champion.model) == "cached, compiled"
        super().__init__(request.dataset, (id(champion), request.temperature) if shares else object(), num)

    @staticmethod
    def run_together(jobs: list["SamplingJob"]) -> None:
        champion, temperature = jobs[0].champion, jobs[0].temperature
        config = champion.config
        ends = list(itertools.accumulate(job.num_images for job in jobs))
        parts = [slice(end - job.num_images, end) for job, end in zip(jobs, ends, strict=True)]

        def on_row(row: int, levels: Tensor) -> None:
            if all(job.done.cancelled() for job in jobs):
                raise _NobodyWaits
            for job, part in zip(jobs, parts, strict=True):
                if job.on_row is not None:
                    job.on_row(row, levels[part])

        image, observed = (torch.cat([getattr(job, name) for job in jobs]) for name in ("image", "observed"))
        u = torch.cat([noise(job.seed, job.num_images, config.image_shape) for job in jobs])
        label = None
        if config.num_labels:
            none = [torch.full((job.num_images,), -1) for job in jobs]
            label = torch.cat([n if job.label is None else job.label for job, n in zip(jobs, none, strict=True)])
        # Between rows the threads of the sampler wait for each other, which a short call would feel: it is
        # told of rows only where somebody listens, or where it pays to notice that nobody waits any more.
        listens = any(job.on_row is not None for job in jobs) or u.numel() * champion.num_parameters > SHORT_CALL
        try:
            levels = complete(champion.model, image, observed, u, label, temperature, on_row if listens else None)
        except _NobodyWaits:
            return
        for job, part in zip(jobs, parts, strict=True):
            if not job.done.cancelled():
                job.levels = levels[part]
                job.finish(job.answer(levels[part]))

    def answer(self, levels: Tensor) -> "CompleteAnswer | GenerateAnswer":
        """Score the images, by themselves: torch does not promise that a score has the same bits in a larger batch."""
        model, label = self.champion.model, self.label
        common: dict[str, Any] = {"seed": self.seed, "model": self.champion.identity}
        with torch.inference_mode():
            if self.is_completion:
                scores = completion_log_prob(model, levels, self.observed, label).tolist()
                return CompleteAnswer(completions=to_lists(levels), log_probs=scores, **common)
            return GenerateAnswer(images=to_lists(levels), log_probs=log_prob(model, levels, label).tolist(), **common)


class LikelihoodJob(Job):
    """A checked image to be scored. Scores share no call: see `SamplingJob.answer`.

    Raises:
        RequestError: the request does not fit the champion.
    """

    def __init__(self, champion: Champion, request: LikelihoodRequest) -> None:
        self.champion = champion
        self.levels = read_image(request.image, champion.config)
        self.label = read_label(request.label, champion.config)
        super().__init__("likelihood", object(), 1)

    @staticmethod
    def run_together(jobs: list["LikelihoodJob"]) -> None:
        for job in jobs:
            with torch.inference_mode():
                nats = -pixel_log_prob(job.champion.model, job.levels, job.label)[0].double()  # (C, H, W)
            total = nats.sum().item()
            answer = LikelihoodAnswer(
                log_prob=-total,
                bits_per_dim=bits_per_dim(total, job.champion.config.image_shape),
                surprise=nats.sum(dim=0).tolist(),
                model=job.champion.identity,
            )
            job.finish(answer)


class WatchJob(Job):
    """Score what was known of a completed image, for the metrics alone: nothing of it is kept."""

    def __init__(self, asked: SamplingJob, completion: Tensor) -> None:
        self.asked, self.levels = asked, completion[:1]
        super().__init__("watch", object(), 1)

    @staticmethod
    def run_together(jobs: list["WatchJob"]) -> None:
        for job in jobs:
            champion, observed = job.asked.champion, job.asked.observed[:1]
            label = None if job.asked.label is None else job.asked.label[:1]
            with torch.inference_mode():
                nats = -(pixel_log_prob(champion.model, job.levels, label) * observed).sum().item()
            num_dims = int(observed.sum()) * champion.config.image_shape[0]
            job.finish(nats / (num_dims * math.log(2)))


models_app = FastAPI(title="models", docs_url=None, redoc_url=None, openapi_url=None)


@bentoml.service(
    name="pixelcnn",
    workers=1,
    traffic={"timeout": TIMEOUT_S},
    http={"host": "127.0.0.1", "port": 3000},
)
@bentoml.asgi_app(models_app)
class PixelCNNService:
    """Complete, generate and score images with the champion of each dataset."""

    def __init__(self) -> None:
        torch.set_num_threads(int(os.environ.get("PIXELCNN_THREADS") or min(4, os.cpu_count() or 1)))
        self.champions = Champions(store_folder())
        self.metrics = metrics()
        self._watch_at = 0.0
        self.batches = Batches(MAX_BATCH_IMAGES, MAX_QUEUE, on_wait=self.metrics.waiting.set, on_call=self._count_call)

    @bentoml.on_startup
    def start(self) -> None:
        self.champions.start()

    @bentoml.on_shutdown
    def shut_down(self) -> None:
        self.champions.stop()
        self.batches.close()

    def _submit(self, job: Job) -> None:
        try:
            self.batches.submit(job)
        except Full:
            raise RequestError(
                f"{self.batches.num_waiting} requests wait already: send this one again in a few seconds.",
                HTTPStatus.TOO_MANY_REQUESTS,
            ) from None

    def _count_call(self, jobs: list[Job]) -> None:
        lane = jobs[0].lane
        self.metrics.batch_requests.labels(lane).observe(len(jobs))
        self.metrics.batch_images.labels(lane).observe(sum(job.num_images for job in jobs))

    @contextlib.contextmanager
    def _measured(self, endpoint: str, dataset: str) -> Iterator[None]:
        """Take the time of an answer; count it where its client left."""
        start = time.perf_counter()
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.left.labels(endpoint, dataset).inc()
            raise
        self.metrics.seconds.labels(endpoint, dataset).observe(time.perf_counter() - start)

    async def _answer(self, endpoint: str, dataset: str, job: Job) -> Any:
        with self._measured(endpoint, dataset):
            self._submit(job)
            return await asyncio.wrap_future(job.done)  # cancelled with the request

    def _watch(self, endpoint: str, dataset: str, job: SamplingJob) -> None:
        """Tell the metrics how likely the drawing was, if that keeps nobody waiting."""
        now = time.monotonic()
        if job.levels is None or self.batches.num_waiting or now < self._watch_at or not bool(job.observed.any()):
            return
        self._watch_at = now + WATCH_EVERY_S
        watch = WatchJob(job, job.levels)
        with contextlib.suppress(Full):
            self.batches.submit(watch)
        drawn = self.metrics.drawn.labels(endpoint, dataset)

        def tell(done: Future[float]) -> None:
            if not done.cancelled() and done.exception() is None:
                drawn.observe(done.result())

        watch.done.add_done_callback(tell)

    @models_app.get("/models")
    def list_models(self) -> dict[str, Any]:
        """Describe the champion of each dataset: shape, levels, labels, lineage, scores."""
        return self.champions.describe()

    @models_app.get("/docs.json", include_in_schema=False)
    def document(self) -> dict[str, Any]:
        """Return the OpenAPI document, in place of BentoML's."""
        return corrected(cast(bentoml.Service, PixelCNNService).openapi_spec.asdict(), self.champions.describe())

    @bentoml.api
    async def complete(self, request: CompleteRequest, /) -> CompleteAnswer:
        """Fill in the missing pixels of an image, several times."""
        job = SamplingJob(self.champions.get(request.dataset), request)
        answer = await self._answer("complete", request.dataset, job)
        self._watch("complete", request.dataset, job)
        return answer

    @bentoml.api
    async def complete_stream(self, request: CompleteRequest, /) -> AsyncGenerator[str, None]:
        """Do the same, telling each finished row: events `rows`, then `result` (or `error`)."""
        loop = asyncio.get_running_loop()
        # It holds an image's rows at most, so the sampler never waits for a slow reader.
        events: asyncio.Queue[str | None] = asyncio.Queue()

        def on_row(row: int, levels: Tensor) -> None:
            event = sse("rows", json.dumps({"start": row, "rows": to_lists(levels[:, :, None])}))
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = SamplingJob(self.champions.get(request.dataset), request, on_row)
        self._submit(job)
        job.done.add_done_callback(lambda _: loop.call_soon_threadsafe(events.put_nowait, None))
        end = loop.time() + TIMEOUT_S
        try:
            with self._measured("complete_stream", request.dataset):
                yield ": drawing\n\n"  # The answer begins now: BentoML's own limit on its time ends here.
                while (event := await asyncio.wait_for(events.get(), end - loop.time())) is not None:
                    yield event
                yield sse("result", job.done.result().model_dump_json())
            self._watch("complete_stream", request.dataset, job)
        except TimeoutError:
            yield sse("error", json.dumps({"error": f"the completion took longer than {TIMEOUT_S} s: ask for less."}))
        except Exception:
            logger.exception("completion failed while it was streamed")
            yield sse("error", json.dumps({"error": "the completion failed: the service's log says why."}))
        finally:
            job.done.cancel()  # The client may have left: do not draw for nobody.

    @bentoml.api
    async def generate(self, request: GenerateRequest, /) -> GenerateAnswer:
        """Sample whole images."""
        job = SamplingJob(self.champions.get(request.dataset), request)
        return await self._answer("generate", request.dataset, job)

    @bentoml.api
    async def likelihood(self, request: LikelihoodRequest, /) -> LikelihoodAnswer:
        """Score an image: its log-probability, and how surprising each pixel is."""
        job = LikelihoodJob(self.champions.get(request.dataset), request)
        answer = await self._answer("likelihood", request.dataset, job)
        self.metrics.drawn.labels("likelihood", request.dataset).observe(answer.bits_per_dim)
        return answer


cast(bentoml.Service, PixelCNNService).add_asgi_middleware(Gate, token=os.environ.get(TOKEN_VARIABLE, "").strip())
