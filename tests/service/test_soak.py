"""A bounded load of mixed requests with promotions in between: what the service holds on to must not grow."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pipelines.registry import store
from tests.local import slow_alone
from tests.service.champions import COLOUR, GREY, put, wait_until
from tests.service.served import serving

# What the documents state: PIXELCNN_TEST_SOAK_S=600, a promotion every minute, memory within 5 %.
SECONDS = float(os.environ.get("PIXELCNN_TEST_SOAK_S", "6"))
PROMOTE_EVERY_S = min(60.0, SECONDS / 4)
NUM_CLIENTS = 4
PAUSE_S = 0.05  # the load is bounded: what is measured is what stays, not how much goes through

GREY_BODY = {"dataset": "grey", "image": [[1] * 4] * 5, "observed": [[1] * 4, *[[0] * 4] * 4], "num_samples": 2}
COLOUR_BODY = {"dataset": "colour", "image": [[[3, 2, 1]] * 5] * 4}
MIX: list[tuple[str, dict, int]] = [  # path, request, the answer's status
    ("/complete", GREY_BODY, 200),
    ("/complete_stream", GREY_BODY, 200),
    ("/generate", {"dataset": "colour", "num_samples": 3}, 200),
    ("/likelihood", COLOUR_BODY, 200),
    ("/complete", GREY_BODY | {"temperature": -1}, 400),
    ("/generate", {"dataset": "../grey"}, 404),
]


def memory_and_files(process: int) -> tuple[int, int]:
    """Return a process's resident bytes, and how many files it has open."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE"), len(os.listdir(f"/proc/{process}/fd"))


def served_version(url: str) -> str:
    answer = httpx.post(f"{url}/complete", json=GREY_BODY, timeout=60)
    return answer.json()["model"]["version"]


@slow_alone
@pytest.mark.timeout(240 + SECONDS)
def test_under_a_steady_load_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "bentoml"
    home.mkdir()
    monkeypatch.setenv("BENTOML_HOME", str(home))
    for dataset, config in (("grey", GREY), ("colour", COLOUR)):
        store.serve(put(tmp_path, dataset, config, "1", seed=0))
    stop = threading.Event()
    counts: dict[int, int] = {}
    wrong: list[str] = []

    def keep_asking(url: str, number: int) -> None:
        i = number
        with httpx.Client(base_url=url, timeout=60) as http:
            while not stop.is_set():
                path, body, status = MIX[i % len(MIX)]
                if path == "/complete_stream" and i % 3 == 0:  # leaves at the first line
                    with http.stream("POST", path, json=body) as response:
                        next(response.iter_lines())
                else:
                    response = http.post(path, json=body)
                if response.status_code != status:
                    wrong.append(f"{path}: {response.status_code}")
                counts[response.status_code] = counts.get(response.status_code, 0) + 1
                i += 1
                time.sleep(PAUSE_S)

    with serving(home, tmp_path / "log") as served, ThreadPoolExecutor(NUM_CLIENTS) as clients:
        (worker,) = served.workers()
        asking = [clients.submit(keep_asking, served.url, number) for number in range(NUM_CLIENTS)]
        try:
            begin = time.monotonic()
            seen: list[tuple[float, int, int]] = []
            version = 1
            while (now := time.monotonic() - begin) < SECONDS:
                if now > version * PROMOTE_EVERY_S:
                    version += 1
                    store.serve(put(tmp_path, "grey", GREY, str(version), seed=version))
                seen.append((now, *memory_and_files(worker)))
                time.sleep(0.5)
            wait_until(lambda: served_version(served.url) == str(version))
        finally:
            stop.set()
        for task in asking:
            task.result()
        assert served.workers() == [worker], "the worker died and was started anew"
        log = (tmp_path / "log").read_text()
    warm = [row for row in seen if row[0] >= SECONDS / 10]  # after one minute of ten
    memory_then, memory_now = (sorted(row[1] for row in part)[len(part) // 2] for part in (warm[:20], warm[-20:]))
    files_then, files_now = max(row[2] for row in warm[:20]), max(row[2] for row in warm[-20:])
    print(
        f"\n{SECONDS:g} s, {sum(counts.values())} requests {counts}, {version - 1} promotions: memory "
        f"{memory_then / 2**20:.1f} MiB after a tenth of the time, {memory_now / 2**20:.1f} MiB at the end "
        f"({memory_now / memory_then - 1:+.1%}); {files_then} files open then, {files_now} at the end"
    )
    assert not wrong
    assert "Traceback" not in log
    assert memory_now < memory_then * (1.05 if SECONDS >= 600 else 1.2)
    assert files_now <= files_then + 3  # connections come and go
