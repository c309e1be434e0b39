"""The environment's settings, in one class."""

import re
from pathlib import Path

import pytest

from pipelines.settings import Settings


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


def test_no_other_module_reads_our_variables() -> None:
    names = [str(field.validation_alias) for field in Settings.model_fields.values()]
    package = Path(__file__).parents[2] / "pipelines"
    for path in package.rglob("*.py"):
        if path.name != "settings.py":
            text = path.read_text()
            assert not any(re.search(rf'(get|getenv)\("{name}"|environ\["{name}"\]', text) for name in names), path
