"""The service's settings: what they may be, what is said of others, and what the README says of them."""

import os
import re
import socket
import sys
from pathlib import Path

import pytest
from bentoml.exceptions import BentoMLConfigException

from app.service.champions import store_folder
from app.service.settings import ENDPOINTS, SHARE, Settings, load_settings, tracing
from tests.local import run

ROOT = Path(__file__).parents[2]


def variable(field: str) -> str:
    return f"PIXELCNN_{field.upper()}"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(variable(field), raising=False)


@pytest.mark.parametrize("field", [field for field in Settings.model_fields if field not in ("token", "datasets")])
@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many", "\u0664"])
def test_a_wrong_value_is_refused_by_the_name_of_its_variable(monkeypatch, field, text):
    if (field, text) in (("drain_s", "0"), ("watch", "0"), ("released", "0")):
        return
    monkeypatch.setenv(variable(field), text)
    with pytest.raises(BentoMLConfigException) as caught:
        load_settings()
    sentence = str(caught.value)
    assert re.fullmatch(
        rf"{variable(field)} must be [a-z0-9 ]+, got {re.escape(ascii(text))}\. Set it anew\.", sentence
    )


def test_a_blank_token_does_not_leave_the_service_open(monkeypatch):
    monkeypatch.setenv("PIXELCNN_TOKEN", "  ")
    with pytest.raises(BentoMLConfigException, match=r"^PIXELCNN_TOKEN must be a token that is not blank, got '  '\."):
        load_settings()


@pytest.mark.parametrize("text", ["many", "-0.1", "1.5", "nan"])
def test_a_share_of_traced_requests_is_one(monkeypatch, text):
    monkeypatch.setenv(ENDPOINTS[0], "http://127.0.0.1:4318")
    monkeypatch.setenv(SHARE, text)
    with pytest.raises(BentoMLConfigException, match=rf"{SHARE} must be a number from 0 to 1, got '{text}'"):
        tracing()


def test_settings_are_read_from_the_environment(monkeypatch):
    monkeypatch.setenv("PIXELCNN_MAX_QUEUE", " 7 ")
    monkeypatch.setenv("PIXELCNN_TOKEN", "s3cret")
    monkeypatch.setenv("PIXELCNN_MAX_REQUESTS", "")
    monkeypatch.setenv("PIXELCNN_DATASETS", "mnist, cifar10,")
    settings = load_settings()
    assert (settings.max_queue, settings.max_requests) == (7, 64)
    assert settings.datasets == ("mnist", "cifar10")
    assert settings.token.get_secret_value() == "s3cret"
    assert "s3cret" not in repr(settings)


def test_a_wrong_value_ends_the_start_with_one_sentence(tmp_path):
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path), "PIXELCNN_TIMEOUT_S": "soon"}
    bentoml = Path(sys.executable).with_name("bentoml")
    done = run([bentoml, "serve", "app.service:PixelCNNService"], cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert "PIXELCNN_TIMEOUT_S must be a valid integer, got 'soon'. Set it anew." in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_port_that_is_taken_ends_the_start_with_one_sentence(tmp_path):
    bentoml = Path(sys.executable).with_name("bentoml")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [bentoml, "serve", "app.service:PixelCNNService", "--port", str(port)]
        done = run(command, cwd=ROOT, env={**os.environ, "BENTOML_HOME": str(tmp_path)})
    assert done.returncode == 1
    assert f"the service cannot listen on 127.0.0.1:{port} (Address already in use). Stop the program" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_named_environment_says_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BENTOML_HOME")
    monkeypatch.setenv("PIXELCNN_ENVIRONMENT", "staging")
    with pytest.raises(BentoMLConfigException, match=r"'staging', which environments\.yaml .*Known: none\."):
        store_folder()
    Path("environments.yaml").write_text("staging: {store: /srv/staging}\nproduction: {store: /srv/production}")
    assert store_folder() == Path("/srv/staging/models")
    monkeypatch.setenv("BENTOML_HOME", "/srv/production")
    with pytest.raises(
        BentoMLConfigException, match=r"BENTOML_HOME is set, but not to the store of staging\. Unset it"
    ):
        store_folder()
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT")
    assert store_folder() == Path("/srv/production/models")
    monkeypatch.delenv("BENTOML_HOME")
    assert store_folder() == Path(".bentoml/models")
    for text in ("staging: [", "staging: /srv/staging"):
        Path("environments.yaml").write_text(text)
        with pytest.raises(BentoMLConfigException, match="must give each environment a registry, a store"):
            store_folder()
    Path("environments.yaml").unlink()
    Path("environments.yaml").mkdir()
    with pytest.raises(BentoMLConfigException, match=r"environments\.yaml cannot be read \(Is a directory\)\. Put the"):
        store_folder()


def test_the_readme_has_every_setting_with_its_default():
    rows = re.findall(r"^\| (`PIXELCNN_.+?) \| (.+?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    told = {}
    for names, defaults in rows:
        variables = re.findall(r"PIXELCNN_\w+", names)
        told |= dict(zip(variables, defaults.split(", ") if len(variables) > 1 else [defaults], strict=True))
    expected = {
        variable(name): "none" if name in ("token", "datasets") else f"{field.default:,}"
        for name, field in Settings.model_fields.items()
        if field.default_factory is None
    }
    assert {name: told.get(name) for name in expected} == expected
    assert told["PIXELCNN_THREADS"] == "cores, at most 4"
