"""Ports, small HTTP servers and processes on this machine."""

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

import psutil
import pytest

# By `make test-slow`, or whoever names a size.
ASKED_FOR_ALL = any(name.startswith(("PIXELCNN_TEST_", "PIXELCNN_KILLS", "FAULT_TIMES")) for name in os.environ)


def slow_alone(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test as `repeated` that others than `make test-slow` leave out."""
    skipped = pytest.mark.skipif(not ASKED_FOR_ALL, reason="takes long for what it adds: make test-slow")
    return pytest.mark.repeated(skipped(test))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def share_compiled(package: Path) -> None:
    """Give another copy of the package `pixelcnn` what this one's sampler was compiled to: valid for a file as old."""
    here = Path(__file__).parents[1] / "pixelcnn/sampling"
    there = package / "sampling"
    shutil.copystat(here / "kernels.py", there / "kernels.py")
    (there / "__pycache__").mkdir(exist_ok=True)
    for file in here.glob("__pycache__/kernels.*.nb?"):
        shutil.copy(file, there / "__pycache__")


def stop(process: subprocess.Popen[Any], seconds: float = 8) -> None:
    """End a process that has a session of its own, and all below it, whatever theirs: asked twice, then killed."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    for _ in range(2):  # a worker that is told once may wait for its runs
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(seconds)


def run(command: Sequence[Any], seconds: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; what it left behind is killed, and after `seconds` itself.

    Its output goes to files: a pipe is read until the last process that holds it has ended.
    """
    with TemporaryFile("w+") as said, TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=said, stderr=errors, start_new_session=True, **options)
        try:
            code = process.wait(seconds)
        finally:
            stop(process)
            for file in (said, errors):
                file.seek(0)
        return subprocess.CompletedProcess(command, code, said.read(), errors.read())


class Handler(BaseHTTPRequestHandler):
    """Answers requests without logging them."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer; `Retry_After` stands for the header Retry-After."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class LocalServer:
    """A server on a free port, for the length of a `with` block.

    Args:
        handler: answers its requests.
    """

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Webhook(LocalServer):
    """Takes messages in JSON; `told` holds them in the order in which they came."""

    def __init__(self) -> None:
        self.told = told = queue.SimpleQueue[dict[str, Any]]()

        class Taking(Handler):
            def do_POST(self) -> None:
                told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.reply(200, b"ok")

        super().__init__(Taking)
