"""Whether requests are to be sent here: not before the champions are served, and not from SIGTERM on."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Collection
from typing import Any

from app.service.settings import settings

logger = logging.getLogger("bentoml.pixelcnn")

draining = threading.Event()  # set by SIGTERM


def why_not_ready(served: Collection[str]) -> str:
    """Return in a sentence why no request is to be sent here, given the datasets that are served; empty if they are."""
    if draining.is_set():
        return "the service is about to end: send requests to another one."
    missing = [name for name in settings.datasets if name not in served]
    if served and not missing:
        return ""
    names = ", ".join(missing) or "any dataset"
    return f"no champion of {names} is served: promote a model, or see in the log why it was refused."


def drain_on_sigterm(on_drain: Callable[[], None]) -> None:
    """Tell `on_drain` of the signal at once, uvicorn after `drain_s`. Call it in a started uvicorn's event loop."""
    if threading.current_thread() is not threading.main_thread():
        return  # a client of the tests, whose process has its own way to end
    end: Any = signal.getsignal(signal.SIGTERM)
    # Longer than any request takes: uvicorn waits without end for a connection whose client takes a little at times.
    most_s = settings.body_timeout_s + settings.timeout_s + settings.send_timeout_s
    end.__self__.config.timeout_graceful_shutdown = most_s
    loop = asyncio.get_running_loop()

    def drain() -> None:
        if not draining.is_set():
            draining.set()
            loop.call_later(settings.drain_s, end, signal.SIGTERM, None)  # first: whatever else fails, the service ends
            on_drain()
            logger.info("not ready from now on; requests are answered for another %d s.", settings.drain_s)

    signal.signal(signal.SIGTERM, lambda number, frame: loop.call_soon_threadsafe(drain))


def end_without_server(server: int) -> None:
    """End this worker, as by SIGTERM, if the `server` that started it was killed: it would keep the port."""
    if os.getppid() != server and not draining.is_set():
        logger.error("the server was killed: this worker ends, too.")
        os.kill(os.getpid(), signal.SIGTERM)
