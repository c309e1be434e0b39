"""What the environment says to the pipeline. Values that belong to the project are in params.yaml."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipelines.errors import without_passwords

ENVIRONMENTS_FILE = Path("environments.yaml")
DEVELOPMENT = "development"  # what no file needs to describe: the variables, or this folder
_NAME = "PIXELCNN_ENVIRONMENT"
_VARIABLES = {"registry": "MLFLOW_TRACKING_URI", "store": "BENTOML_HOME", "service": "PIXELCNN_SERVICE_URL"}


class Environment(BaseModel):
    """A named environment; no two of them share any of these."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    registry: str = Field(min_length=1)  # like MLFLOW_TRACKING_URI
    store: str = Field(min_length=1)  # like BENTOML_HOME
    service: str | None = None  # like PIXELCNN_SERVICE_URL


def one_spelling(place: str) -> str:
    """Return a host and path as all write it: with the number of this machine, no / at its end."""
    return re.sub("^localhost(?=[:/]|$)", "127.0.0.1", place.rstrip("/"))


def _place(text: str) -> str:
    """Return where a registry, store or service is, the same for each way to write it."""
    parts = urlsplit(without_passwords(text.strip()))
    if parts.scheme and not parts.scheme.startswith("sqlite"):
        return one_spelling(f"{parts.netloc.lower() or parts.query}{parts.path}")  # PostgreSQL's host may be an option
    path = parts.path.removeprefix("/") if parts.scheme else text.strip()
    return str(Path(os.path.expandvars(path)).expanduser().resolve())


def environments() -> dict[str, Environment]:
    """Return those of `environments.yaml` in the current folder; LookupError if it is wrong, or two share something."""
    try:
        found = TypeAdapter(dict[str, Environment]).validate_python(yaml.safe_load(ENVIRONMENTS_FILE.read_text()))
    except FileNotFoundError:
        return {}
    except OSError as error:  # such as the folder that Docker makes where the file of a mount is missing
        raise LookupError(f"{ENVIRONMENTS_FILE} cannot be read ({error.strerror}). Mend or remove it.") from None
    except (yaml.YAMLError, UnicodeError, ValidationError) as error:
        wrong = error.errors() if isinstance(error, ValidationError) else []  # without its values: passwords are there
        why = "; ".join(": ".join((*map(str, one["loc"]), one["msg"])) for one in wrong) or "it is no YAML"
        raise LookupError(
            f"{ENVIRONMENTS_FILE} must give each environment a registry, a store and, if there is one, a service: {why}"
        ) from None
    for (name, one), (other, another) in combinations(found.items(), 2):
        for field in _VARIABLES:
            said = getattr(one, field), getattr(another, field)
            try:
                is_shared = all(said) and _place(said[0]) == _place(said[1])
            except (ValueError, RuntimeError):  # a bracket that is not closed, a ~user whom nobody knows
                raise LookupError(f"{ENVIRONMENTS_FILE}: the {field} of {name} or {other} cannot be read.") from None
            if is_shared:  # not shown: it may hold a password
                raise LookupError(f"{ENVIRONMENTS_FILE}: {name} and {other} share a {field}. Give each its own.")
    return found


class Settings(BaseSettings):
    """The environment's settings; one that is empty counts as not set."""

    model_config = SettingsConfigDict(env_ignore_empty=True, str_strip_whitespace=True, frozen=True)

    # One of environments.yaml, which then says registry, store and service.
    environment: str = Field(default=DEVELOPMENT, validation_alias=_NAME)
    # A folder with the official files of the datasets; without, torchvision downloads them.
    data: Path | None = Field(default=None, validation_alias="PIXELCNN_DATA")
    # MLflow's server or database; without, `mlflow.db` in the current folder.
    tracking_uri: str | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI")
    # MLflow's way to keep registered models elsewhere, which is refused.
    registry_uri: str | None = Field(default=None, validation_alias="MLFLOW_REGISTRY_URI")
    # BentoML's home, whose model store holds the champions; without, `.bentoml` in the current folder.
    store: Path = Field(default_factory=lambda: Path.cwd() / ".bentoml", validation_alias="BENTOML_HOME")
    # The service, which `evaluate-champions` then asks, too; and its token.
    service_url: str | None = Field(default=None, validation_alias="PIXELCNN_SERVICE_URL")
    token: str | None = Field(default=None, validation_alias="PIXELCNN_TOKEN", repr=False)
    # A webhook that `make operate` lets Prefect call when a nightly check fails.
    notify_url: str | None = Field(default=None, validation_alias="PIXELCNN_NOTIFY_URL")
    # Prefect's API; without, a flow starts a temporary server.
    prefect_url: str | None = Field(default=None, validation_alias="PREFECT_API_URL")
    # DVC sets this for the stages of an experiment.
    experiment: str | None = Field(default=None, validation_alias="DVC_EXP_BASELINE_REV")

    @property
    def registry(self) -> str:
        """The URI of MLflow's tracking store and registry."""
        return self.tracking_uri or f"sqlite:///{Path.cwd() / 'mlflow.db'}"

    @model_validator(mode="before")
    @classmethod
    def _of_the_named_environment(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Raise LookupError where it is unknown, or a variable says something else than it: nothing is mixed."""
        name = str(values.get(_NAME) or DEVELOPMENT).strip()
        known = environments()
        if name not in known:
            if name == DEVELOPMENT:
                return values
            raise LookupError(
                f"{_NAME} is {name!r}, which {ENVIRONMENTS_FILE} in this folder does not describe. Known: "
                f"{', '.join(known) or 'none'}. docs/operations.md shows what it says."
            )
        said = known[name].model_dump()
        for field, variable in _VARIABLES.items():
            if values.get(variable) not in (None, said[field]):
                raise LookupError(f"{variable} is set, but not to the {field} of {name}. Unset it, or {_NAME}.")
        return values | {variable: said[field] for field, variable in _VARIABLES.items() if said[field]}


def in_prefect(name: str) -> str:
    """Return the name of a work pool or deployment of this environment: none has another's on a common server."""
    here = Settings().environment
    return name if here == DEVELOPMENT else f"{name}-{here}"


@contextmanager
def environment(name: str) -> Iterator[Settings]:
    """Let this process work in another environment for the time of a block; LookupError if it is unknown."""
    variables = (*_VARIABLES.values(), _NAME)
    kept = {variable: os.environ.pop(variable) for variable in variables if variable in os.environ}
    os.environ[_NAME] = name
    try:
        yield Settings()
    finally:
        for variable in variables:  # what MLflow has set meanwhile, too
            os.environ.pop(variable, None)
        os.environ.update(kept)
