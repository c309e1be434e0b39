"""Promotion on evidence, with a real MLflow registry (SQLite) and a real BentoML store, and models known by hand."""

import json
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import bentoml
import mlflow
import pytest
import torch
from bentoml._internal.models import ModelStore
from toys import INK, PARAMS, Toy

from pipelines import promotion_flow, registry, steps, store, tracking
from pipelines.promotion_flow import paired_difference, run_promotion, run_rollback
from pixelcnn import Dataset
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.evaluation import evaluate_completion
from pixelcnn.layers import MaskedConv2d
from pixelcnn.observed import SCORED

NAN = torch.full((2,), math.nan)


@pytest.fixture(scope="module")
def registry_folder(tmp_path_factory):
    """One MLflow database for the file: making its schema takes seconds. Each test has a dataset of its own name."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        tracking.client()
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


def decisions(toy: Toy) -> list:
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
    assert report["difference"] == pytest.approx(
        {
            "mean": difference.mean().item(),
            "low": difference.mean().item() - half,
            "high": difference.mean().item() + half,
            "num_images": 400,
        },
        rel=1e-5,
    )
    assert report["candidate"]["nll_nats"] == pytest.approx(nll_by_hand(toy.data, INK).mean().item(), rel=1e-6)
    assert report["champion"]["nll_nats"] == pytest.approx(nll_by_hand(toy.data, 0.3).mean().item(), rel=1e-6)
    assert f"version {second} is the new champion" in report["text"]
    assert "(toy, data" in report["text"]  # no figure without its protocol

    run = decisions(toy)[-1]
    assert run.info.status == "FINISHED"
    assert run.data.tags["decision"] == "promoted"
    assert run.data.tags["champion_version"] == first
    assert run.data.tags["candidate_version"] == second
    assert run.data.metrics["difference/high"] == pytest.approx(report["difference"]["high"])
    assert run.data.metrics["candidate/nll_nats"] == pytest.approx(report["candidate"]["nll_nats"])
    assert run.data.metrics["champion/nll_nats"] == pytest.approx(report["champion"]["nll_nats"])


def test_export_has_the_lineage(toy):
    version = toy.train(INK)
    report = toy.promote()
    model = toy.served()
    metadata = model.info.metadata
    (registered,) = registry.versions(toy.name)
    assert model.tag.version == f"v{version}-{registered.tags['weights_sha256'][:8]}"
    assert report["served"] == str(model.tag)
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
    assert sorted(f.name for f in Path(model.path).iterdir()) == [
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
    assert "is not wholly below zero" in report["reason"]
    assert report["difference"]["low"] > 0
    assert toy.aliases == {"champion": first}
    assert len(toy.stored()) == 1
    assert decisions(toy)[-1].data.tags["decision"] == "kept"


def test_tie_stays(toy):
    first = toy.register(INK)
    toy.promote()
    toy.register(INK)  # other weights, the same distribution
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["difference"]["mean"] == report["difference"]["high"] == 0
    assert toy.aliases["champion"] == first


def test_better_by_less_than_the_noise_stays(toy):
    best = toy.data.images["validation"].double().mean().item()
    first = toy.register(best + 0.003)
    toy.promote()
    toy.register(best)
    report = toy.promote()
    assert report["difference"]["mean"] < 0 < report["difference"]["high"]
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
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["skipped"] == [
        {"version": unmeasured, "reason": "its recorded validation NLL is not a finite number"},
        {"version": broken, "reason": "its logits are not finite numbers."},
    ]
    assert f"version {broken}: its logits are not finite numbers" in report["text"]
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
    assert report["reason"].endswith("cannot be scored: its NLL is not a finite number for 400 of 400 images.")
    assert toy.aliases["champion"] == broken


def test_a_leak_is_passed_over_however_well_it_scores(toy, monkeypatch):
    first = toy.register(0.3)
    toy.promote()
    leaking = toy.register(INK, nll=0.1)
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

    monkeypatch.setattr(promotion_flow, "load_checkpoint", load)
    report = toy.promote()
    (skipped,) = report["skipped"]
    assert skipped["version"] == leaking
    assert "it leaks: at" in skipped["reason"]
    assert "it leaks: at" in report["text"]
    assert toy.aliases["champion"] == first
    good = toy.register(INK)
    assert toy.promote()["decision"] == "promoted"
    assert toy.aliases["champion"] == good


def test_a_slow_sampler_is_passed_over(toy):
    first = toy.register(0.3)
    toy.promote()
    slow = toy.register(INK)
    report = run_promotion(toy.name, toy.data, replace(PARAMS, max_sample_s=0))
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
    assert "no version can become it" in report["reason"]
    assert "champion" not in toy.aliases
    assert not (store.home() / "models").exists()


def test_first_champion_must_beat_uniform(toy):
    toy.register(0.9)
    report = toy.promote()
    assert report["decision"] == "kept"
    assert "no better than the uniform distribution" in report["reason"]
    assert "champion" not in toy.aliases


def test_first_champion_is_the_better_of_two(toy):
    second_best = toy.register(0.3, nll=1.0)  # its training recorded a better score than it has
    best = toy.register(INK)
    report = toy.promote()
    assert toy.aliases == {"champion": best}
    assert report["runner_up"]["version"] == second_best
    expected = (nll_by_hand(toy.data, INK) - nll_by_hand(toy.data, 0.3)).mean().item()
    assert report["difference"]["mean"] == pytest.approx(expected, rel=1e-5)
    run = decisions(toy)[-1]
    assert run.data.metrics["runner_up/nll_nats"] == pytest.approx(report["runner_up"]["nll_nats"])


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


def test_again_changes_nothing_and_repairs_the_store(toy):
    version = toy.register(INK)
    served = toy.promote()["served"]
    before = (toy.aliases, toy.stored(), toy.served().info.metadata)

    report = toy.promote()
    assert report["decision"] == "kept"
    assert "no other version can compete" in report["reason"]
    assert (toy.aliases, toy.stored(), toy.served().info.metadata) == before
    assert len(registry.versions(toy.name)) == 1

    # A store that lost the champion, or holds a damaged one, gets it back.
    folder = store.home() / "models" / served.replace(":", "/")
    (folder / "model.safetensors").write_bytes(b"damaged")
    toy.promote()
    assert store.is_intact(served, registry.versions(toy.name)[0].tags["weights_sha256"])
    bentoml.models.delete(served, _model_store=ModelStore(store.home() / "models"))
    assert store.latest(toy.model_name) is None
    toy.promote()
    assert str(toy.served().tag) == served
    assert toy.aliases["champion"] == version


@pytest.mark.parametrize("cut", ["export", "alias", "serve"])
def test_cut_off_and_run_again(toy, monkeypatch, cut):
    first = toy.register(0.3)
    served = toy.promote()["served"]
    second = toy.register(INK)

    def fail(*arguments):
        if cut != "alias" or arguments[1] == "champion":
            raise OSError("cut off here")

    with monkeypatch.context() as patch:
        target = {"export": (store, "export"), "alias": (registry, "set_alias"), "serve": (store, "serve")}[cut]
        patch.setattr(*target, fail)
        with pytest.raises(OSError, match="cut off here"):
            toy.promote()
    # What is served is still a whole model.
    assert str(toy.served().tag) == served
    assert decisions(toy)[-1].info.status == "FAILED"
    assert toy.aliases["champion"] == (second if cut == "serve" else first)

    toy.promote()
    assert toy.aliases["champion"] == second
    assert toy.aliases["previous"] == first
    assert toy.served().info.metadata["version"] == second


def test_a_champion_that_changes_meanwhile_is_compared_anew(toy):
    """Another machine promotes while this one scores: no lock holds between machines."""
    first, second, best = toy.register(0.4), toy.register(0.3), toy.register(INK)
    registry.set_alias(toy.name, tracking.CHAMPION, first)
    compared = []

    def scorer(version, data, batch_size, max_sample_s):
        if not compared:
            registry.set_alias(toy.name, tracking.CHAMPION, second)
        compared.append(version.version)
        return promotion_flow.score(version, data, batch_size, max_sample_s)

    report = run_promotion(toy.name, toy.data, PARAMS, scorer)
    assert compared == [first, best, second, best]
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
            return promotion_flow.score(*arguments)

        reports = [run_promotion(toy.name, toy.data, PARAMS, scorer), seconds[0].result()]
    assert [report["decision"] for report in reports] == ["promoted", "kept"]
    assert "waits for process" in said
    assert [run.info.status for run in decisions(toy)] == ["FINISHED", "FINISHED"]


def test_rollback(toy):
    first = toy.register(0.3)
    toy.promote()
    second = toy.register(INK)
    toy.promote()

    report = run_rollback(toy.name)
    assert report["decision"] == "rolled back"
    assert toy.aliases == {"champion": first, "previous": second}
    assert toy.served().info.metadata["version"] == first
    run = decisions(toy)[-1]
    assert (run.data.tags["kind"], run.data.tags["decision"]) == ("rollback", "rolled back")

    # What a person has undone is not done again by itself.
    report = toy.promote()
    assert report["decision"] == "kept"
    assert report["skipped"] == [
        {"version": second, "reason": "it was rolled back; a second rollback would bring it back"}
    ]
    assert toy.aliases["champion"] == first
    assert toy.served().info.metadata["version"] == first
    # It is said, too, when another version competes.
    toy.register(0.4)
    assert f"Passed over: version {second}: it was rolled back" in toy.promote()["text"]

    run_rollback(toy.name)
    assert toy.aliases == {"champion": second, "previous": first}
    assert toy.served().info.metadata["version"] == second
    assert not registry.versions(toy.name)[1].rolled_back


def test_rollback_without_a_previous_champion(toy):
    with pytest.raises(LookupError, match="no previous champion to roll back to: nothing moved"):
        run_rollback(toy.name)
    version = toy.register(INK)
    toy.promote()
    served = toy.served().tag
    with pytest.raises(LookupError, match="nothing moved"):
        run_rollback(toy.name)
    assert toy.aliases == {"champion": version}
    assert toy.served().tag == served


def test_nothing_registered(toy):
    with pytest.raises(LookupError, match="train a pair of nothing_registered first"):
        toy.promote()


def test_interval_needs_two_images():
    assert paired_difference(torch.tensor([1.0]), torch.tensor([2.0]), 0.95) is None


@pytest.fixture
def mnist5k(toy):
    """The working folder of the flow: params.yaml and the prepared data of a known dataset."""
    root = Path(promotion_flow.__file__).parents[1]
    (toy.folder / "params.yaml").write_text((root / "params.yaml").read_text())
    toy.name = "mnist5k"
    toy.data = toy.prepare(seed=0)
    return toy


def state_of(toy: Toy) -> tuple:
    """Return all that a promotion may write."""
    tags = [version.tags for version in registry.versions(toy.name)]
    reports = {path: path.read_text() for path in Path("reports").rglob("*.json")}
    return toy.aliases, tags, toy.stored(), toy.served().tag, len(decisions(toy)), reports


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
    assert mnist5k.served().info.metadata["version"] == best
    assert report["difference"] == dry["difference"]
    promotion_flow.rollback("mnist5k")
    assert "mnist5k: version 1 is the champion again" in capsys.readouterr().out
    mnist5k.register(0.4)
    promotion_flow.promote("mnist5k")
    with pytest.raises(OSError, match="cut off here"), registry.decision_run("mnist5k", "promotion"):
        raise OSError("cut off here")

    # The history of all that.
    assert steps.main(["history", "mnist5k"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC  ", line) for line in lines)
    low, high = report["difference"]["low"], report["difference"]["high"]
    moved = f"version {best} (gated_pixelcnn-mnist5k) replaced version {first} (gated_pixelcnn-mnist5k), "
    moved += f"{report['difference']['mean']:+.3f} nats per image (95 % interval {low:+.3f} to {high:+.3f}, 400 images)"
    assert [re.split("  +", line)[1:] for line in lines[:3]] == [
        ["promoted", f"version {first} (gated_pixelcnn-mnist5k) is the first champion"],
        ["promoted", moved],
        ["rolled back", f"version {first} replaced version {best}, asked for"],
    ]
    assert "  kept         the 95 % interval of candidate minus champion" in lines[3]
    assert lines[4].endswith("  failed       it was cut off before it was recorded")
    assert len(lines) == 5


def test_history_before_any_decision(mnist5k, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{mnist5k.folder}/new.db")
    assert steps.main(["history", "mnist5k"]) == 1
    error = capsys.readouterr().err
    assert error == "history: nothing was decided for mnist5k yet: run python -m pipelines.steps promote mnist5k.\n"
    assert steps.main(["history", "mnist6k"]) == 1
    assert capsys.readouterr().err.startswith("history: unknown dataset 'mnist6k'. Known: mnist5k, ")


def test_a_dry_run_says_why_nothing_would_move(toy):
    toy.register(0.9)
    report = run_promotion(toy.name, toy.data, PARAMS, dry_run=True)
    assert "nothing would move: the best version is no better than the uniform distribution" in report["text"]


def test_unreachable_registry(mnist5k, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        ConnectionError,
        match=r"mnist5k: nothing moved: MLflow at http://127.0.0.1:9 or .* Run this again once they can\.",
    ):
        promotion_flow.promote.fn("mnist5k")
    report = json.loads(Path("reports/promotions/mnist5k.json").read_text())
    assert report["decision"] == "failed"
    assert report["text"].startswith("mnist5k: nothing moved: ")
    assert not (store.home() / "models").exists()


def test_unknown_dataset(mnist5k):
    with pytest.raises(ValueError, match=r"unknown dataset 'mnist6k'\. Known: mnist5k, mnist, "):
        promotion_flow.promote.fn("mnist6k")
    with pytest.raises(ValueError, match="unknown dataset"):
        promotion_flow.rollback("mnist6k")


@pytest.mark.parametrize(
    ("cost", "gain", "has_context", "decision"),
    [
        (0.0, 0.5, True, "promoted"),  # a tie as a joint model
        (0.2, 0.5, True, "promoted"),  # worse by less than completion may cost
        (0.4, 0.5, True, "kept"),  # by more
        (0.0, 0.0, True, "kept"),
        (0.0, -0.5, True, "kept"),
        (0.0, 0.5, False, "kept"),  # by luck: without a context network it is the joint model
    ],
    ids=["tie", "cheap", "dear", "no_gain", "worse", "no_context"],
)
def test_completing_better(toy, monkeypatch, cost, gain, has_context, decision):
    first = toy.register(INK)
    assert toy.promote()["decision"] == "promoted"
    second = toy.register(INK)
    wobble = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wobble -= wobble.mean()
    joint = {first: torch.full((400,), 5.0).double(), second: 5 + cost + wobble}
    completion = {first: (torch.full((400,), 3.0).double(), False), second: (3 - gain + wobble, has_context)}
    monkeypatch.setattr(promotion_flow, "completion_score", lambda version, data, batch: completion[version.version])
    report = run_promotion(toy.name, toy.data, PARAMS, lambda version, *_: joint[version.version])
    assert report["decision"] == decision
    assert toy.aliases["champion"] == (second if decision == "promoted" else first)
    if decision == "promoted":
        assert report["completion_difference"]["mean"] == pytest.approx(-gain)
        assert f"allows it; of its completions it is [{report['completion_difference']['low']:.3f}, " in report["text"]
        run = decisions(toy)[-1]
        assert run.data.metrics["completion_difference/mean"] == pytest.approx(-gain)


def test_completions_that_cannot_be_scored_move_nothing(toy, monkeypatch):
    first = toy.register(INK)
    toy.promote()
    second = toy.register(INK)
    monkeypatch.setattr(promotion_flow, "per_image_completion_nll", lambda *_: dict.fromkeys(SCORED, NAN))
    report = toy.promote()
    assert (report["decision"], toy.aliases["champion"]) == ("kept", first)
    assert report["skipped"] == [
        {
            "version": second,
            "reason": "its completion cannot be compared (its completion NLL is not a finite number for 2 images.)",
        }
    ]


def test_completion_is_scored_as_in_the_evaluation(toy):
    toy.register(INK)
    (version,) = registry.versions(toy.name)
    nll, has_context = promotion_flow.completion_score(version, toy.data, batch_size=50)
    scores = evaluate_completion(promotion_flow._fetch(version), toy.data, "validation", batch_size=50)
    means = [scores[f"validation/completion_{name}_nats"] for name in SCORED]
    assert nll.shape == (400,)
    assert nll.mean().item() == pytest.approx(sum(means) / len(means))
    assert not has_context
