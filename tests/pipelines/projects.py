"""Small projects: params.yaml with tiny networks, a tiny dataset, a copy that DVC can run."""

import copy
import functools
import shutil
from pathlib import Path

import torch
import yaml

from pipelines.params import load_params
from pixelcnn import build_model, evaluate, load_dataset, save_checkpoint
from pixelcnn.data import Dataset
from pixelcnn.evaluation import CHECKED_SCORE, checked_score

PAIR = "pixelcnn-mnist5k"
ROOT = Path(__file__).parents[2]


def tiny_params() -> dict:
    """Return params.yaml with every network and training made tiny."""
    return copy.deepcopy(_tiny_params())


@functools.cache
def _tiny_params() -> dict:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for pair in values["pairs"].values():
        depth = "num_blocks" if pair["model"] == "pixelcnn" else "num_layers"
        pair["network"] = {"num_features": 3, depth: 1, "kernel_size": 3}
        pair["num_threads"] = 1
        pair["train"] = {"batch_size": 8, "learning_rate": 0.01, "max_epochs": 0.05, "num_validations": 2}
        pair["train"] |= {"num_validation_images": 8}
        for part in ("context", "completer", "halves", "added", "added_begins_with", "labels"):
            pair.pop(part, None)
    values["evaluate"] = {"batch_size": 8, "num_images": 8, "completion_images": {}, "judged_images": 8, "judges": {}}
    values["sample"] |= {"num_images": 1, "num_completions": 1}
    return values


def write_params(folder: Path, values: dict) -> None:
    (folder / "params.yaml").write_text(yaml.dump(values, Dumper=yaml.CSafeDumper, sort_keys=False))


def tiny_dataset(name: str = "mnist5k", num_levels: int = 2, shape: tuple[int, int, int] = (1, 28, 28)) -> Dataset:
    """Return 1,000 training images and 8 of each other split: the more ink, the further down."""
    generator = torch.Generator().manual_seed(0)
    ink = torch.linspace(0, 1, shape[1])[None, None, :, None]  # (1, 1, H, 1)

    def levels(num: int) -> torch.Tensor:
        return (torch.rand(num, *shape, generator=generator) < ink).to(torch.uint8)

    scale = 255 if num_levels == 2 else 1
    return Dataset(
        name=name,
        num_levels=num_levels,
        protocol="dynamic" if num_levels == 2 else "8-bit",
        label_names=list("0123456789"),
        images={"train": levels(1000) * scale, "validation": levels(8), "test": levels(8)},
        labels={"train": torch.arange(1000) % 10, "validation": torch.arange(8), "test": torch.arange(8)},
    )


def copy_project(folder: Path) -> None:
    """Copy what `dvc repro` needs, with tiny params.yaml, into a folder."""
    for name in ("pipelines", "pixelcnn", "judges", ".dvc"):
        # With __pycache__, where the compiled sampler lies: it is valid for files of the same time and size.
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
    for name in ("full", "own"):
        (folder / name).mkdir()
    for name in (
        "dvc.yaml",
        "full/dvc.yaml",
        "own/dvc.yaml",
        "own/params.yaml",
        ".dvcignore",
        "prefect.toml",
        "prefect.yaml",
    ):
        shutil.copy(ROOT / name, folder / name)
    write_params(folder, tiny_params())


def write_weights(seed: int, pair: str = PAIR) -> Path:
    """Write random weights of a pair with their scores to weights/PAIR, measured on data/mnist5k.safetensors."""
    data = load_dataset("data/mnist5k.safetensors")
    torch.manual_seed(seed)
    model = build_model(load_params().pair(pair).network).eval()
    scores = {
        **evaluate(model, data),
        CHECKED_SCORE: checked_score(model, data),
        "dataset": "mnist5k",
        "protocol": data.protocol,
        "label_names": data.label_names,
        "data_hash": data.data_hash,
        "git_commit": "0123abc",
    }
    folder = Path("weights") / pair
    save_checkpoint(folder, model, scores)
    return folder
