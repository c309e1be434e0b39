"""What goes over the wire: requests, checked field by field, and answers.

Every mistake of a client is a `RequestError`, one sentence that says what to do.
"""

import asyncio
import base64
import itertools
import json
from http import HTTPStatus
from typing import Annotated, Any

import bentoml
import numpy as np
import torch
from bentoml.exceptions import BentoMLException
from pydantic import ConfigDict, Field, ValidationError, WithJsonSchema, field_validator
from starlette.requests import Request
from torch import Tensor

from app.gate import quoted, setting
from pixelcnn.config import ModelConfig
from pixelcnn.images import from_png

MAX_SAMPLES = setting("PIXELCNN_MAX_SAMPLES", 16)
MAX_BODY_BYTES = setting("PIXELCNN_MAX_BODY_BYTES", 1_000_000)
BODY_TIMEOUT_S = setting("PIXELCNN_BODY_TIMEOUT_S", 10)
MAX_SEED = 2**63 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0


class RequestError(BentoMLException):
    """What is wrong with a request, in one sentence for whoever sent it."""

    def __init__(self, message: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(message, error_code=status)


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


class _Turns:
    """Requests that come together are read one per turn of the event loop, which so refuses others in between."""

    def __init__(self) -> None:
        self.num_waiting = 0

    async def wait(self) -> None:
        self.num_waiting += 1
        try:
            for _ in range(self.num_waiting):
                await asyncio.sleep(0)
        finally:
            self.num_waiting -= 1


_turns = _Turns()


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
        await _turns.wait()
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

    def place(i: int, depth: int) -> str:
        return name + "".join(f"[{k}]" for k in np.unravel_index(i, shape[:depth]))

    items = [value]
    for depth, length in enumerate(shape):
        for i, item in enumerate(items):
            if not isinstance(item, list):
                raise RequestError(f"{place(i, depth)} must be a list of {length} entries, got {quoted(item)}.")
            if len(item) != length:
                raise RequestError(f"{place(i, depth)} must have {length} entries, got {len(item)}.")
        items = list(itertools.chain.from_iterable(items))
    if set(map(type, items)) != {int}:
        i = next(i for i, item in enumerate(items) if type(item) is not int)
        raise RequestError(f"{place(i, len(shape))} must be a whole number, got {quoted(items[i])}.")
    return items


def read_observed(value: Any, config: ModelConfig) -> Tensor:
    """Return the field `observed` as (1, 1, H, W) bool."""
    _, height, width = config.image_shape
    numbers = read_numbers("observed", value, (height, width))
    if not set(numbers) <= {0, 1}:
        i = next(i for i, number in enumerate(numbers) if number not in (0, 1))
        raise RequestError(f"observed[{i // width}][{i % width}] must be 0 or 1, got {quoted(numbers[i])}.")
    return torch.from_numpy(np.array(numbers, dtype=bool)).reshape(1, 1, height, width)


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
        pixels = np.array(numbers, dtype=np.int64).reshape(height, width, channels)
        levels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
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


def to_lists(levels: Tensor) -> list:
    """Return (B, C, H, W) levels as B nested lists, H x W or H x W x 3."""
    return (levels[:, 0] if levels.shape[1] == 1 else levels.permute(0, 2, 3, 1)).tolist()


def sse(event: str, data: str) -> str:
    """Return one server-sent event; `data` is JSON on one line."""
    return f"event: {event}\ndata: {data}\n\n"
