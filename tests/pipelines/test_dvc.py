"""dvc.yaml and full/dvc.yaml: their stages list what they read; DVC's own commands do what is out of date."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.datasets.entry import OFFICIAL
from pipelines.params import QUICK_START, load_params
from pipelines.registry.provenance import recorded_hash
from tests.local import run, slow_alone
from tests.pipelines.projects import ROOT, copy_project, tiny_params, write_params

ROOT_STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
OWN_STAGES = yaml.safe_load((ROOT / "own/dvc.yaml").read_text())["stages"]
FULL_STAGES = yaml.safe_load((ROOT / "full/dvc.yaml").read_text())["stages"]
QUICK_PAIRS = ("pixelcnn-mnist5k", "gated_pixelcnn-mnist5k")
QUICK_START_STAGES = {
    *("fetch@mnist5k", "prepare@mnist5k"),
    *(f"{stage}@{pair}" for stage in ("train", "evaluate") for pair in QUICK_PAIRS),
}


def test_the_locks_record_the_data_of_released_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    of_weights = [json.loads(file.read_text()) for file in Path("weights").glob("*/scores.json")]
    hashes = {scores["dataset"]: scores["data_hash"] for scores in of_weights if scores["dataset"] in OFFICIAL}
    assert hashes.keys() == set(OFFICIAL) - {"mnist5k"}
    assert {name: recorded_hash(name) for name in hashes} == hashes


def imported(path: Path) -> set[Path]:
    """Return the project's files that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    paths = {Path(name.replace(".", "/") + ".py") for name in names if name.startswith(("pipelines.", "pixelcnn."))}
    return {path for path in paths if (ROOT / path).is_file()}


def read_by(path: str) -> set[Path]:
    """Return every file of the project that a module reads, directly or not."""
    found: set[Path] = set()
    new = {Path(path)}
    while new:
        found |= new
        new = set().union(*map(imported, new)) - found
    return found


# What a stage's module reads without its output following from it: settings are checked by params.py, and are listed
# as `params`; the rest tells people and MLflow what happens, or draws while it trains.
WITHOUT_EFFECT = {
    "fetch": (
        *("pipelines/params.py", "pipelines/datasets/checks.py", "pipelines/datasets/entry.py", "pipelines/files.py"),
        *("pipelines/errors.py", "pipelines/settings.py", "pixelcnn/"),
    ),
    "prepare": (
        *("pipelines/params.py", "pipelines/datasets/checks.py", "pipelines/errors.py", "pipelines/files.py"),
        *("pipelines/settings.py", "pixelcnn/"),
    ),
    "train": (
        *("pipelines/", "pixelcnn/checkpoint.py", "pixelcnn/completion.py", "pixelcnn/images.py", "pixelcnn/sampling/"),
    ),
    "evaluate": ("pipelines/", "pixelcnn/training/"),
}
MODULES = {
    "fetch": "pipelines/datasets/sources.py",
    "prepare": "pipelines/datasets/prepare.py",
    "train": "pipelines/stages/train.py",
    "evaluate": "pipelines/stages/evaluate.py",
}


@pytest.mark.parametrize("stages", [ROOT_STAGES, FULL_STAGES], ids=["root", "full"])
@pytest.mark.parametrize("name", MODULES)
def test_stages_list_the_code_that_their_outputs_follow_from(name: str, stages: dict) -> None:
    listed = [dep for dep in stages[name]["deps"] if dep.startswith(("pixelcnn/", "pipelines/"))]
    assert all((ROOT / dep).exists() for dep in listed)
    assert MODULES[name] in listed
    for path in map(str, read_by(MODULES[name])):
        known = path in listed or any(path.startswith(f"{dep}/") for dep in listed)
        assert known or path.startswith(WITHOUT_EFFECT[name]), f"{name} reads {path}"


def test_both_files_have_the_same_stages() -> None:
    assert list(ROOT_STAGES) == list(FULL_STAGES)
    for name in ROOT_STAGES:
        assert ROOT_STAGES[name]["cmd"] == FULL_STAGES[name]["cmd"]
        assert ROOT_STAGES[name]["deps"] == FULL_STAGES[name]["deps"]
    for name in ("train", "evaluate"):
        own = [dep.replace("${key}", "${item.model}-${item.dataset}") for dep in OWN_STAGES[name]["do"]["deps"]]
        assert own == FULL_STAGES[name]["deps"]


def dvc(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # stages call `python`
    environment = {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(folder), **environment}
    return run([sys.executable, "-m", "dvc", *words], 600, cwd=folder, env=environment)


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage ")]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    copy_project(tmp_path)
    return tmp_path


# What the stages do, without the work: each writes its outs from what it reads.
STUB = """
import sys
from pathlib import Path
import yaml
command, name = sys.argv[1:3]
params = yaml.safe_load(Path("params.yaml").read_text())
dataset = name.rpartition("-")[2]
def write(path, *content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(" ".join(map(str, content)))
if command == "fetch":
    write(f"data/raw/{name}/images", name)
elif command == "prepare":
    write(f"data/{name}.safetensors", Path(f"data/raw/{name}/images").read_text(), params["data"])
elif command == "train":
    write(f"trained/{name}/model.safetensors", params["pairs"][name], Path(f"data/{dataset}.safetensors").read_text())
else:
    write(f"models/{name}/model.safetensors", Path(f"trained/{name}/model.safetensors").read_text())
    write(f"reports/{name}/metrics.json", '{"nats": 1.5}')
    write(f"reports/{name}/curve.csv", "step,train_subset_nll_nats,validation_nll_nats\\n1,3,2\\n")
    for picture in ("samples", "class_samples", "extremes", "completions", "curve"):
        write(f"reports/{name}/{picture}.png", params["sample"])
"""


@pytest.fixture
def stubbed(copy: Path) -> Path:
    (copy / "pipelines/steps.py").write_text(STUB)
    return copy


def change(folder: Path, path: str, value: object) -> None:
    values = yaml.safe_load((folder / "params.yaml").read_text())
    *parents, key = path.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    assert section.get(key) != value
    section[key] = value
    write_params(folder, values)


def touch(folder: Path, path: str) -> None:
    with open(folder / path, "a") as source:
        source.write("\n# another word\n")


def stale(folder: Path) -> set[str]:
    """Return the quick start's stages that `dvc status` would run again."""
    done = dvc(folder, "status", "dvc.yaml")
    assert done.returncode == 0, done.stderr
    return {line.removesuffix(":") for line in done.stdout.splitlines() if line.endswith(":") and line[0].isalpha()}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_is_stale_after_a_change(stubbed: Path) -> None:
    assert set(ran(dvc(stubbed, "repro"))) == QUICK_START_STAGES, "dvc repro alone is the quick start"
    assert ran(dvc(stubbed, "repro")) == []
    trains, evaluates = ({f"{stage}@{pair}" for pair in QUICK_PAIRS} for stage in ("train", "evaluate"))
    # The card's text, the compiled sampler, a picture's colour: nothing is trained again.
    for path in ("pipelines/reports/card.py", "pixelcnn/sampling/compiled.py", "pipelines/reports/curve.py"):
        touch(stubbed, path)
    assert stale(stubbed) == evaluates
    touch(stubbed, "pixelcnn/models/layers.py")
    assert stale(stubbed) == trains | evaluates
    assert set(ran(dvc(stubbed, "repro"))) == trains | evaluates
    # What concerns other pairs, or none: another dataset, the commands, how MLflow is told, how it is promoted.
    values = yaml.safe_load((stubbed / "params.yaml").read_text())
    change(stubbed, "pairs.other-glyphs", values["pairs"]["pixelcnn-mnist"] | {"dataset": "glyphs"})
    change(stubbed, "pairs.gated_pixelcnn-mnist.train.learning_rate", 0.02)
    change(stubbed, "promote.confidence", 0.9)
    change(stubbed, "datasets.mnist.num_validation", 1000)
    for path in ("pipelines/steps.py", "pipelines/params.py", "pipelines/registry/runs.py"):
        touch(stubbed, path)
    assert stale(stubbed) == set()
    change(stubbed, "pairs.gated_pixelcnn-mnist5k.train.learning_rate", 0.02)
    assert stale(stubbed) == {"train@gated_pixelcnn-mnist5k"}, "and its evaluation, once it is trained"
    change(stubbed, "sample.seed", 7)
    assert stale(stubbed) == {"train@gated_pixelcnn-mnist5k", *evaluates}
    change(stubbed, "datasets.mnist5k.num_validation", 400)
    assert stale(stubbed) == {"prepare@mnist5k", "train@gated_pixelcnn-mnist5k", *evaluates}, "its own dataset's"
    change(stubbed, "datasets.mnist5k.num_validation", 500)
    with open(stubbed / "data/raw/mnist5k/images", "a") as file:
        file.write("changed by hand")
    assert "prepare@mnist5k" in stale(stubbed), "raw data are a dependency"


@slow_alone
@pytest.mark.timeout(400)
def test_dvcs_commands_without_errors(stubbed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    ran(dvc(stubbed, "repro"))
    shown = dvc(stubbed, "metrics", "show")
    assert (shown.returncode, shown.stderr) == (0, "")
    rows = [line.split() for line in shown.stdout.splitlines()[1:]]
    assert {row[0] for row in rows} == {f"reports/{pair}/metrics.json" for pair in QUICK_PAIRS}
    assert {row[1] for row in rows} == {"1.5"}, "no dashes"
    plots = dvc(stubbed, "plots", "show", "-o", "plots")
    assert (plots.returncode, plots.stderr) == (0, "")
    assert "evaluate@pixelcnn-mnist5k" in dvc(stubbed, "dag").stdout
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (stubbed / ".gitignore").write_text("/data\n/trained\n/models\n/plots\n/reports/*/*\n!/reports/*/metrics.json\n")
    subprocess.run([*git, "add", "."], cwd=stubbed, check=True)
    subprocess.run([*git, "commit", "-qm", "one"], cwd=stubbed, check=True)
    diff = dvc(stubbed, "metrics", "diff")
    assert (diff.returncode, diff.stderr) == (0, "")
    experiment = dvc(stubbed, "exp", "run", "-S", "sample.seed=9")
    assert experiment.returncode == 0, experiment.stderr
    assert "Running stage 'evaluate@pixelcnn-mnist5k'" in experiment.stdout
    assert "Running stage 'train@" not in experiment.stdout
    # Another clone takes what was pushed, and has nothing to do.
    subprocess.run([*git, "commit", "-qam", "two"], cwd=stubbed, check=True)
    remote, clone = tmp_path_factory.mktemp("remote"), tmp_path_factory.mktemp("clones") / "clone"
    assert dvc(stubbed, "remote", "add", "-d", "shared", str(remote)).returncode == 0
    assert dvc(stubbed, "push").returncode == 0
    subprocess.run(["git", "clone", "-q", stubbed, clone], check=True)
    (clone / ".dvc/config").write_text((stubbed / ".dvc/config").read_text())
    pulled = dvc(clone, "pull")
    assert pulled.returncode == 0, pulled.stderr
    assert ran(dvc(clone, "repro")) == []
    # A cache that is lost is filled from the files that lie here, without a remote.
    shutil.rmtree(clone / ".dvc/cache")
    committed = dvc(clone, "commit", "--force", "dvc.yaml")
    assert committed.returncode == 0, committed.stderr
    shutil.rmtree(clone / "models")
    assert dvc(clone, "checkout").returncode == 0
    assert ran(dvc(clone, "repro")) == []


def test_a_pair_on_full_data_is_named_from_the_root(stubbed: Path) -> None:
    done = dvc(stubbed, "repro", "full/dvc.yaml:train@gated_pixelcnn-fashion_mnist")
    stages = ["fetch@fashion_mnist", "prepare@fashion_mnist", "train@gated_pixelcnn-fashion_mnist"]
    assert ran(done) == [f"full/dvc.yaml:{stage}" for stage in stages]
    assert (stubbed / "trained/gated_pixelcnn-fashion_mnist/model.safetensors").exists()
    assert (stubbed / "full/dvc.lock").exists()


def test_stages_of_the_project() -> None:
    found = {}
    for file in ("dvc.yaml", "full/dvc.yaml"):
        done = dvc(ROOT, "stage", "list", "--name-only", file)
        found[file] = {name.rpartition(":")[2] for name in done.stdout.split()}
    assert found["dvc.yaml"] == QUICK_START_STAGES
    params = load_params(ROOT / "params.yaml")
    full = {f"{stage}@{dataset}" for stage in ("fetch", "prepare") for dataset in OFFICIAL if dataset != QUICK_START}
    pairs = {name for name, pair in params.pairs.items() if pair.dataset != QUICK_START}
    assert found["full/dvc.yaml"] == full | {f"{stage}@{pair}" for stage in ("train", "evaluate") for pair in pairs}


def test_the_dvc_command_is_dvcs_own() -> None:
    assert "pipelines" not in Path(sys.executable).with_name("dvc").read_text()
    assert "\ndvc =" not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_repro_for_real(copy: Path) -> None:
    """Real digits, a tiny network: twice; and a training that was killed goes on."""
    params = tiny_params()
    params["pairs"]["pixelcnn-mnist5k"]["train"] |= {"max_epochs": 1.0, "save_minutes": 0}
    params["evaluate"]["judges"] = {"mnist5k": "mnist"}
    write_params(copy, params)
    environment = {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "train@pixelcnn-mnist5k"],
        cwd=copy,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(copy), **environment},
        start_new_session=True,
    )
    try:
        while not list(copy.glob("trained/.pixelcnn-mnist5k.run-*/state.safetensors")):
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    done = dvc(copy, "repro", "evaluate@pixelcnn-mnist5k", **environment)
    assert ran(done) == ["train@pixelcnn-mnist5k", "evaluate@pixelcnn-mnist5k"]
    assert "epoch 1.00: train " in done.stderr
    assert "step 1," not in done.stderr, "the killed training went on where it was"
    assert list(copy.glob("trained/.*.run-*")) == [], "states of trainings that are done are removed"
    metrics = json.loads((copy / "reports/pixelcnn-mnist5k/metrics.json").read_text())
    assert 0 <= metrics["test/accepted_ink45_by_judge"] <= 1
    assert "| whole samples |" in (copy / "models/pixelcnn-mnist5k/README.md").read_text()
    assert ran(dvc(copy, "repro", "evaluate@pixelcnn-mnist5k", **environment)) == []
    lock = yaml.safe_load((copy / "dvc.lock").read_text())["stages"]
    scores = yaml.safe_load((copy / "models/pixelcnn-mnist5k/scores.json").read_text())
    assert scores["data_hash"] == lock["prepare@mnist5k"]["outs"][0]["md5"]
    assert list(copy.rglob("*.pkl")) == []
