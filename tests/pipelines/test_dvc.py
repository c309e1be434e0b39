"""dvc.yaml: its stages list what they read; `dvc repro` does what is out of date, and nothing else."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from projects import ROOT, copy_project, tiny_params, write_params

import pipelines
from pipelines import dvc_cli
from pipelines.dvc_cli import with_default_targets
from pipelines.params import DATASETS, load_params

TARGETS = load_params(ROOT / "params.yaml").default_targets


def test_default_targets_are_added_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert TARGETS == ["promote@mnist5k"]
    assert with_default_targets(["repro"]) == ["repro", *TARGETS]
    assert with_default_targets(["repro", "--force", "-k"]) == ["repro", "--force", "-k", *TARGETS]
    assert with_default_targets(["exp", "run", "-S", "sample.seed=1"]) == [
        "exp",
        "run",
        "-S",
        "sample.seed=1",
        *TARGETS,
    ]
    assert with_default_targets(["--cd", str(ROOT), "repro"]) == ["--cd", str(ROOT), "repro", *TARGETS]


@pytest.mark.parametrize(
    "words",
    [
        "repro train@pixelcnn-mnist",
        "repro --all-pipelines",
        "repro -P",
        "repro -R models",
        "exp run train@pixelcnn-mnist",
        "exp run --run-all",
        "status",
        "repro --no-such-option",
        "repro --help",
        "",
    ],
)
def test_everything_else_passes_untouched(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert with_default_targets(words.split()) == words.split()
    printed = capsys.readouterr()
    assert printed.out + printed.err == "", "what there is to say DVC says, once"


def test_another_project_keeps_dvcs_own_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_default_targets(["repro"]) == ["repro"]


def test_mistakes_in_params_stop_repro_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_params(tmp_path, {**tiny_params(), "trian": 1})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dvc", "repro"])
    assert dvc_cli.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("ERROR: params.yaml: unknown key 'trian'. Known: candidates, ")
    assert error.count("\n") == 1


def _imported(nodes: list[ast.stmt]) -> set[Path]:
    """Return the project's files that statements import by name."""
    names: set[str] = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                names |= {alias.name for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom) and inner.module:
                names |= {inner.module, *(f"{inner.module}.{alias.name}" for alias in inner.names)}
    paths = {Path(name.replace(".", "/") + ".py") for name in names if name.startswith(("pipelines.", "pixelcnn."))}
    return {path for path in paths if (ROOT / path).is_file()}


def _read_by(command: str) -> set[str]:
    """Return every file of ours that a command of pipelines/steps.py reads, directly or not.

    What params.py imports only checks values, and is not followed: networks do not change how data are prepared.
    """
    steps = ast.parse((ROOT / "pipelines/steps.py").read_text()).body
    top = [node for node in steps if not isinstance(node, ast.FunctionDef)]
    own = [node for node in steps if isinstance(node, ast.FunctionDef) and node.name == command]
    assert own
    found: set[Path] = set()
    new = _imported(top + own)
    while new:
        found |= new
        followed = [ast.parse((ROOT / path).read_text()).body for path in new if path.name != "params.py"]
        new = set().union(*map(_imported, followed)) - found
    extra = {"pipelines/steps.py"} | ({"pipelines/logged_model.py"} if command == "train" else set())
    return {str(path) for path in found} | extra


@pytest.mark.parametrize("command", ["prepare", "train", "promote"])
def test_stages_list_every_module_they_use(command: str) -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][command]["do"]
    listed = {dep for dep in stage["deps"] if dep.endswith(".py")}
    assert _read_by(command) - listed == set()
    assert listed - _read_by(command) == set()


def dvc(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "PYTHONPATH": str(folder), **environment}
    return subprocess.run(
        [sys.executable, "-m", "pipelines.dvc_cli", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


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
import hashlib, sys
from pathlib import Path
import yaml
command, name = sys.argv[1:3]
params = yaml.safe_load(Path("params.yaml").read_text())
def write(path, *content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(" ".join(map(str, content)))
if command == "prepare":
    write(f"data/{name}.safetensors", name, params["data"])
elif command == "train":
    pair = params["pairs"][name]
    data = Path(f"data/{pair['dataset']}.safetensors").read_text()
    write(f"models/{name}/model.safetensors", pair, data)
    stage = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]["train"]["do"]
    for report in stage["metrics"] + stage["plots"]:
        path = report if isinstance(report, str) else next(iter(report))
        write(path.replace("${key}", name), "{}")
else:
    write(f"reports/promotions/{name}.json", [Path(f"models/{pair}/model.safetensors").read_text()
          for pair in params["candidates"][name]])
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
    assert section[key] != value
    section[key] = value
    write_params(folder, values)


QUICK_START = {"prepare@mnist5k", "train@pixelcnn-mnist5k", "train@gated_pixelcnn-mnist5k", "promote@mnist5k"}


def test_what_reruns(stubbed: Path) -> None:
    assert set(ran(dvc(stubbed, "repro"))) == QUICK_START
    assert ran(dvc(stubbed, "repro")) == []
    change(stubbed, "pairs.gated_pixelcnn-mnist5k.train.learning_rate", 0.02)
    assert ran(dvc(stubbed, "repro")) == ["train@gated_pixelcnn-mnist5k", "promote@mnist5k"]
    change(stubbed, "pairs.gated_pixelcnn-mnist.train.learning_rate", 0.02)
    assert ran(dvc(stubbed, "repro")) == [], "a pair of another dataset"
    change(stubbed, "promote.confidence", 0.9)
    assert ran(dvc(stubbed, "repro")) == ["promote@mnist5k"]
    change(stubbed, "data.split_seed", 5)
    assert set(ran(dvc(stubbed, "repro"))) == QUICK_START
    with open(stubbed / "data/mnist5k.safetensors", "a") as file:
        file.write("changed by hand")
    assert set(ran(dvc(stubbed, "repro"))) <= {"prepare@mnist5k"}, "the file comes back, and nothing else is touched"
    assert "changed" not in (stubbed / "data/mnist5k.safetensors").read_text()
    with open(stubbed / "pixelcnn/layers.py", "a") as source:
        source.write("\n")
    assert set(ran(dvc(stubbed, "repro"))) >= {"train@pixelcnn-mnist5k", "train@gated_pixelcnn-mnist5k"}


def test_any_pair_can_be_named(stubbed: Path) -> None:
    pair = "train@gated_pixelcnn-fashion_mnist"
    assert ran(dvc(stubbed, "repro", pair)) == ["prepare@fashion_mnist", pair]
    assert ran(dvc(stubbed, "repro", "promote@mnist")) == ["prepare@mnist", "train@pixelcnn-mnist", "promote@mnist"]
    assert ran(dvc(stubbed, "repro", "prepare@cifar10")) == ["prepare@cifar10"]


def test_stages_of_the_project() -> None:
    done = dvc(ROOT, "stage", "list", "--name-only")
    params = load_params(ROOT / "params.yaml")
    expected = {f"{stage}@{dataset}" for stage in ("prepare", "promote") for dataset in DATASETS}
    assert set(done.stdout.split()) == expected | {f"train@{pair}" for pair in params.pairs}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_repro_for_real(copy: Path, prefect_server: str) -> None:
    """Real digits, tiny networks, promotion: twice."""
    assert Path(pipelines.__file__).parent == ROOT / "pipelines", "this process uses the project, DVC the copy"
    environment = {"PREFECT_API_URL": prefect_server, "BENTOML_HOME": str(copy / "bentoml"), "OMP_NUM_THREADS": "1"}
    environment |= {"MLFLOW_TRACKING_URI": ""}
    done = dvc(copy, "repro", **environment)
    assert set(ran(done)) == QUICK_START
    assert "No target given: doing promote@mnist5k" in done.stderr
    assert ran(dvc(copy, "repro", **environment)) == []
    lock = yaml.safe_load((copy / "dvc.lock").read_text())["stages"]
    metrics = dvc(copy, "metrics", "show", "--json").stdout
    assert "reports/gated_pixelcnn-mnist5k/metrics.json" in metrics
    scores = yaml.safe_load((copy / "models/pixelcnn-mnist5k/scores.json").read_text())
    assert scores["data_hash"] == lock["prepare@mnist5k"]["outs"][0]["md5"]
    assert list(copy.rglob("*.pkl")) == []
    plots = dvc(copy, "plots", "show", "-o", "plots", "reports/pixelcnn-mnist5k/curve.csv")
    assert plots.returncode == 0, plots.stderr


def test_the_installed_dvc_command_is_the_projects() -> None:
    """Both DVC and this project bring a script of this name: the project's must be the one that was written last."""
    script = Path(sys.executable).with_name("dvc")
    assert "pipelines.dvc_cli" in script.read_text(), f"{script} is DVC's own: run `make install`"
