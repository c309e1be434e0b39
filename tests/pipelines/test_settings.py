"""The environment's settings, in one class."""

import logging
import os
import re
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.request import getproxies, proxy_bypass

import pytest
from mlflow.exceptions import MlflowException
from typer import Typer

from pipelines import steps
from pipelines.errors import one_line, run_typer, without_passwords
from pipelines.settings import Settings
from tests import local
from tests.pipelines.projects import ROOT


def run(name: str, work: Callable[[], None]) -> int:
    """Run a command line of one command."""
    app = Typer()
    app.command()(work)
    return run_typer(app, name, name, [])


def test_what_is_empty_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields.values():
        monkeypatch.setenv(str(field.validation_alias), "")
    settings = Settings()
    assert settings.store == Path.cwd() / ".bentoml", "of this clone alone"
    assert settings.environment == "development"
    other = {"store", "environment"}
    assert settings.model_dump(exclude=other) == dict.fromkeys(set(Settings.model_fields) - other)
    monkeypatch.setenv("PIXELCNN_DATA", "/mirror")
    monkeypatch.setenv("PIXELCNN_TOKEN", " secret\n")
    assert Settings().data == Path("/mirror")
    assert Settings().token == "secret"
    assert "secret" not in repr(Settings())


@pytest.mark.parametrize(("before", "after"), [("", "127.0.0.1,localhost"), ("a.b", "a.b,127.0.0.1,localhost")])
def test_neighbours_are_not_reached_by_way_of_a_proxy(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    for name, value in (("http_proxy", "http://proxy:8080"), ("no_proxy", before)):
        monkeypatch.setenv(name, value)
    assert run("test", lambda: None) == 0
    assert getproxies()["no"] == after
    assert proxy_bypass("127.0.0.1:4200")


def test_a_training_that_finds_no_memory_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise MemoryError("a step does not fit into memory: lower batch_size.")

    assert run("train", work) == 1
    assert capsys.readouterr().err == "train: a step does not fit into memory: lower batch_size.\n"


def test_an_error_of_many_lines_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise MlflowException("These failed:\n##### File report.json #####\n  No such artifact")

    assert run("history", work) == 1
    assert capsys.readouterr().err == "history: These failed: ##### File report.json ##### No such artifact\n"

    def ours() -> None:
        raise ValueError("a: wrong\n  b: wrong, at http://me:s3cret@host")

    assert run("add", ours) == 1
    assert capsys.readouterr().err == "add: a: wrong b: wrong, at http://host\n"

    def prefect() -> None:
        raise RuntimeError("Failed to reach API at http://host/api/")

    assert run("train", prefect) == 1
    assert capsys.readouterr().err == (
        "train: Failed to reach API at http://host/api/. Start that server (make operate), or unset PREFECT_API_URL to "
        "run without one.\n"
    )


def test_a_password_in_an_address_is_not_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow's errors hold the address that MLFLOW_TRACKING_URI gives it; a training logs them, too."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:hid@den@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert steps.main(["history", "svhn"]) == 1
    assert "API request to http://127.0.0.1:9/api" in (said := capsys.readouterr().err)
    assert "den" not in said
    line = logging.LogRecord(
        "prefect.task_runs", logging.ERROR, "", 1, "failed: %s", ("http://bob:hid@den@host/a",), None
    )
    assert one_line(line)
    assert line.getMessage() == "failed: http://host/a"


@pytest.mark.parametrize("who", ["bob@", "bob:hidden@", "bob:hid@den@", "bob:hid/den@", "bob:hid/d:en@"])
def test_an_address_is_told_without_who_asks(who: str) -> None:
    """A password of PostgreSQL's may hold a slash."""
    text = "({0}host:5432/mlflow) failed: no such table, see https://mlflow.org/docs, or write to a@b.org"
    assert without_passwords(text.format(f"postgresql://{who}")) == text.format("postgresql://")
    path = "sqlite:////home/a@b/mlflow.db"
    assert without_passwords(path) == path


def test_no_other_module_reads_our_variables() -> None:
    names = [str(field.validation_alias) for field in Settings.model_fields.values()]
    package = Path(__file__).parents[2] / "pipelines"
    for path in package.rglob("*.py"):
        if path.name != "settings.py":
            text = path.read_text()
            assert not any(re.search(rf'(get|getenv)\("{name}"|environ\["{name}"\]', text) for name in names), path


def test_a_persons_settings_do_not_reach_the_tests(tmp_path: Path) -> None:
    theirs = {"PIXELCNN_TOKEN": "a", "PIXELCNN_TEST_CASES": "9", "MLFLOW_TRACKING_URI": "b", "PREFECT_API_URL": "c"}
    theirs |= {"MLFLOW_REGISTRY_URI": "d", "OTEL_EXPORTER_OTLP_ENDPOINT": "e", "PROMETHEUS_MULTIPROC_DIR": "f"}
    command = [sys.executable, "-c", "import os, tests.conftest; print(*os.environ)"]
    done = local.run(command, cwd=ROOT, env={**os.environ, **theirs, "TMPDIR": str(tmp_path)})
    assert theirs.keys() & set(done.stdout.split()) == {"PIXELCNN_TEST_CASES"}


def test_a_command_that_is_ended_removes_what_is_half_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the exception that Ctrl-C raises in its place: on SIGTERM Python would leave temporary folders."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["steps", "--help"])
    try:
        with pytest.raises(SystemExit):
            runpy.run_module("pipelines.steps", run_name="__main__")
        with pytest.raises(SystemExit, match="143"), tempfile.TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())
