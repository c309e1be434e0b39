"""Where images to pack or to rank come from, where unpacked ones go: PNG files in a folder, NumPy arrays, datasets."""

import io
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from pixelcnn.config import ModelConfig
from pixelcnn.data import SPLITS, Dataset, generator_for, load_dataset
from pixelcnn.images import from_png, to_png
from pixelcnn.packing.container import is_plain, is_text

OnProgress = Callable[[int, int], None]  # called with how many images are done, and of how many

LABELS_FILE = "labels.npy"
# What NumPy raises of a file that is damaged, or none.
DAMAGED = (
    *(ValueError, TypeError, OverflowError, SyntaxError, EOFError, RuntimeError),
    *(TokenError, BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Images:
    """Images to pack or to rank."""

    num: int
    read: Callable[[int, int], Tensor]  # (start, stop) -> (N, C, H, W) int64 levels; ValueError where one does not fit
    names: list[str] | None = None  # of the PNG files, relative to their folder; None where they have none
    num_left_out: int = 0  # files of the folder that are none of them


def number_name(i: int, num: int) -> str:
    """Return the file name of image i of `num` that have no names."""
    return f"{i:0{max(5, len(str(num - 1)))}}.png"


def open_images(path: Path, split: str, config: ModelConfig, exact: bool = True) -> Images:
    """Find the images that a path names: a folder of PNG files, one PNG, a `.npy` array or a split of a dataset.

    ValueError if there are none of the model's shape.

    Args:
        exact: refuse what is not all levels of the model, and names that a packed file does not keep. If not, PNG files
            are rounded to them, and intensities, the training images of a binary dataset, become one Bernoulli sample,
            always the same.
    """
    is_kept = is_plain if exact else is_text
    if path.is_dir():
        # Links, too: one to nothing cannot be read, one to a folder is left out.
        files = sorted(file for file in path.rglob("*") if file.is_file() or file.is_symlink())
        pictures = [file for file in files if file.name.endswith(".png")]
        if not pictures:
            raise ValueError(f"{path} holds no PNG file (*.png).")
        num, names = len(pictures), [file.relative_to(path).as_posix() for file in pictures]
        if strange := [name for name in names if not is_kept(name)]:
            raise ValueError(f"{path}: the name {strange[0]!r} cannot be kept. Rename that file.")
        return Images(num, lambda i, j: _read_pngs(pictures[i:j], config, exact), names, len(files) - num)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.suffix == ".png":
        kept = [path.name] if is_kept(path.name) else None
        return Images(1, lambda start, stop: _read_pngs([path], config, exact), kept)
    data = None
    if path.suffix == ".npy":
        array = _load_npy(path)
    elif path.suffix == ".safetensors":
        data = _split_of(path, split)
        array = data.images[split].numpy()
    else:
        raise ValueError(f"{path} must be a folder of PNG files, a .png, a .npy or a prepared dataset (.safetensors).")
    shapes = [config.image_shape, config.image_shape[1:]] if config.image_shape[0] == 1 else [config.image_shape]
    if array.shape[1:] not in shapes or len(array) == 0 or array.dtype.kind not in "biu":
        raise ValueError(
            f"{path} must hold at least one image {config.image_shape} of whole numbers, as an array (N, C, H, W), "
            f"got {array.dtype} {array.shape}."
        )

    def read(start: int, stop: int) -> Tensor:
        values = array[start:stop]
        if data is not None and not exact:
            drawn = [data.levels(split, slice(i, i + 1), generator_for(i)) for i in range(start, stop)]
            values = torch.cat(drawn).numpy()
        if values.min() < 0 or values.max() >= config.num_levels:
            raise ValueError(
                f"{path} does not fit the model: its levels are 0 to {config.num_levels - 1}, got {values.min()} to "
                f"{values.max()}."
            )
        return torch.from_numpy(values.astype(np.int64)).view(-1, *config.image_shape)

    return Images(len(array), read)


def load_labels(path: Path, split: str, num_images: int, config: ModelConfig) -> Tensor:
    """Return the (N,) int64 labels in a `.npy` array or a dataset's split; ValueError unless the model knows them."""
    if config.num_labels == 0:
        raise ValueError("the model knows no labels. Leave --labels out.")
    labels = _split_of(path, split).labels[split].numpy() if path.suffix == ".safetensors" else _load_npy(path)
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold {num_images} whole numbers, got {labels.dtype} {labels.shape}.")
    if labels.min() < -1 or labels.max() >= config.num_labels:
        raise ValueError(f"{path} must hold labels from -1 (none) to {config.num_labels - 1}.")
    return torch.from_numpy(labels.astype(np.int64))


def _split_of(path: Path, split: str) -> Dataset:
    if split not in SPLITS:
        raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}.")
    return load_dataset(path)


def _read_pngs(files: list[Path], config: ModelConfig, exact: bool) -> Tensor:
    levels = []
    for file in files:
        try:
            levels.append(from_png(file.read_bytes(), config.image_shape, config.num_levels, exact))
        except ValueError as error:
            raise ValueError(f"{str(file)!r} does not fit the model: {error}") from None
    return torch.stack(levels)


def _load_npy(path: Path) -> Any:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist.") from None
    except DAMAGED as error:
        raise ValueError(f"{path} is no .npy array ({error}).") from None


def check_absent(path: Path, empty_folder: bool = False) -> None:
    """Raise ValueError if something is there (but for an empty folder, if told so), or nothing can be written there."""
    # Nothing can be renamed onto `.`, a link to a folder, or a mount.
    is_plain_folder = path.is_dir() and path.name and not path.is_symlink() and not path.is_mount()
    if os.path.lexists(path) and not (empty_folder and is_plain_folder and not any(path.iterdir())):
        raise ValueError(f"{path} is there already. Name another one, or remove it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder that you may write to.")


class Unpacked:
    """Writes unpacked images into a folder beside `out`, and puts them in its place when told to.

    Args:
        out: a `.npy` file, (N, C, H, W) uint8; a `.png`, for a single image; or a folder, for a PNG of each. Labels go
            beside a file, as `NAME.labels.npy`, or into the folder, as `labels.npy`.
        names: of the PNG files in a folder, by the number of the image.
    """

    def __init__(self, out: Path, config: ModelConfig, names: Callable[[int], str]) -> None:
        self.out, self.config, self.num = out, config, 0
        self.labels: list[Tensor] = []
        self.is_folder = out.suffix not in (".npy", ".png")
        self.names = names if self.is_folder else lambda i: out.name
        self.labels_name = LABELS_FILE if self.is_folder else f"{out.stem}.labels.npy"
        check_absent(out, empty_folder=self.is_folder)
        if not self.is_folder:
            check_absent(out.with_name(self.labels_name))
        self.new = out.with_name(f".{out.name}.new")
        shutil.rmtree(self.new, ignore_errors=True)
        self.new.mkdir()
        if out.suffix == ".npy":
            (self.new / out.name).touch()

    def write(self, levels: Tensor, labels: Tensor | None) -> None:
        """Write images, (N, C, H, W) int64, and their labels."""
        if self.out.suffix == ".npy":
            shape = (self.num + len(levels), *self.config.image_shape)
            with open(self.new / self.out.name, "r+b") as file:
                # Of the same length for any number of images.
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.seek(0, os.SEEK_END)
                file.write(levels.byte().numpy().tobytes())
        else:
            for i, image in enumerate(levels, start=self.num):
                self._write_png(self.names(i), image)
        self.num += len(levels)
        if labels is not None:
            self.labels.append(labels)

    def _write_png(self, name: str, image: Tensor) -> None:
        file = self.new / name
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("xb") as opened:
                opened.write(to_png(image, self.config.num_levels))
        except FileExistsError:
            raise ValueError(
                f"{self.out} cannot hold a second {name!r}: on its disk capitals make no other name. Name a .npy file."
            ) from None

    def commit(self) -> None:
        """Put what was written in its place."""
        if self.labels:
            buffer = io.BytesIO()  # into a file np.save cuts them off, and says nothing, where the disk is full
            np.save(buffer, torch.cat(self.labels).numpy())
            (self.new / self.labels_name).write_bytes(buffer.getvalue())
        if self.is_folder:
            self.new.rename(self.out)
        else:
            for file in sorted(self.new.iterdir(), key=lambda file: file.name == self.out.name):  # the images last
                file.rename(self.out.with_name(file.name))

    def discard(self) -> None:
        """Remove what was written and not put in its place, and labels whose images were not."""
        if not self.is_folder and (self.new / self.out.name).exists():
            self.out.with_name(self.labels_name).unlink(missing_ok=True)
        shutil.rmtree(self.new, ignore_errors=True)
