"""Processes killed at their worst moments; FAULT_TIMES=10 makes each fault ten times, where else some are made once."""

import os
import sys

import pytest

from tests.local import run
from tests.pipelines.projects import ROOT


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.timeout(1800)
def test_nothing_is_lost_or_doubled() -> None:
    times = os.environ.get("FAULT_TIMES", "1")
    only = ["--only", "alias"] if times == "1" else []  # all take a minute and a half
    command = [sys.executable, "-m", "tools.faults", "--times", times, *only]
    done = run(command, 1500, cwd=ROOT)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert len(rows) >= (6 if only else 25)
    assert all(row[1] == row[2].removesuffix(" |") == times for row in rows)
