"""All settings of the service: the environment variables PIXELCNN_*, with their types, bounds and defaults.

Where the models are and where the service listens is for BentoML's own variables to say: BENTOML_HOME, BENTOML_HOST,
BENTOML_PORT.
"""

import os
from typing import Annotated, Any

from bentoml.exceptions import BentoMLConfigException
from pydantic import Field, NonNegativeInt, PositiveInt, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """The field `max_queue` is set by PIXELCNN_MAX_QUEUE, and so on; an empty variable counts as absent."""

    model_config = SettingsConfigDict(env_prefix="PIXELCNN_", env_ignore_empty=True)

    token: SecretStr = SecretStr("")
    """What callers must send as `Authorization: Bearer TOKEN`, health checks apart; empty for an open service."""
    max_requests: PositiveInt = 64
    """Requests in flight: being received, waiting, computed or sent. More are refused with 429."""
    max_client_requests: PositiveInt = 32
    """Those of one client, told by its header X-Client or else its address. More are refused with 429."""
    max_queue: PositiveInt = 48
    """Requests that wait for a computation. More are refused with 429."""
    max_samples: PositiveInt = 16
    """Images that one request may ask for."""
    max_body_bytes: PositiveInt = 1_000_000
    """Size of a request's body."""
    timeout_s: PositiveInt = 120
    """Seconds from a received request to its answer, or to the last event of a stream."""
    body_timeout_s: PositiveInt = 10
    """Seconds for a request's body to arrive."""
    send_timeout_s: PositiveInt = 30
    """Seconds that a client may take none of its answer."""
    threads: PositiveInt = Field(default_factory=lambda: min(4, os.cpu_count() or 1), le=1024)
    """Threads of a computation; by default as many as there are cores, at most 4."""
    datasets: Annotated[tuple[str, ...], NoDecode] = ()
    """Those whose champions must be served before /readyz says so, separated by commas; without any, one of any."""
    released: bool = False
    """Serve the weights that were released with this code, too: of each dataset until its first promotion."""
    drain_s: NonNegativeInt = 0
    """Seconds after SIGTERM in which it goes on answering though /readyz says no; then it refuses, and ends."""

    watch: bool = True
    """Log lines, metrics and what is told of drawings; 0 turns all of it off, to measure what it costs."""

    @field_validator("datasets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        BentoMLConfigException: a variable holds something else than it may; `bentoml serve` prints the sentence.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = f"PIXELCNN_{first['loc'][0]}".upper()
        expected = first["msg"].removeprefix("Input should be ").partition(",")[0]
        raise BentoMLConfigException(f"{name} must be {expected}, got {first['input']!a}. Set it anew.") from None


settings = load_settings()
