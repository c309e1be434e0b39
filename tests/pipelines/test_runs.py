"""MLflow's database, when it is made."""

from pathlib import Path

import pytest

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
