"""The prepare stage: official images, or somebody's own -> one file with fixed splits, `data/DATASET.safetensors`."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipelines.datasets.checks import CheckParams, check, keep
from pipelines.datasets.entry import DatasetParams
from pipelines.datasets.pictures import fixed_levels, load_pictures
from pipelines.datasets.sources import Images, read
from pipelines.params import DataParams
from pixelcnn.data import DYNAMIC_PROTOCOL, Dataset, save_dataset


def prepare(
    name: str,
    spec: DatasetParams,
    raw: str | Path,
    out: str | Path,
    params: DataParams,
    limits: CheckParams | None = None,
) -> None:
    """Write a dataset's file. Equal inputs give equal bytes.

    Beside the splits the file keeps the permutation behind them and the seeds.

    Args:
        spec: the dataset's entry.
        raw: folder of the official files, as `sources.fetch` writes it; pictures of one's own are read where they lie.
        out: the file to write.
        params: the seeds.
        limits: how much it may have changed since it was prepared last; None to compare nothing.

    Raises:
        ValueError: the images are missing or damaged, too few for the splits, or have changed beyond the limits.
    """
    found = read(spec.source.path, Path(raw)) if spec.source.kind == "official" else load_pictures(spec)[0]
    write(name, spec, found, Path(out), params, limits)


def write(
    name: str,
    spec: DatasetParams,
    found: dict[str, Images],
    out: Path,
    params: DataParams,
    limits: CheckParams | None,
) -> Dataset:
    """Split what was read, compare it with what was prepared last, and write it; see `prepare` and `split`."""
    dataset, extra = split(name, spec, found, params)
    summary = check(dataset, out.parent, limits) if limits else None
    save_dataset(out, dataset, extra)
    if summary:
        keep(summary, out.parent, name)
    return dataset


def split(
    name: str, spec: DatasetParams, found: dict[str, Images], params: DataParams
) -> tuple[Dataset, dict[str, Tensor]]:
    """Cut validation (and test, where there is none) off a seeded permutation; make levels of what is fixed.

    Args:
        found: `train`, and `test` if the dataset has one. Without, test images are set aside like validation's.

    Returns:
        The dataset, and what else its file keeps: the permutation and the seeds.

    Raises:
        ValueError: there are too few images.
    """
    num_held_out = spec.num_validation * (1 if "test" in found else 2)
    num_found = len(found["train"][0]) if "train" in found else 0
    if num_found <= num_held_out:
        raise ValueError(
            f"{name} has {num_found} different images to train on, and sets {num_held_out} aside: give it more, or "
            "lower num_validation in its entry."
        )
    # RandomState: its streams are frozen for ever, unlike those of newer generators.
    train_images, train_labels = found["train"]
    permutation = torch.from_numpy(np.random.RandomState(params.split_seed).permutation(len(train_images)))
    index = {
        "train": permutation[: len(permutation) - num_held_out],
        "validation": permutation[len(permutation) - num_held_out :][: spec.num_validation],
    }
    if "test" not in found:
        index["test"] = permutation[-spec.num_validation :]
    images = {s: train_images[i] for s, i in index.items()}
    labels = {s: train_labels[i] for s, i in index.items()}
    if "test" in found:
        images["test"], labels["test"] = found["test"]
    if spec.protocol == DYNAMIC_PROTOCOL:
        for stream, s in enumerate(("validation", "test")):
            u = np.random.RandomState([params.binarization_seed, stream]).random_sample(tuple(images[s].shape))
            images[s] = torch.from_numpy((u * 255 < images[s].numpy()).astype(np.uint8))
    else:
        images = {s: fixed_levels(part, spec) for s, part in images.items()}
    dataset = Dataset(
        name=name,
        num_levels=spec.num_levels,
        protocol=spec.protocol,
        label_names=list(spec.label_names),
        images=images,
        labels=labels,
    )
    extra = {
        "split/permutation": permutation,
        "split/seed": torch.tensor([params.split_seed]),
        "binarization/seed": torch.tensor([params.binarization_seed]),
    }
    return dataset, extra
