"""The HTTP service, a program of its own: it shares the wire format with the canvas, and no code.

This is its one place that imports private modules of BentoML. Usage reports are off unless BENTOML_DO_NOT_TRACK asks
for them; but `bentoml serve` has cached that variable before it imports this. The counts for /metrics are kept in one
folder per model store, which each start empties; here each `bentoml serve` has its own folder, and takes it away, as
the next start does with that of one that was killed. It is one in memory, unless TMPDIR says where: on a full disk a
worker that counts something new is killed (SIGBUS).
BentoML's own are off: each path that a client sends, be it without the token, would be a time series of theirs. Where
it cannot listen, `bentoml serve` says so in one sentence.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

import uvicorn.config
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware
from bentoml._internal.utils.analytics import usage_stats
from bentoml.exceptions import BentoMLConfigException
from circus.sockets import CircusSocket

from app.service.api import PixelCNNService as PixelCNNService
from app.service.operation.requests import JsonFormatter

os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
usage_stats.do_not_track.cache_clear()

_folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")  # given by a person, or to a worker by its server
if not _folder:
    _memory = None if os.environ.get("TMPDIR") or not os.access("/dev/shm", os.W_OK) else "/dev/shm"
    _counts = tempfile.TemporaryDirectory(prefix="pixelcnn-metrics-", dir=_memory)  # until this process ends
    _folder = _counts.name
    # The folder itself is locked, as long as this process lives: BentoML makes one that holds a file anew. One without
    # any may be about to be locked.
    fcntl.flock(os.open(_folder, os.O_RDONLY), fcntl.LOCK_EX)
    for _file in Path(_folder).parent.glob("pixelcnn-metrics-*/*.db"):
        with contextlib.suppress(OSError):  # held, or somebody else's
            _left = os.open(_file.parent, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(_left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(_file.parent)
            finally:
                os.close(_left)
BentoMLContainer.prometheus_multiproc_dir.set(_folder)
uvicorn.config.HTTP_PROTOCOLS["auto"] = "app.service.operation.connection:Connection"
RunnerTrafficMetricsMiddleware.__call__ = lambda self, *message: self.app(*message)  # type: ignore[method-assign]

_bind_and_listen = CircusSocket.bind_and_listen


def _listen(server: CircusSocket) -> None:
    try:
        _bind_and_listen(server)
    except OSError as error:
        raise BentoMLConfigException(
            f"the service cannot listen on {server.location} ({error.strerror}). Stop the program that holds the port, "
            "or choose another: bentoml serve app.service:PixelCNNService --port N."
        ) from None


CircusSocket.bind_and_listen = _listen

for _handler in logging.getLogger("bentoml").handlers:
    if _handler.name == "tracehandler":  # a server's, not the command line's
        _handler.setFormatter(JsonFormatter())
