"""What people draw: compared with the champion's reference, and scored by a challenger, too. Figures alone are kept.

All of it happens after the answer, in a lane of its own: one drawing at a time, at most one a second, and none while a
request waits. A challenger is another version, named in the model store by `pipelines.steps shadow`.
"""

import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from app.service.batching import Batcher, Job, QueueFull
from app.service.champions import Champion, Champions
from app.service.jobs import SamplingJob
from app.service.metrics import metrics
from app.service.operation.drift import STATISTICS, Drift, Paired
from app.service.settings import settings
from pixelcnn.completion import drawing_bits_per_dim, shares_of_drawing

logger = logging.getLogger("bentoml.pixelcnn")

SCORE_EVERY_S = 1.0


class _Score(Job):
    """A finished completion, whose known part is scored: `done` holds each model's bits per dimension."""

    def __init__(self, finished: SamplingJob, models: list[Champion]) -> None:
        self.finished, self.models = finished, models
        super().__init__("drawings", object(), 1)

    @staticmethod
    def run_together(jobs: list["_Score"]) -> None:
        for job in jobs:
            of = job.finished
            assert of.levels is not None
            label = None if of.label is None else of.label[:1]
            scored = [drawing_bits_per_dim(one.model, of.levels[:1], of.observed[:1], label) for one in job.models]
            job.finish([bits.item() for bits in scored])


@dataclass
class _Watched:
    """A champion, its challenger, and what was seen of drawings since these two are what they are."""

    champion: Champion
    drifts: dict[str, Drift]
    since: str | None = None  # when the present drift was found, ISO 8601
    challenger: Champion | None = None
    paired: Paired = field(default_factory=Paired)


class Drawings:
    """Watch the drawings that are completed.

    Args:
        batcher: computes the scores, in a lane of its own.
        challengers: at most one of each dataset; one that is the champion itself does not count.
    """

    def __init__(self, batcher: Batcher, challengers: Champions) -> None:
        self._batcher, self._challengers = batcher, challengers
        self._watched: dict[str, _Watched] = {}
        self._score: Job | None = None  # the last that was begun
        self._next_score = 0.0  # time.monotonic()
        self._lock = threading.Lock()  # shares come from the event loop, scores from their lane

    def completed(self, endpoint: str, dataset: str, job: SamplingJob) -> None:
        """Take a request that was answered."""
        if not settings.watch or not bool(job.observed[0].any()):
            return
        shares = shares_of_drawing(job.image[:1], job.observed[:1], job.champion.config.num_levels)
        for name, value in shares.items():
            metrics().drawn_share.labels(dataset, name).observe(value.item())
            self._add(dataset, job.champion, name, value.item())
        now = time.monotonic()
        is_free = self._score is None or self._score.done.done()
        if not is_free or self._batcher.num_waiting or now < self._next_score:
            return
        self._next_score = now + SCORE_EVERY_S
        challenger = self._challenger_of(dataset, job.champion)
        score = self._score = _Score(job, [job.champion, *([challenger] if challenger else [])])
        score.done.add_done_callback(lambda done: self._scored(endpoint, dataset, score))
        with contextlib.suppress(QueueFull):
            self._batcher.submit(score)
            return
        score.done.cancel()

    def describe(self) -> dict[str, Any]:
        """Return what GET /drawings answers."""
        with self._lock:
            return {dataset: _description(watched) for dataset, watched in sorted(self._watched.items())}

    def _challenger_of(self, dataset: str, champion: Champion) -> Champion | None:
        found = self._challengers.find(dataset)
        return None if found is None or found.identity == champion.identity else found

    def _of(self, dataset: str, champion: Champion) -> _Watched:
        """Return what is known of a champion's drawings; a new champion begins anew."""
        watched = self._watched.get(dataset)
        if watched is None or watched.champion is not champion:
            drifts = {name: Drift(values) for name, values in champion.reference.items()}
            watched = self._watched[dataset] = _Watched(champion, drifts)
            for name in STATISTICS:
                metrics().drift.labels(dataset, name).set(0)
            metrics().shadow_drawings.labels(dataset).set(0)
        return watched

    def _add(self, dataset: str, champion: Champion, name: str, value: float) -> None:
        with self._lock:
            watched = self._of(dataset, champion)
            drift = watched.drifts.get(name)
            if drift is None or not drift.add(value):
                return
            metrics().drift.labels(dataset, name).set(drift.has_drifted)
            metrics().drift_distance.labels(dataset, name).set(drift.distance)
            drifted = [name for name, one in watched.drifts.items() if one.has_drifted]
            if drifted and watched.since is None:
                watched.since = datetime.now(UTC).isoformat(timespec="seconds")
                text = "drawings of %s are not like the reference of version %s: %s differs by %.2f."
                logger.warning(text, dataset, champion.identity.version, name, drift.distance)
            elif not drifted and watched.since is not None:
                watched.since = None
                logger.info("drawings of %s are like the reference again.", dataset)

    def _scored(self, endpoint: str, dataset: str, score: _Score) -> None:
        if score.done.cancelled() or score.done.exception():
            return
        champion, bits = score.models[0], score.done.result()
        metrics().drawn.labels(endpoint, dataset).observe(bits[0])
        self._add(dataset, champion, "bits_per_dim", bits[0])
        if len(bits) == 1:
            return
        with self._lock:
            watched, challenger = self._of(dataset, champion), score.models[1]
            if watched.challenger is not challenger:
                watched.challenger, watched.paired = challenger, Paired()
            watched.paired.add(bits[1] - bits[0])
            low, high = watched.paired.interval()
            for bound, value in (("low", low), ("mean", watched.paired.mean), ("high", high)):
                metrics().shadow.labels(dataset, bound).set(value)
            metrics().shadow_drawings.labels(dataset).set(watched.paired.num)


def _description(watched: _Watched) -> dict[str, Any]:
    told: dict[str, Any] = {
        "version": watched.champion.identity.version,
        "drifted_since": watched.since,
        "drift": {name: drift.describe() for name, drift in watched.drifts.items()},
        "shadow": None,
    }
    if watched.challenger is not None and watched.paired.num > 1:
        low, high = watched.paired.interval()
        told["shadow"] = {
            "version": watched.challenger.identity.version,
            "drawings": watched.paired.num,
            "bits_per_dim_less": {"low": low, "mean": watched.paired.mean, "high": high},
        }
    return told
