"""The benchmark of the tools compares each with the same training without tools."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import overhead
from tests.pipelines.projects import PAIR, ROOT


def test_each_tool_is_compared_with_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    site = {"port": 1, "environment": {"PREFECT_API_URL": ""}, "start": lambda *_: None}
    monkeypatch.setattr(overhead, "Site", lambda _: SimpleNamespace(**site, wait_until_healthy=lambda: None))
    for name in ("stop", "_write_project", "_python"):
        monkeypatch.setattr(overhead, name, lambda *_: None)
    spent = iter([8.0, 18.0, 33.0, 21.0, 30.0])
    monkeypatch.setattr(overhead, "timed", lambda _: (None, next(spent)))
    monkeypatch.chdir(ROOT)
    overhead.main()
    *_, scores, dvc, prefect, fresh, by_dvc, by_prefect, when_fresh = capsys.readouterr().out.splitlines()
    added = [row.split(" | ")[-1].removesuffix(" |") for row in (scores, dvc, prefect, fresh)]
    assert added == ["+10.0 s", "+15.0 s", "+3.0 s", "+12.0 s"]
    assert by_dvc == "DVC and MLflow: 15.0 processor seconds, 25 % of a 60 s training."
    assert by_prefect == "Prefect and MLflow: 3.0 processor seconds, 5 % of a 60 s training."
    assert when_fresh == "On a fresh machine: 12.0 processor seconds, 20 % of a 60 s training."


def test_no_epochs_are_not_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(overhead, "copy_project", lambda _: None)
    monkeypatch.setattr(overhead.shutil, "copy", lambda *_: None)
    overhead._write_project(tmp_path, PAIR, "mnist5k", 0)
    assert yaml.safe_load((tmp_path / "params.yaml").read_text())["pairs"][PAIR]["train"]["max_epochs"] == 0
