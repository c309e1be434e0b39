"""A typed client of the completion service: requests in, values or one `ServiceError` out.

It knows the wire alone: images are nested lists of levels (H x W, or H x W x 3), everything else is plain JSON.
"""

import json
import os
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import httpx

DEFAULT_URL = "http://127.0.0.1:3000"
URL_VARIABLE = "PIXELCNN_SERVICE_URL"
TOKEN_VARIABLE = "PIXELCNN_TOKEN"
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 120.0  # a batch of whole images by the slow sampler
BUSY = (429, 503)
RETRIES = 2
MAX_RETRY_WAIT_S = 5.0

Image = list[list[Any]]  # H rows of W levels, or of W [red, green, blue]


class ServiceError(Exception):
    """The service could not be reached, refused the request or failed; the text is a sentence for the person."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What serves one dataset.

    Args:
        shape: [C, H, W] of its images.
        levels: K; images hold 0 to K - 1.
        labels: the names of the classes; empty for a model without labels.
        protocol: how the images were made, which belongs beside every score.
        architecture: `pixelcnn` or `gated_pixelcnn`.
        promoted_at: when it became champion, ISO 8601.
        model: lineage: name, version, run_id, git_commit, data_hash, weights_sha256.
        scores: measured when it was trained, e.g. `test/nll_nats`.
    """

    shape: list[int]
    levels: int
    labels: list[str]
    protocol: str
    architecture: str
    promoted_at: str
    model: dict[str, Any]
    scores: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Completions:
    """Finished images; `log_probs` are nats of what was missing given what was observed."""

    completions: list[Image]
    log_probs: list[float]
    seed: int
    model: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Finished rows of every completion: `rows[sample][i]` is row `start + i`, its W levels."""

    start: int
    rows: list[Image]


@dataclass(frozen=True, kw_only=True)
class GeneratedImages:
    """Whole images, and their log-probability in nats."""

    images: list[Image]
    log_probs: list[float]
    seed: int
    model: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """The exact likelihood of an image; `surprise` is H x W, the nats that each pixel costs."""

    log_prob: float
    bits_per_dim: float
    surprise: list[list[float]]
    model: dict[str, Any]


Answer = TypeVar("Answer", ServedModel, Completions, Rows, GeneratedImages, Likelihood)


def service_url() -> str:
    """Return the service's address: the environment's, else the default."""
    return os.environ.get(URL_VARIABLE, "").strip().rstrip("/") or DEFAULT_URL


class ServiceClient:
    """Calls the service over HTTP. Safe to share between threads.

    Args:
        url: e.g. `http://127.0.0.1:3000`.
        transport: how to send; for tests.

    Where the environment sets PIXELCNN_TOKEN, every request carries it.

    Every method raises ServiceError, and nothing else, when there is no usable answer; so does making a client for
    what is no address. A busy service is asked again, at most twice, after the seconds that it names (5 at most): no
    request changes anything there. A stream is not: whoever watches one learns at once that there is none.
    """

    def __init__(self, url: str = DEFAULT_URL, transport: httpx.BaseTransport | None = None) -> None:
        if not _is_address(url):
            raise ServiceError(f"{URL_VARIABLE} must be an address like {DEFAULT_URL}, got '{url}'. Set it anew.")
        self.url = url
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not (token.isascii() and token.isprintable()):
            raise ServiceError(f"{TOKEN_VARIABLE} must be printable ASCII text, without blanks. Set it anew.")
        self._http = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {token}"} if token else {},
            transport=transport,
            trust_env=False,  # the service is a neighbour: never by way of a proxy
        )

    def models(self) -> dict[str, ServedModel]:
        """Return what is served, by dataset."""
        answer = self._json("GET", "/models", None, timeout_s=5.0)
        return {dataset: self._answer(ServedModel, values) for dataset, values in answer.items()}

    def complete(
        self,
        dataset: str,
        image: Image,
        observed: list[list[int]],
        *,
        num_samples: int = 1,
        label: int | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> Completions:
        """Have the missing pixels of an image drawn.

        Args:
            image: levels; ignored where missing.
            observed: H x W of 0 (missing) and 1 (known).
            num_samples: 1 to 16.
            label: index of a class; None for none.
            temperature: 1 draws from the model itself.
            seed: 0 to 2^63 - 1; None lets the service choose, and say which.
        """
        body = _body(dataset, num_samples, label, temperature, seed, image=image, observed=observed)
        return self._answer(Completions, self._json("POST", "/complete", body))

    def complete_stream(
        self,
        dataset: str,
        image: Image,
        observed: list[list[int]],
        *,
        num_samples: int = 1,
        label: int | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> Generator[Rows | Completions, None, None]:
        """Like `complete`, telling of each row as it is finished; the last value is the whole answer.

        Closing the iterator ends the request.
        """
        body = _body(dataset, num_samples, label, temperature, seed, image=image, observed=observed)
        try:
            with self._http.stream("POST", "/complete_stream", json=body) as response:
                if response.is_error:
                    response.read()
                    raise self._refusal(response)
                for event, data in _server_sent_events(response.iter_lines()):
                    values = self._decoded(data)
                    if event == "error":
                        raise ServiceError(_sentence(values) or f"The service at {self.url} failed in mid-answer.")
                    if event == "result":
                        yield self._answer(Completions, values)
                        return
                    if event == "rows":
                        yield self._answer(Rows, values)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        raise ServiceError(f"The service at {self.url} stopped in mid-answer. Try again; your drawing is kept.")

    def generate(
        self,
        dataset: str,
        *,
        num_samples: int = 1,
        label: int | None = None,
        temperature: float = 1.0,
        seed: int | None = None,
    ) -> GeneratedImages:
        """Have whole images drawn; arguments as in `complete`."""
        body = _body(dataset, num_samples, label, temperature, seed)
        return self._answer(GeneratedImages, self._json("POST", "/generate", body))

    def likelihood(self, dataset: str, image: Image, *, label: int | None = None) -> Likelihood:
        """Have a whole image scored; arguments as in `complete`."""
        body = {"dataset": dataset, "image": image, "label": -1 if label is None else label}
        return self._answer(Likelihood, self._json("POST", "/likelihood", body))

    def _json(self, method: str, path: str, body: Any, timeout_s: float = READ_TIMEOUT_S) -> Any:
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        for retries_left in range(RETRIES, -1, -1):
            try:
                response = self._http.request(method, path, json=body, timeout=timeout)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from None
            if response.status_code not in BUSY or not retries_left:
                break
            time.sleep(_retry_after_s(response))
        if response.is_error:
            raise self._refusal(response)
        return self._decoded(response.text)

    def _decoded(self, text: str) -> Any:
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise self._foreign()
        return values

    def _answer(self, answer_class: type[Answer], values: Any) -> Answer:
        names = [field.name for field in fields(answer_class)]
        if not isinstance(values, Mapping) or not all(name in values for name in names):
            raise self._foreign()
        return answer_class(**{name: values[name] for name in names})

    def _unreachable(self, error: httpx.HTTPError) -> ServiceError:
        if isinstance(error, httpx.ReadTimeout):
            return ServiceError(f"The service at {self.url} takes too long to answer. Try again; your drawing is kept.")
        return ServiceError(
            f"The service at {self.url} does not answer. Start it with `make serve`; your drawing is kept."
        )

    def _refusal(self, response: httpx.Response) -> ServiceError:
        try:
            sentence = _sentence(response.json())
        except ValueError:
            sentence = ""
        if sentence:
            return ServiceError(sentence)
        if response.status_code in BUSY:
            return ServiceError(f"The service at {self.url} is busy. Try again in a moment; your drawing is kept.")
        if response.status_code >= 500:
            return ServiceError(f"The service at {self.url} failed; its log says why. Your drawing is kept.")
        return self._foreign()

    def _foreign(self) -> ServiceError:
        return ServiceError(
            f"What answers at {self.url} does not speak like the completion service. "
            f"Set {URL_VARIABLE} to the address that `make serve` prints."
        )


def _retry_after_s(response: httpx.Response) -> float:
    """Return how long a busy service asks to be left alone, within bounds."""
    text = response.headers.get("retry-after", "")
    return min(float(text), MAX_RETRY_WAIT_S) if text.isascii() and text.isdecimal() else 1.0


def _is_address(url: str) -> bool:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)


def _body(
    dataset: str, num_samples: int, label: int | None, temperature: float, seed: int | None, **more: Any
) -> dict[str, Any]:
    body = {
        "dataset": dataset,
        "num_samples": num_samples,
        "label": -1 if label is None else label,
        "temperature": temperature,
        **more,
    }
    return body if seed is None else {**body, "seed": seed}


def _sentence(values: Any) -> str:
    """Return the `error` of a refusal's body; empty if it has none."""
    error = values.get("error") if isinstance(values, Mapping) else None
    return error if isinstance(error, str) else ""


def _server_sent_events(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """Yield (event, data) of a stream of server-sent events."""
    event, data = "message", []
    for line in lines:
        if line.startswith("event:"):
            event = line[6:].strip()
        elif line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif line == "" and data:
            yield event, "\n".join(data)
            event, data = "message", []
