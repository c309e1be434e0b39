"""train-all on a local Ray cluster of two workers: the same scores as without."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from projects import PAIR

from pipelines import steps
from pipelines.ray_runner import run_on_ray
from pipelines.train_all_flow import RUNNER_VARIABLE, train_all

GATED = "gated_pixelcnn-mnist5k"


def scores() -> dict[str, float]:
    """Return the scores of the trainings so far, by pair; those of one pair must be equal."""
    found: dict[str, float] = {}
    for path in Path("models/deployments").glob("*/reports/*/metrics.json"):
        nats = json.loads(path.read_text())["test/nll_nats"]
        assert found.setdefault(path.parent.name, nats) == nats
    return found


@pytest.fixture
def two_workers() -> Iterator[None]:
    """Start a Ray cluster of two workers on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is missing: pip install -e '.[cluster]'")
    pytest.importorskip("prefect_ray", reason="prefect-ray is missing: pip install -e '.[cluster]'")
    ray.init(num_cpus=2, include_dashboard=False, namespace="prefect")
    yield
    ray.shutdown()


@pytest.mark.timeout(600)
def test_commands_run_in_processes_of_the_cluster(project: Path, prefect_server: str, two_workers: None) -> None:
    code = {"fine": "print('done')", "failed": "print('train: no data here.'); raise SystemExit(1)"}
    commands = {name: [sys.executable, "-c", text] for name, text in code.items()}
    failures = run_on_ray(commands, 2, Path("logs"), {**os.environ, "PREFECT_API_URL": prefect_server}, "auto")
    assert failures == {"failed": "no data here."}
    assert Path("logs/fine.log").read_text() == "done\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ray_trains_the_same(
    project: Path, prefect_server: str, two_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUNNER_VARIABLE, "auto")
    with pytest.raises(ChildProcessError, match=r"pixelcnn-mnist \(data/mnist.safetensors does not exist"):
        train_all([PAIR, "pixelcnn-mnist", GATED], at_once=2, again=True)
    assert set(scores()) == {PAIR, GATED}
    monkeypatch.setenv(RUNNER_VARIABLE, "local")
    train_all([PAIR, GATED], again=True)
    assert len(list(Path("models/deployments").glob("*/reports/*/metrics.json"))) == 4
    assert set(scores()) == {PAIR, GATED}


def test_a_wrong_runner_is_said_at_once(
    project: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RUNNER_VARIABLE, "rya")
    assert steps.main(["train-all", PAIR]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "train-all: PIXELCNN_TASK_RUNNER must be local, ray, auto or ray://HOST:PORT, got 'rya'."
