"""Lineage both ways, on released weights in a real registry and store; and every damage to them is found."""

import importlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.promotion.register import release
from pipelines.registry import decisions, lineage, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.registry.provenance import git_state
from pixelcnn.data import load_dataset, save_dataset
from tests.pipelines.projects import PAIR, tiny_dataset, tiny_params, write_params, write_weights

NAME = "pixelcnn-mnist5k"
DATA = Path("data/mnist5k.safetensors")


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory: pytest.TempPathFactory, new_database: Path):
    """Yield a project with two registered versions, of which the first is champion; made once, for it takes seconds."""
    folder = tmp_path_factory.mktemp("lineage")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("BENTOML_HOME", str(folder / "bentoml"))
        patch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
        shutil.copy(new_database, folder / "mlflow.db")
        write_params(folder, tiny_params())
        save_dataset(DATA, tiny_dataset())
        for seed in (0, 1):
            write_weights(seed)
            release(PAIR)
        lock = {"stages": {"prepare@mnist5k": {"outs": [{"md5": load_dataset(DATA).data_hash}]}}}
        Path("dvc.lock").write_text(json.dumps(lock))  # JSON is YAML, too
        for words in (
            ["init"],
            ["add", "dvc.lock"],
            ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-m", "x"],
        ):
            subprocess.run(["git", *words], check=True, capture_output=True)
        yield folder


@pytest.fixture
def found(two_versions: Path) -> registry.Version:
    return registry.versions("mnist5k")[0]


@pytest.fixture
def restored(two_versions: Path):
    """Put everything back that a test damages."""
    kept = two_versions.with_name("kept")
    shutil.copytree(two_versions, kept)
    yield
    for name in ("data", "mlruns", "bentoml"):
        shutil.rmtree(two_versions / name)
        shutil.copytree(kept / name, two_versions / name)
    shutil.rmtree(kept)


def ask(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = lineage.main(words)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_back_from_a_version(found: registry.Version, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, "--version", f"{NAME}/1")
    assert code == 0
    data_hash, sha256 = load_dataset(DATA).data_hash, found.tags["weights_sha256"]
    commit = subprocess.run(["git", "log", "--format=%h of %cs"], capture_output=True, text=True, check=True).stdout
    run = tracking.client().get_run(found.run_id)
    expected = [
        f"{NAME} version 1: {PAIR}, validation {found.recorded_nll:.2f} nats per image, protocol dynamic, champion, "
        f"served as {NAME}:v1-{sha256[:8]}",
        f"MD5 {data_hash} of data/mnist5k.safetensors, protocol dynamic",
        "prepare@mnist5k of dvc.lock in this folder records it; first recorded in revision " + commit,
        "git commit 0123abc\n",
        f"SHA-256 {sha256}\n",
        f"run         {found.run_id}, of 20",
        "  network.num_features = 3\n",
        f"  test/nll_nats_first_200 = {run.data.metrics['test/nll_nats_first_200']:g}\n",
        "  released     version 1 is the first champion\n",
    ]
    assert [text for text in expected if text not in out] == []
    assert "curve/" not in out


def test_data_that_dvc_does_not_know(found: registry.Version, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Path("dvc.lock").read_text()
    Path("dvc.lock").write_text(lock.replace(found.tags["data_hash"], "0ther"))
    out = ask(capsys, "--version", f"{NAME}/1")[1]
    Path("dvc.lock").write_text(lock)
    assert "dvc.lock in this folder records 0ther; first recorded in revision" in out


def test_data_that_another_dvc_lock_records(found: registry.Version, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the pairs on full data lies in `full/`."""
    Path("full").mkdir(exist_ok=True)
    for words in (("mv", "dvc.lock", "full/dvc.lock"), ("commit", "-qm", "moved")):
        subprocess.run(["git", *words], check=True)
    out = ask(capsys, "--version", f"{NAME}/1")[1]
    for words in (("mv", "full/dvc.lock", "dvc.lock"), ("commit", "-qm", "moved back")):
        subprocess.run(["git", *words], check=True)
    assert "records it; first recorded in revision" in out


def test_back_from_an_answer_of_the_service(
    found: registry.Version, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_number = ask(capsys, "--version", f"{NAME}/1")
    path = tmp_path / "answer.json"
    for answer in ({"images": [[0]], "model": found.lineage()}, found.lineage()):
        path.write_text(json.dumps(answer))
        assert ask(capsys, "--version", str(path)) == by_number
    path.write_text(json.dumps({"model": found.lineage() | {"weights_sha256": "beef"}}))
    code, out, err = ask(capsys, "--version", str(path))
    assert (code, out) == (1, "")
    assert "answer.json says weights_sha256 beef, but pixelcnn-mnist5k version 1 has " in err
    for strange in ({"version": "\x1b[2J"}, {"run_id": "\x1b[2J"}):  # which a terminal would take for commands
        path.write_text(json.dumps({"model": found.lineage() | strange}))
        code, out, err = ask(capsys, "--version", str(path))
        assert (code, out, "\x1b" in err) == (1, "", False)
    path.write_text("[" * 10**5)
    assert "answer.json is no JSON. Save an answer" in ask(capsys, "--version", str(path))[2]
    # Of released weights, which the service served before this registry had them.
    released = found.lineage() | {"version": "released", "run_id": "of another registry"}
    path.write_text(json.dumps({"model": released}))
    assert ask(capsys, "--version", str(path)) == by_number
    for key in ("weights_sha256", "data_hash"):
        path.write_text(json.dumps({"model": released | {key: "beef"}}))
        code, out, err = ask(capsys, "--version", str(path))
        assert (code, out) == (1, "")
        assert "answer.json is an answer of released weights, which " in err
        assert "python -m pipelines.steps release" in err


def test_decisions_that_concern_a_version(found: registry.Version, capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "dataset": "mnist5k",
        "decision": "kept",
        "reason": "no other version can compete",
        "champion": found.lineage(),
        "skipped": [{"version": "2", "reason": "it leaks"}],
    }
    with decisions.decision_run("mnist5k", "promotion") as run_id:
        decisions.record_decision(run_id, report)
        decisions.end_decision(run_id)
    first, second = (ask(capsys, "--version", f"{NAME}/{number}")[1] for number in (1, 2))
    concerning = [text.split("decisions\n")[1].splitlines() for text in (first, second)]
    assert [len(lines) for lines in concerning] == [2, 1], "the release is of the first alone"
    assert concerning[0][1].endswith("  kept         no other version can compete")
    assert concerning[1][0].endswith("  kept         no other version can compete (passed over: it leaks)")


def test_forward_from_the_data(found: registry.Version, capsys: pytest.CaptureFixture[str]) -> None:
    data_hash = found.tags["data_hash"]
    code, out, _ = ask(capsys, "--data", data_hash[:8])
    assert code == 0
    first, *versions = out.splitlines()
    assert first == f"{data_hash}: trained on it, 2 in all"
    assert versions[0].startswith(f"{NAME} version 1: ")
    assert f"champion, served as {NAME}:v1-" in versions[0]
    assert versions[1].startswith(f"{NAME} version 2: ")
    assert versions[1].endswith(", challenger")


def test_the_beginning_of_several_data_hashes_is_none(
    found: registry.Version, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on = [replace(found, tags=found.tags | {"data_hash": data_hash}) for data_hash in ("abcdef1", "abcdef2")]
    monkeypatch.setattr(registry, "versions", lambda _: trained_on)
    said = "lineage: abcdef is the beginning of several data hashes: abcdef1, abcdef2. Give more of it.\n"
    assert ask(capsys, "--data", "abcdef") == (1, "", said)


def test_verified(found: registry.Version, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ask(capsys, "--version", f"{NAME}/1", "--verify")
    assert (code, err) == (0, "")
    sha256, data_hash = found.tags["weights_sha256"], found.tags["data_hash"]
    assert f"verified    data: the MD5 of data/mnist5k.safetensors is {data_hash}\n" in out
    assert f"verified    registry: the weights' SHA-256 is {sha256}\n" in out
    assert f"verified    model store: {NAME}:v1-{sha256[:8]} has the same weights\n" in out
    assert "verified    score: up to 200 test images score what its training recorded\n" in out
    code, out, _ = ask(capsys, "--data", data_hash, "--verify")
    assert code == 0
    assert out.count("verified    score: ") == 2
    assert "bentoml does not hold it, and need not: it is not the champion" in out


def change_data(version: registry.Version) -> None:
    data = load_dataset(DATA)
    data.images["test"] = 1 - data.images["test"]
    save_dataset(DATA, data)


def remove_data(version: registry.Version) -> None:
    DATA.unlink()


def artifact(version: registry.Version, name: str) -> Path:
    checkpoints = {path.parent for path in Path("mlruns").rglob(f"checkpoint/{name}")}
    for folder in checkpoints:
        if json.loads((folder / "config.json").read_text())["weights_sha256"] == version.tags["weights_sha256"]:
            return folder / name
    raise AssertionError(checkpoints)


def damage_artifact(version: registry.Version) -> None:
    path = artifact(version, "model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def forge_score(version: registry.Version) -> None:
    path = artifact(version, "scores.json")
    scores = json.loads(path.read_text())
    path.write_text(json.dumps(scores | {"test/nll_nats_first_200": scores["test/nll_nats_first_200"] - 0.1}))


def damage_store(version: registry.Version) -> None:
    path = store.home() / "models" / str(store.latest(NAME)).replace(":", "/") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def serve_another(version: registry.Version) -> None:
    (store.home() / "models" / NAME / "latest").unlink()


@pytest.mark.parametrize(
    ("damage", "message", "still"),
    [
        (change_data, "data and score: the MD5 of data/mnist5k.safetensors is ", ["registry", "model store"]),
        (remove_data, "data and score: data/mnist5k.safetensors does not exist", ["registry", "model store"]),
        (damage_artifact, "registry and score: pixelcnn-mnist5k version 1 does not hold the", ["data", "model store"]),
        (
            forge_score,
            "score: pixelcnn-mnist5k version 1 does not score what it says: ",
            ["data", "registry", "model store"],
        ),
        (damage_store, "does not hold the weights that were registered. Run ", ["data", "registry", "score"]),
        (serve_another, "bentoml serves nothing, the champion is ", ["data", "registry", "score"]),
    ],
)
def test_every_damage_is_found_and_hides_nothing_else(
    damage, message: str, still: list[str], found: registry.Version, restored, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(found)
    code, out, err = ask(capsys, "--version", f"{NAME}/1", "--verify")
    assert code == 1
    assert err.startswith("lineage: not as registered: pixelcnn-mnist5k version 1, ")
    assert message in err
    assert err.count("\n") == 1
    assert re.findall(r"verified    ([a-z ]+): ", out) == still


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--version nonsense", "'nonsense' is neither a version, like pixelcnn-mnist/3, nor a JSON file of an answer."),
        (f"--version {NAME}/9", "pixelcnn-mnist5k has no version 9. Known: 1, 2."),
        ("--version pixelcnn-svhn/1", "no model 'pixelcnn-svhn' is registered in /"),
        ("--version dvc.lock", "dvc.lock names no model and version. Save an answer of the service, or its `model`."),
        ("--version params.yaml", "params.yaml is no JSON. Save an answer of the service, or its `model`."),
        ("--data 0123456789", "no version was trained on data of hash 0123456789. Known: "),
        ("--data b1", "a data hash of 2 characters is too short: give 6 or more."),
        ("--verify", "say one of the two: --version NAME/NUMBER (or a JSON file), or --data HASH."),
        (f"--version {NAME}/1 --data abcdef", "say one of the two: "),
    ],
)
def test_a_mistake_is_one_sentence(
    two_versions: Path, capsys: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    code, out, err = ask(capsys, *words.split())
    assert (code, out) == (1, "")
    assert err.startswith(f"lineage: {message}")
    assert err.count("\n") == 1


def test_what_makes_a_tree_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pixelcnn/sampling/fast.py", "README.md", "reports/pair/metrics.json", "dvc.lock", "full/dvc.lock"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")

    def git(*words: str) -> str:
        author = ("-c", "user.name=x", "-c", "user.email=x@y")
        return subprocess.run(["git", *author, *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    state = git_state()
    assert state == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": "false"}
    # What DVC does before and during a stage.
    Path("reports/pair/metrics.json").unlink()
    Path("dvc.lock").write_text("new")
    Path("full/dvc.lock").write_text("new")
    Path("notes.py").write_text("")  # in no package: nothing imports it
    assert git_state()["git_dirty"] == "false"
    Path("pixelcnn/sampling/faster.py").write_text("")
    assert git_state()["git_dirty"] == "true", "a new module is code that no commit holds"
    Path("pixelcnn/sampling/faster.py").unlink()
    assert git_state()["git_dirty"] == "false"
    Path("pixelcnn/sampling/fast.py").write_text("changed")
    assert git_state()["git_dirty"] == "true"
    git("checkout", "--", "pixelcnn")
    Path("mine.py").write_text("class Config: ...")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("mine").Config
    assert git_state()["git_dirty"] == "false"
    monkeypatch.setattr("pixelcnn.models.registry._ARCHITECTURES", {"mine": (own, own)})
    assert git_state()["git_dirty"] == "true", "an architecture of one's own is code as well"
    git("add", "mine.py")
    git("commit", "-m", "mine")
    assert git_state()["git_dirty"] == "false"
    Path("README.md").write_text("changed")
    assert git_state()["git_dirty"] == "true", "tracked, though of no package"


def test_a_run_that_was_deleted_is_named(found: registry.Version) -> None:
    with pytest.raises(LookupError, match=r"run gone of pixelcnn-mnist5k version 1 was deleted\."):
        lineage.describe(registry.Version(**{**vars(found), "run_id": "gone"}))
