"""docs/architectures.md is true: its example, saved as it stands outside of the packages, is an architecture."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pixelcnn.models import attention, layers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architectures.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's example as a file, and a checkpoint that its second block of code has saved."""
    folder = tmp_path_factory.mktemp("elsewhere")
    example, use, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    (folder / "stacked.py").write_text(example)
    run(folder, "-c", use)
    return folder


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "PIXELCNN_ARCHITECTURES": "stacked"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_has_about_sixty_lines(folder: Path) -> None:
    assert len((folder / "stacked.py").read_text().splitlines()) < 75


def test_it_is_sampled_exactly_with_labels_drawings_and_both_outputs(folder: Path) -> None:
    code = """
import torch, stacked
from pixelcnn import build_model, complete, naive_sample, sample
from pixelcnn.models.registry import count_weights
for output in ({}, {"output": "logistic_mixture", "num_mixtures": 2}):
    torch.manual_seed(0)
    config = stacked.StackedConfig(image_shape=(3, 5, 4), num_levels=6, num_features=6, num_layers=3, num_labels=2,
                                   context_features=2, completer_features=3, **output)
    model = build_model(config).double().eval()
    u, label = torch.rand(3, 3, 5, 4, dtype=torch.float64), torch.tensor([-1, 0, 1])
    image, observed = torch.randint(6, u.shape), torch.rand(3, 1, 5, 4) < 0.5
    assert torch.equal(sample(model, u, label), naive_sample(model, u, label))
    seen = {"drawing": image, "observed": observed}
    assert torch.equal(complete(model, image, observed, u, label), naive_sample(model, u, label, **seen))
    assert count_weights(config) == sum(weight.numel() for weight in model.state_dict().values())
print("equal")
"""
    assert run(folder, "-c", code) == "equal\n"


def test_changed_weights_are_noticed_whatever_its_layers_parts_are_called(folder: Path, tmp_path: Path) -> None:
    """Also by the names of a whole model's other networks, which are not sampled with it."""
    text = (folder / "stacked.py").read_text()
    for own, name in (("self.context", "self.context_network"), ("self.out", "self.label_network")):
        text = re.sub(rf"{re.escape(own)}( =| is|\()", rf"{name}\1", text)
    (tmp_path / "stacked.py").write_text(text)
    code = """
import torch, stacked
from pixelcnn import build_model, naive_sample, sample
torch.manual_seed(0)
config = stacked.StackedConfig(image_shape=(1, 6, 6), num_levels=2, num_features=4, num_layers=2)
model, u = build_model(config).double().eval(), torch.rand(4, 1, 6, 6, dtype=torch.float64)
before = sample(model, u)
with torch.no_grad():
    for layer in model.layers:
        layer.label_network.weight.normal_(std=10)
assert torch.equal(sample(model, u), naive_sample(model, u))
assert not torch.equal(sample(model, u), before)
"""
    run(tmp_path, "-c", code)


@pytest.mark.slow
def test_the_benchmark_and_the_command_line_know_it(folder: Path) -> None:
    words = ["--batch-sizes", "1", "--samplers", "naive", "cached, compiled", "--seconds", "0.2", "--exact-images", "4"]
    shown = run(folder, "-m", "pixelcnn", "bench", "--checkpoint", "models/stacked", *words)
    assert "Stacked" in shown
    assert "float64: 0 of 4 images differ" in shown
    ratio = re.search(r"cached, compiled +[\d.]+ +([\d.]+)x", shown)
    assert ratio is not None
    assert float(ratio.group(1)) > 100  # on a free core more than 200
    assert "--num-layers" in run(folder, "-m", "pixelcnn", "train", "stacked", "--help")


def test_its_file_may_run_again(folder: Path) -> None:
    run(folder, "stacked.py")  # as the main program, which the environment names, too
    code = """
import importlib, stacked
from pixelcnn import build_model
config = stacked.StackedConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4, num_layers=1)
importlib.reload(stacked)
assert type(build_model(config)) is stacked.Stacked
"""
    run(folder, "-c", code)


def test_another_version_of_its_file_is_told_apart(folder: Path) -> None:
    code = """
import stacked
from pixelcnn.models.registry import code_beside
print(code_beside("stacked"), code_beside("pixelcnn"))
"""
    before = run(folder, "-c", code)
    assert re.fullmatch(r"\['[0-9a-f]{64}'\] \[\]\n", before)
    text = (folder / "stacked.py").read_text()
    (folder / "stacked.py").write_text(text.replace("gate(y)", "F.relu(gate(y))"))
    assert run(folder, "-c", code) != before
    (folder / "stacked.py").write_text(text)
    assert run(folder, "-c", code) == before


def test_a_file_that_imports_the_package_itself_is_told_what_to_import(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text("from pixelcnn import ModelConfig, build_model\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PIXELCNN_ARCHITECTURES": "early"}
    words = [sys.executable, "-c", "import pixelcnn"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr.endswith(
        "): there import from pixelcnn.models and the other modules, not from pixelcnn itself.\n"
    )


def test_an_architecture_that_is_not_there_is_named() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PIXELCNN_ARCHITECTURES": " stakced"}
    words = [sys.executable, "-c", "import pixelcnn"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: PIXELCNN_ARCHITECTURES names 'stakced', which cannot be imported" in done.stderr


def test_every_block_of_the_page_exists() -> None:
    for name in re.findall(r"^\| `(\w+)\(", PAGE.read_text(), flags=re.M):
        assert hasattr(layers, name) or hasattr(attention, name) or name == "F", name
