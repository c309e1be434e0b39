"""What the benchmark of Ctrl-C starts ends with it."""

import os
import time
from pathlib import Path

import pytest

from benchmarks import interrupts


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put a demo in place that does nothing for long; return the marks of those that are started."""
    make, start, found = tmp_path / "make", interrupts.start, list[str]()
    make.write_text("#!/bin/sh\nexec sleep 300\n")
    make.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(interrupts, "GIVE_UP_S", 2)  # where SIGINT is ignored, as in a shell's background
    monkeypatch.setattr(interrupts, "clone", lambda folder, _: folder.mkdir())

    def noted(*words):
        process, mark = start(*words)
        found.append(mark)
        return process, mark

    monkeypatch.setattr(interrupts, "start", noted)
    return found


def test_a_demo_does_not_outlive_it(marks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sleep = time.sleep

    def pressed(seconds: float) -> None:
        if seconds == 200:
            raise KeyboardInterrupt
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", pressed)
    with pytest.raises(KeyboardInterrupt):
        interrupts.main(moments=[200])
    assert not interrupts.marked_processes(marks[0])


def test_a_last_start_that_fails_is_a_failure(
    marks: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interrupts, "WAIT_S", 0.1)
    with pytest.raises(SystemExit) as end:
        interrupts.main(moments=[])
    assert end.value.code == 1
    assert "The last start FAILED: " in capsys.readouterr().out
    assert not interrupts.marked_processes(marks[0])
