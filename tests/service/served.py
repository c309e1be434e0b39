"""The service as a person starts it: a process of its own on a free port."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.local import free_port, stop

ROOT = Path(__file__).parents[2]
BENTOML = str(Path(sys.executable).with_name("bentoml"))
START_SECONDS = 150


class Served:
    """A running service.

    Args:
        url: where it answers.
        process: `bentoml serve`, which starts and watches the worker.
        log: the file of both outputs.
    """

    def __init__(self, url: str, process: subprocess.Popen, log: Path) -> None:
        self.url, self.process, self.log = url, process, log
        self.port = int(url.rpartition(":")[2])

    def wait_until_ready(self) -> float:
        """Wait for the first good answer; return the seconds that took."""
        start = time.monotonic()
        while time.monotonic() < start + START_SECONDS:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/models", timeout=5).status_code == 200:
                    return time.monotonic() - start
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def workers(self) -> list[int]:
        """Return the process ids of the workers that compute."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == self.process.pid and b"_bentoml_impl.worker.service" in command:
                found.append(int(folder.name))
        return found


@contextmanager
def serving(home: Path, log: Path, port: int | None = None, **environment: str) -> Iterator[Served]:
    """Serve the models of a store, BENTOML_HOME, until the end of the block.

    A store `.bentoml` is found as that of the current folder instead: the variable is unset.
    """
    port = port or free_port()
    by_default = home.name == ".bentoml"
    place = {"HOME": str(log.parent)} if by_default else {"BENTOML_HOME": str(home)}
    settings = {**place, "BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(ROOT), **environment}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [BENTOML, "serve", "app.service:PixelCNNService", "--port", str(port)],
            cwd=home.parent if by_default else ROOT,
            env={**{name: value for name, value in os.environ.items() if name != "BENTOML_HOME"}, **settings},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    served = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        served.wait_until_ready()
        yield served
    finally:
        stop(process, 30)
