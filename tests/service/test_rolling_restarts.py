"""Two services of one store behind a simple proxy, restarted one after the other under load: nobody notices."""

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Self

import httpx
import pytest

from pipelines.registry import store
from tests.local import Handler, LocalServer, free_port, slow_alone
from tests.service.champions import GREY, put, wait_until
from tests.service.served import serving

# The size that the documents state: PIXELCNN_TEST_RESTARTS=100.
NUM_RESTARTS = int(os.environ.get("PIXELCNN_TEST_RESTARTS", "1"))
REQUEST = {"dataset": "grey", "num_samples": 2, "seed": 1}
CHECK_EVERY_S = 0.2
DRAIN_S = 2


class Proxy(LocalServer):
    """Sends each request to a service that was ready at the last look; it tries no other one when that fails."""

    def __init__(self, ports: list[int]) -> None:
        self.ready: list[int] = []
        self._end = threading.Event()
        turns, proxy = itertools.count(), self

        class Forward(Handler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                ready = proxy.ready
                connection = HTTPConnection("127.0.0.1", ready[next(turns) % len(ready)], timeout=60)
                try:
                    connection.request("POST", self.path, body, {"Content-Type": "application/json"})
                    answer = connection.getresponse()
                    status, text = answer.status, answer.read()
                except OSError as error:
                    status, text = 502, str(error).encode()
                finally:
                    connection.close()
                self.reply(status, text)

        def look() -> None:
            while not self._end.wait(CHECK_EVERY_S):
                # None at all: all are late with their answers. As proxies do, it goes on with those of before.
                self.ready = [port for port in ports if is_ready(port)] or self.ready

        super().__init__(Forward)
        self._looking = threading.Thread(target=look)

    def __enter__(self) -> Self:
        self._looking.start()
        return super().__enter__()

    def __exit__(self, *args: object) -> None:
        self._end.set()
        super().__exit__(*args)


def is_ready(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=1).status_code == 200
    return False


@slow_alone
@pytest.mark.timeout(300 + 90 * NUM_RESTARTS)
def test_rolling_restarts_fail_no_request(tmp_path, monkeypatch):
    home = tmp_path / "bentoml"
    home.mkdir()
    monkeypatch.setenv("BENTOML_HOME", str(home))
    store.serve(put(tmp_path, "grey", GREY, "1", seed=0))
    ports = [free_port(), free_port()]
    logs = itertools.count()

    @contextlib.contextmanager
    def running(port: int) -> Iterator[None]:
        log = tmp_path / f"log-{next(logs)}"
        with serving(home, log, port=port, PIXELCNN_DATASETS="grey", PIXELCNN_DRAIN_S=str(DRAIN_S)):
            yield

    end = threading.Event()

    def keep_asking(url: str) -> list[int]:
        seen = []
        while not end.wait(0.05):
            seen.append(httpx.post(f"{url}/generate", json=REQUEST, timeout=90).status_code)
        return seen

    with contextlib.ExitStack() as stack, Proxy(ports) as proxy, ThreadPoolExecutor(2) as crowd:
        services = [stack.enter_context(contextlib.ExitStack()) for _ in ports]
        for service, port in zip(services, ports, strict=True):
            service.enter_context(running(port))
        wait_until(lambda: len(proxy.ready) == 2)
        asking = [crowd.submit(keep_asking, proxy.url) for _ in range(2)]
        try:
            for i in range(NUM_RESTARTS):
                services[i % 2].close()  # SIGTERM, and until it has ended
                services[i % 2].enter_context(running(ports[i % 2]))
                wait_until(lambda: len(proxy.ready) == 2)
        finally:
            end.set()
        seen = [status for task in asking for status in task.result()]
    print(f"\n{NUM_RESTARTS} restarts: {len(seen)} answers, {sum(status != 200 for status in seen)} failed")
    assert seen
    assert set(seen) == {200}
