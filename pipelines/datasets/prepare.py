"""The prepare stage: official images, or somebody's own -> one file with fixed splits, `data/DATASET.safetensors`."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from pipelines.datasets.checks import CheckParams, save_checked
from pipelines.datasets.entry import DatasetParams
from pipelines.datasets.pictures import fixed_levels, load_pictures
from pipelines.datasets.sources import Images, read
from pipelines.params import DataParams, repro_command
from pixelcnn.data import DYNAMIC_PROTOCOL, SPLITS, Dataset


def prepare(name: str, spec: DatasetParams, raw: Path, out: Path, params: DataParams, limits: CheckParams) -> None:
    """Read a dataset's images and write its file, as `write` does; ValueError, too, if they are missing or damaged.

    Official files lie in `raw`, as `sources.fetch` writes it; pictures of one's own are read where they lie.
    """
    if spec.source.kind == "official":
        again = repro_command("fetch", name).replace("repro", "repro -f")
        if name != spec.source.path:  # it has a folder of its own, which no stage of DVC's fills
            again = f"python -m pipelines.steps fetch {name}"
        official = read(spec.source.path, raw, f"fetch it again: {again}")
        if (shape := official["train"][0].shape[1:]) != spec.image_shape:
            raise ValueError(f"{name} has images of shape {list(shape)}: set image_shape in its entry to that.")
        num = max(int(labels.max()) for _, labels in official.values()) + 1
        if 0 < len(spec.label_names) < num:
            raise ValueError(
                f"{name} has {num} labels: name as many in its entry, got {len(spec.label_names)} label_names."
            )
        found = {part: (fixed_levels(images, spec), labels) for part, (images, labels) in official.items()}
    else:
        found = load_pictures(spec)[0]
    write(name, spec, found, out, params, limits)


def write(
    name: str, spec: DatasetParams, found: dict[str, Images], out: Path, params: DataParams, limits: CheckParams
) -> Dataset:
    """Cut validation (and test, where there is none) off a permutation, which the file keeps; draw binary levels.

    `found` has `train`, and `test` if the dataset has one, as `fixed_levels` makes them. Equal inputs give equal bytes.
    ValueError if there are too few images, or they have changed beyond the limits since they were prepared last.
    """
    held_out = [spec.num_validation] * (1 if "test" in found else 2)
    num_found = len(found["train"][0]) if "train" in found else 0
    if num_found <= sum(held_out):
        raise ValueError(
            f"{name} has {num_found} different images to train on, and sets {sum(held_out)} aside: give it more, or "
            "lower num_validation in its entry."
        )
    train_images, train_labels = found["train"]
    if spec.source.kind == "folder":
        # By content: as pictures are added, none that a model has learned is set aside, where it would flatter it.
        seed = str(params.split_seed).encode()
        keys = [hashlib.sha256(seed + image.numpy().tobytes()).digest() for image in train_images]
        permutation = torch.tensor(sorted(range(num_found), key=keys.__getitem__))
    else:
        # RandomState: its streams are frozen for ever, unlike those of newer generators.
        permutation = torch.from_numpy(np.random.RandomState(params.split_seed).permutation(num_found))
    index = dict(zip(SPLITS, torch.split(permutation, [num_found - sum(held_out), *held_out]), strict=False))
    parts = {**found, **{s: (train_images[i], train_labels[i]) for s, i in index.items()}}
    images = {s: part[0] for s, part in parts.items()}
    if spec.protocol == DYNAMIC_PROTOCOL:
        for stream, s in enumerate(("validation", "test")):
            u = np.random.RandomState([params.binarization_seed, stream]).random_sample(tuple(images[s].shape))
            images[s] = torch.from_numpy((u * 255 < images[s].numpy()).astype(np.uint8))
    dataset = Dataset(
        name=name,
        num_levels=spec.num_levels,
        protocol=spec.protocol,
        label_names=list(spec.label_names),
        images=images,
        labels={s: part[1] for s, part in parts.items()},
    )
    extra = {
        "split/permutation": permutation,
        "split/seed": torch.tensor([params.split_seed]),
        "binarization/seed": torch.tensor([params.binarization_seed]),
    }
    save_checked(out, dataset, extra, limits)
    return dataset
