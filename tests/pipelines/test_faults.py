"""Processes killed at their worst moments: FAULT_TIMES=10 makes each fault ten times."""

import os
import sys

import pytest

from tests.local import run, slow_alone
from tests.pipelines.projects import ROOT
from tools.faults.__main__ import main


def test_a_case_that_there_is_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["faults", "--only", "typo"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "no case has 'typo' in its name: name one of " in capsys.readouterr().err


@slow_alone
@pytest.mark.timeout(1800)
def test_nothing_is_lost_or_doubled() -> None:
    times = os.environ.get("FAULT_TIMES", "1")
    command = [sys.executable, "-m", "tools.faults", "--times", times]
    done = run(command, 1500, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) >= 25
    assert all(row[1] == row[2].removesuffix(" |") == times for row in rows)
