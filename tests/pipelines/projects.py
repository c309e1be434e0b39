"""Small projects: params.yaml with tiny networks, a tiny dataset, a copy that DVC can run."""

import shutil
from pathlib import Path

import torch
import yaml

from pixelcnn.data import Dataset

ROOT = Path(__file__).parents[2]


def tiny_params() -> dict:
    """Return params.yaml with every network and training made tiny."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for pair in values["pairs"].values():
        depth = "num_blocks" if pair["model"] == "pixelcnn" else "num_layers"
        pair["network"] = {"num_features": 3, depth: 1, "kernel_size": 3}
        pair["num_threads"] = 1
        pair["train"] = {"batch_size": 8, "learning_rate": 0.01, "max_epochs": 0.05, "num_validations": 2}
        pair["train"] |= {"num_validation_images": 8}
    values["evaluate"] = {"batch_size": 8, "num_images": 8}
    values["sample"] |= {"num_images": 1, "num_completions": 1}
    return values


def write_params(folder: Path, values: dict) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


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
    for name in ("pipelines", "pixelcnn", ".dvc"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "cache", "tmp", "*.local")
        )
    for name in ("dvc.yaml", ".dvcignore", "prefect.toml", "prefect.yaml"):
        shutil.copy(ROOT / name, folder / name)
    write_params(folder, tiny_params())
