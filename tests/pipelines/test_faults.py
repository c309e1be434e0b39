"""Processes killed at their worst moments; FAULT_TIMES=10 makes each fault ten times, where else some are made once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.projects import ROOT


@pytest.mark.repeated
@pytest.mark.timeout(1800)
def test_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    times = os.environ.get("FAULT_TIMES", "1")
    only = ["--only", "alias"] if times == "1" else []  # all take a minute and a half
    command = [sys.executable, "-m", "tools.faults", "--times", times, *only]
    # Into files: a process that was left behind would hold a pipe open for ever.
    with (tmp_path / "said").open("w+") as said, (tmp_path / "errors").open("w+") as errors:
        code = subprocess.run(command, cwd=ROOT, stdout=said, stderr=errors, timeout=1500, check=False).returncode
    text = (tmp_path / "said").read_text()
    print(text)
    assert code == 0, text + (tmp_path / "errors").read_text()[-5000:]
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert len(rows) >= (6 if only else 25)
    assert all(row[1] == row[2].removesuffix(" |") == times for row in rows)
