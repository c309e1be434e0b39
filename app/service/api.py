"""The service's endpoints: decode a request, have it computed, encode the answer.

It serves what promotion put into BentoML's model store, and takes up a new champion without a restart. Its settings are
in settings.py.
"""

import asyncio
import contextlib
import functools
import gc
import json
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, TypeVar, cast

import bentoml
from bentoml.images import Image
from fastapi import FastAPI, HTTPException
from fastapi.responses import HTMLResponse
from torch import Tensor

from app.service import gate, wire
from app.service.batching import Batcher, Job
from app.service.champions import Champions, pinned_models, released_by_dataset, store_folder
from app.service.images import to_lists
from app.service.jobs import LikelihoodJob, ReadingJob, SamplingJob
from app.service.metrics import metrics
from app.service.openapi import amended
from app.service.operation.drawings import Drawings
from app.service.operation.readiness import drain_on_sigterm, end_without_server, why_not_ready
from app.service.operation.requests import RequestLog, line_of_request
from app.service.settings import settings, tracing
from pixelcnn.sampling.fast import set_sampler_threads

logger = logging.getLogger("bentoml.pixelcnn")

MAX_BATCH_IMAGES = 36  # of requests that share a call: nine endings for four canvases take half the processor time
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>PixelCNN service</title>
<h1>PixelCNN service</h1>
<p>It completes, generates and scores images over HTTP; the canvas is a program of its own.</p>
<ul>
<li><a href="models">/models</a>: what is served</li>
<li><a href="docs.json">/docs.json</a>: how to ask: OpenAPI</li>
<li><a href="readyz">/readyz</a>: whether it is ready</li>
<li><a href="metrics">/metrics</a>: its figures, for Prometheus</li>
</ul>
</html>
"""

# Clients' mistakes stay out of the server's log, where BentoML would write a traceback for each.
logging.getLogger("bentoml._internal.server.http_app").addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], wire.RequestError))
)

_Kind = TypeVar("_Kind", bound=Job)
models_app = FastAPI(title="models", docs_url=None, redoc_url=None, openapi_url=None)


@bentoml.service(
    name="pixelcnn",
    workers=1,
    traffic={"timeout": settings.timeout_s},
    tracing=tracing(),
    logging={"access": {"enabled": False}},  # RequestLog's lines say more
    metrics={"enabled": settings.watch},
    http={"host": "127.0.0.1", "port": 3000},
)
@bentoml.asgi_app(models_app)
class PixelCNNService:
    """Complete, generate and score images with the champion of each dataset."""

    def __init__(self) -> None:
        self.server = os.getppid()  # `bentoml serve`
        set_sampler_threads(settings.threads)
        self.champions = Champions(store_folder(), self._on_poll)
        self.batcher = Batcher(MAX_BATCH_IMAGES, settings.max_queue)
        self.drawings = Drawings(self.batcher, self.champions)

    @bentoml.on_startup
    def start(self) -> None:
        """Load the champions before the first request."""
        self.champions.start(released_by_dataset() if settings.released else {})
        drain_on_sigterm(self._on_poll)
        self.openapi = json.dumps(_service.openapi_spec.asdict())  # once: it takes tens of milliseconds
        # gc.freeze(): full collections of all that is loaded would stall the event loop for about 100 ms.
        gc.collect()
        gc.freeze()
        # Threads that compute in Python would otherwise keep the event loop waiting for 5 ms at a time.
        sys.setswitchinterval(0.0005)

    @bentoml.on_shutdown
    def shut_down(self) -> None:
        """Finish the current calls; cancel what waits."""
        self.champions.stop()
        self.batcher.close()

    def _on_poll(self) -> None:
        """Bring gauge and watched drawings up to what is served, after each poll and at SIGTERM; end if orphaned."""
        end_without_server(self.server)
        metrics().ready.set(not why_not_ready(self.champions.describe()))
        self.drawings.forget()

    async def __is_ready__(self) -> bool:
        """Tell BentoML's /readyz; its /livez, which asks for nothing, says that this process answers."""
        if reason := why_not_ready(self.champions.describe()):
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, json.dumps({"error": reason}))
        return True

    async def _submit(
        self, kind: Callable[..., _Kind], request: wire.GenerateRequest | wire.LikelihoodRequest, *more: Any
    ) -> _Kind:
        """Queue the job of a request, and return it; RequestError if it does not fit the champion."""
        champion = self.champions.get(request.dataset)
        client, line = gate.client.get(), line_of_request.get({})
        line.update(dataset=request.dataset, version=champion.identity.version)
        read = functools.partial(kind, champion, request, *more)
        if isinstance(getattr(request, "image", None), str):
            reading = ReadingJob(read)
            reading.client = client
            self.batcher.submit(reading)
            job = cast(_Kind, await asyncio.wrap_future(reading.done))
        else:
            job = read()
        start = time.perf_counter()
        job.on_call = lambda: line.setdefault("waited_s", round(time.perf_counter() - start, 4))
        job.client = client
        self.batcher.submit(job)
        return job

    @contextlib.contextmanager
    def _measured(self, endpoint: str, dataset: str) -> Iterator[None]:
        """Record the seconds of an answer, be it a failure, or that its client disconnected."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if isinstance(sys.exception(), asyncio.CancelledError | GeneratorExit):
                metrics().disconnects.labels(endpoint, dataset).inc()
            else:
                metrics().seconds.labels(endpoint, dataset).observe(time.perf_counter() - start)

    async def _answer(self, endpoint: str, dataset: str, job: Job) -> Any:
        with self._measured(endpoint, dataset):
            return await asyncio.wrap_future(job.done)  # cancelled with the request

    @models_app.get("/models")
    def list_models(self) -> dict[str, Any]:
        """Describe the champion of each dataset: shape, levels, labels, lineage, scores."""
        return self.champions.describe()

    @models_app.get("/drawings")
    def list_drawings(self) -> dict[str, Any]:
        """Tell of each dataset's drawings: are they like the reference, and which of two versions knows them better."""
        return self.drawings.describe()

    @models_app.get("/", include_in_schema=False)
    def page(self) -> HTMLResponse:
        """Return a page in place of BentoML's, which has a browser load programs from elsewhere."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": "default-src 'none'"})

    @models_app.get("/docs.json", include_in_schema=False)
    def document(self) -> dict[str, Any]:
        """Return the OpenAPI document, in place of BentoML's."""
        return amended(json.loads(self.openapi), self.champions.describe())

    @bentoml.api
    async def complete(self, request: wire.CompleteRequest, /) -> wire.CompleteAnswer:
        """Fill in the missing pixels of an image, several times."""
        job = await self._submit(SamplingJob, request)
        answer: wire.CompleteAnswer = await self._answer("complete", request.dataset, job)
        # Once the answer is on its way.
        asyncio.get_running_loop().call_soon(self.drawings.completed, "complete", job)
        return answer

    @bentoml.api
    async def complete_stream(self, request: wire.CompleteRequest, /) -> AsyncGenerator[str, None]:
        """Do the same, sending each finished row: events `rows`, then `result` (or `error`)."""
        loop = asyncio.get_running_loop()
        end = loop.time() + settings.timeout_s
        # Unbounded, but it holds one image's rows at most: the sampler never waits for a slow reader.
        events: asyncio.Queue[str | None] = asyncio.Queue()

        def put(event: str | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def on_row(row: int, levels: Tensor) -> None:
            put(wire.server_sent_event("rows", json.dumps({"start": row, "rows": to_lists(levels[:, :, None])})))

        job = await self._submit(SamplingJob, request, on_row)
        job.done.add_done_callback(lambda _: put(None))
        try:
            with self._measured("complete_stream", request.dataset):
                yield ": drawing\n\n"  # The answer has begun: BentoML's own timeout no longer applies.
                while (event := await asyncio.wait_for(events.get(), end - loop.time())) is not None:
                    yield event
                yield wire.server_sent_event("result", job.done.result().model_dump_json())
            loop.call_soon(self.drawings.completed, "complete_stream", job)
        except Exception as error:
            status, text = 504, f"the completion took longer than {settings.timeout_s} s: ask for less."
            if not isinstance(error, TimeoutError):
                logger.exception("completion failed while it was streamed")
                status, text = 500, "the completion failed: the service's log says why."
            line_of_request.get({}).update(status=status)  # its response began as 200
            yield wire.server_sent_event("error", json.dumps({"error": text}))
        finally:
            job.done.cancel()  # The client may have disconnected: stop drawing.

    @bentoml.api
    async def generate(self, request: wire.GenerateRequest, /) -> wire.GenerateAnswer:
        """Sample whole images."""
        job = await self._submit(SamplingJob, request)
        return cast(wire.GenerateAnswer, await self._answer("generate", request.dataset, job))

    @bentoml.api
    async def likelihood(self, request: wire.LikelihoodRequest, /) -> wire.LikelihoodAnswer:
        """Score an image: its log-probability, and how surprising each pixel is."""
        job = await self._submit(LikelihoodJob, request)
        answer: wire.LikelihoodAnswer = await self._answer("likelihood", request.dataset, job)
        metrics().drawn.labels("likelihood", request.dataset).observe(answer.bits_per_dim)
        return answer


_service = cast(bentoml.Service[Any], PixelCNNService)
_service.models += pinned_models()
# The same bits need these releases; the build of PyTorch, for a CPU or a GPU, is the choice of who installs the Bento.
_pinned = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "numpy", "numba", "llvmlite")]
_service.image = Image().python_packages(*_pinned)
_service.add_asgi_middleware(RequestLog, paths=["/models", *(f"/{name}" for name in _service.apis)])
_service.add_asgi_middleware(gate.Gate, token=settings.token.get_secret_value().strip())
