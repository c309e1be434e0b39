"""What people draw: compared with the champion's reference, and scored by a challenger, too. Figures alone are kept.

All of it happens after the answer. Every fourth drawing of a dataset is scored, in a lane of its own: one at a time,
and none while a request waits. A challenger is another version, named in the model store by `pipelines.steps shadow`.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from app.service.batching import Batcher, Job, QueueFull
from app.service.champions import Champion, Champions
from app.service.jobs import SamplingJob
from app.service.metrics import metrics
from app.service.operation.drift import SCORE_EVERY, STATISTICS, WINDOW, Drift, Paired, drifts_from
from app.service.settings import settings
from pixelcnn.completion import drawing_bits_per_dim, shares_of_drawing

logger = logging.getLogger("bentoml.pixelcnn")

MAX_UNSCORED = 2 * WINDOW // SCORE_EVERY  # drawings of a dataset that wait to be scored; the oldest are dropped


class _Score(Job):
    """A finished completion, whose known part the champion, and a challenger if there is one, score in bits per dim."""

    def __init__(self, endpoint: str, finished: SamplingJob, models: list[Champion]) -> None:
        assert finished.levels is not None
        self.endpoint, self.dataset, self.models = endpoint, finished.request.dataset, models
        # Copies of the first image: what else its call has computed is not kept until there is time.
        self.levels, self.observed = finished.levels[:1].clone(), finished.observed[:1].clone()
        self.label = None if finished.label is None else finished.label[:1]
        super().__init__("drawings", object(), 1)

    def answer(self) -> list[float]:
        labels = [self.label if one.model.config.num_labels else None for one in self.models]  # some know none
        scored = zip(self.models, labels, strict=True)
        return [drawing_bits_per_dim(one.model, self.levels, self.observed, label).item() for one, label in scored]


@dataclass
class _Watched:
    """A champion, its challenger, and what was seen of drawings since these two are what they are."""

    champion: Champion
    drifts: dict[str, Drift]
    num_drawings: int = 0
    unscored: deque[_Score] = field(default_factory=lambda: deque(maxlen=MAX_UNSCORED))
    since: str | None = None  # when the present drift was found, ISO 8601
    challenger: Champion | None = None
    paired: Paired = field(default_factory=Paired)

    @property
    def is_compared(self) -> bool:
        """Whether its champion came with a reference of all statistics, and that is large enough."""
        return self.drifts.keys() >= set(STATISTICS)


class Drawings:
    """Watch the drawings that are completed.

    Args:
        batcher: computes the scores, in a lane of its own.
        challengers: at most one of each dataset; one that is the champion itself, or for other images, does not count.
    """

    def __init__(self, batcher: Batcher, challengers: Champions) -> None:
        self._batcher, self._challengers = batcher, challengers
        self._watched: dict[str, _Watched] = {}
        self._score: Job | None = None  # the last that was begun
        self._lock = threading.Lock()  # shares come from the event loop, scores from their lane

    def completed(self, endpoint: str, dataset: str, job: SamplingJob) -> None:
        """Take a request that was answered."""
        if not settings.watch or not bool(job.observed[0].any()):
            return
        shares = shares_of_drawing(job.image[:1], job.observed[:1], job.champion.model.config.num_levels)
        with self._lock:
            watched = self._of(dataset, job.champion)
            for name, value in shares.items():
                metrics().drawn_share.labels(dataset, name).observe(value.item())
                self._add(dataset, watched, name, value.item())
            watched.num_drawings += 1
            if watched.num_drawings % SCORE_EVERY == 0:
                found = self._challengers.find(dataset)
                others = [found] if found and _can_challenge(found, job.champion) else []
                watched.unscored.append(_Score(endpoint, job, [job.champion, *others]))
        self._score_next()

    def _score_next(self) -> None:
        """Score a drawing of the dataset that has most of them, unless one is being scored or a request waits."""
        with self._lock:
            unscored = max((watched.unscored for watched in self._watched.values()), key=len, default=None)
            is_free = self._score is None or self._score.done.done()
            if not unscored or not is_free or self._batcher.num_waiting:
                return
            score = unscored.popleft()
            self._score = score
        score.done.add_done_callback(lambda _: self._scored(score))
        try:
            self._batcher.submit(score)
        except QueueFull:
            score.done.cancel()

    def describe(self) -> dict[str, Any]:
        """Return what GET /drawings answers."""
        with self._lock:
            return {dataset: _description(watched) for dataset, watched in sorted(self._watched.items())}

    def forget(self, champions: Champions) -> None:
        """Drop what is known of drawings for champions that are no longer served."""
        with self._lock:
            for dataset, watched in list(self._watched.items()):
                if watched.champion is not champions.find(dataset):
                    del self._watched[dataset]
                    self._tell_nothing_yet(dataset)

    def _of(self, dataset: str, champion: Champion) -> _Watched:
        """Return what is known of a champion's drawings; a new champion begins anew. The lock is held."""
        watched = self._watched.get(dataset)
        if watched is None or watched.champion is not champion:
            drifts = drifts_from(champion.reference)
            watched = self._watched[dataset] = _Watched(champion, drifts)
            self._tell_nothing_yet(dataset, watched.is_compared, drifts)
        return watched

    def _tell_nothing_yet(self, dataset: str, is_compared: float = math.nan, drifts: Collection[str] = ()) -> None:
        metrics().drift_watched.labels(dataset).set(is_compared)
        for name in STATISTICS:  # nothing is told of what is not compared
            metrics().drift.labels(dataset, name).set(0 if name in drifts else math.nan)
            metrics().drift_distance.labels(dataset, name).set(math.nan)
        self._tell_no_challenge(dataset)

    def _tell_no_challenge(self, dataset: str) -> None:
        metrics().shadow_drawings.labels(dataset).set(0)
        for bound in Paired().interval():
            metrics().shadow.labels(dataset, bound).set(math.nan)

    def _add(self, dataset: str, watched: _Watched, name: str, value: float) -> None:
        """Add a value of a statistic. The lock is held."""
        drift = watched.drifts.get(name)
        if drift is None or not drift.add(value):
            return
        metrics().drift.labels(dataset, name).set(drift.has_drifted)
        metrics().drift_distance.labels(dataset, name).set(drift.distance)
        drifted = [name for name, one in watched.drifts.items() if one.has_drifted]
        if drifted and watched.since is None:
            watched.since = datetime.now(UTC).isoformat(timespec="seconds")
            text = "drawings of %s are not like the reference of version %s: %s differs by %.2f."
            logger.warning(text, dataset, watched.champion.identity.version, name, drift.distance)
        elif not drifted and watched.since is not None:
            watched.since = None
            logger.info("drawings of %s are like the reference again.", dataset)

    def _scored(self, score: _Score) -> None:
        if score.done.cancelled():
            return
        if error := score.done.exception():
            logger.error("a drawing of %s could not be scored.", score.dataset, exc_info=error)
            self._score_next()
            return
        dataset, bits = score.dataset, score.done.result()
        with self._lock:
            watched = self._watched.get(dataset)
            if watched is not None and watched.champion is score.models[0]:
                metrics().drawn.labels(score.endpoint, dataset).observe(bits[0])
                self._add(dataset, watched, "bits_per_dim", bits[0])
                challenger = score.models[1] if len(bits) > 1 else None
                if watched.challenger is not challenger:  # another one, or none any more
                    watched.challenger, watched.paired = challenger, Paired()
                    self._tell_no_challenge(dataset)
                if challenger is not None:
                    watched.paired.add(bits[1] - bits[0])
                    for bound, value in watched.paired.interval().items():
                        metrics().shadow.labels(dataset, bound).set(value)
                    metrics().shadow_drawings.labels(dataset).set(watched.paired.num)
        self._score_next()


def _can_challenge(challenger: Champion, champion: Champion) -> bool:
    """Say whether it is another version, for the same images and labels."""
    is_other = challenger.identity != champion.identity
    return is_other and challenger.model.config.for_same_images(champion.model.config)


def _description(watched: _Watched) -> dict[str, Any]:
    told: dict[str, Any] = {
        "version": watched.champion.identity.version,
        "watched": watched.is_compared,
        "drifted_since": watched.since,
        "drift": {name: drift.describe() for name, drift in watched.drifts.items()},
        "shadow": None,
    }
    if watched.challenger is not None and watched.paired.num > 1:
        told["shadow"] = {
            "version": watched.challenger.identity.version,
            "drawings": watched.paired.num,
            "bits_per_dim_difference": watched.paired.interval(),  # challenger minus champion
        }
    return told
