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
import contextlib
import gc
import json
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, cast

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")

import bentoml
import torch
from bentoml._internal.utils.analytics import usage_stats
from fastapi import FastAPI
from torch import Tensor

from app.batching import Batches, Full, Job
from app.champions import Champions, store_folder
from app.gate import TOKEN_VARIABLE, Gate, setting
from app.jobs import LikelihoodJob, SamplingJob, WatchJob
from app.metrics import metrics
from app.openapi import corrected
from app.wire import (
    CompleteAnswer,
    CompleteRequest,
    GenerateAnswer,
    GenerateRequest,
    LikelihoodAnswer,
    LikelihoodRequest,
    RequestError,
    sse,
    to_lists,
)

# `bentoml serve` asked before this module was imported, and would report usage to its makers.
usage_stats.do_not_track.cache_clear()

logger = logging.getLogger("bentoml.pixelcnn")

WATCH_EVERY_S = 1.0  # drawings are scored for the metrics at most so often
MAX_BATCH_IMAGES = 16  # of requests that share a call
SWITCH_S = 0.0005  # after which a thread that runs Python lets another do so
MAX_QUEUE = setting("PIXELCNN_MAX_QUEUE", 48)
TIMEOUT_S = setting("PIXELCNN_TIMEOUT_S", 120)


class _NotForTheLog(logging.Filter):
    """Keep a client's mistakes out of the server's log: BentoML writes a traceback for each."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], RequestError))


logging.getLogger("bentoml._internal.server.http_app").addFilter(_NotForTheLog())

models_app = FastAPI(title="models", docs_url=None, redoc_url=None, openapi_url=None)


@bentoml.service(
    name="pixelcnn",
    workers=1,
    traffic={"timeout": TIMEOUT_S},
    tracing={"excluded_urls": ".*"},  # nobody collects traces here, and making them takes time
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
        # Or the event loop waits, 100 ms now and then while the garbage collector looks through all that is loaded,
        # and 5 ms again and again for a thread that computes.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_S)

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
