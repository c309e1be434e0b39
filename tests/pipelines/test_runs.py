"""MLflow's database, when it is made."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from pipelines.files import file_lock
from pipelines.registry import runs


def test_a_database_whose_making_was_interrupted_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.store.db.utils._upgrade_db", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runs.client()
    assert not (tmp_path / "mlflow.db").exists()
    assert runs.client().search_experiments()
    assert sorted(path.name for path in tmp_path.glob("mlflow.db*")) == ["mlflow.db"]


def test_two_who_make_a_database_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever folder each has for its temporary files: a demo has one of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    caplog.set_level("INFO", logger="pipelines")
    with ThreadPoolExecutor() as pool, file_lock(tmp_path / "mlflow.db.lock", "this test", print):
        second = pool.submit(runs.client)
        while "the making of MLflow's database waits for process" not in caplog.text:
            assert not second.done()
            time.sleep(0.01)
        mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").create_experiment("first")
    assert second.result().get_experiment_by_name("first")
