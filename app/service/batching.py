"""Adaptive batching: requests that arrive while the sampler is busy share its next call.

A request that finds its lane idle is computed at once, alone; what arrives meanwhile waits, and the next call takes the
request whose turn it is with all others of the same key, up to a number of images. Turns go round the clients: who
sends many requests at once waits behind who sends one. Each lane is a thread, so that a long computation in one does
not hold up another. A request that needs more than one call may also rest in between.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from app.service.metrics import metrics
from app.service.wire import RequestError

logger = logging.getLogger("bentoml.pixelcnn")

IDLE_LANE = "/drawings"  # its jobs are no requests, and wait until none waits; no dataset is named with a slash
MAX_CLIENTS = 1024  # whose last turns are remembered


@dataclass(eq=False)
class Job:
    """A request that waits for its computation; cancelling the future `done` drops it."""

    lane: str  # its jobs are computed one call after the other
    key: Hashable = field(default_factory=object)  # jobs of a lane with equal keys can share a call
    num_images: int = 1  # what it adds to a call
    client: str = ""  # whose turn it takes
    on_call: Callable[[], None] = lambda: None  # told when its call begins
    num_calls: int = 0  # that it took part in
    not_before: float = 0.0  # time.monotonic() of its next call, at the earliest
    done: Future[Any] = field(default_factory=Future)

    @staticmethod
    def run_together(jobs: list[Any]) -> None:
        """Compute these jobs in one call, and `finish` each; what is raised fails all that are unfinished.

        Who is left unfinished waits for another call, behind all who have had none.
        """
        for job in jobs:
            job.finish(job.answer())

    def answer(self) -> Any:
        """Return the result of this job, which shares nothing with others."""
        raise NotImplementedError

    def finish(self, result: Any) -> None:
        """Resolve `done` with a result or an exception, unless that has happened or it was cancelled."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(result, BaseException):
                self.done.set_exception(result)
            else:
                self.done.set_result(result)


class Batcher:
    """The waiting jobs, and the threads that compute them, one for each lane."""

    def __init__(self, max_images: int, max_waiting: int) -> None:
        self.max_images = max_images  # of a call with several jobs; a larger job is computed alone
        self.max_waiting = max_waiting  # requests, in all lanes together
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._turns: dict[str, int] = {}  # of each client, the number of its last turn, the oldest first
        self._numbers = itertools.count(1)
        self._lanes: set[str] = set()
        self._closed = False

    @property
    def num_waiting(self) -> int:
        return sum(job.lane != IDLE_LANE for job in self._waiting)

    def submit(self, job: Job) -> None:
        """Queue a job, whose `done` resolves when it is computed; RequestError (429) if too many wait already."""
        with self._changed:
            if self._closed or (self.num_waiting >= self.max_waiting and job.lane != IDLE_LANE):
                raise RequestError(
                    f"{self.num_waiting} requests wait already: send this one again in a few seconds.", 429
                )
            if job.lane not in self._lanes:
                threading.Thread(target=self._work, args=(job.lane,), name=f"lane-{job.lane}", daemon=True).start()
                self._lanes.add(job.lane)  # only now: if the start fails, the lane's next job tries again
            self._set_waiting([*self._waiting, job])
        job.done.add_done_callback(lambda _: self._drop(job))

    def close(self) -> None:
        """Stop the threads after their current call, and cancel what waits."""
        with self._changed:
            self._closed = True
            waiting = self._waiting
            self._set_waiting([])
        for job in waiting:
            job.done.cancel()

    def _set_waiting(self, jobs: list[Job]) -> None:
        self._waiting = jobs
        self._changed.notify_all()
        with _failures_logged():
            metrics().waiting.set(self.num_waiting)

    def _drop(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting:
                self._set_waiting([other for other in self._waiting if other is not job])

    def _take(self, lane: str) -> list[Job]:
        """Wait for jobs; return those of the next call, none when closed."""
        with self._changed:
            while not (ready := self._in_turn(lane)) and not self._closed:
                # What waits in the idle lane does so for a change, in the others for its time.
                times = [job.not_before for job in self._waiting if job.lane == lane != IDLE_LANE]
                self._changed.wait(min(times) - time.monotonic() if times else None)
            taken: list[Job] = []
            num_images = 0
            for job in ready:
                if not taken or (job.key == taken[0].key and num_images + job.num_images <= self.max_images):
                    taken.append(job)
                    num_images += job.num_images
                    self._turns.pop(job.client, None)
                    self._turns[job.client] = next(self._numbers)
            while len(self._turns) > MAX_CLIENTS:
                del self._turns[next(iter(self._turns))]
            self._set_waiting([job for job in self._waiting if job not in taken])
            return taken

    def _in_turn(self, lane: str) -> list[Job]:
        """Return what may be computed in a lane: of each client the first job, the client first whose turn was longest
        ago; then of each the second, and so on. Who has had a call counts as one further back."""
        if lane == IDLE_LANE and self.num_waiting:
            return []
        now = time.monotonic()
        waiting = [job for job in self._waiting if job.lane == lane and job.not_before <= now]
        rounds: Counter[str] = Counter()
        places = {}
        for job in waiting:
            places[job] = (rounds[job.client] + job.num_calls, self._turns.get(job.client, 0))
            rounds[job.client] += 1
        return sorted(waiting, key=places.__getitem__)

    def _work(self, lane: str) -> None:
        while jobs := self._take(lane):
            with _failures_logged():
                for job in jobs:
                    job.on_call()
                metrics().batch_requests.labels(lane).observe(len(jobs))
                metrics().batch_images.labels(lane).observe(sum(job.num_images for job in jobs))
            try:
                jobs[0].run_together(jobs)
            except BaseException as error:  # a library's own, such as a PanicException of Rust, is not an Exception
                for job in jobs:
                    job.finish(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            with self._changed:
                unfinished = [job for job in jobs if not job.done.done()]
                if unfinished and not self._closed:
                    for job in unfinished:
                        job.num_calls += 1
                    self._set_waiting([*self._waiting, *unfinished])
                    continue
            for job in unfinished:
                job.done.cancel()


@contextlib.contextmanager
def _failures_logged() -> Iterator[None]:
    """Log what an observer raises, which must neither fail a job nor end a lane's thread."""
    try:
        yield
    except Exception:
        logger.exception("an observer of the queue failed")
