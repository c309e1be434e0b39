"""Promotion on evidence, with a real MLflow registry (SQLite) and a real BentoML store, and models known by hand."""

import errno
import getpass
import json
import math
import re
import shutil
import socket
import sqlite3
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect.client.orchestration import get_client
from safetensors import SafetensorError

from pipelines import steps
from pipelines.flows import promote as promotion_flow
from pipelines.promotion import decide, register, score
from pipelines.promotion.move import UnfinishedMoveError, explained, run_promotion, run_rollback, run_shadow
from pipelines.promotion.rule import Candidate, Choice
from pipelines.registry import decisions, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.registry.lineage import describe
from pixelcnn import Dataset
from pixelcnn.checkpoint import load_checkpoint, save_checkpoint
from pixelcnn.evaluation import evaluate, evaluate_completion
from pixelcnn.models.layers import MaskedConv2d
from pixelcnn.observed import SCORED
from tests.pipelines.toys import CONFIG, INK, PARAMS, Toy


@pytest.fixture(scope="module")
def registry_folder(tmp_path_factory, new_database):
    """One MLflow database for the file. Each test has a dataset of its own name."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(new_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        yield folder
        mlflow.set_tracking_uri(None)


@pytest.fixture
def toy(registry_folder, tmp_path, monkeypatch, request):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bentoml").mkdir()
    return Toy(request.node.name.removeprefix("test_").replace("[", "-").replace("]", ""), tmp_path)


def nll_by_hand(data: Dataset, ink: float) -> torch.Tensor:
    images = data.images["validation"].double().flatten(1)
    return -(images * math.log(ink) + (1 - images) * math.log(1 - ink)).sum(dim=1)


def decision_runs(toy: Toy) -> list:
    client = tracking.client()
    experiment = client.get_experiment_by_name("promotions")
    runs = client.search_runs([experiment.experiment_id], f"tags.dataset = '{toy.name}'", order_by=["start_time ASC"])
    return list(runs)


def test_better_moves(toy):
    first = toy.train(0.3)
    report = toy.promote()
    assert report["decision"] == "promoted"
    assert toy.aliases == {"champion": first}

    second = toy.train(INK)
    assert toy.aliases["challenger"] == second
    report = toy.promote()
    assert report["decision"] == "promoted"
    assert toy.aliases == {"champion": second, "previous": first}

    # Both were scored on the same validation images, and the interval is the one computed by hand.
    difference = nll_by_hand(toy.data, INK) - nll_by_hand(toy.data, 0.3)
    half = 1.959964 * difference.std().item() / math.sqrt(len(difference))
    mean = difference.mean().item()
    assert report["joint_difference"] == pytest.approx(
        {"mean": mean, "low": mean - half, "high": mean + half}, rel=1e-5
    )
    completion = report["candidate"]["completion_nats"] - report["champion"]["completion_nats"]
    assert report["completion_difference"]["mean"] == pytest.approx(completion)
    assert report["total_difference"]["mean"] == pytest.approx(mean + completion)
    assert report["candidate"]["nll_nats"] == pytest.approx(nll_by_hand(toy.data, INK).mean().item(), rel=1e-6)
    assert report["champion"]["nll_nats"] == pytest.approx(nll_by_hand(toy.data, 0.3).mean().item(), rel=1e-6)
    assert f"version {second} is the new champion" in report["text"]
    assert "(toy, data" in report["text"]  # no figure without its protocol

    run = decision_runs(toy)[-1]
    assert run.info.status == "FINISHED"
    assert run.info.run_name == f"{toy.name}: version {second} promoted instead of {first}"
    assert run.data.tags["decision"] == "promoted"
    assert run.data.tags["champion_version"] == first
    assert run.data.tags["candidate_version"] == second
    assert run.data.metrics["joint_difference/high"] == pytest.approx(report["joint_difference"]["high"])
    assert run.data.metrics["candidate/nll_nats"] == pytest.approx(report["candidate"]["nll_nats"])
    assert run.data.metrics["champion/nll_nats"] == pytest.approx(report["champion"]["nll_nats"])


def test_export_has_the_lineage(toy):
    version = toy.train(INK)
    report = toy.promote()
    metadata, tag = toy.served(), str(store.latest(toy.model_name))
    (registered,) = registry.versions(toy.name)
    assert tag == f"{toy.model_name}:v{version}-{registered.tags['weights_sha256'][:8]}"
    assert report["served"] == tag
    assert metadata["name"] == toy.model_name
    assert metadata["version"] == version
    assert metadata["run_id"] == registered.run_id
    assert metadata["git_commit"] == "c0ffee"
    assert metadata["data_hash"] == toy.data.data_hash
    assert metadata["weights_sha256"] == registered.tags["weights_sha256"]
    assert (metadata["dataset"], metadata["label_names"], metadata["protocol"]) == (toy.name, ["a", "b"], "toy")
    # Forward again: from the metadata to the run.
    run = tracking.client().get_run(metadata["run_id"])
    assert run.data.tags["data_hash"] == metadata["data_hash"]
    # Nothing but a checkpoint's files and BentoML's own: no code and no pickle.
    assert sorted(f.name for f in (store.home() / "models" / tag.replace(":", "/")).iterdir()) == [
        "beginnings.json",
        "config.json",
        "model.safetensors",
        "model.yaml",
        "scores.json",
    ]


def test_worse_stays(toy):
    first = toy.register(INK)
    toy.promote()
    toy.register(0.3)
    report = toy.promote()
    assert report["decision"] == "kept"
    assert "does not lie below zero" in report["reason"]
    assert report["joint_difference"]["low"] > 0
    assert toy.aliases == {"champion": first}
    assert len(toy.stored()) == 1
    assert decision_runs(toy)[-1].data.tags["decision"] == "kept"


def test_tie_stays(toy):
    first = toy.register(INK)
    toy.promote()
    toy.register(INK)  # other weights, the same distribution
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["total_difference"]["mean"] == report["total_difference"]["high"] == 0
    assert toy.aliases["champion"] == first


def test_better_by_less_than_the_noise_stays(toy):
    best = toy.data.images["validation"].double().mean().item()
    first = toy.register(best + 0.002)
    toy.promote()
    toy.register(best)
    report = toy.promote()
    assert report["total_difference"]["mean"] < 0 < report["total_difference"]["high"]
    assert report["decision"] == "kept"
    assert toy.aliases["champion"] == first


def test_the_best_candidate_competes(toy):
    toy.register(0.4)
    toy.promote()
    toy.register(0.3)
    best = toy.register(INK)
    toy.register(0.2)
    report = toy.promote()
    assert report["candidate"]["version"] == best
    assert toy.aliases["champion"] == best


def test_weights_that_are_not_numbers_are_passed_over(toy):
    first = toy.register(0.3)
    toy.promote()
    unmeasured = toy.register(INK, broken=True, nll=math.nan)
    broken = toy.register(INK, broken=True, nll=1.0)
    edited = toy.register(INK / 2)
    tracking.client().set_model_version_tag(toy.model_name, edited, registry.VALIDATION_METRIC, "about 80")
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["skipped"] == [
        {"version": unmeasured, "reason": "its recorded validation NLL is not a finite number"},
        {"version": edited, "reason": "its recorded validation NLL is not a finite number"},
        {"version": broken, "reason": "its joint NLL is not a finite number for 400 of 400 images"},
    ]
    assert f"version {broken}: its joint NLL is not a finite number" in report["text"]
    assert toy.aliases["champion"] == first
    # It does not stand in the way of a good one.
    good = toy.register(INK)
    assert toy.promote()["decision"] == "promoted"
    assert toy.aliases["champion"] == good


def test_a_champion_that_gives_no_number_is_not_replaced_unseen(toy):
    broken = toy.register(INK, broken=True, nll=1.0)
    registry.set_alias(toy.name, tracking.CHAMPION, broken)
    toy.register(INK)
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["reason"].endswith("cannot be compared: its joint NLL is not a finite number for 400 of 400 images")
    assert toy.aliases["champion"] == broken
    json.dumps(report, allow_nan=False)  # as the flow writes it


def test_a_leak_is_passed_over_however_well_it_scores(toy, monkeypatch):
    first = toy.register(0.3)
    toy.promote()
    leaking = toy.register(INK)
    sha256 = registry.versions(toy.name)[-1].tags["weights_sha256"]

    def load(folder):
        model, scores = load_checkpoint(folder)
        if registry.sha256_of(folder / "model.safetensors") == sha256:
            with torch.no_grad():
                model.logits.weight.normal_()
                for module in model.modules():
                    if isinstance(module, MaskedConv2d):
                        module.mask.fill_(1)
        return model, scores

    def scorer(version, data, batch_size):
        found = score.score(version, data, batch_size)
        return found if version.version != leaking else replace(found, joint_nats=found.joint_nats * 0.1)

    with monkeypatch.context() as patch:
        for module in (registry, score):
            patch.setattr(module, "load_checkpoint", load)
        report = run_promotion(toy.name, toy.data, PARAMS, scorer)
        (skipped,) = report["skipped"]
        assert skipped["version"] == leaking
        assert "it leaks: at" in skipped["reason"]
        assert "it leaks: at" in report["text"]
        assert toy.aliases["champion"] == first
        # It does not stand in the way of a good one.
        good = toy.register(INK)
        assert run_promotion(toy.name, toy.data, PARAMS, scorer)["decision"] == "promoted"
        assert toy.aliases["champion"] == good


def test_a_slow_sampler_is_passed_over(toy):
    first = toy.register(0.3)
    toy.promote()
    slow = toy.register(INK)
    report = run_promotion(toy.name, toy.data, PARAMS.model_copy(update={"max_sample_s": 0}))
    assert report["decision"] == "kept"
    (skipped,) = report["skipped"]
    assert skipped["version"] == slow
    assert "it samples too slowly" in skipped["reason"]
    assert "promote.max_sample_s allows 0 s" in report["text"]
    assert toy.aliases["champion"] == first
    # The limit is for whoever wants the place: the champion itself is scored, and a fast enough rival compared with it.
    assert toy.promote()["decision"] == "promoted"


def test_first_champion_must_be_a_number(toy):
    toy.register(INK, broken=True, nll=1.0)
    report = toy.promote()
    assert report["decision"] == "kept"
    assert "no version can be compared" in report["reason"]
    assert "champion" not in toy.aliases
    assert not (store.home() / "models").exists()


def test_first_champion_must_beat_uniform(toy):
    toy.register(0.9)
    report = toy.promote()
    assert report["decision"] == "kept"
    assert "no better than the uniform distribution" in report["text"]
    assert "champion" not in toy.aliases


def test_first_champion_is_the_better_of_two(toy):
    toy.register(0.3, nll=1.0)  # its training recorded a better score than it has
    best = toy.register(INK)
    report = toy.promote()
    assert toy.aliases == {"champion": best}
    assert report["compared"] == ["1", best]
    assert "there was no champion, and no version has a lower mean NLL" in report["text"]


def test_other_data_stays_out(toy):
    first = toy.register(0.3)
    toy.promote()
    other = toy.prepare(seed=1)
    assert other.data_hash != toy.data.data_hash
    stranger = toy.register(INK, data=other)
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["skipped"][0]["version"] == stranger
    assert f"other data (hash {other.data_hash[:12]}, now {toy.data.data_hash[:12]})" in report["text"]
    assert toy.aliases["champion"] == first


def test_champion_that_cannot_be_scored_stays(toy, registry_folder):
    first = toy.register(0.3)
    toy.promote()
    (version,) = registry.versions(toy.name)
    (damaged,) = (registry_folder / "mlruns").rglob(f"{version.run_id}/**/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    toy.register(INK)
    report = toy.promote()
    assert report["decision"] == "kept"
    assert f"champion version {first} cannot be scored" in report["reason"]
    assert "does not hold the weights that were registered" in report["reason"]
    assert toy.aliases["champion"] == first


def test_a_champion_for_other_images_gives_way(toy):
    """A dataset was made anew under its name, with another side: the champion would stay for ever."""
    first = toy.register(0.3)
    toy.promote()
    images = {split: torch.cat([part, part], dim=3) for split, part in toy.data.images.items()}
    toy.data = replace(toy.data, images=images, data_hash="wider")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.pipelines.toys.CONFIG", replace(CONFIG, image_shape=(1, 4, 8)))
        second = toy.register(INK)
    report = toy.promote()
    assert (report["decision"], report["old"], report["new"]) == ("promoted", first, second)
    assert report["reason"] == (
        f"champion version {first} cannot be compared: the model is for images (1, 4, 4) of 2 levels, {toy.name} has "
        "(1, 4, 8) of 2; no version has a lower mean NLL"
    )
    assert toy.aliases["champion"] == second
    with pytest.raises(ValueError, match=r"is for other images or labels than .*: no challenge has begun"):
        run_shadow(toy.name, int(first))
    assert store.latest(toy.model_name, "challenger") is None


def test_a_past_challenger_does_not_challenge_again(toy):
    for ink in (0.3, 0.2, INK):
        version = toy.register(ink)
        if ink == 0.2:
            run_shadow(toy.name, int(version))
        toy.promote(version)
    assert store.latest(toy.model_name, "challenger") == store.latest(toy.model_name)


def test_again_changes_nothing_and_repairs_the_store(toy):
    version = toy.register(INK)
    served = toy.promote()["served"]
    before = (toy.aliases, toy.stored(), toy.served())

    report = toy.promote()
    assert report["decision"] == "kept"
    assert "no other version can compete" in report["reason"]
    assert (toy.aliases, toy.stored(), toy.served()) == before
    assert len(registry.versions(toy.name)) == 1

    # A store that lost the champion, or holds a damaged one, gets it back.
    folder = store.home() / "models" / served.replace(":", "/")
    (folder / "model.safetensors").write_bytes(b"damaged")
    assert f"{served}, which was damaged, is exported to the model store again" in toy.promote()["text"]
    assert store.is_intact(served, registry.versions(toy.name)[0].lineage())
    (folder / "more").mkdir()
    toy.promote()
    assert store.is_intact(served, registry.versions(toy.name)[0].lineage())
    for metadata in ("", " text", " {promoted_at: 2026-01-01}"):
        (folder / "model.yaml").write_text(f"metadata:{metadata}")
        toy.promote()
        assert store.is_intact(served, registry.versions(toy.name)[0].lineage())
    fed = store.feeder()
    (store.home() / "pixelcnn-registry.json").write_text("")
    toy.promote()
    assert store.feeder() == fed
    for file in (store.home() / "pixelcnn-registry.json", folder / "model.yaml"):  # a power cut empties both
        file.write_text("")
    toy.promote()
    assert store.feeder() == fed
    assert store.is_intact(served, registry.versions(toy.name)[0].lineage())
    for damage in (b"\xff\xfe", b"\0", b""):
        (folder.parent / "latest").write_bytes(damage)
        toy.promote()
        assert store.latest(toy.model_name) == served
    shutil.rmtree(folder)
    (store.home() / ".promote-killed").mkdir()
    assert store.latest(toy.model_name) is None
    toy.promote()
    assert store.latest(toy.model_name) == served
    assert not list(store.home().glob(".promote-*")), "nor what a killed process has left"
    assert toy.aliases["champion"] == version


@pytest.mark.parametrize("cut", ["export", "alias", "serve", "end"])
def test_cut_off_and_run_again(toy, monkeypatch, cut):
    first = toy.register(0.3)
    served = toy.promote()["served"]
    second = toy.register(INK)
    tag = store.tag_of(registry.versions(toy.name)[1].lineage())

    def fail(*arguments):
        if cut != "alias" or arguments[1] == "champion":
            raise OSError("cut off here")

    targets = {"export": (store, "export"), "alias": (registry, "set_alias"), "serve": (store, "serve")}
    with monkeypatch.context() as patch:
        patch.setattr(*targets.get(cut, (decisions, "end_decision")), fail)
        with pytest.raises(OSError, match="cut off here") as raised:
            toy.promote()
    # What is served is still a whole model, and the error says how far it came.
    assert store.latest(toy.model_name) == (tag if cut == "end" else served)
    assert decision_runs(toy)[-1].info.status == "FAILED"
    told = "failed" if cut == "export" else "unfinished"  # what was recorded is carried out yet
    assert decisions.decisions(toy.name)[-1]["decision"] == told
    assert toy.aliases["champion"] == (second if cut in ("serve", "end") else first)
    assert isinstance(raised.value, UnfinishedMoveError) == (cut != "export")
    if cut != "export":
        done, failed = str(raised.value).split(" Failed: ")
        assert ("champion is version 2" in done) == (cut in ("serve", "end"))
        assert "previous is version 1" in done
        what = {"alias": "champion is version 2", "serve": f"{tag} is served", "end": "the record says that it is done"}
        assert failed == f"{what[cut]} (cut off here). Run this again to go on there."

    toy.promote()
    assert toy.aliases["champion"] == second
    assert toy.aliases["previous"] == first
    assert toy.served()["version"] == second


def test_an_ended_decision_is_not_carried_out_again(toy, monkeypatch):
    toy.register(0.3)
    toy.promote()
    toy.register(INK)
    set_tag = mlflow.MlflowClient.set_tag

    def set_all_but_the_end(client, run_id, key, value):
        if value != "ended":  # as if it was killed before the last write
            set_tag(client, run_id, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_tag", set_all_but_the_end)
        toy.promote()
    assert decisions.unfinished_decisions(toy.name) == []
    assert [report["decision"] for report in decisions.decisions(toy.name)] == ["promoted", "promoted"]


def test_a_decision_that_another_one_has_overtaken_is_left(toy, monkeypatch):
    """It was cut off; before anybody went on with it, another machine made another champion."""

    def cut_off(*_):
        raise OSError("cut off here")

    toy.register(0.4)
    toy.promote()
    toy.register(0.3)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", cut_off)
        with pytest.raises(UnfinishedMoveError):
            toy.promote()
    best = toy.register(INK)
    registry.set_alias(toy.name, tracking.CHAMPION, best)
    report = toy.promote()
    assert (report["decision"], report["old"]) == ("kept", best), "the other one's champion stays"
    assert toy.aliases == {"champion": best}
    assert toy.served()["version"] == best
    assert decision_runs(toy)[1].info.status == "FAILED"
    assert decisions.history(toy.name)[1].endswith("  failed       it failed, was cut off, or was overtaken")
    assert decisions.unfinished_decisions(toy.name) == []


def test_a_candidate_that_is_removed_meanwhile_is_named(toy, monkeypatch):
    first = toy.register(0.3)
    toy.promote()
    best = toy.register(INK)
    monkeypatch.setattr(
        decide, "check_candidate", lambda *_: tracking.client().delete_model_version(toy.model_name, best)
    )
    said = rf"version {best} of {toy.name} was removed from MLflow meanwhile: nothing new moved\. Run this again\."
    with pytest.raises(LookupError, match=said):
        toy.promote()
    assert toy.aliases == {"champion": first}
    assert decisions.decisions(toy.name)[-1]["decision"] == "failed"


def test_numbers_of_a_deleted_model_are_of_others_now(toy, monkeypatch):
    """MLflow counts from 1 again, and the decisions stay."""

    def cut_off(*_):
        raise OSError("cut off here")

    for ink in (0.3, 0.2):
        toy.promote(toy.register(ink))
    run_rollback(toy.name)
    tracking.client().delete_registered_model(toy.model_name)
    assert [toy.register(0.4), toy.register(INK)] == ["1", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", cut_off)
        with pytest.raises(UnfinishedMoveError):
            toy.promote("1")
    tracking.client().delete_registered_model(toy.model_name)
    never, best = toy.register(0.9), toy.register(INK)
    report = toy.promote(best)
    assert (report["new"], report["old"]) == (best, None), "what was decided about the other version 1 is left"
    for to, said in ((None, "no previous champion"), (int(never), f"no earlier champion of version {never}")):
        with pytest.raises(LookupError, match=f"{said} to roll back to: nothing moved"):
            run_rollback(toy.name, to)
    assert toy.aliases == {"champion": best}
    told = describe(registry.versions(toy.name)[0])
    assert not any("first champion" in line for line in told), "nor are they told of the new version 1"


def test_a_champion_that_changes_meanwhile_is_compared_anew(toy):
    """Another machine promotes while this one scores: no lock holds between machines."""
    first, second, best = toy.register(0.4), toy.register(0.3), toy.register(INK)
    registry.set_alias(toy.name, tracking.CHAMPION, first)
    compared = []

    def scorer(version, data, batch_size):
        if not compared:
            registry.set_alias(toy.name, tracking.CHAMPION, second)
        compared.append(version.version)
        return score.score(version, data, batch_size)

    report = run_promotion(toy.name, toy.data, PARAMS, scorer)
    assert compared == [first, second, best, second, first, best]
    assert report["champion"]["version"] == second
    assert toy.aliases == {"champion": best, "previous": second}


def test_two_promotions_at_once_take_turns(toy, capsys):
    toy.register(INK)
    said = ""
    with ThreadPoolExecutor(1) as pool:
        seconds = []

        def scorer(*arguments):
            nonlocal said
            seconds.append(pool.submit(toy.promote))  # while this one decides
            deadline = time.monotonic() + 60
            while "waits for" not in said and time.monotonic() < deadline:
                said += capsys.readouterr().err
                time.sleep(0.01)
            return score.score(*arguments)

        reports = [run_promotion(toy.name, toy.data, PARAMS, scorer), seconds[0].result()]
    assert [report["decision"] for report in reports] == ["promoted", "kept"]
    assert "waits for process" in said
    assert [run.info.status for run in decision_runs(toy)] == ["FINISHED", "FINISHED"]


def test_rollback(toy):
    first = toy.register(0.3)
    toy.promote()
    second = toy.register(INK)
    toy.promote()

    report = run_rollback(toy.name)
    assert report["decision"] == "rolled back"
    assert toy.aliases == {"champion": first, "previous": second}
    assert toy.served()["version"] == first
    run = decision_runs(toy)[-1]
    assert (run.data.tags["kind"], run.data.tags["decision"]) == ("rollback", "rolled back")

    # What a person has undone is not done again by itself.
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["skipped"] == [
        {"version": second, "reason": "it was rolled back; rollback --to, or promote --version, would bring it back"}
    ]
    assert toy.aliases["champion"] == first
    assert toy.served()["version"] == first
    # It is said, too, when another version competes.
    toy.register(0.4)
    assert f"Passed over: version {second}: it was rolled back" in toy.promote()["text"]

    # A second rollback is no toggle.
    with pytest.raises(LookupError, match=r"nothing moved\. Earlier champions: 2\. Name one: --to N\."):
        run_rollback(toy.name)
    assert toy.aliases == {"champion": first, "previous": second}

    # Who asks for a version by its number means it.
    run_rollback(toy.name, int(second))
    assert toy.aliases == {"champion": second, "previous": first}
    assert toy.served()["version"] == second
    assert not registry.versions(toy.name)[1].rolled_back
    run_rollback(toy.name)
    assert toy.promote(second)["decision"] == "promoted"
    assert not registry.versions(toy.name)[1].rolled_back


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["lost", "empty"])
def test_a_lost_report_is_no_lost_decision(toy, damage):
    first, second, third = (toy.register(ink) for ink in (0.3, 0.2, INK))
    for number in (first, second, third):
        assert toy.promote(number)["decision"] == "promoted"
    for wanted in (second, first):
        for run in decision_runs(toy):
            if (report := Path(urlsplit(run.info.artifact_uri).path, "report.json")).exists():
                damage(report)
        assert run_rollback(toy.name)["new"] == wanted
    said = [line.split("  ", 1)[1].split() for line in decisions.history(toy.name)]
    assert [" ".join(words) for words in said] == [
        "promoted version 1 is the first champion",
        "promoted version 2 replaced version 1",
        "promoted version 3 replaced version 2",
        "rolled back version 2 replaced version (lost), asked for",
        "rolled back version 1 replaced version 2, asked for",
    ]


def test_a_damaged_data_file_keeps_nobody_from_rolling_back(mnist5k):
    for ink in (0.3, INK):
        mnist5k.promote(mnist5k.register(ink))
    shutil.rmtree(store.folder_of(mnist5k.model_name) / mnist5k.stored()[0])
    Path("data/mnist5k.safetensors").write_bytes(b"cut off")
    assert run_rollback("mnist5k")["new"] == mnist5k.served()["version"] == "1"


def test_each_rollback_goes_further_back_and_says_who_and_why(toy):
    versions = [toy.register(ink) for ink in (0.3, 0.2, INK)]
    for number in versions:
        run_promotion(toy.name, toy.data, PARAMS, only=int(number), why="a try")
    assert run_rollback(toy.name, why="too much ink")["new"] == "2"
    assert run_rollback(toy.name)["new"] == "1"
    assert [version.rolled_back for version in registry.versions(toy.name)] == [False, True, True]
    with pytest.raises(LookupError, match="no previous champion to roll back to"):
        run_rollback(toy.name)
    assert toy.promote(versions[2])["new"] == "3"
    assert run_rollback(toy.name)["new"] == "1", "the champion before it, whatever number that had"
    made = decisions.decisions(toy.name)
    assert [report["why"] for report in made] == ["a try"] * 3 + ["too much ink"] + [None] * 3
    assert {report["who"] for report in made} == {f"{getpass.getuser()}@{socket.gethostname()}"}
    lines = decisions.history(toy.name)
    assert lines[3].endswith(f"version 2 replaced version 3, asked for; {made[0]['who']}: too much ink")
    assert lines[4].endswith("version 1 replaced version 2, asked for")


def test_the_newest_decisions_count_however_many_there_are(toy, monkeypatch):
    """One answer of MLflow holds a limited number of them, the oldest first."""
    for ink in (0.3, 0.2, INK):
        toy.promote(toy.register(ink))
    search = MlflowClient.search_runs

    def at_most_two(client, experiments, text, kind=1, max_results=1000, order_by=None, page_token=None):
        return search(client, experiments, text, kind, min(max_results, 2), order_by, page_token)

    monkeypatch.setattr(MlflowClient, "search_runs", at_most_two)
    assert run_rollback(toy.name)["new"] == "2"
    assert len(decisions.decisions(toy.name)) == 4


def test_rollback_to_a_version_passes_over_all_that_came_after(toy):
    first, second, third = (toy.register(ink) for ink in (0.3, 0.2, INK))
    for number in (first, second, third):
        assert toy.promote(number)["decision"] == "promoted"
    never = toy.register(0.4)
    with pytest.raises(LookupError, match=rf"has no earlier champion of version {never} .* Earlier champions: 1, 2\."):
        run_rollback(toy.name, int(never))
    with pytest.raises(LookupError, match=r"no earlier champion of version 3 to roll back to: nothing moved"):
        run_rollback(toy.name, int(third))
    report = run_rollback(toy.name, int(first))
    assert (report["new"], report["old"]) == (first, third)
    assert toy.aliases == {"champion": first, "previous": third}
    assert [version.rolled_back for version in registry.versions(toy.name)] == [False, True, True, False]
    assert toy.promote()["decision"] == "kept"
    assert toy.served()["version"] == first


def test_a_rollback_that_was_cut_off_is_not_taken_for_another(toy, monkeypatch):
    for ink in (0.4, 0.3, 0.2, INK):
        assert toy.promote(toy.register(ink))["decision"] == "promoted"

    def cut_off(*_):
        raise OSError("cut off here")

    for wanted in (9, 1):
        with monkeypatch.context() as patch:
            patch.setattr(store, "serve", cut_off)
            with pytest.raises(UnfinishedMoveError):
                run_rollback(toy.name)
        if wanted == 9:
            said = r"no earlier champion of version 9 to roll back to: .* is carried out: .*version 3 is the champion "
            with pytest.raises(LookupError, match=said):
                run_rollback(toy.name, 9)
            assert toy.aliases["champion"] == "3"
    report = run_rollback(toy.name, 1)
    assert re.match(r".* is carried out: .*version 2 is the champion .*version 1 is the champion ", report["text"])
    assert (report["new"], report["old"]) == ("1", "2")
    assert (toy.aliases["champion"], toy.served()["version"]) == ("1", "1")


def test_only_the_version_that_is_named_competes(toy):
    first, middling, best = toy.register(0.3), toy.register(0.2), toy.register(INK)
    assert toy.promote(middling)["new"] == middling
    report = toy.promote(first)
    assert (report["decision"], report["candidate"]["version"]) == ("kept", first)
    assert "version 2 is the champion already" in toy.promote(middling)["text"]
    with pytest.raises(LookupError, match=r"has no version 9\. Known: 1, 2, 3\."):
        toy.promote("9")
    assert toy.promote()["new"] == best


def test_every_version_counts_as_a_look_at_the_images(toy):
    for ink in (0.3, 0.25, 0.2):
        toy.register(ink)
    assert toy.promote("1")["confidence"] == 0.95
    report = toy.promote("2")
    assert report["compared"] == ["1", "2"]
    report = toy.promote("3")  # compared with the champion alone, but the third on these images
    assert report["compared"] == ["2", "3"]
    assert report["confidence"] == pytest.approx(1 - 0.05 / 3)
    assert "the 98.333 % interval" in report["reason"]


def test_scores_are_kept_for_the_next_decision(toy, monkeypatch):
    toy.register(0.3)
    toy.promote()
    toy.register(INK)
    scored = []
    measure = score.per_image_nll
    monkeypatch.setattr(score, "per_image_nll", lambda *words, **more: scored.append(1) or measure(*words, **more))
    dry = run_promotion(toy.name, toy.data, PARAMS, dry_run=True)
    assert len(scored) == 1, "the champion was scored when it became one"
    report = toy.promote()
    assert len(scored) == 1
    assert report["total_difference"] == dry["total_difference"]
    (usual := Path("usual")).touch()
    for path in score.SCORES_FOLDER.iterdir():
        assert path.stat().st_mode == usual.stat().st_mode, "whoever shares the folder may read it"
        path.write_bytes(b"damaged")
    toy.promote()
    assert len(scored) == 3, "both anew"
    others = {"core_sha256": lambda: "other code", "code_beside": lambda _: ["of one's own"], "NUM_COMPLETED": 7}
    for number, (name, other) in enumerate(others.items(), start=1):
        monkeypatch.setattr(score, name, other)
        toy.promote()
        assert len(scored) == 3 + 2 * number, f"another {name}"


def test_scores_that_cannot_be_kept_count(toy, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(score, "atomic_write", fail)
    toy.register(INK)
    assert toy.promote()["decision"] == "promoted"


def test_what_another_user_has_left_stays(toy, monkeypatch):
    left, remove = store.home() / ".promote-killed", shutil.rmtree
    left.mkdir()

    def may_not(path, ignore_errors=False, **more):  # as of a folder of mode 700
        if Path(path) != left:
            remove(path, ignore_errors, **more)
        elif not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", may_not)
    toy.register(INK)
    assert toy.promote()["decision"] == "promoted"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="a disk of its own, of Linux")
def test_temporary_files_may_lie_on_another_disk(toy, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    toy.register(INK)
    assert toy.promote()["decision"] == "promoted"


def test_a_rollback_from_a_champion_whose_alias_is_gone_says_what_brings_it_back(mnist5k):
    for ink in (0.3, INK):
        mnist5k.promote(mnist5k.register(ink))
    registry.remove_alias("mnist5k", "champion", "2")
    for to in (None, 1):
        with pytest.raises(
            LookupError, match=r"no champion to roll back from.*: nothing moved\..* pipelines\.steps repair\."
        ):
            run_rollback("mnist5k", to)
    register.repair("mnist5k")
    assert run_rollback("mnist5k")["new"] == "1"


def test_a_clock_that_is_put_back_keeps_the_order(toy, monkeypatch):
    for ink in (0.3, 0.2):
        toy.promote(toy.register(ink))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    assert run_rollback(toy.name)["new"] == "1"
    with pytest.raises(LookupError, match="no previous champion to roll back to"):
        run_rollback(toy.name)


def test_a_champion_without_our_tags_is_named(toy):
    first = toy.register(0.3)
    toy.promote()
    toy.register(INK)
    client = tracking.client()
    strange = client.create_model_version(toy.model_name, "elsewhere").version
    registry.set_alias(toy.name, "champion", strange)
    said = f"{toy.model_name} version {strange} was not registered by this pipeline: it has no tag "
    report = toy.promote()
    assert (report["decision"], toy.served()["version"]) == ("kept", first)
    assert f"champion version {strange} cannot be scored: {said}'weights_sha256'" in report["reason"]
    for work in (lambda: register.repair(toy.name), lambda: run_shadow(toy.name, int(strange))):
        with pytest.raises(ValueError, match=f"{said}'dataset'"):
            work()


def test_rollback_without_a_previous_champion(toy):
    with pytest.raises(LookupError, match="no previous champion to roll back to: nothing moved"):
        run_rollback(toy.name)
    version = toy.register(INK)
    toy.promote()
    served = store.latest(toy.model_name)
    for to, said in ((None, "no previous champion"), (0, "no earlier champion of version 0")):
        with pytest.raises(LookupError, match=f"{said} to roll back to: nothing moved"):
            run_rollback(toy.name, to)
    assert toy.aliases == {"champion": version}
    assert store.latest(toy.model_name) == served


def test_nothing_registered(toy):
    with pytest.raises(LookupError, match="train a pair of nothing_registered first"):
        toy.promote()


@pytest.fixture
def mnist5k(toy, new_database, monkeypatch):
    """The working folder of the flow: params.yaml, the prepared data of a known dataset, and a registry of its own."""
    shutil.copy(new_database, toy.folder / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{toy.folder / 'mlflow.db'}")
    root = Path(promotion_flow.__file__).parents[2]
    (toy.folder / "params.yaml").write_text((root / "params.yaml").read_text())
    toy.name = "mnist5k"
    toy.data = toy.prepare(seed=0)
    return toy


def state_of(toy: Toy) -> tuple:
    """Return all that a promotion may write."""
    tags = [version.tags for version in registry.versions(toy.name)]
    reports = {path: path.read_text() for path in Path("reports").rglob("*.json")}
    return toy.aliases, tags, toy.stored(), store.latest(toy.model_name), len(decision_runs(toy)), reports


def test_flow(mnist5k, prefect_server, capsys):
    first = mnist5k.register(0.3)
    promotion_flow.promote("mnist5k")
    best = mnist5k.register(INK)
    before = state_of(mnist5k)
    assert steps.main(["promote", "mnist5k", "--dry-run"]) == 0
    dry = promotion_flow.promote("mnist5k", dry_run=True)
    assert state_of(mnist5k) == before, "a dry run writes nothing"
    assert dry["decision"] == "promoted"
    assert re.match(rf"dry run: mnist5k \(.*\): version {best} would be the new champion: the 95 % ", dry["text"])
    report = promotion_flow.promote("mnist5k")
    assert report["decision"] == "promoted"
    assert json.loads(Path("reports/promotions/mnist5k.json").read_text()) == report
    assert mnist5k.served()["version"] == best
    assert report["joint_difference"] == dry["joint_difference"]
    assert "mnist5k: version 1 is the champion again" in promotion_flow.rollback("mnist5k")["text"]
    mnist5k.register(0.4)
    promotion_flow.promote("mnist5k")
    with pytest.raises(OSError, match="cut off here"), decisions.decision_run("mnist5k", "promotion"):
        raise OSError("cut off here")

    names = [run.info.run_name.partition(": ")[2] for run in decision_runs(mnist5k)]
    assert names[1:4] == [
        f"version {best} promoted instead of 1",
        f"version 1 back instead of {best}",
        "version 1 kept",
    ]
    with get_client(sync_client=True) as prefect:
        shown = prefect.request("POST", "/artifacts/filter", json={"sort": "CREATED_DESC"}).json()
    shown = [one for one in shown if one["key"] == "decision-mnist5k"]
    assert [one["description"] for one in shown[:3]] == ["kept", "rolled back", "promoted"]
    assert f"| total_difference | {report['total_difference']['mean']:+.3f} |" in shown[2]["data"]

    # The history of all that.
    capsys.readouterr()
    assert steps.main(["history", "mnist5k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  ", line) for line in lines)
    low, high = report["total_difference"]["low"], report["total_difference"]["high"]
    moved = f"version {best} (gated_pixelcnn-mnist5k) replaced version {first} (gated_pixelcnn-mnist5k), "
    moved += f"{report['total_difference']['mean']:+.3f} nats (95 % interval {low:+.3f} to {high:+.3f})"
    assert [re.split("  +", line)[1:] for line in lines[:3]] == [
        ["promoted", f"version {first} (gated_pixelcnn-mnist5k) is the first champion"],
        ["promoted", moved],
        ["rolled back", f"version {first} replaced version {best}, asked for"],
    ]
    assert "  kept         the 98.333 % interval of version 3 minus champion 1" in lines[3]
    assert lines[4].endswith("  failed       it failed, was cut off, or was overtaken")
    assert len(lines) == 5


def test_what_a_command_or_a_deployment_is_told_reaches_the_decision(mnist5k, without_prefect, monkeypatch):
    monkeypatch.setattr(promotion_flow, "promote", promotion_flow.promote.fn)  # the command's, too
    for ink in (0.3, 0.2, INK):
        mnist5k.register(ink)
    for number in ("1", "2"):
        assert steps.main(["promote", "mnist5k", "--version", number, "--why", f"try {number}"]) == 0
        assert mnist5k.aliases["champion"] == number
    assert promotion_flow.promote("mnist5k", version=1, why="again")["decision"] == "kept"
    assert promotion_flow.promote("mnist5k", why="the best")["new"] == "3"
    assert steps.main(["rollback", "mnist5k", "--to", "1", "--why", "blots"]) == 0
    assert mnist5k.aliases["champion"] == "1"
    assert promotion_flow.rollback.fn("mnist5k", to=3, why="no blots")["new"] == "3"
    whys = ["try 1", "try 2", "again", "the best", "blots", "no blots"]
    assert [report["why"] for report in decisions.decisions("mnist5k")] == whys


def test_history_before_any_decision(mnist5k, capsys):
    assert steps.main(["history", "mnist5k"]) == 1
    error = capsys.readouterr().err
    assert error == "history: nothing was decided for mnist5k yet: run python -m pipelines.steps promote mnist5k.\n"
    assert steps.main(["history", "mnist6k"]) == 1
    assert capsys.readouterr().err.startswith("history: unknown dataset 'mnist6k'. Known: mnist5k, ")


def test_a_dry_run_says_why_nothing_would_move(toy):
    toy.register(0.9)
    report = run_promotion(toy.name, toy.data, PARAMS, dry_run=True)
    assert (
        "nothing would move: no version can be compared. Passed over: version 1: it is no better than" in report["text"]
    )


def test_unreachable_registry(mnist5k, without_prefect, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    expected = (
        r"mnist5k: nothing new moved: MLflow at 127\.0\.0\.1:9 failed \(.*refused.*Run this again once it works\."
    )
    with pytest.raises(OSError, match=expected):
        promotion_flow.promote.fn("mnist5k")
    report = json.loads(Path("reports/promotions/mnist5k.json").read_text())
    assert report["decision"] == "failed"
    assert re.match(expected, report["text"])
    assert not (store.home() / "models").exists()


def test_a_registry_is_named_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:s3cret@host/mlflow")
    said = explained(MlflowException("it is down"))
    assert said == "MLflow at host/mlflow failed (it is down). Run this again once it works."


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "mnist5k: nothing new moved: [Errno 28] No space left on device"),
        (MlflowException("x" * 5000 + " No space left"), "No space left). Run this again once it works."),
        (sqlite3.OperationalError("database or disk is full"), "nothing new moved: database or disk is full"),
        (SafetensorError("I/O error: No space left"), "mnist5k: nothing new moved: I/O error: No space left"),
        (KeyError("outs"), None),
    ],
    ids=["disk", "mlflow", "database", "scores", "ours"],
)
def test_an_error_is_blamed_on_whom_it_comes_from(mnist5k, without_prefect, monkeypatch, error, said):
    def fail(*_):
        raise error

    mnist5k.register(INK)
    monkeypatch.setattr(decisions, "record_decision", fail)
    with pytest.raises(KeyError if said is None else OSError) as raised:
        promotion_flow.promote.fn("mnist5k")
    if said is None:
        assert raised.value is error, "a bug of ours is shown as one"
        return
    assert str(raised.value).endswith(said)
    assert len(str(raised.value)) < 800
    assert ("MLflow" in str(raised.value)) == isinstance(error, MlflowException)
    assert json.loads(Path("reports/promotions/mnist5k.json").read_text())["text"] == str(raised.value)


def test_a_report_is_not_of_an_earlier_day(mnist5k, without_prefect):
    mnist5k.register(INK)
    promotion_flow.promote.fn("mnist5k")
    Path("data/mnist5k.safetensors").unlink()
    with pytest.raises(ValueError, match="does not exist"):
        promotion_flow.promote.fn("mnist5k")
    report = json.loads(Path("reports/promotions/mnist5k.json").read_text())
    assert report["decision"] == "failed"
    assert report["text"].startswith("mnist5k: nothing new moved: data/mnist5k.safetensors does not exist. Make it: ")


def test_a_report_does_not_deny_what_has_moved(mnist5k, without_prefect, monkeypatch):
    mnist5k.register(INK)

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "serve", fail)
    with pytest.raises(OSError, match="carried out in part"):
        promotion_flow.promote.fn("mnist5k")
    text = json.loads(Path("reports/promotions/mnist5k.json").read_text())["text"]
    assert "moved" not in text
    assert re.search(r"Done: .*champion is version 1.* Failed: .* is served \(\[Errno 5\] Input/output error\)", text)


def test_a_report_that_cannot_be_written_hides_nothing(mnist5k, without_prefect, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    mnist5k.register(INK)
    monkeypatch.setattr(promotion_flow, "atomic_write", fail)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", fail)
        with pytest.raises(OSError, match="carried out in part"):
            promotion_flow.promote.fn("mnist5k")
    with pytest.raises(OSError, match="No space left"):
        promotion_flow.promote.fn("mnist5k")
    assert "version 1 is the new champion" in capsys.readouterr().out


def test_a_report_does_not_deny_what_was_completed(mnist5k, without_prefect, monkeypatch):
    first = mnist5k.register(INK)

    def fail(*_):
        raise OSError("cut off here")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", fail)
        with pytest.raises(UnfinishedMoveError):
            mnist5k.promote()
    monkeypatch.setattr(decisions, "record_decision", fail)
    with pytest.raises(OSError, match="mnist5k: nothing new moved: cut off here"):
        promotion_flow.promote.fn("mnist5k")
    assert mnist5k.aliases == {"champion": first}


def test_a_new_registry_takes_what_is_there(mnist5k, without_prefect, new_database, monkeypatch):
    """As after a clone and `dvc pull`: one command registers and promotes."""
    mnist5k.train(INK)
    trained = mnist5k.folder / "models" / str(mnist5k.weight_seed)
    shutil.copytree(trained, mnist5k.folder / "models/pixelcnn-mnist5k")
    report = promotion_flow.promote.fn("mnist5k")
    assert report["text"].startswith("mnist5k (toy, data "), "it was known"
    shutil.copy(new_database, mnist5k.folder / "new.db")
    monkeypatch.setenv("BENTOML_HOME", str(mnist5k.folder / "new"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mnist5k.folder / 'new.db'}")
    with pytest.raises(LookupError, match=r"or register a checkpoint: python -m pipelines\.steps register FOLDER\."):
        promotion_flow.promote.fn("mnist5k", dry_run=True)
    report = promotion_flow.promote.fn("mnist5k")
    assert report["text"].startswith("models/pixelcnn-mnist5k is registered as version 1 (checksum checked, scored ")
    assert mnist5k.aliases == {"champion": "1"}
    assert len(registry.versions("mnist5k")) == 1


def test_where_no_champion_is_known_and_the_served_one_is_damaged_a_version_is_named(mnist5k, without_prefect):
    mnist5k.promote(mnist5k.register(INK))
    registry.remove_alias("mnist5k", tracking.CHAMPION, "1")
    (store.folder_of(str(store.latest(mnist5k.model_name))) / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is damaged\. Restore a backup, or promote another version"):
        promotion_flow.promote.fn("mnist5k")
    assert promotion_flow.promote.fn("mnist5k", version=1)["decision"] == "promoted"
    assert mnist5k.aliases == {"champion": "1"}


def test_the_same_weights_on_new_data_compete(mnist5k):
    first = mnist5k.train(INK)
    mnist5k.promote()
    folder = mnist5k.folder / "models" / str(mnist5k.weight_seed)
    mnist5k.data = mnist5k.prepare(seed=1)
    known, _ = register.register_checkpoint(folder)
    assert known.version == first, "measured on the old data, they are the version that is there"
    model, scores = load_checkpoint(folder)
    measured = {**scores, **evaluate(model, mnist5k.data), "data_hash": mnist5k.data.data_hash}
    measured["run_id"] = known.run_id  # as the pipeline writes it
    measured["test/nll_nats_first_200"] = measured["test/nll_nats"]
    save_checkpoint(folder, model, measured)
    assert register.register_checkpoint(folder)[0].version == "2"
    assert register.register_checkpoint(folder)[0].version == "2", "once"
    assert tracking.find_run(known.run_id).data.tags["data_hash"] == scores["data_hash"], "its run is as it was"
    worse = mnist5k.register(0.3)
    registry.set_alias(mnist5k.name, tracking.CHAMPION, worse)
    report = mnist5k.promote()
    assert (report["decision"], report["new"]) == ("promoted", "2")
    expected = nll_by_hand(mnist5k.data, INK).mean().item()
    assert report["candidate"]["nll_nats"] == pytest.approx(expected, rel=1e-6), "no kept score of the old data"
    assert mnist5k.served()["data_hash"] == mnist5k.data.data_hash


def test_a_version_registered_twice_is_removed_unless_it_is_the_champion(toy):
    """Two machines at once make two; the later one may have been promoted before anybody looked."""
    toy.train(INK)
    checkpoint, client = toy.folder / "models/1", tracking.client()
    (first,) = registry.versions(toy.name)
    for champion, left in ((None, ["1"]), ("3", ["1", "3"])):  # a number is never given twice
        source = client.get_model_version(first.name, "1").source
        twin = client.create_model_version(first.name, source, first.run_id, first.tags)
        if champion is not None:
            registry.set_alias(toy.name, tracking.CHAMPION, str(twin.version))
        model_id = client.get_run(first.run_id).outputs.model_outputs[0].model_id
        assert tracking.register(first.run_id, model_id, checkpoint, first.tags["pair"], toy.name) == "1"
        assert [version.version for version in registry.versions(toy.name)] == left


def test_unknown_dataset(mnist5k, without_prefect):
    with pytest.raises(ValueError, match=r"unknown dataset 'mnist6k'\. Known: mnist5k, mnist, "):
        promotion_flow.promote.fn("mnist6k")
    with pytest.raises(ValueError, match="unknown dataset"):
        promotion_flow.rollback.fn("mnist6k")


@pytest.mark.parametrize(
    ("cost", "gain", "decision"),
    [
        (0.2, 0.5, "promoted"),  # worse by less than completion may cost
        (0.4, 0.5, "kept"),  # by more
    ],
    ids=["cheap", "dear"],
)
def test_completing_better_and_then_it_rests(toy, cost, gain, decision):
    first = toy.register(INK)
    assert toy.promote()["decision"] == "promoted"
    second = toy.register(INK)
    wobble = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wobble -= wobble.mean()
    scores = {
        first: Candidate(first, torch.full((400,), 5.0).double(), torch.full((400,), 3.0).double()),
        second: Candidate(second, 5 + cost + wobble, 3 - gain + wobble),
    }
    found = [run_promotion(toy.name, toy.data, PARAMS, lambda version, *_: scores[version.version]) for _ in range(3)]
    assert [report["decision"] for report in found] == [decision, "kept", "kept"]
    assert toy.aliases["champion"] == (second if decision == "promoted" else first)
    if decision == "promoted":
        assert found[0]["completion_difference"]["mean"] == pytest.approx(-gain)
        run = decision_runs(toy)[1]
        assert run.data.metrics["completion_difference/mean"] == pytest.approx(-gain)


def test_completion_is_scored_as_in_the_evaluation(toy):
    toy.register(INK)
    (version,) = registry.versions(toy.name)
    found = score.score(version, toy.data, batch_size=50)
    model, _ = load_checkpoint(registry.download(version, toy.folder))
    scores = evaluate_completion(model, toy.data, "validation", batch_size=50)
    means = [scores[f"validation/completion_{name}_nats"] for name in SCORED]
    assert found.completion_nats.shape == (400,)
    assert found.completion_nats.mean().item() == pytest.approx(sum(means) / len(means))


def test_what_one_part_may_cost_the_other_is_in_the_unit_of_the_field(toy, monkeypatch):
    allowed = []

    def nobody(champion, pool, *, allowance, **_):
        allowed.append(allowance)
        return Choice(None, "nobody")

    monkeypatch.setattr(decide, "choose", nobody)
    toy.register(INK)
    scores = Candidate("1", torch.ones(400).double(), torch.ones(400).double())
    for num_levels in (2, 4):
        run_promotion(toy.name, replace(toy.data, num_levels=num_levels), PARAMS, lambda *_: scores, dry_run=True)
    assert allowed == [0.3, pytest.approx(0.01 * math.prod(toy.data.image_shape) * math.log(2))]


def test_a_champion_of_lost_files_leaves_the_store(toy, registry_folder):
    toy.register(INK)
    served = toy.promote()["served"]
    (version,) = registry.versions(toy.name)
    (damaged,) = (registry_folder / "mlruns").rglob(f"{version.run_id}/**/model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    shutil.rmtree(store.home() / "models" / served.replace(":", "/"))
    report = toy.promote()
    assert report["decision"] == "kept"
    assert "The model store was left as it is: " in report["text"]
    damaged.with_name("scores.json").unlink()
    report = toy.promote()
    assert report["decision"] == "kept"
    assert "holds no scores.json. Promote another version (if this is the champion: roll back)" in report["text"]


def test_a_champion_that_never_rests_is_left_alone(toy):
    one, other, _ = toy.register(0.4), toy.register(0.3), toy.register(INK)
    registry.set_alias(toy.name, tracking.CHAMPION, one)

    def scorer(version, data, batch_size):  # three times a decision: it ends with the other one
        now = toy.aliases["champion"]
        registry.set_alias(toy.name, tracking.CHAMPION, other if now == one else one)
        return score.score(version, data, batch_size)

    with pytest.raises(OSError, match="changed 3 times during the decision"):
        run_promotion(toy.name, toy.data, PARAMS, scorer)
    assert decision_runs(toy)[-1].info.status == "FAILED"


def test_a_rollback_is_served_before_the_registry_is_told(toy, monkeypatch):
    first = toy.register(0.3)
    toy.promote()
    toy.register(INK)
    toy.promote()

    def away(*_):
        raise OSError("MLflow is away")

    monkeypatch.setattr(registry, "set_alias", away)
    with pytest.raises(UnfinishedMoveError):
        run_rollback(toy.name)
    assert toy.served()["version"] == first


def test_a_rollback_passes_over_versions_that_are_gone(toy):
    first, second, third = (toy.register(ink) for ink in (0.3, 0.2, INK))
    for number in (first, second, third):
        toy.promote(number)
    tracking.client().delete_registered_model_alias(tracking.registered_name(toy.name), "previous")
    tracking.client().delete_model_version(tracking.registered_name(toy.name), second)
    assert run_rollback(toy.name, int(first))["new"] == first
    assert toy.aliases["champion"] == first


def test_another_run_is_other(toy):
    toy.register(INK)
    toy.promote()
    lineage = registry.champion(toy.name).lineage()
    tag = store.tag_of(lineage)
    assert store.is_intact(tag, lineage)
    assert not store.is_intact(tag, {**lineage, "run_id": "another"})


def test_of_one_that_was_champion_twice_the_later_time_counts():
    made = [{"decision": decisions.PROMOTED, "new": n} for n in "1213"]
    assert decisions.champions([*made, {"decision": decisions.ROLLED_BACK, "new": "1"}]) == ["1", "2", "1"]
