"""What the service reports to Prometheus at /metrics, beside BentoML's own counts: numbers alone, never an image."""

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

        by = ["endpoint", "dataset"]
        # Without the process's ID as a label.
        gauge = functools.partial(Gauge, multiprocess_mode="mostrecent")
        self.requests = Counter("pixelcnn_requests", "Requests, by path and status.", ["path", "status"])
        self.seconds = Histogram(
            "pixelcnn_request_seconds", "From a checked request to its answer, waiting included.", by, buckets=SECONDS
        )
        self.batch_requests = Histogram(
            "pixelcnn_batch_requests", "Requests that shared a call.", ["lane"], buckets=COUNTS
        )
        self.batch_images = Histogram("pixelcnn_batch_images", "Images of a call.", ["lane"], buckets=COUNTS)
        self.waiting = gauge("pixelcnn_waiting_requests", "Requests that wait for a call.")
        self.disconnects = Counter(
            "pixelcnn_left_requests", "Requests whose client left, or whose time was up, before the answer.", by
        )
        self.champion = gauge(
            "pixelcnn_champion",
            "1 for the version that is served, or as challenger scores drawings, too.",
            ["dataset", "version", "role"],
        )
        self.refused = gauge(
            "pixelcnn_champion_refused",
            "1 while the newest champion cannot be served.",
            ["dataset", "role"],
        )
        self.store_readable = gauge("pixelcnn_store_readable", "1 while the model store is, 0 before any promotion.")
        self.ready = gauge("pixelcnn_ready", "1 while /readyz says so.")
        self.drawn = Histogram(
            "pixelcnn_drawn_bits_per_dim",
            "What people draw: of /complete the known pixels, each given what lies before it in the first completion; "
            "of /likelihood the image. Of completions every fourth is scored, and none while somebody waits.",
            by,
            buckets=BITS_PER_DIM,
        )
        self.drawn_share = Histogram(
            "pixelcnn_drawn_share",
            "Of each drawing: part of the image that is known ink, or known.",
            ["dataset", "statistic"],
            buckets=SHARES,
        )
        self.drift = gauge(
            "pixelcnn_drift",
            "1 while drawings are not like the reference; NaN where there is none, or nobody has drawn yet.",
            ["dataset", "statistic"],
        )
        self.drift_watched = gauge(
            "pixelcnn_drift_watched",
            "1 where drawings are compared with a reference, 0 where there is none, or too small; NaN until one comes.",
            ["dataset"],
        )
        self.drift_distance = gauge(
            "pixelcnn_drift_distance",
            "Kolmogorov-Smirnov distance of the last window to the reference; NaN where either is not there.",
            ["dataset", "statistic"],
        )
        self.shadow = gauge(
            "pixelcnn_shadow_bits_per_dim",
            "Challenger less champion on drawings: mean, and 95 % interval.",
            ["dataset", "bound"],
        )
        self.shadow_drawings = gauge(
            "pixelcnn_shadow_drawings",
            "Drawings that champion and challenger have both scored.",
            ["dataset"],
        )


class _Nothing:
    """Takes the place of each metric while PIXELCNN_WATCH is 0."""

    def __getattr__(self, name: str) -> "_Nothing":
        return self

    def __call__(self, *values: Any) -> "_Nothing":
        return self


def _forget_killed_workers() -> None:
    """Remove the gauges that a killed worker has left; its counts go on. One worker at a time has any."""
    if folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        for file in Path(folder).glob("gauge_*.db"):
            if not file.stem.endswith(f"_{os.getpid()}"):
                file.unlink(missing_ok=True)


@functools.cache
def metrics() -> Any:
    """Return the `Metrics` of this process; the first call must come after the service has started."""
    if not settings.watch:
        return _Nothing()
    _forget_killed_workers()
    return Metrics()
