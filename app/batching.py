"""Adaptive batching: requests that come while the sampler is busy share its next call.

There is no timer. A request that finds its lane idle is computed at once, alone; what arrives meanwhile waits, and the
next call takes the oldest request with all that wait and have the same key, up to a number of images. A lane is a
thread of its own, so that a long computation in one does not hold up another.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from typing import Any


class Full(Exception):
    """As many requests wait as may wait."""


class Job:
    """A request that waits for its computation; cancelling `done` drops it.

    Args:
        lane: jobs of one lane are computed one call after the other.
        key: jobs of a lane with equal keys can share a call.
        num_images: what it adds to a call.
    """

    def __init__(self, lane: str, key: Hashable, num_images: int) -> None:
        self.lane, self.key, self.num_images = lane, key, num_images
        self.done: Future[Any] = Future()

    @staticmethod
    def run_together(jobs: list[Any]) -> None:
        """Compute these jobs in one call, and `finish` each."""
        raise NotImplementedError

    def finish(self, answer: Any) -> None:
        """Give the answer to whoever waits for it, if somebody still does."""
        try:
            if isinstance(answer, BaseException):
                self.done.set_exception(answer)
            else:
                self.done.set_result(answer)
        except InvalidStateError:
            pass  # cancelled


class Batches:
    """Jobs that wait, and the threads that compute them.

    Args:
        max_images: of a call with several jobs; a larger job is computed alone.
        max_waiting: jobs that may wait, in all lanes together.
        on_wait: is told how many wait, whenever that changes.
        on_call: is told the jobs of each call, before it.
    """

    def __init__(
        self,
        max_images: int,
        max_waiting: int,
        on_wait: Callable[[int], None] = lambda num: None,
        on_call: Callable[[list[Job]], None] = lambda jobs: None,
    ) -> None:
        self.max_images, self.max_waiting = max_images, max_waiting
        self._on_wait, self._on_call = on_wait, on_call
        self._changed = threading.Condition()
        self._waiting: dict[str, list[Job]] = {}
        self._closed = False

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def is_idle(self, lane: str) -> bool:
        """Say whether nothing waits in a lane."""
        return not self._waiting.get(lane)

    def submit(self, job: Job) -> None:
        """Let a job be computed; its `done` tells when.

        Raises:
            Full: too many wait; the job is not taken.
        """
        with self._changed:
            if self._closed or self.num_waiting >= self.max_waiting:
                raise Full
            if job.lane not in self._waiting:
                self._waiting[job.lane] = []
                threading.Thread(target=self._work, args=(job.lane,), name=f"lane-{job.lane}", daemon=True).start()
            self._waiting[job.lane].append(job)
            self._on_wait(self.num_waiting)
            self._changed.notify_all()
        job.done.add_done_callback(lambda _: self._drop(job))

    def close(self) -> None:
        """End the threads after what they are at, and cancel what waits."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._changed.notify_all()
        for job in left:
            job.done.cancel()

    def _drop(self, job: Job) -> None:
        with self._changed:
            if job in self._waiting[job.lane]:
                self._waiting[job.lane].remove(job)
                self._on_wait(self.num_waiting)

    def _take(self, lane: str) -> list[Job]:
        """Wait for jobs; return those of the next call, none when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting[lane])
            taken: list[Job] = []
            for job in [] if self._closed else self._waiting[lane]:
                num_images = sum(other.num_images for other in taken) + job.num_images
                if not taken or (job.key == taken[0].key and num_images <= self.max_images):
                    taken.append(job)
            for job in taken:
                self._waiting[lane].remove(job)
            self._on_wait(self.num_waiting)
            return taken

    def _work(self, lane: str) -> None:
        while jobs := self._take(lane):
            self._on_call(jobs)
            try:
                jobs[0].run_together(jobs)
            except Exception as error:
                for job in jobs:
                    job.finish(error)
