"""What the service reports to Prometheus at /metrics: numbers alone, never an image."""

import functools
import os
from pathlib import Path
from typing import Any

from app.service.settings import settings

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
BITS_PER_DIM = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12)
SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1)
COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The service's own metrics; `metrics()` returns the one instance.

    The label `dataset` is always one that is served, so that clients cannot create time series.
    """

    def __init__(self) -> None:
        # Imported late: prometheus_client reads PROMETHEUS_MULTIPROC_DIR when imported, and BentoML's worker sets it
        # after our code is loaded.
        from prometheus_client import Counter, Gauge, Histogram

        def gauge(name: str, text: str, labels: str = "") -> Gauge:
            return Gauge(name, text, labels.split(), multiprocess_mode="mostrecent")  # no process's ID as a label

        def histogram(name: str, text: str, labels: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, labels.split(), buckets=buckets)

        self.requests = Counter("pixelcnn_requests", "Requests, by path and status.", ["path", "status"])
        self.disconnects = Counter(
            "pixelcnn_left_requests", "Requests left, or out of time, before the answer.", ["endpoint", "dataset"]
        )
        self.seconds = histogram(
            "pixelcnn_request_seconds", "From a checked request to its answer, wait too.", "endpoint dataset", SECONDS
        )
        self.waiting = gauge("pixelcnn_waiting_requests", "Requests that wait for a call.")
        self.batch_requests = histogram("pixelcnn_batch_requests", "Requests that shared a call.", "lane", COUNTS)
        self.batch_images = histogram("pixelcnn_batch_images", "Images of a call.", "lane", COUNTS)
        self.champion = gauge(
            "pixelcnn_champion", "1 for what is served, or loaded as challenger.", "dataset version role"
        )
        self.refused = gauge(
            "pixelcnn_champion_refused", "1 while the newest version cannot be served.", "dataset role"
        )
        self.store_readable = gauge("pixelcnn_store_readable", "1 while the model store is, 0 before any promotion.")
        self.ready = gauge("pixelcnn_ready", "1 while /readyz says so.")
        self.drawn = histogram(
            "pixelcnn_drawn_bits_per_dim",
            "Of /complete the known pixels, each given what lies before it in the first completion (of every fourth, "
            "and none while somebody waits); of /likelihood the image.",
            "endpoint dataset",
            BITS_PER_DIM,
        )
        self.drawn_share = histogram(
            "pixelcnn_drawn_share", "Of each drawing: what is known ink, or known.", "dataset statistic", SHARES
        )
        self.drift = gauge(
            "pixelcnn_drift",
            "1 while drawings are unlike the reference; NaN without reference or drawings.",
            "dataset statistic",
        )
        self.drift_watched = gauge(
            "pixelcnn_drift_watched",
            "1 where drawings are compared with a reference, else 0; NaN before any.",
            "dataset",
        )
        self.drift_distance = gauge(
            "pixelcnn_drift_distance",
            "Kolmogorov-Smirnov distance of the last window to the reference; or NaN.",
            "dataset statistic",
        )
        self.shadow = gauge(
            "pixelcnn_shadow_bits_per_dim", "Challenger less champion: mean, and 95 % interval.", "dataset bound"
        )
        self.shadow_drawings = gauge("pixelcnn_shadow_drawings", "Drawings that both have scored.", "dataset")


class _Nothing:
    """Takes the place of each metric while PIXELCNN_WATCH is 0."""

    def __getattr__(self, name: str) -> "_Nothing":
        return self

    def __call__(self, *values: Any) -> "_Nothing":
        return self


@functools.cache
def metrics() -> Any:
    """Return the `Metrics` of this process; the first call must come after the service has started."""
    if not settings.watch:
        return _Nothing()
    # The gauges that a killed worker has left; its counts go on. One worker at a time has any.
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        for file in Path(folder).glob("gauge_*.db"):
            if not file.stem.endswith(f"_{os.getpid()}"):
                file.unlink(missing_ok=True)
    return Metrics()
