"""The lock between processes, and writing that is whole or not at all."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.files import alone, write_whole

HOLD = """
import sys, time
from pathlib import Path
from pipelines.files import alone
with alone(Path("lock"), "the first", print):
    Path("held").touch()
    time.sleep(float(sys.argv[1]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def holder(seconds: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(seconds)], env=environment)
    while not Path("held").exists():
        assert process.poll() is None
        time.sleep(0.02)
    return process


def test_the_second_says_whom_it_waits_for(folder: Path) -> None:
    process = holder(1)
    said: list[str] = []
    with alone(Path("lock"), "the second", said.append) as waited:
        assert process.wait(timeout=10) == 0, "the first has ended"
        assert waited
    assert said == [
        f"the second waits for process {process.pid} on {os.uname().nodename}, which does the same; "
        "stop that one to go on at once."
    ]
    assert not Path("lock").exists()
    with alone(Path("lock"), "the third", said.append) as waited:
        assert not waited
    assert len(said) == 1


def test_a_killed_holder_keeps_nobody_out(folder: Path) -> None:
    process = holder(100)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert Path("lock").exists(), "its file is still there"
    with alone(Path("lock"), "the second", print) as waited:
        assert not waited
    assert not Path("lock").exists()


def test_a_lock_on_a_removed_file_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its holder may have ended and removed it."""
    real, first = os.stat, True

    def stat(path: object, *args: object, **words: object) -> os.stat_result:
        nonlocal first
        if first and str(path) == "lock":
            first = False
            Path("lock").unlink()
        return real(path, *args, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", stat)
    with alone(Path("lock"), "this", print):
        assert not first
        assert "process" in Path("lock").read_text(), "the lock is on a file that others see"


def test_a_write_that_fails_leaves_the_old_text(folder: Path) -> None:
    write_whole(Path("file"), "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(Path("file"), "new \udcff")
    assert Path("file").read_text() == "old"
