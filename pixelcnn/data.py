"""Tensor files; and prepared datasets, one such file each, written by the prepare stage: the only preprocessing.

With protocol `dynamic` (K = 2) the training images are intensities 0..255, of which a Bernoulli sample is drawn at
each read; validation and test are one fixed Bernoulli sample, drawn when the file was written. With every other
protocol all images are stored as levels.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

SPLITS = ("train", "validation", "test")
DYNAMIC_PROTOCOL = "dynamic"  # Bernoulli sample at each read in training, one fixed sample for validation and test
BYTES_PROTOCOL = "8-bit"
# What `load_tensors` raises.
DAMAGED = (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A prepared dataset."""

    name: str  # e.g. `mnist`
    num_levels: int  # K
    protocol: str  # what one pixel of validation and test is, named beside every figure
    label_names: list[str]  # one per class
    images: dict[str, Tensor]  # per split, (N, C, H, W) uint8 levels; intensities for train if protocol is dynamic
    labels: dict[str, Tensor]  # per split, (N,) int64; -1 where the dataset has no labels
    data_hash: str = ""  # MD5 of the file, the one that `dvc.lock` records; empty for a dataset made in memory

    def __post_init__(self) -> None:
        for split in SPLITS:
            images, labels = self.images[split], self.labels[split]
            if images.dim() != 4 or images.dtype != torch.uint8 or len(images) != len(labels) or len(images) == 0:
                raise ValueError(f"{self.name}: split {split} must hold (N, C, H, W) uint8 images and N labels.")
            if not self._has_intensities(split) and int(images.max()) >= self.num_levels:
                raise ValueError(f"{self.name}: split {split} has levels above {self.num_levels - 1}.")

    def _has_intensities(self, split: str) -> bool:
        return split == "train" and self.protocol == DYNAMIC_PROTOCOL

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.images["test"].shape
        return channels, height, width

    def levels(self, split: str, index: Tensor | slice, generator: torch.Generator | None = None) -> Tensor:
        """Return images of a split as levels, (B, C, H, W) int64 in [0, K).

        The generator draws the Bernoulli sample of the training split, protocol dynamic alone.
        """
        images = self.images[split][index]
        if self._has_intensities(split):
            return binarize(images, generator)
        return images.long()

    def probabilities(self, split: str, index: Tensor) -> Tensor | None:
        """Return with which probability `levels` draws each level, (B, K, C, H, W) float32; None if it draws none."""
        if not self._has_intensities(split):
            return None
        return bernoulli(self.images[split][index] / 255)

    def batches(self, split: str, batch_size: int, num_images: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (levels, label) of a split's first `num_images` images, in order."""
        num = len(self.images[split][:num_images])
        # A fixed seed: the training split's likelihood, too, is a number that comes out the same twice.
        generator = torch.Generator().manual_seed(0)
        for start in range(0, num, batch_size):
            index = slice(start, min(start + batch_size, num))
            yield self.levels(split, index, generator), self.labels[split][index]


def generator_for(seed: int, *path: int) -> torch.Generator:
    """Return a generator that depends on (seed, path) alone."""
    state = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) % 2**63)


def binarize(intensities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a Bernoulli sample with probability intensity / 255: uint8 (...) -> int64 (...) in {0, 1}."""
    u = torch.rand(intensities.shape, generator=generator)
    return (u * 255 < intensities).long()


def bernoulli(ink: Tensor) -> Tensor:
    """Return the probabilities of levels 0 and 1, where that of 1 is `ink`: (B, ...) -> (B, 2, ...) float32."""
    ink = ink.float()
    return torch.stack([1 - ink, ink], dim=1)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a file to write in place of another, which it then replaces; where that fails, the other stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], **values: Mapping[str, Any]) -> None:
    """Write a safetensors file, with JSON-ready values of one kind; where it cannot be, what was there stays."""
    # One metadata entry: safetensors writes several in no fixed order, and equal data must be equal bytes.
    metadata = {kind: json.dumps(some, sort_keys=True) for kind, some in values.items()} or None
    try:
        # Not `save_file`, which would keep the file from everybody else.
        with replaced(path) as new:
            own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            new.write_bytes(save(own, metadata))  # which refuses tensors that share memory
    except OSError as error:
        raise OSError(
            f"{path} could not be saved ({error}). Make room on its disk, then run the same command again: a training "
            "goes on from what was saved before, which is untouched."
        ) from None


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the values and the tensors that `save_tensors` wrote; one of `DAMAGED` is raised where it did not.

    OSError if the file cannot be read.
    """
    open(path, "rb").close()  # safetensors says of a folder, or a file that may not be read, that there is none
    with safetensors.safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()[kind])
        return values, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict


def save_dataset(path: str | Path, dataset: Dataset, extra: dict[str, Tensor] | None = None) -> None:
    """Write a dataset and `extra` tensors (e.g. the permutation behind its splits), as `save_tensors` does."""
    images = {f"{split}/images": dataset.images[split] for split in SPLITS}
    labels = {f"{split}/labels": dataset.labels[split] for split in SPLITS}
    values = {name: getattr(dataset, name) for name in ("name", "num_levels", "protocol", "label_names")}
    save_tensors(Path(path), {**(extra or {}), **images, **labels}, dataset=values)


def load_dataset(path: str | Path) -> Dataset:
    """Read what `save_dataset` wrote; ValueError if the file is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist. Make it: python -m pipelines.steps prepare {path.stem}")
    try:
        values, tensors = load_tensors(path, "dataset")
        images, labels = ({s: tensors[f"{s}/{part}"] for s in SPLITS} for part in ("images", "labels"))
        with open(path, "rb") as raw:
            data_hash = hashlib.file_digest(raw, "md5").hexdigest()
        return Dataset(**values, images=images, labels=labels, data_hash=data_hash)
    except DAMAGED as error:
        raise ValueError(
            f"{path} is no prepared dataset ({error}). Make it again: python -m pipelines.steps prepare {path.stem}"
        ) from None
