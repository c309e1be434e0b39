"""All settings of the service: the environment variables PIXELCNN_*, with their types, bounds and defaults.

Where the models are and where the service listens is for BentoML's own variables to say: BENTOML_HOME, BENTOML_HOST,
BENTOML_PORT; where traces are sent, for OpenTelemetry's.
"""

import importlib.util
import os
from typing import Annotated, Any

from bentoml.exceptions import BentoMLConfigException
from pydantic import Field, NonNegativeInt, PositiveInt, SecretStr, TypeAdapter, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # one that is set switches traces on
SHARE = "OTEL_TRACES_SAMPLER_ARG"  # the part of the requests, from 0 to 1; all by default
HEALTH_CHECKS = ("/healthz", "/livez", "/readyz")  # answered without the token
QUIET = (*HEALTH_CHECKS, "/metrics")  # neither logged nor traced


class Settings(BaseSettings):
    """The field `max_queue` is set by PIXELCNN_MAX_QUEUE, and so on; an empty variable counts as absent."""

    model_config = SettingsConfigDict(env_prefix="PIXELCNN_", env_ignore_empty=True)

    token: SecretStr = SecretStr("")  # of `Authorization: Bearer TOKEN`, health checks apart; empty for an open service
    max_requests: PositiveInt = 64  # in flight: being received, waiting, computed or sent; more are refused with 429
    max_client_requests: PositiveInt = 32  # of one client, told by its header X-Client or else its address; likewise
    max_queue: PositiveInt = 48  # requests that wait for a computation; likewise
    max_samples: PositiveInt = 16  # images that one request may ask for
    max_body_bytes: PositiveInt = 1_000_000
    timeout_s: PositiveInt = 120  # from a received request to its answer, or to the last event of a stream
    body_timeout_s: PositiveInt = 10  # for a request's body to arrive
    send_timeout_s: PositiveInt = 30  # that a client may take none of its answer
    threads: PositiveInt = Field(default_factory=lambda: min(4, os.cpu_count() or 1), le=1024)  # of a computation
    datasets: Annotated[tuple[str, ...], NoDecode] = ()  # served before /readyz says so; without any, one of any
    released: bool = False  # serve the weights that were released with this code, until a dataset's first promotion
    drain_s: NonNegativeInt = 0  # after SIGTERM all is still answered, though /readyz says no; then only what was taken
    watch: bool = True  # log lines, metrics and what is told of drawings; off to measure what they cost

    @field_validator("token")
    @classmethod
    def _is_no_blank(cls, value: SecretStr) -> SecretStr:
        if value and not value.get_secret_value().strip():  # it would leave the service open
            raise PydanticCustomError("blank", "Input should be a token that is not blank")
        return value

    @field_validator("datasets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def load_settings() -> Settings:
    """Read the settings; BentoMLConfigException, whose sentence `bentoml serve` prints, if one is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = f"PIXELCNN_{first['loc'][0]}".upper()
        expected = first["msg"].removeprefix("Input should be ").partition(",")[0]
        raise BentoMLConfigException(f"{name} must be {expected}, got {first['input']!a}. Set it anew.") from None


def tracing() -> dict[str, Any]:
    """Return BentoML's setting `tracing`; BentoMLConfigException if the share is wrong, or the exporter is missing."""
    endpoint = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if endpoint is None:
        return {"excluded_urls": ".*"}
    # Names from the top: the parent of a module that is looked for is imported.
    if not all(importlib.util.find_spec(name) for name in ("opentelemetry.exporter", "opentelemetry.exporter.otlp")):
        raise BentoMLConfigException(
            f"{endpoint} is set: pip install opentelemetry-exporter-otlp-proto-http, or unset it."
        )
    text = os.environ.get(SHARE) or "1"
    try:
        share = TypeAdapter(Annotated[float, Field(ge=0, le=1)]).validate_python(text)
    except ValidationError:
        raise BentoMLConfigException(f"{SHARE} must be a number from 0 to 1, got {text!a}. Set it anew.") from None
    return {"exporter_type": "otlp", "sample_rate": share, "excluded_urls": [*QUIET], "otlp": {"protocol": "http"}}


settings = load_settings()
