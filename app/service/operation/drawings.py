"""What people draw: compared with the champion's reference, and scored by a challenger, too. Figures alone are kept.

All of it happens after the answer. Every fourth drawing of a dataset is scored, in a lane of its own: one at a time,
and none while a request waits. A challenger is another version, named in the model store by `pipelines.steps shadow`.
"""

import contextlib
import functools
import logging
import math
import threading
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from app.service.batching import IDLE_LANE, Batcher, Job
from app.service.champions import Champion, Champions
from app.service.jobs import SamplingJob
from app.service.metrics import metrics
from app.service.operation.drift import SCORE_EVERY, STATISTICS, WINDOW, Drift, Paired, drifts_from
from app.service.settings import settings
from app.service.wire import RequestError
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
        super().__init__(IDLE_LANE, client=self.dataset)  # datasets take turns

    def answer(self) -> list[float]:
        labels = [self.label if one.model.config.num_labels else None for one in self.models]  # some know none
        scored = zip(self.models, labels, strict=True)
        return [drawing_bits_per_dim(one.model, self.levels, self.observed, label).item() for one, label in scored]


@dataclass
class _Watched:
    """A champion, its challenger, and what was seen of drawings since these two are what they are."""

    dataset: str
    champion: Champion
    drifts: dict[str, Drift]  # none where it came without a reference, or with too small a one
    num_drawings: int = 0
    unscored: deque[_Score] = field(default_factory=deque)  # the oldest first
    since: str | None = None  # when the present drift was found, ISO 8601
    challenger: Champion | None = None
    paired: Paired = field(default_factory=Paired)

    def add(self, name: str, value: float) -> None:
        """Add a value of a statistic, and tell of the window that it completes."""
        drift = self.drifts.get(name)
        if drift is None or not drift.add(value):
            return
        _set_gauges(self.dataset, self)
        drifted = any(one.has_drifted for one in self.drifts.values())
        if drifted and self.since is None:
            self.since = datetime.now(UTC).isoformat(timespec="seconds")
            text = "drawings of %s are not like the reference of version %s: %s differs by %.2f."
            logger.warning(text, self.dataset, self.champion.identity.version, name, drift.distance)
        elif not drifted and self.since is not None:
            self.since = None
            logger.info("drawings of %s are like the reference again.", self.dataset)

    def challenge(self, found: Champion | None) -> None:
        """Compare with this challenger, anew if it is another one; not if it is the champion, or for other images."""
        is_rival = (
            found is not None
            and found.identity != self.champion.identity
            and found.model.config.for_same_images(self.champion.model.config)
        )
        challenger = found if is_rival else None
        if self.challenger is not challenger:
            self.challenger, self.paired = challenger, Paired()
            _set_gauges(self.dataset, self)

    def describe(self) -> dict[str, Any]:
        """Return what GET /drawings answers of it."""
        shadow = None
        if self.challenger is not None and self.paired.num > 1:
            shadow = {
                "version": self.challenger.identity.version,
                "drawings": self.paired.num,
                "bits_per_dim_difference": self.paired.interval(),  # challenger minus champion
            }
        return {
            "version": self.champion.identity.version,
            "watched": bool(self.drifts),
            "drifted_since": self.since,
            "drift": {name: drift.describe() for name, drift in self.drifts.items()},
            "shadow": shadow,
        }


def _set_gauges(dataset: str, watched: _Watched | None) -> None:
    """Set the gauges of a dataset: NaN where nothing is known, or compared."""
    paired, drifts = (watched.paired, watched.drifts) if watched else (Paired(), {})
    metrics().drift_watched.labels(dataset).set(bool(drifts) if watched else math.nan)
    for name in STATISTICS:
        drift = drifts.get(name)
        metrics().drift.labels(dataset, name).set(drift.has_drifted if drift else math.nan)
        metrics().drift_distance.labels(dataset, name).set(drift.distance if drift and drift.num_windows else math.nan)
    for bound, value in paired.interval().items():
        metrics().shadow.labels(dataset, bound).set(value if paired.num else math.nan)
    metrics().shadow_drawings.labels(dataset).set(paired.num)


class Drawings:
    """Watch the drawings that are completed, for the champion and the challenger that are served."""

    def __init__(self, batcher: Batcher, champions: Champions) -> None:
        self._batcher, self._champions = batcher, champions
        self._watched: dict[str, _Watched] = {}
        self._lock = threading.Lock()  # shares come from the event loop, scores from their lane

    def completed(self, endpoint: str, job: SamplingJob) -> None:
        """Take a request that was answered, unless its champion is served no more."""
        dataset, champion = job.request.dataset, job.champion
        is_blank = not bool(job.observed[0].any())
        if not settings.watch or is_blank or champion is not self._champions.find(dataset):
            return
        shares = shares_of_drawing(job.image[:1], job.observed[:1], champion.model.config.num_levels)
        with self._lock:
            watched = self._followed(dataset)
            if watched is None:
                watched = self._watched[dataset] = _Watched(dataset, champion, drifts_from(champion.reference))
                _set_gauges(dataset, watched)
            for name, value in shares.items():
                metrics().drawn_share.labels(dataset, name).observe(value.item())
                watched.add(name, value.item())
            watched.num_drawings += 1
            if watched.num_drawings % SCORE_EVERY:
                return
            score = _Score(endpoint, job, [champion, *([watched.challenger] if watched.challenger else [])])
            score.on_call = functools.partial(self._begun, watched, score)
            if len(watched.unscored) == MAX_UNSCORED:
                watched.unscored.popleft().done.cancel()
            watched.unscored.append(score)
        score.done.add_done_callback(lambda _: self._scored(score))
        with contextlib.suppress(RequestError):  # the service is about to end
            self._batcher.submit(score)

    def _begun(self, watched: _Watched, score: _Score) -> None:
        with self._lock, contextlib.suppress(ValueError):  # it was dropped in this moment
            watched.unscored.remove(score)

    def _scored(self, score: _Score) -> None:
        if score.done.cancelled():
            return
        if error := score.done.exception():
            logger.error("a drawing of %s could not be scored.", score.dataset, exc_info=error)
            return
        champion, *others = score.models
        bits = score.done.result()
        with self._lock:
            watched = self._followed(score.dataset)
            if watched is None or watched.champion is not champion:
                return
            metrics().drawn.labels(score.endpoint, score.dataset).observe(bits[0])
            watched.add("bits_per_dim", bits[0])
            if others == [watched.challenger]:  # otherwise its challenge has ended
                watched.paired.add(bits[1] - bits[0])
                _set_gauges(score.dataset, watched)

    def describe(self) -> dict[str, Any]:
        """Return what GET /drawings answers."""
        with self._lock:
            return {dataset: watched.describe() for dataset, watched in sorted(self._watched.items())}

    def forget(self) -> None:
        """Drop what is known of drawings for champions, and challengers, that are no longer served."""
        with self._lock:
            for dataset in list(self._watched):
                self._followed(dataset)

    def _followed(self, dataset: str) -> _Watched | None:
        """Return what is known of drawings for the champion and challenger that are served now. The lock is held."""
        watched = self._watched.get(dataset)
        if watched is None:
            return None
        if watched.champion is self._champions.find(dataset):
            watched.challenge(self._champions.find(dataset, "challenger"))
            return watched
        for score in self._watched.pop(dataset).unscored:
            score.done.cancel()
        _set_gauges(dataset, None)
        return None
