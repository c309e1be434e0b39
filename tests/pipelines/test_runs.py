"""MLflow's database, when it is made."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from pipelines.files import file_lock
from pipelines.registry import runs
from pipelines.settings import Settings


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


@pytest.mark.parametrize("who", ["", "bob@", "bob:secret@", "bob:sec/ret@", "bob:sec/r:et@", "bob:sec@ret@"])
def test_a_registry_is_told_without_its_password(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg://{who}host:5432/mlflow?sslmode=require")
    assert runs.location() == "host:5432/mlflow"


def test_options_of_the_database_are_no_part_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db?timeout=60")
    assert runs.client().search_experiments()
    assert runs.sqlite_file() == tmp_path / "mlflow.db"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_an_experiment_that_was_deleted_says_what_brings_it_back(project: Path) -> None:
    number = runs.experiment_id("promotions")
    runs.client().delete_experiment(number)
    told = (
        rf"^the experiment promotions was deleted in MLflow, .*: mlflow experiments restore --experiment-id {number}\.$"
    )
    with pytest.raises(ValueError, match=told):
        runs.create_run("promotions", "one", {})
    runs.client().restore_experiment(number)
    assert runs.experiment_id("promotions") == number


def test_registered_models_in_another_place_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup would not hold them."""
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", Settings().registry)
    assert runs.client().search_experiments()
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{project}/other.db")
    with pytest.raises(ValueError, match=r"names another place than MLFLOW_TRACKING_URI\. Unset it\."):
        runs.client()


def test_users_of_one_server_have_locks_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may open another user's file in a common folder for temporary files."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite://")  # in memory: no file, as on a server
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    locks = []
    monkeypatch.setattr(runs, "file_lock", lambda path, *_: locks.append(path) or nullcontext())
    for user in (1, 2):
        monkeypatch.setattr("os.getuid", lambda user=user: user)
        monkeypatch.setattr(runs, "_ready", set())
        runs.client()
    assert len({path for path in locks if path.parent == tmp_path}) == 2


def test_a_run_of_other_data_is_another_run(project):
    training = runs.Training(pair="pair", dataset="toy", data_hash="a", params={"x": "1"})
    first = runs.start_training_run(training, "key")
    assert runs.start_training_run(training, "key", first) == first
    assert runs.start_training_run(replace(training, data_hash="b"), "key", first) != first
