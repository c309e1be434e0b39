"""What the service tells Prometheus at /metrics, beside BentoML's own counts: numbers alone, never an image."""

import functools
import os
from typing import Literal

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
BITS_PER_DIM = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12)
COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The service's own metrics; `metrics()` returns the one instance.

    Args of their labels: `dataset` is one that is served, so their number stays small whatever clients send.
    """

    def __init__(self) -> None:
        # Not at the top: it reads PROMETHEUS_MULTIPROC_DIR when imported, which BentoML's worker sets after our code.
        from prometheus_client import Counter, Gauge, Histogram

        by = ["endpoint", "dataset"]
        # Of several workers, or of one that died and the next: the number that was set last.
        mode: Literal["mostrecent", "all"] = "mostrecent" if "PROMETHEUS_MULTIPROC_DIR" in os.environ else "all"
        self.seconds = Histogram(
            "pixelcnn_request_seconds", "From a checked request to its answer, waiting included.", by, buckets=SECONDS
        )
        self.batch_requests = Histogram(
            "pixelcnn_batch_requests", "Requests that shared a call.", ["lane"], buckets=COUNTS
        )
        self.batch_images = Histogram("pixelcnn_batch_images", "Images of a call.", ["lane"], buckets=COUNTS)
        self.waiting = Gauge("pixelcnn_waiting_requests", "Requests that wait for a call.", multiprocess_mode=mode)
        self.left = Counter(
            "pixelcnn_left_requests", "Requests whose client left, or whose time was up, before the answer.", by
        )
        self.champion = Gauge(
            "pixelcnn_champion", "1 for the version that is served.", ["dataset", "version"], multiprocess_mode=mode
        )
        self.drawn = Histogram(
            "pixelcnn_drawn_bits_per_dim",
            "What people draw: of /complete the known pixels, each given what lies before it in the first completion; "
            "of /likelihood the image. Of completions at most one a second is scored, and none while somebody waits.",
            by,
            buckets=BITS_PER_DIM,
        )


@functools.cache
def metrics() -> Metrics:
    """Return the metrics of this process; made at the first call, which must come after the service has started."""
    return Metrics()
