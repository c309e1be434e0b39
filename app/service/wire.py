"""The wire format: requests, checked field by field, and answers; images.py checks what depends on a champion.

A client's mistake is a `RequestError`, one sentence that says what to do.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Annotated, Any, Self, cast
from weakref import WeakKeyDictionary

import bentoml
from bentoml.exceptions import BentoMLException
from pydantic import AfterValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from app.service.settings import settings

MAX_SEED = 2**63 - 1
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 100.0


class RequestError(BentoMLException):
    """What is wrong with a request, in one sentence for whoever sent it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message, error_code=HTTPStatus(status))


def quoted(value: Any) -> str:
    """Return a value from a request for an error message: at most 60 characters, ASCII, so that it can be sent."""
    try:
        text = ascii(value)
    except RecursionError:
        text = "something of many layers"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _sentence(error: ValidationError, known: str) -> str:
    """Return the first of pydantic's complaints as one sentence."""
    first = error.errors(include_url=False)[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{name} is missing: add it to the request."
    if not name:
        return f"the request must be a JSON object with the fields {known}."
    message = first["msg"].replace("Input should be", "must be")
    return f"{name} {message[0].lower()}{message[1:]}, got {quoted(first['input'])}."


async def read_body(request: Request) -> bytes:
    """Return a request's body; RequestError if it has over `max_body_bytes` (413), or takes `body_timeout_s` (408)."""
    limit = settings.max_body_bytes
    too_large = RequestError(
        f"the request must have at most {limit} bytes: send one image, as levels or as a PNG.", 413
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise too_large
    body = bytearray()  # counted as it arrives: a chunked one states no length
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError(
            f"the request took longer than {settings.body_timeout_s} s to arrive: send it anew, in one go.", 408
        ) from None
    return bytes(body)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; which of two equal keys counts would depend on the reader, so that is a mistake."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise RequestError(f"the field {quoted(name)} stands twice in the request: send it once.")
        values[name] = value
    return values


# One request is parsed per turn of its event loop, and others are refused in between.
_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class ApiRequest(bentoml.IODescriptor):
    """A request: a JSON object of exactly the declared fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    async def from_http_request(cls, request: Request, serde: object) -> Self:
        """Read and check a request; BentoML calls this in place of its own reader.

        RequestError if it is no JSON (415, 400), too large (413), too slow (408), or a field is wrong (400).
        """
        known = ", ".join(cls.model_fields)
        content_type = request.headers.get("content-type", "")
        if content_type.split(";")[0].strip().lower() != "application/json":
            raise RequestError(
                f"the request must have the header Content-Type: application/json, got {quoted(content_type)}.", 415
            )
        body = await read_body(request)
        async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            await asyncio.sleep(0)
        if not body.strip():
            raise RequestError(f"the request is empty: send a JSON object with the fields {known}.")
        try:
            # As text: given bytes, Python would also read UTF-16 and others.
            values = json.loads(body.decode(), object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            why = quoted(str(error))
            if isinstance(error, json.JSONDecodeError):  # whose words hold none of the request's
                why = f"{error.msg}, at character {error.pos + 1}"
            raise RequestError(f"the request is no readable JSON: {why}.") from None
        # Not by pydantic: it would describe each of a hundred thousand, and the event loop wait a third of a second.
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                raise RequestError(f"unknown field {quoted(name)}. Known: {known}.")
        try:
            return cast(Self, cls.model_validate(values))
        except ValidationError as error:
            raise RequestError(_sentence(error, known)) from None


def _not_tiny(temperature: float) -> float:
    # Logits divided by less than this could overflow.
    if 0 < temperature < MIN_TEMPERATURE:
        raise PydanticCustomError("tiny", f"Input should be 0, or from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}")
    return temperature


_PIXELS = {"type": "array", "items": {"type": "array", "items": {}}}
# Any to pydantic: the shape and range depend on the champion, so images.py checks them.
ImageField = Annotated[
    Any,
    WithJsonSchema({"oneOf": [_PIXELS, {"type": "string", "format": "byte"}]}),
    Field(description="levels 0 to K-1, H x W or H x W x 3; or a PNG of exactly this size in base64"),
]
ObservedField = Annotated[
    Any, WithJsonSchema(_PIXELS), Field(description="H x W: 1 where the pixel is known, 0 where it is missing")
]
Label = Annotated[int | None, Field(ge=-1, description="-1 or absent for none")]
Temperature = Annotated[
    float, Field(ge=0, le=MAX_TEMPERATURE, description="0 takes the most likely level"), AfterValidator(_not_tiny)
]


class GenerateRequest(ApiRequest):
    """Whole images to be sampled."""

    dataset: str
    num_samples: int = Field(1, ge=1, le=settings.max_samples)
    label: Label = None
    temperature: Temperature = 1.0
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="drawn and returned when absent")


class CompleteRequest(GenerateRequest):
    """An image whose missing pixels are to be drawn, `num_samples` times."""

    image: ImageField
    observed: ObservedField


class LikelihoodRequest(ApiRequest):
    """A whole image to be scored."""

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
    """Finished images of levels, H x W or H x W x 3; `log_probs` are nats, missing given observed pixels."""

    completions: list[list[list[Any]]]
    log_probs: list[float]
    seed: int
    model: Identity


class GenerateAnswer(bentoml.IODescriptor):
    """Whole images of levels, H x W or H x W x 3; `log_probs` are nats per image."""

    images: list[list[list[Any]]]
    log_probs: list[float]
    seed: int
    model: Identity


class LikelihoodAnswer(bentoml.IODescriptor):
    """The likelihood of an image; `log_prob` in nats, `surprise` H x W, the nats that each pixel costs.

    `packed_bytes` is what it takes where the model packs images without loss (docs/packing.md).
    """

    log_prob: float
    bits_per_dim: float
    packed_bytes: int
    surprise: list[list[float]]
    model: Identity


def server_sent_event(event: str, data: str) -> str:
    """Return one server-sent event as it is sent; `data` is JSON on one line."""
    return f"event: {event}\ndata: {data}\n\n"
