"""A typed client of the completion service: requests in, values or one `ServiceError` out.

It knows the wire alone: images are nested lists of levels (H x W, or H x W x 3), everything else is plain JSON.
"""

import contextlib
import copy
import functools
import os
import secrets
import socket
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypedDict, TypeVar, Unpack

import httpx
import stamina
from httpx_sse import SSEError, connect_sse
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from app.environment import setting

DEFAULT_URL = "http://127.0.0.1:3000"
URL_VARIABLE = "PIXELCNN_SERVICE_URL"
TOKEN_VARIABLE = "PIXELCNN_TOKEN"
ID_HEADER = "X-Request-Id"  # the service's log has the same
CLIENT_HEADER = "X-Client"
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 120.0  # a batch of whole images by the slow sampler
BUSY = (429, 503)
RETRIES = 2
MAX_RETRY_WAIT_S = 5.0

OnOpen = Callable[[Callable[[], None]], object]
Image = list[list[Any]]  # H rows of W levels, or of W [red, green, blue]
_Kind = TypeVar("_Kind")


class ServiceError(Exception):
    """The service could not be reached, refused the request or failed; the text is a sentence for the person.

    It is `away` where not the request is at fault, so trying again may help; `busy` is one way of being away.
    """

    def __init__(self, text: str, away: bool = False, busy: bool = False) -> None:
        super().__init__(text)
        self.away = away
        self.busy = busy


class Sampling(TypedDict, total=False):
    """How images are drawn; what is absent or None is as its comment says."""

    num_samples: int  # 1 to 16; 1
    label: int | None  # index of a class; none
    temperature: float  # 1 draws from the model itself; 1
    seed: int | None  # 0 to 2^63 - 1; the service chooses, and says which


class ServedModel(BaseModel):
    """What serves one dataset."""

    shape: list[int]  # [C, H, W] of its images
    levels: int  # K; images hold 0 to K - 1
    labels: list[str]  # the names of the classes; empty for a model without labels
    protocol: str  # how the images were made, which belongs beside every score
    architecture: str
    promoted_at: str  # when it became champion, ISO 8601
    model: dict[str, Any]  # lineage: name, version, run_id, git_commit, data_hash, weights_sha256
    scores: dict[str, Any]  # measured when it was trained, e.g. `test/nll_nats`


class Completions(BaseModel):
    """Finished images; `log_probs` are nats of what was missing given what was observed."""

    completions: list[Image]
    log_probs: list[float]
    seed: int
    model: dict[str, Any]


class Rows(BaseModel):
    """Finished rows of every completion: `rows[sample][i]` is row `start + i`, its W levels."""

    start: int
    rows: list[Image]


class GeneratedImages(BaseModel):
    """Whole images, and their log-probability in nats."""

    images: list[Image]
    log_probs: list[float]
    seed: int
    model: dict[str, Any]


class Likelihood(BaseModel):
    """The exact likelihood of an image; `surprise` is H x W, the nats that each pixel costs."""

    log_prob: float
    bits_per_dim: float
    packed_bytes: int  # without loss, by the model
    surprise: list[list[float]]
    model: dict[str, Any]


class _Refusal(BaseModel):
    error: str = Field(min_length=1)


def service_url() -> str:
    """Return the service's address: the environment's, else the default. Raises ServiceError where `setting` does."""
    try:
        return setting(URL_VARIABLE, "service").rstrip("/") or DEFAULT_URL
    except LookupError as error:
        raise ServiceError(str(error)) from None


class ServiceClient:
    """Calls the service over HTTP. Safe to share between threads. `transport`, which sends, is for tests.

    Where the environment sets PIXELCNN_TOKEN, every request carries it.

    Every method raises ServiceError, and nothing else, when there is no usable answer; so does making a client for
    what is no address. Where the service was reached, the error's text ends with the request's ID, by which the
    service's log names it. A busy service is asked again, at most twice, after the seconds that it names (5 at most):
    no request changes anything there. A stream is not: whoever watches one learns at once that there is none.
    """

    def __init__(self, url: str = DEFAULT_URL, transport: httpx.BaseTransport | None = None) -> None:
        try:
            parsed = httpx.URL(url)
            is_address = parsed.scheme in ("http", "https") and parsed.host != ""
        except (httpx.InvalidURL, UnicodeError):  # the latter of a name that no network knows
            is_address = False
        if not is_address:
            shown = url.rpartition("@")[2]  # visitors may see it: without a password
            raise ServiceError(f"{URL_VARIABLE} must be an address like {DEFAULT_URL}, got '{shown}'. Set it anew.")
        self.url = str(parsed.copy_with(userinfo=b""))  # what is told to visitors
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ServiceError(f"{TOKEN_VARIABLE} must be printable ASCII text. Set it anew.")
        self._headers: dict[str, str] = {}
        self._http = httpx.Client(
            base_url=self.url if token else url,  # or httpx would send what is in the address instead of it
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            transport=transport,
            event_hooks={"request": [lambda request: request.headers.update({ID_HEADER: secrets.token_hex(6)})]},
            trust_env=False,  # the service is a neighbour: never by way of a proxy
        )

    def named(self, name: str) -> "ServiceClient":
        """Return this client under a name: the service takes turns between names. Connections are shared."""
        other = copy.copy(self)
        other._headers = {CLIENT_HEADER: name}
        return other

    def models(self) -> dict[str, ServedModel]:
        """Return what is served, by dataset."""
        timeout = httpx.Timeout(5.0, connect=CONNECT_TIMEOUT_S)
        return self._ask(dict[str, ServedModel], "GET", "/models", timeout=timeout)

    def complete_stream(
        self,
        dataset: str,
        image: Image,
        observed: Image,
        on_open: OnOpen = lambda end: None,
        **sampling: Unpack[Sampling],
    ) -> Generator[Rows | Completions, None, None]:
        """Have the missing pixels of an image drawn: each row as it is finished; the last value is the whole answer.

        Closing the iterator ends the request.

        Args:
            image: levels; ignored where missing.
            observed: H x W of 0 (missing) and 1 (known).
            on_open: is given what ends the request from another thread, even while this one waits for an event.
        """
        body = _body(dataset, sampling) | {"image": image, "observed": observed}
        # A connection of its own: who hangs up must not cut off somebody who uses it next.
        sent: dict[str, Any] = {"json": body, "headers": {**self._headers, "Connection": "close"}}
        with self._errors_told(), connect_sse(self._http, "POST", "/complete_stream", **sent) as source:
            on_open(functools.partial(_hang_up, source.response))
            if source.response.is_error:
                source.response.read()
                source.response.raise_for_status()
            with contextlib.suppress(httpx.ReadError, httpx.RemoteProtocolError):  # cut off, it lacks a result
                for event in source.iter_sse():
                    if event.event == "error":
                        error = _Refusal.model_validate_json(event.data).error
                        raise ServiceError(_with_id(error, source.response.request), away=True)
                    if event.event == "result":
                        yield Completions.model_validate_json(event.data)
                        return
                    if event.event == "rows":
                        yield Rows.model_validate_json(event.data)
        text = f"The service at {self.url} stopped in mid-answer. Try again; your drawing is kept."
        raise ServiceError(_with_id(text, source.response.request), away=True)

    def generate(self, dataset: str, **sampling: Unpack[Sampling]) -> GeneratedImages:
        """Have whole images drawn."""
        return self._ask(GeneratedImages, "POST", "/generate", json=_body(dataset, sampling))

    def likelihood(self, dataset: str, image: Image, *, label: int | None = None) -> Likelihood:
        """Have a whole image scored."""
        body = {"dataset": dataset, "image": image, "label": -1 if label is None else label}
        return self._ask(Likelihood, "POST", "/likelihood", json=body)

    def _ask(self, kind: type[_Kind], method: str, path: str, **options: Any) -> _Kind:
        with self._errors_told():
            for attempt in stamina.retry_context(on=_retry_after_s, attempts=1 + RETRIES, timeout=None):
                with attempt:
                    response = self._http.request(method, path, headers=self._headers, **options).raise_for_status()
            return TypeAdapter(kind).validate_json(response.text)

    @contextlib.contextmanager
    def _errors_told(self) -> Iterator[None]:
        """Turn whatever keeps an answer away into a ServiceError."""
        service = f"The service at {self.url}"
        stranger = (
            f"What answers at {self.url} does not speak like the completion service. "
            f"Set {URL_VARIABLE} to the address that `make serve` prints."
        )
        try:
            yield
        except (SSEError, ValidationError):
            raise ServiceError(stranger, away=True) from None
        except httpx.HTTPStatusError as error:
            busy = error.response.status_code in BUSY
            away = busy or error.response.status_code >= 500
            try:
                text = _Refusal.model_validate_json(error.response.text).error
            except ValidationError:
                if not away:
                    raise ServiceError(stranger) from None
                text = f"{service} failed; its log says why. Your drawing is kept."
                if busy:
                    text = f"{service} is busy. Try again in a moment; your drawing is kept."
            raise ServiceError(_with_id(text, error.request), away, busy) from None
        except httpx.ReadTimeout as error:
            text = f"{service} takes too long to answer. Try again; your drawing is kept."
            raise ServiceError(_with_id(text, error.request), away=True) from None
        except (httpx.HTTPError, UnicodeError):  # the latter of a name that no network knows
            text = f"{service} does not answer. Start it with `make serve`; your drawing is kept."
            raise ServiceError(text, away=True) from None


def _with_id(text: str, request: httpx.Request) -> str:
    return f"{text} (request {request.headers[ID_HEADER]})"


def _retry_after_s(error: Exception) -> float | bool:
    """Return for how long a busy service asks to be left alone, within bounds; False where it is not busy."""
    if not isinstance(error, httpx.HTTPStatusError) or error.response.status_code not in BUSY:
        return False
    text = error.response.headers.get("retry-after", "")
    return min(float(text), MAX_RETRY_WAIT_S) if text.isdecimal() else 1.0


def _hang_up(response: httpx.Response) -> None:
    """End a response that another thread reads: unlike closing it, this wakes who waits for its next bytes."""
    if stream := response.extensions.get("network_stream"):
        with contextlib.suppress(OSError):
            stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)


def _body(dataset: str, sampling: Sampling) -> dict[str, Any]:
    given = {name: value for name, value in sampling.items() if value is not None}
    return {"dataset": dataset, "num_samples": 1, "label": -1, "temperature": 1.0, **given}
