"""A Prefect server for the flows, and a small project to run them in."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import sqlalchemy
import torch

from pipelines.promotion.score import score
from pipelines.registry import runs as tracking
from pixelcnn.data import save_dataset
from tests.pipelines.projects import tiny_dataset, tiny_params, write_params, write_weights

torch.set_num_threads(1)


@sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
def _without_waiting_for_the_disk(connection: Any, record: object) -> None:
    """A test's database need not outlive a power cut: each commit would cost 7 ms."""
    if type(connection).__module__ == "sqlite3":
        connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a Prefect server for the session; flows called in a test use it. Yields its API's URL."""
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_RESULTS_LOCAL_STORAGE_PATH,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    # Results lie outside the harness's own database: those of an earlier session must not be found.
    storage = tmp_path_factory.mktemp("prefect-results")
    # Without heartbeats, whose thread each flow would wait a second for.
    quick = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None, PREFECT_RESULTS_LOCAL_STORAGE_PATH: str(storage)}
    with prefect_test_harness(server_startup_timeout=120), temporary_settings(quick):
        yield PREFECT_API_URL.value()


@pytest.fixture
def without_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flows be called as functions, by `.fn`, without a server: what they would show is not shown."""
    for name in ("promote.tag_run", "promote.show_decision", "add_dataset.tag_run"):
        monkeypatch.setattr(f"pipelines.flows.{name}", lambda *_: None)
    monkeypatch.setattr("pipelines.flows.promote._score", score)


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Make an MLflow database once for all processes of the tests: its schema takes ten seconds, a copy none."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder if worker_id == "master" else folder.parent) / "new-mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        tracking.client()
        mlflow.set_tracking_uri(None)
    return path


@pytest.fixture
def project(tmp_path: Path, new_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder with tiny params.yaml and a tiny mnist5k the current one; MLflow's file lies there too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    shutil.copy(new_database, tmp_path / "mlflow.db")
    write_params(tmp_path, tiny_params())
    save_dataset(tmp_path / "data/mnist5k.safetensors", tiny_dataset())
    return tmp_path


@pytest.fixture
def weights(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write random weights of a tiny pair, with their scores, as released ones; BentoML's store is a new one."""
    monkeypatch.setenv("BENTOML_HOME", str(project / "bentoml"))
    return write_weights(seed=0)
