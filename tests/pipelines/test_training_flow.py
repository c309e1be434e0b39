"""The training flow on a tiny dataset, with MLflow on SQLite: what it writes, records and registers, and what not."""

import base64
import csv
import json
import logging
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.flow_engine import FlowRunEngine
from safetensors.torch import load_file

from pipelines import steps
from pipelines.files import file_lock
from pipelines.flows import shown
from pipelines.flows import train as training_flow
from pipelines.flows.train import train_pair
from pipelines.flows.train_all import train_all
from pipelines.params import load_params
from pipelines.registry import provenance
from pipelines.registry import runs as tracking
from pipelines.reports import curve as training_report
from pipelines.reports.card import model_card
from pipelines.reports.curve import PARTS, read_curve
from pipelines.stages import evaluate as evaluate_stage
from pipelines.stages import live_run
from pipelines.stages import register as register_stage
from pipelines.stages import train as train_stage
from pipelines.stages.evaluate import baseline_scores
from pixelcnn.checkpoint import load_checkpoint, save_checkpoint
from pixelcnn.data import load_dataset, save_dataset
from pixelcnn.evaluation import per_image_nll
from pixelcnn.likelihood import log_prob
from pixelcnn.models.registry import build_model, config_to_dict
from pixelcnn.training import config as training_config
from pixelcnn.training import read_state, trainer
from tests.local import run, slow_alone
from tests.pipelines.projects import ROOT, tiny_dataset, tiny_params, write_params

PAIR = "pixelcnn-mnist5k"
OUT, REPORT = Path("models") / PAIR, Path("reports") / PAIR

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, prefect_server: str, new_database: Path):
    """One project, in which a pair was trained once; yields its folder and what the flow returned."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
        patch.setattr(trainer, "PROGRESS_S", 0.0)
        shutil.copy(new_database, folder / "mlflow.db")
        write_params(folder, tiny_params())
        save_dataset(folder / "data/mnist5k.safetensors", tiny_dataset())
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("prefect.task_runs").addHandler(handler)
        result = train_pair(PAIR, str(OUT), str(REPORT))
        logging.getLogger("prefect.task_runs").removeHandler(handler)
        yield folder, result, lines


@pytest.fixture(autouse=True)
def _quick_pictures(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the pictures of the first training alone: they take most of the time of a tiny one."""
    for name in ("draw_curve", "draw_extremes", "draw_samples", "draw_completions"):
        monkeypatch.setattr(training_report, name, lambda path, *args, **words: path.write_bytes(b"a picture"))


def runs() -> list[mlflow.entities.Run]:
    client = tracking.client()
    return list(client.search_runs([tracking.experiment_id("mnist5k")]))


def versions() -> list[mlflow.entities.model_registry.ModelVersion]:
    return list(tracking.client().search_model_versions("name='pixelcnn-mnist5k'"))


def test_the_folders_that_it_was_told(trained) -> None:
    folder, result, _ = trained
    assert sorted(p.name for p in OUT.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "scores.json",
    ]
    reports = ["class_samples.png", "completions.png", "curve.csv", "curve.png", "extremes.png", "metrics.json"]
    reports += ["samples.png"]
    assert sorted(p.name for p in REPORT.iterdir()) == reports
    assert [p.name for p in (folder / "models").iterdir()] == [PAIR], "the state is gone at the end"
    assert result["out"] == str(OUT)
    model, scores = load_checkpoint(OUT)
    data = load_dataset("data/mnist5k.safetensors")
    assert scores["data_hash"] == data.data_hash
    assert (scores["dataset"], scores["protocol"], scores["label_names"]) == ("mnist5k", "dynamic", data.label_names)
    assert scores["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert scores["train_minutes"] > 0
    metrics = json.loads((REPORT / "metrics.json").read_text())
    numbers = {key: value for key, value in scores.items() if isinstance(value, int | float)}
    assert metrics == numbers | {"data_hash": data.data_hash, "protocol": data.protocol}
    assert metrics["test/nll_nats_uniform"] == pytest.approx(784 * math.log(2))
    with open(REPORT / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ["step", "epoch", "train_nll_nats", "train_subset_nll_nats", "validation_nll_nats", "learning_rate"]
    assert list(rows[0]) == columns
    assert len(rows) == 2
    assert Image.open(REPORT / "samples.png").size[0] > 28
    assert Image.open(REPORT / "class_samples.png").size == (8 * 58 + 2, 10 * 58 + 2), "a row for each class"


def test_every_image_has_its_score(trained) -> None:
    model, scores = load_checkpoint(OUT)
    data = load_dataset("data/mnist5k.safetensors")
    for split in ("validation", "test"):
        nll = per_image_nll(model, data, split, num_images=8)
        torch.testing.assert_close(nll.float(), -log_prob(model, data.levels(split, slice(0, 8))).detach())
        assert scores[f"{split}/nll_nats"] == pytest.approx(nll.mean().item(), rel=1e-12)
    assert scores["test/nll_nats_max"] == nll.max().item()


def test_what_is_checked_and_what_labels_are_worth_is_of_the_first_200(trained, tmp_path: Path) -> None:
    """Even where fewer images are scored: whoever registers the checkpoint scores 200."""
    model, scores = load_checkpoint(OUT)
    record = {key: value for key, value in scores.items() if not key.startswith(("test/", "validation/"))}
    save_checkpoint(tmp_path / "trained", model, record)
    values = tiny_params()
    values["evaluate"]["num_images"] = 4  # of 8
    write_params(Path(), values)
    evaluate_stage.evaluate(PAIR, tmp_path / "trained", tmp_path / "model", tmp_path / "report")
    write_params(Path(), tiny_params())
    scores = load_checkpoint(tmp_path / "model")[1]
    assert scores["test/num_images"] == 4
    data = load_dataset("data/mnist5k.safetensors")
    levels, label = data.levels("test", slice(None)), data.labels["test"]
    of_each = torch.stack([log_prob(model, levels, torch.full_like(label, y)) for y in range(10)])
    summed_out = of_each.logsumexp(dim=0) - math.log(10)
    expected = {"": log_prob(model, levels), "_given_label": log_prob(model, levels, label)}
    for what, log_probs in {**expected, "_label_summed_out": summed_out}.items():
        assert scores[f"test/nll_nats_first_200{what}"] == pytest.approx(-log_probs.mean().item(), rel=1e-5)


def test_the_card_tells_what_was_measured(trained) -> None:
    card = (OUT / "README.md").read_text()
    _, scores = load_checkpoint(OUT)
    score, error = scores["test/nll_nats"], scores["test/nll_nats_stderr"]
    assert f"| test | 8 | {score:.2f} ± {error:.2f} | {scores['test/bits_per_dim']:.4f} |" in card
    assert "Protocol: **dynamic**" in card
    assert "| `learning_rate` | 0.01 |" in card
    assert f"MD5 `{scores['data_hash']}`" in card
    assert f"dvc repro evaluate@{PAIR}" in card
    for heading in ("Preprocessing", "Known failures", "Licence"):
        assert f"## {heading}\n" in card
    assert "None" not in card


def test_progress_is_in_the_log(trained) -> None:
    _, _, lines = trained
    assert any("step 1, epoch" in line and "nats" in line and "images/s" in line for line in lines)
    assert any("validation" in line and "left" in line for line in lines)
    assert any("test/nll_nats_uniform: 543.43 nats" in line for line in lines)
    assert any("test/nll_nats_independent: " in line for line in lines)


def test_the_run_has_everything(trained) -> None:
    _, result, _ = trained
    client = tracking.client()
    run = client.get_run(result["run_id"])
    data = load_dataset("data/mnist5k.safetensors")
    _, scores = load_checkpoint(OUT)
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "mnist5k"
    assert run.data.params["train.learning_rate"] == "0.01"
    assert run.data.params["network.num_features"] == "3"
    assert run.data.params["data.split_seed"] == str(tiny_params()["data"]["split_seed"])
    assert run.data.tags["pair"] == PAIR
    assert run.data.tags["data_hash"] == data.data_hash
    assert run.data.tags["protocol"] == "dynamic"
    assert run.data.tags["git_commit"] == "unknown", "this folder is no git repository"
    assert run.data.metrics["test/nll_nats"] == pytest.approx(scores["test/nll_nats"])
    assert run.data.metrics["test/nll_nats_independent"] == pytest.approx(scores["test/nll_nats_independent"])
    history = client.get_metric_history(result["run_id"], "curve/validation_nll_nats")
    with open(REPORT / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [m.step for m in history] == [int(float(row["step"])) for row in rows]
    assert [m.value for m in history] == [float(row["validation_nll_nats"]) for row in rows]
    train = client.get_metric_history(result["run_id"], "curve/train_subset_nll_nats")
    assert [m.value for m in train] == [float(row["train_subset_nll_nats"]) for row in rows]
    steps_scored = [int(float(row["step"])) for row in rows]
    sheets = client.list_artifacts(result["run_id"], "samples")
    assert [f.path for f in sheets] == [f"samples/step-{step:07d}.png" for step in steps_scored]
    assert run.inputs.dataset_inputs[0].dataset.digest == data.data_hash
    assert {f.path for f in client.list_artifacts(result["run_id"])} >= {
        "samples.png",
        "completions.png",
        "curve.png",
        "extremes.png",
        "class_samples.png",
        "README.md",
        "scores.json",
    }


def test_the_version_holds_the_checkpoint_without_a_pickle(trained, tmp_path: Path) -> None:
    folder, result, _ = trained
    client = tracking.client()
    version = client.get_model_version_by_alias("pixelcnn-mnist5k", "challenger")
    config, scores = (json.loads((OUT / f"{name}.json").read_text()) for name in ("config", "scores"))
    assert (str(version.version), version.run_id) == (result["version"], result["run_id"])
    assert version.tags == {
        "pair": PAIR,
        "dataset": "mnist5k",
        "data_hash": load_dataset("data/mnist5k.safetensors").data_hash,
        "protocol": "dynamic",
        "weights_sha256": config["weights_sha256"],
        "git_commit": "unknown",
        **{key: f"{scores[key]:.6g}" for key in tracking.VERSION_SCORES},
    }
    # Whoever looks at the registry alone sees what it is, how good, and who made it.
    assert f"{PAIR}: validation {scores['validation/nll_nats']:.2f} nats" in version.description
    assert "models of mnist5k" in client.get_registered_model("pixelcnn-mnist5k").description
    logged = mlflow.get_logged_model(version.source.removeprefix("models:/"))
    assert {m.key: m.value for m in logged.metrics}["test/nll_nats"] == pytest.approx(scores["test/nll_nats"])
    assert client.get_run(version.run_id).data.tags.keys() >= {"mlflow.source.name", "mlflow.user"}
    uri = f"models:/pixelcnn-mnist5k/{version.version}"
    top = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    checkpoint = top / "artifacts" / tracking.CHECKPOINT_NAME
    for file in ("README.md", "config.json", "model.safetensors", "scores.json"):
        assert (checkpoint / file).read_bytes() == (OUT / file).read_bytes()
    levels = load_dataset("data/mnist5k.safetensors").levels("test", slice(0, 3))
    model, _ = load_checkpoint(OUT)
    predicted = mlflow.pyfunc.load_model(uri).predict(levels.numpy())
    np.testing.assert_allclose(predicted, log_prob(model, levels).detach().numpy(), rtol=1e-6)
    pickles = [p for p in (*folder.rglob("*"), *top.rglob("*")) if p.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    assert pickles == []
    assert "python_model.pkl" not in (top / "MLmodel").read_text()


@pytest.mark.slow
def test_the_logged_model_loads_outside_of_the_project(trained, tmp_path: Path) -> None:
    """With the code that it brings, and requirements that name versions."""
    uri = f"models:/pixelcnn-mnist5k/{trained[1]['version']}"
    mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "model"))
    requirements = (tmp_path / "model/requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in requirements} >= {"torch", "numpy", "safetensors", "pillow", "numba"}
    assert all("==" in line and "+" not in line for line in requirements)
    code = """
import mlflow, numpy as np
model = mlflow.pyfunc.load_model("model")
import pixelcnn
print(pixelcnn.__file__)
print(model.predict(np.zeros((1, 1, 28, 28), dtype=np.int64))[0])
"""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    command = [sys.executable, "-c", code]
    done = run(command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    where, nats = done.stdout.splitlines()[-2:]
    assert Path(where).is_relative_to(tmp_path / "model/code"), "not that of the project"
    blank = torch.zeros(1, 1, 28, 28, dtype=torch.int64)
    assert float(nats) == pytest.approx(log_prob(load_checkpoint(OUT)[0], blank).item(), rel=1e-5)


def test_the_same_work_twice_makes_no_second_version(trained) -> None:
    _, result, _ = trained
    before = len(versions())
    again = train_pair(PAIR, "models/again", "reports/again")
    assert again["version"] == result["version"]
    assert again["run_id"] != result["run_id"]
    assert len(versions()) == before
    weights = Path("models/again/model.safetensors").read_bytes()
    assert weights == (OUT / "model.safetensors").read_bytes(), "one seed, one result"


def test_another_pair_is_the_next_version_and_the_challenger(trained) -> None:
    client = tracking.client()
    client.set_registered_model_alias("pixelcnn-mnist5k", "champion", trained[1]["version"])
    # Without `out`: where a deployment writes.
    result = train_pair("gated_pixelcnn-mnist5k")
    out = Path(result["out"])
    assert out.parent.parent == Path("models/deployments")
    assert out.name == "gated_pixelcnn-mnist5k"
    assert load_checkpoint(out)[1]["dataset"] == "mnist5k"

    def aliases() -> dict[str, str]:
        found = client.get_registered_model("pixelcnn-mnist5k").aliases
        return {alias: str(version) for alias, version in found.items()}

    before = aliases()
    assert before == {"champion": trained[1]["version"], "challenger": result["version"]}
    assert int(result["version"]) == len(versions())
    # Registering the champion's weights once more does not make it its own challenger.
    assert tracking.register(trained[1]["run_id"], "any", OUT, PAIR, "mnist5k") == trained[1]["version"]
    assert aliases() == before


def test_a_busy_store_is_asked_again(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = training_flow.register_task.with_options(retry_delay_seconds=[0, 0])
    monkeypatch.setattr(training_flow, "register_task", quick)
    asked = []

    def busy_once(*words: Any) -> None:
        asked.append(words)
        if len(asked) == 1:
            raise mlflow.exceptions.MlflowException("database is locked")
        return real(*words)

    real = tracking.log_training_run
    monkeypatch.setattr(tracking, "log_training_run", busy_once)
    assert train_pair(PAIR, "models/busy", "reports/busy")["version"] == trained[1]["version"]
    assert len(asked) == 2


def test_a_training_is_not_lost_with_the_store(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store stays out of reach: the flow fails, and the next attempt finds the training done."""

    def out_of_reach(*words: object) -> None:
        raise mlflow.exceptions.MlflowException("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(training_flow, "register_task", training_flow.register_task.with_options(retries=0))
        patch.setattr(tracking, "log_training_run", out_of_reach)
        with pytest.raises(mlflow.exceptions.MlflowException, match="no route to host"):
            train_pair(PAIR, "models/lost", "reports/lost")
    reports: list[object] = []
    monkeypatch.setattr(trainer, "format_progress", lambda report, *_: reports.append(report) or "")
    assert train_pair(PAIR, "models/lost", "reports/lost")["version"] == trained[1]["version"]
    assert reports == [], "no step was done again"
    assert Path("reports/lost/curve.csv").read_bytes() == (REPORT / "curve.csv").read_bytes()
    assert list(Path("models").glob(".*")) == []


@pytest.mark.parametrize("reuse", [False, True])
def test_a_training_whose_end_prefect_did_not_hear_of_is_not_done_again(
    trained, monkeypatch: pytest.MonkeyPatch, reuse: bool
) -> None:
    set_state = FlowRunEngine.set_state

    def cut_off(self, state, force=False):
        if state.is_completed():
            raise httpx.ConnectError("no route to host")
        return set_state(self, state, force)

    with monkeypatch.context() as patch:
        patch.setattr(FlowRunEngine, "set_state", cut_off)
        with pytest.raises(httpx.ConnectError):
            train_pair(PAIR, "models/unheard", "reports/unheard")
    training_flow._finished.clear()  # the process has ended
    num_runs = len(runs())
    reports: list[object] = []
    monkeypatch.setattr(trainer, "format_progress", lambda report, *_: reports.append(report) or "")
    assert train_pair(PAIR, "models/unheard", "reports/unheard", reuse=reuse)["version"] == trained[1]["version"]
    assert reports == [], "no step was done again"
    assert len(runs()) == num_runs
    assert list(Path("models").glob(".*")) == []


def test_a_training_that_dvc_did_not_record_is_not_done_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC was killed, the training lived on to its end; the next `dvc repro` removes what it made, and asks anew."""
    assert steps.main(["train", PAIR]) == 0
    weights, num_runs = Path(f"trained/{PAIR}/model.safetensors").read_bytes(), len(runs())
    shutil.rmtree(f"trained/{PAIR}")
    reports: list[object] = []
    monkeypatch.setattr(trainer, "format_progress", lambda report, *_: reports.append(report) or "")
    assert steps.main(["train", PAIR]) == 0
    assert reports == [], "no step was done again"
    assert Path(f"trained/{PAIR}/model.safetensors").read_bytes() == weights
    assert len(runs()) == num_runs == 1
    assert len(list(Path("trained").glob(".*.run-*"))) == 1
    assert steps.main(["evaluate", PAIR]) == 0  # so DVC has recorded the training
    assert [path.name for path in Path("trained").iterdir()] == [PAIR]


def test_what_is_edited_while_it_trains_is_not_what_trained(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DVC hashes settings and code when the stage ends, and would take them for those of the weights."""
    inputs = train_stage.inputs_of(PAIR, load_params(), load_dataset("data/mnist5k.safetensors"), False)
    real = train_stage.fit
    with monkeypatch.context() as patch:

        def fit(*words: Any) -> None:
            real(*words)
            patch.setattr(train_stage, "core_sha256", lambda *files: "of the edited code")

        patch.setattr(train_stage, "fit", fit)
        assert steps.main(["train", PAIR]) == 1
    assert f"code were changed while {PAIR} trained: run this again; as they were" in capsys.readouterr().err
    assert load_checkpoint(f"trained/{PAIR}")[1]["inputs_sha256"] == inputs
    monkeypatch.setattr(trainer, "format_progress", lambda *_: pytest.fail("as they were, no step is done again"))
    assert steps.main(["train", PAIR]) == 0


def test_the_stages_and_the_flow_make_the_same(trained, project: Path) -> None:
    for stage in ("train", "evaluate", "register", "register"):
        assert steps.main([stage, PAIR]) == 0
    weights = (trained[0] / OUT / "model.safetensors").read_bytes()
    assert Path(f"models/{PAIR}/model.safetensors").read_bytes() == weights
    (version,) = versions()
    (run,) = runs()
    assert version.run_id == run.info.run_id == load_checkpoint(OUT)[1]["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test/nll_nats"] == load_checkpoint(OUT)[1]["test/nll_nats"]


def test_a_new_registry_takes_what_is_there(
    trained, new_database: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After `dvc pull` in a clone, say: the run that trained is not in this registry."""
    shutil.copy(new_database, tmp_path / "new.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new.db")
    result = register_stage.register(OUT, REPORT)
    assert result == register_stage.register(OUT, REPORT), "once"
    assert result["run_id"] != trained[1]["run_id"]
    (run,) = runs()
    assert run.data.params["train.learning_rate"] == "0.01"
    assert run.data.tags["git_commit"] == "unknown"
    assert len(tracking.client().get_metric_history(result["run_id"], "curve/validation_nll_nats")) == 2


@pytest.mark.parametrize("content", ["thesis.txt", "photos"])
def test_a_folder_of_something_else_is_not_replaced(trained, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(train_stage, "fit", lambda *args: pytest.fail("it trained before it looked"))
    theirs = Path("models") / content
    (theirs / "photos" if content == "photos" else theirs).mkdir(parents=True)
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"is no checkpoint that may be replaced: it holds .*, which would be lost"):
        train_pair(PAIR, str(theirs), "reports/theirs")
    with pytest.raises(ValueError, match="is no checkpoint that may be replaced"):
        train_stage.train(PAIR, theirs)
    with pytest.raises(ValueError, match="is no checkpoint that may be replaced"):
        evaluate_stage.evaluate(PAIR, OUT, theirs, Path("reports/theirs"))
    assert (theirs / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(theirs)


class Stopped(BaseException):
    """As abrupt as a kill: no code of the flow runs after it, but for what is said here."""


def test_a_stopped_training_shows_its_curve_and_goes_on_as_the_same_run(
    trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_params()
    values["pairs"][PAIR]["train"]["save_minutes"] = 0
    write_params(Path(), values)
    before = {run.info.run_id for run in runs()}
    out, state = "models/stopped", Path("models/stopped-state")
    state.mkdir()

    def stop_after_first_row(report: train_stage.StepReport, *_: object) -> str:
        if report.validation_nll_nats is not None:
            raise Stopped
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "format_progress", stop_after_first_row)
        patch.setattr(live_run.LiveRun, "end", lambda live, error=None: None)
        with pytest.raises(Stopped):
            train_stage.train(PAIR, Path("models/stopped-trained"), state)
    (run_id,) = {run.info.run_id for run in runs()} - before
    client = tracking.client()
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["train.learning_rate"] == "0.01"
    assert [m.step for m in client.get_metric_history(run_id, "curve/validation_nll_nats")] == [3]
    result = train_pair(PAIR, out, "reports/stopped", str(state))
    assert result["run_id"] == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(run_id, "curve/validation_nll_nats")] == [3, 6]
    assert {run.info.run_id for run in runs()} - before == {run_id}, "one run, not two"
    assert "inputs_sha256" not in load_checkpoint(out)[1], "its state may be older than its settings and code"
    assert Path("reports/stopped/curve.csv").read_bytes() == (REPORT / "curve.csv").read_bytes()
    assert (Path(out) / "model.safetensors").read_bytes() == (OUT / "model.safetensors").read_bytes()
    # The state was kept, and its run is complete: more training is another run. It has no step left to take.
    values["pairs"][PAIR]["train"]["learning_rate"] = 0.02
    write_params(Path(), values)
    assert train_pair(PAIR, out, "reports/stopped", str(state))["run_id"] != run_id
    assert load_checkpoint(out)[1]["train_settings"]["learning_rate"] == 0.01, "that of its steps"
    write_params(Path(), tiny_params())


def test_a_store_that_fails_does_not_stop_a_training(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], tracking.start_training_run

    def out_of_reach_at_first(*words: Any) -> str:
        asked.append(words)
        if len(asked) == 1:
            raise mlflow.exceptions.MlflowException("no route to host")
        return real(*words)

    monkeypatch.setattr(tracking, "start_training_run", out_of_reach_at_first)
    result = train_pair(PAIR, "models/unseen", "reports/unseen")
    assert len(asked) == 2, "it was left alone until the end"
    history = tracking.client().get_metric_history(result["run_id"], "curve/validation_nll_nats")
    assert [m.step for m in history] == [3, 6], "the end brings what was missed"
    assert result["version"] == trained[1]["version"]


def test_a_diverging_training_is_a_failed_run(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {run.info.run_id for run in runs()}

    def diverge(*words: object) -> None:
        raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(train_stage, "fit", diverge)
    with pytest.raises(FloatingPointError):
        train_pair(PAIR, "models/diverged", "reports/diverged")
    (failed,) = [run for run in runs() if run.info.run_id not in before]
    assert failed.info.status == "FAILED"


def test_a_training_that_fails_soon_after_the_store_is_a_failed_run_too(trained, tmp_path: Path) -> None:
    identity = {"pair": PAIR, "dataset": "mnist5k", "data_hash": "0"}
    live = live_run.LiveRun(tmp_path, tracking.Training(**identity, params={}, tags={}), print)
    live._try(lambda: (tmp_path / "absent").read_text())  # it is left alone from now on
    live.end(FloatingPointError("the loss is not finite"))
    assert tracking.client().get_run(live.run_id).info.status == "FAILED"


def test_a_training_that_is_stopped_is_a_killed_run(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {run.info.run_id for run in runs()}

    def interrupt(*words: object) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:  # the machine is measured meanwhile
            started = [run for run in runs() if run.info.run_id not in before]
            if any("system/cpu_utilization_percentage" in run.data.metrics for run in started):
                break
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setattr(train_stage, "fit", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_stage.train(PAIR, Path("models/killed"))
    (killed,) = [run for run in runs() if run.info.run_id not in before]
    assert killed.info.status == "KILLED"
    assert "system/cpu_utilization_percentage" in killed.data.metrics


def test_a_cancelled_run_leaves_no_folder_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(shown, "DEPLOYMENTS_FOLDER", tmp_path)
    monkeypatch.setattr(tracking, "client", away)
    (tmp_path / "its ID/.trained").mkdir(parents=True)
    (tmp_path / "its ID/.trained" / live_run.RUN_ID_FILE).write_text("a run")
    with pytest.raises(OSError, match="no route to host"):
        shown.remove_cancelled(None, SimpleNamespace(id="its ID"), None)
    assert list(tmp_path.iterdir()) == []


def test_a_run_shows_scores_and_pictures(trained) -> None:
    """In Prefect's pages, which can be filtered by tags."""
    with get_client(sync_client=True) as prefect:
        (run,) = [one for one in prefect.read_flow_runs() if one.parameters.get("out") == str(OUT)]
        answer = prefect.request("POST", "/artifacts/filter", json={})
    found = {one["key"]: one["data"] for one in answer.json() if one["flow_run_id"] == str(run.id)}
    assert set(found) == {f"{kind}-pixelcnn-mnist5k" for kind in ("scores", "samples", "completions", "curve")}
    scores = json.loads((OUT / "scores.json").read_text())
    assert {"score": "test/nll_nats", "value": scores["test/nll_nats"]} in json.loads(found["scores-pixelcnn-mnist5k"])
    picture = base64.b64encode((REPORT / "samples.png").read_bytes()).decode()
    assert found["samples-pixelcnn-mnist5k"] == f"data:image/png;base64,{picture}"
    assert set(run.tags) == {PAIR, "mnist5k"}


def test_what_followed_from_the_same_inputs_is_not_trained_again(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("trained again")

    before = {run.info.run_id for run in runs()}
    monkeypatch.setattr(train_stage, "fit", never)
    foreign = Path("reports/reused/README.md")
    foreign.parent.mkdir()
    foreign.write_text("somebody's")
    result = train_pair(PAIR, "models/reused", "reports/reused", reuse=True)
    assert foreign.read_text() == "somebody's"
    foreign.unlink()
    assert result == {**trained[1], "out": "models/reused"}
    assert {run.info.run_id for run in runs()} == before
    for made, again in ((OUT, Path("models/reused")), (REPORT, Path("reports/reused"))):
        assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in made.iterdir())
        assert all((again / path.name).read_bytes() == path.read_bytes() for path in made.iterdir())


def test_inputs_are_data_settings_and_code(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params, data = load_params(), load_dataset("data/mnist5k.safetensors")
    same = train_stage.inputs_of(PAIR, params, data, False)
    assert trained[1]["run_id"] in tracking.runs_of_inputs("mnist5k", same)
    others = {train_stage.inputs_of(PAIR, params, data, True)}
    others.add(train_stage.inputs_of(PAIR, params, replace(data, data_hash="0" * 32), False))
    others.add(train_stage.inputs_of("gated_pixelcnn-mnist5k", params, data, False))
    with monkeypatch.context() as patch:  # the file of an architecture of one's own
        patch.setattr(train_stage, "code_beside", lambda model: {"pixelcnn": ["its SHA-256"]}[model])
        others.add(train_stage.inputs_of(PAIR, params, data, False))
    others.add(
        train_stage.inputs_of(
            PAIR, params.model_copy(update={"sample": params.sample.model_copy(update={"seed": 5})}), data, False
        )
    )
    judged = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"judges": {"mnist5k": "mnist"}})})
    Path("judges").mkdir()
    for weights in (b"one", b"another"):
        (Path("judges") / "mnist-judge.safetensors").write_bytes(weights)
        others.add(train_stage.inputs_of(PAIR, judged, data, False))
    shutil.rmtree("judges")
    elsewhere = params.evaluate.model_copy(update={"completion_images": {"cifar10": 1}, "judges": {"mnist": "mnist"}})
    assert train_stage.inputs_of(PAIR, params.model_copy(update={"evaluate": elsewhere}), data, False) == same
    shutil.copytree(Path(provenance.pixelcnn.__file__).parent, tmp_path / "pixelcnn")
    monkeypatch.setattr(provenance.pixelcnn, "__file__", str(tmp_path / "pixelcnn/__init__.py"))
    # The one decides the weights: a state of the code before is not gone on with. The other decides scores alone.
    for file, decides in (("models/layers.py", True), ("completion.py", False)):
        before = train_stage.weights_key(PAIR, params, data)
        with open(tmp_path / "pixelcnn" / file, "a") as source:
            source.write("\n")
        assert (train_stage.weights_key(PAIR, params, data) != before) == decides
        others.add(train_stage.inputs_of(PAIR, params, data, False))
    assert len(others) == 9
    assert same not in others


def test_scores_of_other_settings_do_not_name_the_inputs(trained, tmp_path: Path) -> None:
    """DVC trains, the evaluation's settings change, and DVC evaluates alone."""
    values = tiny_params()
    for num_images in (8, 4):
        values["evaluate"]["num_images"] = num_images
        write_params(Path(), values)
        evaluate_stage.evaluate(PAIR, OUT, tmp_path / "model", tmp_path / "report")
        assert ("inputs_sha256" in load_checkpoint(tmp_path / "model")[1]) == (num_images == 8)
    write_params(Path(), tiny_params())


def test_state_and_result_lie_apart(trained) -> None:
    before = sorted(Path("models").iterdir())
    with pytest.raises(ValueError, match=r"state and out are the same folder, models/x: name another for the state\."):
        train_pair(PAIR, "models/x", state="models/../models/x")
    with pytest.raises(ValueError, match="state and out are the same folder"):
        train_stage.train(PAIR, Path("models/x"), Path("models/x"))
    assert sorted(Path("models").iterdir()) == before


def test_a_curve_of_an_earlier_training_is_not_taken_for_this_ones(trained, tmp_path: Path) -> None:
    """It may have had more parts; so may a state that is carried over."""
    report, trained_folder, stale = tmp_path / "report", tmp_path / "as-trained", ("labels.csv", "completer.csv")
    shutil.copytree(REPORT, report)
    shutil.copytree(OUT, trained_folder)
    shutil.copy(REPORT / "curve.csv", trained_folder)
    for name in stale:
        (report / name).write_text("step,labels_validation_nats\n1,2.0\n")
    evaluate_stage.evaluate(PAIR, trained_folder, tmp_path / "model", report)
    assert sorted(path.name for path in report.iterdir()) == sorted(path.name for path in REPORT.iterdir())
    state = tmp_path / "state"
    state.mkdir()
    for name in stale:
        (state / name).write_text("")
    train_stage.train(PAIR, tmp_path / "trained", state)
    assert not {path.name for path in (tmp_path / "trained").iterdir()} & set(stale)


def test_two_trainings_of_one_folder_do_not_meet(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits, says for whom, and takes what the first has made."""

    def never(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train_stage, "fit", never)
    ready, end, said = threading.Event(), threading.Event(), []

    def hold() -> None:
        with file_lock(Path("models/.both.lock"), "the first", print):
            ready.set()
            end.wait(60)

    first = threading.Thread(target=hold)
    first.start()
    assert ready.wait(10)

    def waiting(path: Path, what: str, say: Callable[[str], None]):
        def once_said(text: str) -> None:
            said.append(text)
            end.set()

        return file_lock(path, what, once_said)

    monkeypatch.setattr(training_flow, "file_lock", waiting)
    try:
        result = train_pair(PAIR, "models/both", "reports/both")
    finally:
        end.set()
        first.join()
    assert said[0].startswith(f"the training of {PAIR} waits for process {os.getpid()} on ")
    assert result == {**trained[1], "out": "models/both"}
    assert (Path("models/both") / "model.safetensors").read_bytes() == (OUT / "model.safetensors").read_bytes()


def test_two_that_register_the_same_weights_make_one_version(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked, and found nothing, before either has registered."""
    before, real = len(versions()), mlflow.register_model
    client = tracking.client()
    config = json.loads((OUT / "config.json").read_text())
    other = Path("models/twice")
    shutil.copytree(OUT, other)
    (other / "config.json").write_text(json.dumps({**config, "weights_sha256": "f" * 64}))
    run_id = trained[1]["run_id"]
    (model,) = client.search_logged_models([tracking.experiment_id("mnist5k")], f"source_run_id = '{run_id}'")

    def register_both(uri: str, name: str, tags: dict[str, str]):
        real(uri, name, tags=tags)
        return real(uri, name, tags=tags)

    monkeypatch.setattr(mlflow, "register_model", register_both)
    number = tracking.register(run_id, model.model_id, other, PAIR, "mnist5k")
    assert len(versions()) == before + 1
    assert [str(v.version) for v in versions() if v.tags["weights_sha256"] == "f" * 64] == [number]
    client.delete_model_version("pixelcnn-mnist5k", number)


def test_halves_are_the_nearest_of_so_many_bits() -> None:
    every = torch.arange(0x77E1, dtype=torch.int16).view(torch.float16)  # from 0 to 32256
    coarse = every[::32].float()
    middle = (coarse[1:] + coarse[:-1]) / 2
    for sign in (1, -1):
        found = train_stage._rounded(sign * every.float(), 5)
        assert found.dtype == torch.float16
        nearest = coarse[torch.bucketize(every.float(), middle, right=True)]
        assert torch.equal(found.float(), sign * nearest)
        assert torch.equal(train_stage._rounded(sign * every.float(), 10), sign * every)


@pytest.mark.parametrize(("bits", "tolerance", "is_coarse"), [((5, 10), 1.0, True), ((0, 10), 1e-4, False)])
def test_half_precision_has_as_few_bits_as_score_alike(trained, monkeypatch, bits, tolerance, is_coarse) -> None:
    model, _ = load_checkpoint(OUT)
    monkeypatch.setattr(train_stage, "HALF_BITS", bits)
    monkeypatch.setattr(train_stage, "HALF_TOLERANCE", tolerance)
    assert train_stage._round_to_half(model, load_dataset("data/mnist5k.safetensors"), print)
    found = torch.cat([weight.detach().half().view(torch.int16).flatten() for weight in model.parameters()])
    assert bool(((found & 31) == 0).all()) == is_coarse
    assert (found & 32).any()


def test_half_precision_is_stored_where_it_scores_alike(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    train_pair(PAIR, "models/half", "reports/half", half=True)
    stored = load_file("models/half/model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float16}
    model, scores = load_checkpoint("models/half")
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert scores["weights_dtype"] == "float16"
    data = load_dataset("data/mnist5k.safetensors")
    found = -log_prob(model, data.levels("test", slice(0, 8))).mean().item()
    assert scores["test/nll_nats"] == pytest.approx(found, rel=1e-6), "the scores are those of the stored weights"
    monkeypatch.setattr(train_stage, "HALF_TOLERANCE", -1.0)
    train_pair(PAIR, "models/whole", "reports/whole", half=True)
    assert Path("models/whole/model.safetensors").read_bytes() == (OUT / "model.safetensors").read_bytes()
    assert load_checkpoint("models/whole")[1]["weights_dtype"] == "float32"


@pytest.mark.slow
def test_the_code_of_a_training_is_that_of_its_start(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["a", "b", "c"])
    monkeypatch.setattr(train_stage, "git_state", lambda: {"git_commit": next(commits), "git_dirty": "false"})
    train_pair(PAIR, "models/committed", "reports/committed")
    assert load_checkpoint("models/committed")[1]["git_commit"] == "a"


def test_context_completer_and_label_network_are_trained_after_the_joint_model(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_stage.train(PAIR, Path("models/joint"))
    values = tiny_params()
    pair = values["pairs"][PAIR]
    pair["network"] |= {"context_features": 2, "completer_features": 2}
    pair["completer"] = {**pair["train"], "context_share": 1.0, "learning_rate": 0.02}
    pair["context"] = {**pair["train"], "learning_rate": 0.03, "max_epochs": 0.06}
    pair["halves"] = {**pair["completer"], "halves_share": 0.75, "learning_rate": 0.04}
    pair["network"] |= {"added_features": 2, "label_features": 2}
    pair["added"] = {**pair["completer"], "learning_rate": 0.05, "context_network_share": 0.0}
    pair["added_begins_with"] = "models/begin"
    pair["labels"] = {**pair["train"], "label_dropout": 0.0}
    values["evaluate"]["completion_images"] = {"mnist5k": 5}
    write_params(Path(), values)
    begin = build_model(replace(load_params().pair(PAIR).network, added_features=0))
    save_checkpoint("models/begin", begin, {})
    out, state = Path("models/completer"), Path("models/completer-state")
    run_id = train_pair(PAIR, str(out), "reports/completer", str(state))["run_id"]
    model, scores = load_checkpoint(out)
    joint, _ = load_checkpoint("models/joint")
    assert model.completer is not None
    assert model.label_network is not None
    assert scores["num_labels_parameters"] == sum(p.numel() for p in model.label_network.parameters())
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in joint.state_dict().items()), "it is as it was"
    assert model.completer.added is not None
    assert scores["num_added_parameters"] == sum(p.numel() for p in model.completer.added.parameters())
    both = sum(p.numel() for p in model.completer.parameters())
    assert scores["num_completer_parameters"] + scores["num_added_parameters"] == both
    assert scores["completer_train_minutes"] > 0
    assert scores["completer_train_settings"]["learning_rate"] == 0.02
    assert scores["test/completion_num_images"] == 5
    card = (out / "README.md").read_text()
    assert f"(and {both:,} of the networks that complete drawings)" in card
    assert "of the first 5 test images" in card
    assert "| `learning_rate` | 0.01 |" in card
    assert "| `learning_rate` | 0.02 |" in card
    num_context = sum(p.numel() for p in model.completer.context_network.parameters())
    assert scores["num_context_parameters"] == num_context + 3 * 2, "and a classifier of two levels by two maps"
    assert f"the context network of the completer, {scores['num_context_parameters']:,} parameters: " in card
    assert "| `learning_rate` | 0.03 |" in card
    assert "It then went on, mostly with halves of images as they are: " in card
    assert "| `learning_rate` | 0.04 |" in card
    assert "The network whose logits are added to the completer's, which stays as it was: " in card
    assert " It began as the completer of `models/begin`, a part of whose logits was added" in card
    assert "| `learning_rate` | 0.05 |" in card
    before = read_state(state / "completer.safetensors")[1]
    after = read_state(state / "halves.safetensors")[1]
    assert not torch.equal(before["ema/0"], after["ema/0"])
    kept = dict(model.completer.named_parameters())
    assert torch.equal(after["ema/0"], next(iter(kept.values()))), "what went on is what is kept"
    learned = read_state(state / "added.safetensors")[1]
    first_name, first_weight = next(begin.completer.named_parameters())
    assert torch.equal(learned["ema/0"], kept[f"added.{first_name}"])
    assert not torch.equal(learned["ema/0"], first_weight)
    of_context = "added.context_network.first.weight"
    assert torch.equal(kept[of_context], begin.completer.context_network.first.weight), "its share is 0"
    client = tracking.client()
    history = client.get_metric_history(run_id, "curve/completer_validation_nats")
    assert [m.step for m in history] == [3, 6]
    assert [m.step for m in client.get_metric_history(run_id, "curve/labels_validation_nats")] == [3, 6]
    for part in ("halves", "added"):
        assert [m.step for m in client.get_metric_history(run_id, f"curve/{part}_validation_nats")] == [3, 6]
    assert [m.step for m in client.get_metric_history(run_id, "curve/context_validation_nats")] == [4, 8]
    assert client.get_run(run_id).data.params["completer.learning_rate"] == "0.02"
    # With larger budgets both go on, what follows the completer anew, and the record says by which code each began.
    monkeypatch.setattr(train_stage, "git_state", lambda: {"git_commit": "later", "git_dirty": "false"})
    pair["train"]["max_epochs"], pair["completer"]["max_epochs"], pair["halves"]["max_epochs"] = 0.06, 0.07, 0.1
    write_params(Path(), values)
    (state / "labels.safetensors").unlink()
    train_stage.train(PAIR, Path("models/longer"), state)
    longer = load_checkpoint("models/longer")[1]
    began = {part: longer[f"{part}_git_commit"] for part in ("train", *PARTS)}
    anew = dict.fromkeys(("halves", "added", "labels"), "later")
    assert began == dict.fromkeys(("train", "context", "completer"), "unknown") | anew
    assert longer["git_commit"] == "later"
    card = model_card(config_to_dict(model.config), scores | longer)
    assert card.count(", by the code of commit `unknown`") == 3
    last = {name: (state / name).read_text().splitlines()[-1].split(",")[0] for name in ("curve.csv", "completer.csv")}
    assert last == {"curve.csv": "8", "completer.csv": "9"}
    assert [row["step"] for row in read_curve(state / "halves.csv")] == [6, 12], "none of those before it began anew"


def test_a_compiler_that_is_missing_is_told_before_anything_is_trained(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_params()
    pair = values["pairs"][PAIR]
    pair["network"] |= {"context_features": 2, "completer_features": 2}
    pair["completer"] = {**pair["train"], "compiled": True}
    write_params(Path(), values)
    monkeypatch.setattr(training_config, "CXX", "no-such-compiler")
    monkeypatch.setattr(train_stage, "fit", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"^compiled must be false: it takes the C\+\+ compiler no-such-compiler and "):
        train_stage.train(PAIR, Path("models/uncompiled"))


def test_a_training_that_begins_anew_keeps_no_row_though_it_is_killed_before_its_first(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    state = Path("training/state")
    train_stage.train(PAIR, Path("models/first"), state)
    assert read_curve(state / "curve.csv")
    (state / "state.safetensors").unlink()
    monkeypatch.setattr(train_stage, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        train_stage.train(PAIR, Path("models/second"), state)
    assert not (state / "curve.csv").exists()


def test_the_state_of_other_settings_stays_beside(project: Path) -> None:
    said: list[str] = []
    data = load_dataset("data/mnist5k.safetensors")

    def work_folder() -> Path:
        return train_stage._work_folder(OUT, PAIR, load_params(), data, said.append)

    first = work_folder()
    assert work_folder() == first
    first.mkdir(parents=True)
    values = tiny_params()
    values["pairs"][PAIR]["train"]["learning_rate"] = 0.02
    write_params(project, values)
    assert said == []
    assert work_folder() != first
    assert first.exists(), "hours of training are not deleted because a setting was tried"
    assert said == [
        f"{first} holds an unfinished training of {PAIR} with other settings, data or code: it goes on when they are "
        "as they were. Delete it if you do not want it."
    ]
    train_stage.remove_finished_states(OUT)
    assert first.exists()
    write_params(project, tiny_params())
    assert work_folder() == first


def test_weights_of_other_data_are_not_scored(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained[0])
    other = replace(load_dataset("data/mnist5k.safetensors"), data_hash="0" * 32)
    monkeypatch.setattr(evaluate_stage, "load", lambda _: other)
    with pytest.raises(ValueError, match=r"was trained on other data than data/mnist5k\.safetensors\. Train it again"):
        evaluate_stage.evaluate(PAIR, OUT, tmp_path / "model", tmp_path / "report")
    assert not (tmp_path / "model").exists()


def test_weights_that_the_core_trained_are_not_scored(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained[0])
    model, record = load_checkpoint(OUT)
    save_checkpoint(tmp_path / "core", model, {key: record[key] for key in ("data_hash", "protocol", "label_names")})
    with pytest.raises(ValueError, match=r"not written by the train stage\. Register it: pipelines\.steps register "):
        evaluate_stage.evaluate(PAIR, tmp_path / "core", tmp_path / "model", tmp_path / "report")


def test_a_missing_judge_is_named_before_anything_is_scored(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny_params()
    values["evaluate"]["judges"] = {"mnist5k": "mnist5k"}
    write_params(Path(), values)
    monkeypatch.setattr(evaluate_stage.evaluation, "evaluate", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(ValueError, match=r"judges/mnist5k-judge\.safetensors is no judge of mnist5k"):
        evaluate_stage.evaluate(PAIR, OUT, Path("models/judged"), Path("reports/judged"))
    write_params(Path(), tiny_params())


def test_how_settings_went_that_changed_on_the_way() -> None:
    phases = [{"from_step": 0, "learning_rate": 0.01, "batch_size": 8}]
    phases += [{"from_step": 6, "learning_rate": 0.02, "batch_size": 8, "ema_decay": 0.9}]
    config = load_params(ROOT / "params.yaml").pair(PAIR).train
    told = {"learning_rate": "0.01 from step 0, then 0.02 from step 6", "ema_decay": "0.9 from step 6", "batch_size": 8}
    assert train_stage._settings_taken(config, phases) == asdict(config) | told


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: train_pair.fn("nope"), "unknown pair"),
        (lambda: train_all.fn(at_once=0), "at_once"),
        (lambda: train_all.fn([PAIR, f"models/{PAIR}"]), "unknown pair"),
    ],
)
def test_a_run_that_crashes_each_time_is_not_retried_for_ever(
    monkeypatch: pytest.MonkeyPatch, attempt: Callable[[], object], said: str
) -> None:
    for count, error in ((3, ValueError), (4, RuntimeError)):
        monkeypatch.setattr(training_flow, "flow_run", SimpleNamespace(get_run_count=lambda count=count: count))
        with pytest.raises(error, match=said if count == 3 else "this run has crashed 3 times"):
            attempt()


def test_baselines_of_two_levels_by_hand() -> None:
    data = tiny_dataset(shape=(1, 1, 2))
    # Column 0 is inked in a quarter of the 1,000 images, column 1 always half: 250 and 500 ones are expected.
    data.images["train"][:, 0, 0, 0] = torch.tensor([255, 0, 0, 0], dtype=torch.uint8).repeat(250)
    data.images["train"][:, 0, 0, 1] = torch.tensor([255, 0], dtype=torch.uint8).repeat(500)
    data.images["test"][:] = torch.tensor([1, 0], dtype=torch.uint8)
    scores = baseline_scores(data)
    assert scores["test/nll_nats_uniform"] == pytest.approx(2 * math.log(2))
    assert scores["test/nll_nats_independent"] == pytest.approx(-math.log(251 / 1002) - math.log(501 / 1002))


def test_baselines_of_256_levels_by_hand() -> None:
    data = tiny_dataset("cifar10", 256, (3, 1, 1))
    data.images["train"][:, :, 0, 0] = torch.tensor([7, 200, 255], dtype=torch.uint8)
    data.images["test"][:, :, 0, 0] = torch.tensor([7, 200, 0], dtype=torch.uint8)
    scores = baseline_scores(data)
    assert scores["test/nll_nats_uniform"] == pytest.approx(3 * math.log(256))
    expected = -2 * math.log(1001 / 1256) - math.log(1 / 1256)
    assert scores["test/nll_nats_independent"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "train-pair pixelcnn-svhn --out o --report r",
            "train-pair: unknown pair 'pixelcnn-svhn'. Known pairs in params.yaml: ",
        ),
        ("train pixelcnn-mnist", "train: data/mnist.safetensors does not exist. Make it: dvc repro full/dvc.yaml:"),
        (
            "evaluate pixelcnn-mnist5k",
            "evaluate: trained/pixelcnn-mnist5k does not exist. Make it: dvc repro train@pixelcnn-mnist5k",
        ),
        ("prepare svhn", "prepare: unknown dataset 'svhn'. Known: mnist5k, mnist, fashion_mnist, cifar10."),
    ],
)
def test_a_mistake_is_one_sentence(project: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert steps.main(words.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert not (project / "o").exists()


def test_a_mistake_in_params_is_one_sentence(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tiny_params()
    values["pairs"][PAIR]["train"]["learning_rat"] = 0.02
    write_params(project, values)
    assert steps.main(["train", PAIR]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train: params.yaml: pairs.{PAIR}.train: unknown key 'learning_rat'. Known: accumulate, ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text", ["", "stages:\n", "stages:\n<<<<<<< HEAD\n  a: b\n=======\n", "stages: {prepare@mnist5k: {outs: []}}"]
)
def test_a_lock_that_cannot_be_read_is_one_sentence(
    project: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    Path("dvc.lock").write_text(text)
    assert steps.main(["train", PAIR]) == 1
    said = "train: dvc.lock cannot be read: resolve its git conflict, or wait until dvc has ended.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [AssertionError, KeyError, IndexError, TypeError])
def test_a_bug_is_not_hidden(project: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def bug(*words: object) -> None:
        raise error("a bug")

    monkeypatch.setattr("pipelines.datasets.prepare.prepare", bug)
    with pytest.raises(error, match="a bug"):
        steps.main(["prepare", "mnist5k"])


@slow_alone
def test_two_processes_may_make_one_new_database(tmp_path: Path) -> None:
    """Without a lock the second dies in the middle of the first one's schema."""
    code = "from pipelines.registry import runs; runs.experiment_id('x')"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with ThreadPoolExecutor(2) as both:
        for done in both.map(lambda _: run(command, env=environment), range(2)):
            assert done.returncode == 0, done.stderr
    assert (tmp_path / "mlflow.db").stat().st_size > 0
