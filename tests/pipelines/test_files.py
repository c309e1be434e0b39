"""The lock between processes, and writing that is whole or not at all."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.files import atomic_write, file_lock

HOLD = """
import time
from pathlib import Path
from pipelines.files import file_lock
with file_lock(Path("lock"), "the first", print):
    Path("held").touch()
    while not Path("go").exists():
        time.sleep(0.01)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start() -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)


def holder() -> subprocess.Popen:
    process = start()
    while not Path("held").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_the_second_says_whom_it_waits_for(folder: Path) -> None:
    process = holder()
    said: list[str] = []

    def let_go(text: str) -> None:
        said.append(text)
        Path("go").touch()

    with file_lock(Path("lock"), "the second", let_go) as waited:
        assert process.wait(timeout=10) == 0, "the first has ended"
        assert waited
    assert said == [
        f"the second waits for process {process.pid} on {os.uname().nodename}, which does the same; "
        "stop that one to go on at once."
    ]
    assert not Path("lock").exists()
    with file_lock(Path("lock"), "the third", said.append) as waited:
        assert not waited
    assert len(said) == 1


def test_a_killed_holder_keeps_nobody_out(folder: Path) -> None:
    process = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Path("lock").exists(), "its file is still there"
    with file_lock(Path("lock"), "the second", print) as waited:
        assert not waited
    assert not Path("lock").exists()


def test_a_lock_on_a_removed_file_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its holder may have ended and removed it."""
    real, first = fcntl.flock, True

    def flock(descriptor: int, operation: int) -> None:
        nonlocal first
        if first:
            first = False
            Path("lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with file_lock(Path("lock"), "this", print):
        assert not first
        assert "process" in Path("lock").read_text(), "the lock is on a file that others see"
        Path("go").touch()
        process = start()
        assert process.stdout is not None
        assert process.stdout.readline().startswith("the first waits for process")
    assert process.wait(10) == 0


def test_a_write_that_fails_leaves_the_old_text(folder: Path) -> None:
    atomic_write(Path("file"), "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(Path("file"), "new \udcff")
    assert Path("file").read_text() == "old"
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_two_may_write_at_once(folder: Path) -> None:
    texts = [letter * 100_000 for letter in "ab"]
    with ThreadPoolExecutor(3) as pool:
        writers = [
            pool.submit(lambda text=text: [atomic_write(Path("file"), text) for _ in range(200)]) for text in texts
        ]
        while not all(writer.done() for writer in writers):
            assert not Path("file").exists() or Path("file").read_text() in texts
        for writer in writers:
            writer.result()
