"""One running service for the session, over a BentoML store of its own with two tiny champions."""

from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from pipelines.registry import store
from pixelcnn import load_checkpoint
from tests.service.champions import COLOUR, GREY, put, wait_until

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def service_home(tmp_path_factory) -> Path:
    """The folder that is BENTOML_HOME for the running service and for `use_home`."""
    return tmp_path_factory.mktemp("bentoml")


@pytest.fixture(scope="session")
def answers_when_empty() -> dict:
    """What the service answered when it had just started with an empty store."""
    return {}


@pytest.fixture(scope="session")
def client(service_home, answers_when_empty, tmp_path_factory):
    """A client of the one service: a second one in this process would register BentoML's metrics twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(service_home))
        from app.service import api as service
        from app.service import champions

        patch.setattr(champions, "POLL_S", 0.1)
        with TestClient(service.PixelCNNService.to_asgi()) as client:
            answers_when_empty["models"] = client.get("/models")
            answers_when_empty["generate"] = client.post("/generate", json={"dataset": "grey"})
            folder = tmp_path_factory.mktemp("checkpoints")
            for dataset, config in (("grey", GREY), ("colour", COLOUR)):
                store.serve(put(folder, dataset, config, "1", seed=0))
            wait_until(lambda: set(client.get("/models").json()) == {"grey", "colour"})
            yield client


@pytest.fixture
def use_home(service_home, monkeypatch) -> None:
    """Let this test change the store that the service serves."""
    monkeypatch.setenv("BENTOML_HOME", str(service_home))


@pytest.fixture
def grey(client, service_home):
    """The served model of `grey`, loaded for comparison."""
    folder = service_home / "models/pixelcnn-grey"
    return load_checkpoint(folder / (folder / "latest").read_text())[0]
