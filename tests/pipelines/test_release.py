"""Released weights: the first champion of their dataset, registered once, and only if they score what they say."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from pipelines import steps
from pipelines.params import DECISIONS_EXPERIMENT
from pipelines.promotion.register import register_trained, release, release_all
from pipelines.registry import decisions, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.stages import register as stage
from pixelcnn.__main__ import main as core
from tests.pipelines.projects import PAIR, write_weights

DATA = Path("data/mnist5k.safetensors")


def test_released_weights_become_the_first_champion_once(weights: Path) -> None:
    shutil.copytree(weights, weights.with_name(f".{PAIR}.new"))  # a save that was cut off
    (text,) = release_all("a first one")
    assert decisions.history("mnist5k")[-1].endswith(": a first one")
    assert text == (
        "pixelcnn-mnist5k: released weights are version 1 of pixelcnn-mnist5k (checksum checked, scored afresh on "
        "up to 200 test images); champion, as the first of its dataset."
    )
    assert registry.aliases("mnist5k") == {"champion": "1"}
    sha256 = json.loads((weights / "config.json").read_text())["weights_sha256"]
    assert store.latest("pixelcnn-mnist5k") == f"pixelcnn-mnist5k:v1-{sha256[:8]}"
    (version,) = registry.versions("mnist5k")
    assert version.lineage()["git_commit"] == "0123abc"
    assert release(PAIR).endswith("; champion already.")
    assert len(registry.versions("mnist5k")) == 1
    experiment = tracking.client().get_experiment_by_name(DECISIONS_EXPERIMENT)
    (decision,) = tracking.client().search_runs([experiment.experiment_id])
    assert decision.data.tags["decision"] == "released"


def test_a_checkpoint_is_registered_once(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "is version 1 of pixelcnn-mnist5k (checksum checked, scored afresh on up to 200 test images).\n"
    assert steps.main(["register", str(weights)]) == 0
    assert capsys.readouterr().out == f"{weights} {said}"
    shutil.copytree(weights, Path("models") / PAIR)  # as DVC does
    assert steps.main(["register", PAIR]) == 0
    assert capsys.readouterr().out == f"models/{PAIR} {said}"
    (version,) = registry.versions("mnist5k")
    assert version.tags["pair"] == PAIR
    assert registry.aliases("mnist5k") == {"challenger": "1"}, "it serves nobody before a promotion"
    assert steps.main(["register", "gated_pixelcnn-mnist5k"]) == 1
    assert capsys.readouterr().err == (
        "register: neither gated_pixelcnn-mnist5k nor models/gated_pixelcnn-mnist5k holds a checkpoint (config.json, "
        "weights and scores). Name a folder that does, fetch it (dvc pull), or train the pair.\n"
    )
    scores = json.loads((weights / "scores.json").read_text())
    del scores["data_hash"], scores["label_names"]
    (weights / "scores.json").write_text(json.dumps(scores))
    assert steps.main(["register", str(weights)]) == 1
    assert "scores.json of weights/pixelcnn-mnist5k lacks data_hash, label_names." in capsys.readouterr().err


def test_nothing_else_that_lies_in_the_folders_is_logged(weights: Path, tmp_path: Path) -> None:
    """A report or a checkpoint may lie in the project's folder, with the registry and passwords: `--report .`."""
    report = tmp_path / "report"
    for folder in (weights, report):
        (folder / "notes").mkdir(parents=True)
        for name in ("environments.yaml", "mlflow.db", ".env", "notes/secret"):
            (folder / name).write_text("a password")
    (report / "README.md").write_text("the project's")
    for name in ("metrics.json", "samples.png", "completer.csv"):
        (report / name).write_text("step\n" if name.endswith(".csv") else "{}")
    (weights / "README.md").write_text("the card")
    found = stage.register(weights, report)
    logged = {file.path for file in tracking.client().list_artifacts(found["run_id"])}
    assert logged == {"README.md", "scores.json", "metrics.json", "samples.png", "completer.csv"}
    tracking.download_files(found["run_id"], tmp_path / "run")
    assert (tmp_path / "run/README.md").read_text() == "the card"
    top = mlflow.artifacts.download_artifacts(f"models:/pixelcnn-mnist5k/{found['version']}", dst_path=str(tmp_path))
    checkpoint = Path(top) / "artifacts" / tracking.CHECKPOINT_NAME
    own = ["README.md", "config.json", "model.safetensors", "scores.json"]
    assert sorted(path.name for path in checkpoint.iterdir()) == own


def test_a_checkpoint_that_the_core_trained_is_registered(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, schedule = (
        ["--num-features", "3", "--num-blocks", "1"],
        ["--batch-size", "500", "--learning-rate", "0.01", "--max-epochs", "1"],
    )
    words = ["--data", str(DATA), "--out", "ours", *network, *schedule, "--warmup-steps", "0"]
    assert core(["train", "pixelcnn", *words]) == 0
    capsys.readouterr()
    for _ in range(2):
        assert steps.main(["register", "ours"]) == 0
        said = "ours is version 1 of pixelcnn-mnist5k (checksum checked, scored afresh on up to 200 test images).\n"
        assert capsys.readouterr().out == said
    (version,) = registry.versions("mnist5k")
    assert version.tags["pair"] == PAIR


def test_released_weights_need_no_entry_of_their_dataset(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = json.loads((weights / "scores.json").read_text()) | {"dataset": "letters", "pair": "pixelcnn-letters"}
    (weights / "scores.json").write_text(json.dumps(scores))
    weights.rename(weights.with_name("pixelcnn-letters"))
    (text,) = release_all()
    assert text.endswith(
        "(checksum checked, not scored: the prepared data are not here); champion, as the first of its dataset."
    )
    assert store.latest("pixelcnn-letters") is not None
    assert steps.main(["history", "letters"]) == 0
    assert "version 1 is the first champion" in capsys.readouterr().out
    assert steps.main(["rollback", "letters"]) == 1
    assert "unknown dataset" not in capsys.readouterr().err
    assert steps.main(["promote", "letters"]) == 1
    assert "promote: unknown dataset 'letters'. Known: mnist5k, " in capsys.readouterr().err
    (Path("weights/pixelcnn-letters") / "scores.json").write_text(json.dumps(scores | {"dataset": "../x"}))
    with pytest.raises(ValueError, match=r"weights/pixelcnn-letters is of '../x', which is no name of a dataset: use"):
        list(release_all())


def test_a_champion_that_is_there_stays(weights: Path) -> None:
    others = store.home() / "models/iris/abc"  # somebody else's, in the same store
    others.mkdir(parents=True)
    others.with_name("latest").write_text("abc")
    release(PAIR)
    served = store.latest("pixelcnn-mnist5k")
    write_weights(seed=1)
    assert "version 2" in (text := release(PAIR))
    assert text.endswith("; version 1 stays champion until a promotion decides otherwise.")
    assert registry.aliases("mnist5k") == {"champion": "1", "challenger": "2"}
    assert store.latest("pixelcnn-mnist5k") == served
    write_weights(seed=2)
    assert "version 3" in release(PAIR)
    write_weights(seed=1)
    assert "version 2" in release(PAIR)
    assert registry.aliases("mnist5k") == {"champion": "1", "challenger": "3"}, "the newest stays the challenger"


@pytest.mark.parametrize("best", [PAIR, "gated_pixelcnn-mnist5k"])
def test_of_two_pairs_of_a_dataset_the_likelier_becomes_champion(weights: Path, best: str) -> None:
    for pair in (PAIR, "gated_pixelcnn-mnist5k"):
        path = write_weights(seed=0, pair=pair) / "scores.json"
        scores = json.loads(path.read_text()) | {"validation/nll_nats": 80.0 if pair == best else 90.0}
        path.write_text(json.dumps(scores))
    first, second = release_all()
    assert first.startswith(best)
    assert first.endswith("champion, as the first of its dataset.")
    assert second.endswith("version 1 stays champion until a promotion decides otherwise.")


def test_where_nothing_was_released_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert steps.main(["release"]) == 1
    said = f"release: there are no released weights in {tmp_path}/weights: run this in a clone.\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def test_other_weights_under_the_same_scores_are_refused(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = (weights / "scores.json").read_text()
    write_weights(seed=1)
    (weights / "scores.json").write_text(scores)
    with pytest.raises(ValueError, match=r"does not score what it says: .* nats on up to 200 .* Fetch the weights"):
        release(PAIR)
    assert registry.versions("mnist5k") == []
    assert store.latest("pixelcnn-mnist5k") is None
    likelier = write_weights(seed=0, pair="gated_pixelcnn-mnist5k") / "scores.json"
    likelier.write_text(json.dumps(json.loads(likelier.read_text()) | {"validation/nll_nats": 1.0}))
    assert steps.main(["release"]) == 1
    said = capsys.readouterr()
    assert "gated_pixelcnn-mnist5k: released weights are version 1" in said.out, "what was done before is told"
    assert "release: weights/pixelcnn-mnist5k does not score what it says" in said.err


def test_without_the_data_the_checksum_alone_is_checked(weights: Path) -> None:
    DATA.unlink()
    assert "(checksum checked, not scored: the prepared data are not here)" in release(PAIR)
    with open(weights / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    with pytest.raises(ValueError, match="is not the file that was saved"):
        release(PAIR)


def test_scores_that_cannot_be_checked_are_refused(weights: Path) -> None:
    scores = json.loads((weights / "scores.json").read_text())
    del scores["test/nll_nats_first_200"]
    (weights / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(ValueError, match=r"states no score of the first few images\. Train the pair again"):
        release(PAIR)


@pytest.mark.parametrize(
    ("key", "strange"),
    [
        *(
            ("dataset", 7),
            ("protocol", None),
            ("data_hash", ["a"]),
            ("label_names", "ab"),
            ("validation/nll_nats", "90"),
        ),
        *(("pair", 7), ("settings", ["a"]), ("run_id", 7)),
    ],
)
def test_scores_of_another_kind_are_refused(weights: Path, key: str, strange: object) -> None:
    """A stranger may have written them."""
    scores = json.loads((weights / "scores.json").read_text())
    (weights / "scores.json").write_text(json.dumps(scores | {key: strange}))
    with pytest.raises(ValueError, match=rf"scores.json of weights/pixelcnn-mnist5k lacks {key}\."):
        stage.load_evaluated(weights)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"damaged"),
        lambda folder: (folder / "scores.json").unlink(),
    ],
    ids=["damaged", "half fetched"],
)
def test_a_checkpoint_that_is_not_whole_does_not_keep_out_the_others(
    weights: Path, damage: Callable[[Path], object]
) -> None:
    for pair in (PAIR, "gated_pixelcnn-mnist5k"):
        shutil.copytree(write_weights(seed=0, pair=pair), Path("models") / pair)
    damage(Path("models") / PAIR)
    said = sorted(text.partition(" is ")[2][:14] for text in register_trained("mnist5k"))
    assert said == ["not registered", "registered as "]
    assert [version.tags["pair"] for version in registry.versions("mnist5k")] == ["gated_pixelcnn-mnist5k"]


def test_a_score_that_is_no_number_is_not_what_was_said(monkeypatch):
    monkeypatch.setattr(registry, "checked_score", lambda *_: math.nan)
    with pytest.raises(ValueError, match="does not score what it says: nan nats"):
        registry.check_scores("it", None, {registry.CHECKED_SCORE: 1.0}, None)
