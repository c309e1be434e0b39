"""Where images to pack or to rank come from, where unpacked ones go: PNG files in a folder, NumPy arrays, datasets."""

import io
import os
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelcnn.config import ModelConfig
from pixelcnn.data import SPLITS, Dataset, generator_for, load_dataset
from pixelcnn.images import from_png, to_png
from pixelcnn.packing.container import is_plain

LABELS_FILE = "labels.npy"
# What np.load raises of a file that is damaged, or none.
DAMAGED = (ValueError, EOFError, SyntaxError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


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
    """Find the images that a path names: a folder of PNG files, one PNG, a `.npy` array or a prepared dataset.

    Args:
        split: of a dataset.
        exact: refuse what is not all levels of the model. If not, PNG files are rounded to them, and intensities, the
            training images of a binary dataset, become one Bernoulli sample, always the same.

    Raises:
        ValueError: there are none, or they are not of the model's shape.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        pictures = [file for file in files if file.name.endswith(".png")]
        if not pictures:
            raise ValueError(f"{path} holds no PNG file (*.png).")
        num, names = len(pictures), [file.relative_to(path).as_posix() for file in pictures]
        if strange := [name for name in names if not is_plain(name)]:
            raise ValueError(f"{path}: the name {strange[0]!r} cannot be kept. Rename that file.")
        return Images(num, lambda i, j: _read_pngs(pictures[i:j], config, exact), names, len(files) - num)
    if not path.exists():
        raise ValueError(f"{path} does not exist.")
    if path.suffix == ".png":
        kept = [path.name] if is_plain(path.name) else None
        return Images(1, lambda start, stop: _read_pngs([path], config, exact), kept)
    if path.suffix == ".npy":
        array = _load_npy(path)
        return Images(_check_shape(path, array, config), lambda start, stop: _levels(path, array[start:stop], config))
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must be a folder of PNG files, a .png, a .npy or a prepared dataset (.safetensors).")
    data = _split_of(path, split)
    images = data.images[split].numpy()
    num = _check_shape(path, images, config)
    if exact:
        return Images(num, lambda start, stop: _levels(path, images[start:stop], config))

    def read(start: int, stop: int) -> Tensor:
        drawn = [data.levels(split, slice(i, i + 1), generator_for(i)) for i in range(start, stop)]
        return _levels(path, torch.cat(drawn).numpy(), config)

    return Images(num, read)


def load_labels(path: Path, split: str, num_images: int, config: ModelConfig) -> Tensor:
    """Return the (N,) int64 labels in a `.npy` array or a dataset's split.

    Raises:
        ValueError: there are none, or they are not one for each image that the model knows.
    """
    if config.num_labels == 0:
        raise ValueError("the model knows no labels. Leave --labels out.")
    if path.suffix == ".safetensors":
        labels = _split_of(path, split).labels[split].numpy()
    elif path.exists():
        labels = _load_npy(path)
    else:
        raise ValueError(f"{path} does not exist.")
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise ValueError(f"{path} must hold {num_images} whole numbers, got {labels.dtype} {labels.shape}.")
    if labels.min() < -1 or labels.max() >= config.num_labels:
        raise ValueError(f"{path} must hold labels from -1 (none) to {config.num_labels - 1}.")
    return torch.from_numpy(labels.astype(np.int64))


def _split_of(path: Path, split: str) -> Dataset:
    """Return a prepared dataset that has this split."""
    if split not in SPLITS:
        raise ValueError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}.")
    return load_dataset(path)


def _read_pngs(files: list[Path], config: ModelConfig, exact: bool) -> Tensor:
    levels = []
    for file in files:
        try:
            levels.append(from_png(file.read_bytes(), config.image_shape, config.num_levels, exact))
        except ValueError as error:
            raise ValueError(f"{file} does not fit the model: {error}") from None
    return torch.stack(levels)


def _load_npy(path: Path) -> Any:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED as error:
        raise ValueError(f"{path} is no .npy array ({error}).") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is no .npy array: it holds several.")
    return array


def _check_shape(path: Path, array: Any, config: ModelConfig) -> int:
    """Return the number of images of an array, (N, C, H, W), or (N, H, W) where C is 1."""
    shapes = [config.image_shape, config.image_shape[1:]] if config.image_shape[0] == 1 else [config.image_shape]
    if array.shape[1:] not in shapes or len(array) == 0 or array.dtype.kind not in "biu":
        raise ValueError(
            f"{path} must hold at least one image {config.image_shape} of whole numbers, as an array (N, C, H, W), "
            f"got {array.dtype} {array.shape}."
        )
    return len(array)


def _levels(path: Path, values: Any, config: ModelConfig) -> Tensor:
    if values.min() < 0 or values.max() >= config.num_levels:
        raise ValueError(
            f"{path} does not fit the model: its levels are 0 to {config.num_levels - 1}, got {values.min()} to "
            f"{values.max()}."
        )
    return torch.from_numpy(values.astype(np.int64)).view(-1, *config.image_shape)


def check_absent(path: Path, empty_folder: bool = False) -> None:
    """Raise ValueError if something is there (but for an empty folder, if told so), or nothing can be written there."""
    # Nothing can be renamed onto `.`, a link to a folder, or a mount.
    is_plain_folder = path.is_dir() and path.name and not path.is_symlink() and not path.is_mount()
    if os.path.lexists(path) and not (empty_folder and is_plain_folder and not any(path.iterdir())):
        raise ValueError(f"{path} is there already. Name another one, or remove it.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is no folder that you may write to.")


class Unpacked:
    """Writes unpacked images beside `out`, and puts them in its place when told to.

    Args:
        out: a `.npy` file, (N, C, H, W) uint8; a `.png`, for a single image; or a folder, for a PNG of each. Labels go
            beside a file, as `NAME.labels.npy`, or into the folder, as `labels.npy`.
        names: of the PNG files in a folder, by the number of the image.
    """

    def __init__(self, out: Path, config: ModelConfig, names: Callable[[int], str]) -> None:
        self.out, self.config, self.names = out, config, names
        self.num = 0
        self.labels: list[Tensor] = []
        self.is_folder = out.suffix not in (".npy", ".png")
        check_absent(out, empty_folder=self.is_folder)
        self.new = out.with_name(f".{out.name}.new")
        self.labels_out = self.new / LABELS_FILE if self.is_folder else out.with_suffix(".labels.npy")
        self.labels_new = self.labels_out.with_name(f".{self.labels_out.name}.new")
        if self.is_folder:
            shutil.rmtree(self.new, ignore_errors=True)
            self.new.mkdir()
        else:
            check_absent(self.labels_out)
            self.file = open(self.new, "wb")  # noqa: SIM115 -- until `commit` or `discard`
        self._write_npy_header()

    def _write_npy_header(self) -> None:
        """Write it for the images so far: it is of the same length for any number."""
        if self.out.suffix == ".npy":
            self.file.seek(0)
            shape = (self.num, *self.config.image_shape)
            np.lib.format.write_array_header_1_0(self.file, {"descr": "|u1", "fortran_order": False, "shape": shape})

    def write(self, levels: Tensor, labels: Tensor | None) -> None:
        """Write images, (N, C, H, W) int64, and their labels."""
        if self.out.suffix == ".npy":
            self.file.write(levels.byte().numpy().tobytes())
        else:
            for i, image in enumerate(levels):
                png = to_png(image, self.config.num_levels)
                if self.is_folder:
                    file = self.new / self.names(self.num + i)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    self._write_new(file, png)
                else:
                    self.file.write(png)
        self.num += len(levels)
        if labels is not None:
            self.labels.append(labels)

    def _write_new(self, file: Path, png: bytes) -> None:
        try:
            with file.open("xb") as opened:
                opened.write(png)
        except FileExistsError:
            raise ValueError(
                f"{self.out} cannot hold a second {file.relative_to(self.new)}: on its disk capitals make no other "
                "name. Name a .npy file."
            ) from None

    def commit(self) -> None:
        """Put what was written in its place."""
        self._write_npy_header()
        if not self.is_folder:
            self.file.close()
        if self.labels:
            buffer = io.BytesIO()  # into a file np.save cuts them off, and says nothing, where the disk is full
            np.save(buffer, torch.cat(self.labels).numpy())
            self.labels_new.write_bytes(buffer.getvalue())
            self.labels_new.rename(self.labels_out)
        self.new.rename(self.out)

    def discard(self) -> None:
        """Remove what was written and not put in its place."""
        if self.is_folder:
            shutil.rmtree(self.new, ignore_errors=True)
            return
        with suppress(OSError):  # a full disk does not take what is still in the buffer
            self.file.close()
        if self.new.exists():
            for path in (self.labels_out, self.labels_new, self.new):
                path.unlink(missing_ok=True)
