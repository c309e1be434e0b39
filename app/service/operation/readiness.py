"""Whether requests are to be sent here: not before the champions are served, and not from SIGTERM on."""

import asyncio
import logging
import signal
import threading
from typing import Any

from app.service.champions import Champions
from app.service.metrics import metrics
from app.service.settings import settings

logger = logging.getLogger("bentoml.pixelcnn")

draining = threading.Event()  # set by SIGTERM


class Readiness:
    """What /readyz answers. From SIGTERM on it says no, for `drain_s`; only then uvicorn learns of the signal."""

    def __init__(self, champions: Champions) -> None:
        self.champions = champions

    def reason(self) -> str:
        """Return why no request is to be sent here, in a sentence; empty while they are."""
        if draining.is_set():
            return "the service is about to end: send requests to another one."
        served = self.champions.describe()
        missing = [name for name in settings.datasets if name not in served]
        if served and not missing:
            return ""
        names = ", ".join(missing) or "any dataset"
        return f"no champion of {names} is served: promote a model, or see in the log why it was refused."

    def tell(self) -> None:
        """Set the metric."""
        metrics().ready.set(not self.reason())

    def drain_on_sigterm(self) -> None:
        """Take the signal in uvicorn's place. To be called in the event loop, after uvicorn has set its handlers."""
        if threading.current_thread() is not threading.main_thread():
            return  # a client of the tests, whose process has its own way to end
        end: Any = signal.getsignal(signal.SIGTERM)
        loop = asyncio.get_running_loop()

        def drain() -> None:
            if not draining.is_set():
                draining.set()
                self.tell()
                logger.info("not ready from now on; requests are answered for another %d s.", settings.drain_s)
                loop.call_later(settings.drain_s, end, signal.SIGTERM, None)

        signal.signal(signal.SIGTERM, lambda number, frame: loop.call_soon_threadsafe(drain))
