"""Images of somebody's own: a folder of pictures, arrays, IDX files or CIFAR's binary batches, as bytes of one size.

Nothing here trusts a file. A picture is refused by its header before it is decoded if it is too large; links do not
lead out of the folder; no pickle is opened. What is wrong is one sentence that names the file.
"""

import gzip
import math
import os
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from pipelines.datasets.entry import QUANTIZED_PROTOCOL, THRESHOLD_PROTOCOL, DatasetParams, Source
from pipelines.errors import reason
from pixelcnn.packing.pictures import DAMAGED, check_absent

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP"}
MIN_PICTURE, MAX_PICTURE = 4, 4096  # pixels on a side
CIFAR_SIDE = 32


@dataclass(frozen=True)
class Picture:
    """One picture: grey, RGB or RGBA, turned as it is meant to be seen."""

    name: str
    image: Image.Image
    label: str | None  # None where there is none
    is_test: bool = False  # of an official test set

    def on(self, ground: str) -> Image.Image:
        """Return it grey or RGB, laid on a ground, `black` or `white`, where it is transparent."""
        if self.image.mode != "RGBA":
            return self.image
        return Image.alpha_composite(Image.new("RGBA", self.image.size, ground), self.image).convert("RGB")


@dataclass
class Left:
    """What of a source is no picture that can be learned."""

    broken: list[str] = field(default_factory=list)  # a sentence's part each: 'name' is ...
    num_others: int = 0  # files of other kinds

    def check(self) -> None:
        """Raise ValueError if a picture is broken."""
        if self.broken:
            several = f"{len(self.broken)} pictures cannot be used, the first of them: " if self.broken[1:] else ""
            raise ValueError(
                f"{several}{self.broken[0]}. Mend or remove {'them' if several else 'it'}, or leave such pictures out: "
                "--skip-broken, or skip_broken: true in the dataset's entry."
            )


def read_pictures(source: Source, use_labels: bool, left: Left) -> Iterator[Picture]:
    """Yield the pictures of a source, in an order that depends on names alone; `left` is told of what cannot be used.

    Sub-folders are labels if `use_labels` says so; arrays have theirs in any case. ValueError if the source is not what
    its kind says.
    """
    path = Path(source.path).expanduser()
    try:
        if source.kind == "folder":
            yield from _of_folder(path, use_labels, left)
        elif source.kind == "arrays":
            yield from _of_arrays(path)
        else:
            list(_files(path))  # ValueError where a link leads out
            yield from (_of_idx if source.kind == "idx" else _of_cifar)(path)
    except OSError as error:
        raise ValueError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from None


def load_pictures(spec: DatasetParams) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """Return all pictures of an entry as they are learned: the parts `train`, and `test` where the source has one.

    One that is there twice is taken once: on both sides of a split it would flatter every score. Files of a folder are
    compared as they are learned, images of arrays by their strengths. Returned are by part (N, C, H, W) as of
    `fixed_levels`, and (N,) int64 labels, -1 without; and the number of doubles. ValueError if the source is not as it
    should be, or a picture is broken and broken ones are not left out.
    """
    left, seen, twice = Left(), set(), 0
    index: dict[str | None, int] = {name: i for i, name in enumerate(spec.label_names)}
    parts: dict[str, tuple[list[Tensor], list[int]]] = {"train": ([], []), "test": ([], [])}
    for picture in read_pictures(spec.source, bool(index), left):
        if index and picture.label not in index:
            named = f"label {picture.label!r}" if picture.label is not None else "no label"
            raise ValueError(f"{picture.name!r} has {named}, which is not one of the dataset's. Add the dataset anew.")
        array = fitted(picture, spec)
        levels = fixed_levels(torch.tensor(array), spec)
        # Arrays hold what somebody has chosen, near doubles, too; the hash of the released letters depends on it.
        if (key := (levels.numpy() if spec.source.kind == "folder" else array).tobytes()) in seen:
            twice += 1
            continue
        seen.add(key)
        images, labels = parts["test" if picture.is_test else "train"]
        images.append(levels)
        labels.append(index.get(picture.label, -1))
    if not spec.skip_broken:
        left.check()
    found = {part: (torch.stack(images), torch.tensor(labels)) for part, (images, labels) in parts.items() if images}
    return found, twice


def fixed_levels(images: Tensor, spec: DatasetParams) -> Tensor:
    """Return a protocol's levels of uint8 strengths, of any shape; the strengths themselves where levels are drawn."""
    if spec.protocol == THRESHOLD_PROTOCOL:
        return (images >= 128).to(torch.uint8)
    if spec.protocol == QUANTIZED_PROTOCOL:  # the inverse of pixelcnn.images.to_picture
        return (images.double() * (spec.num_levels - 1) / 255).round().to(torch.uint8)
    return images


def fitted(picture: Picture, spec: DatasetParams) -> np.ndarray:
    """Return a picture in a dataset's size: (C, H, W) uint8 strengths."""
    channels, height, width = spec.image_shape
    image = picture.on(spec.ground).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        smaller = width < image.width or height < image.height
        method = Image.Resampling.LANCZOS if smaller else Image.Resampling.BICUBIC
        if spec.fit == "crop":
            image = ImageOps.fit(image, (width, height), method)
        elif spec.fit == "pad":
            # Of a picture that is long and thin a pixel of the short side stays.
            width_kept, height_kept = math.ceil(image.height / height), math.ceil(image.width / width)
            image = image.resize((max(image.width, width_kept), max(image.height, height_kept)), method)
            image = ImageOps.pad(image, (width, height), method, color=spec.ground)
        else:
            image = image.resize((width, height), method)
    array = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    return np.ascontiguousarray(255 - array if spec.invert else array)


def write_pictures(spec: DatasetParams, out: Path) -> tuple[int, Left]:
    """Write a dataset's pictures as `fitted`, as PNG under their own names; return how many, and what was left out.

    ValueError if the source is not as it should be, or `out` is there already.
    """
    check_absent(out, empty_folder=True)
    left, num = Left(), 0
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name, "new")
        folder.mkdir()
        for picture in read_pictures(spec.source, False, left):
            num += 1
            file = folder / (picture.name if picture.name.endswith(".png") else f"{picture.name}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                raise ValueError(f"{picture.name!r} and another picture would both be {file.name}: rename one.")
            array = fitted(picture, spec).transpose(1, 2, 0)
            Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file)
        folder.replace(out)
    return num, left


def _of_folder(folder: Path, use_labels: bool, left: Left) -> Iterator[Picture]:
    found = sorted(_files(folder), key=lambda file: file.as_posix().encode())
    files = [file for file in found if file.suffix.lower() in FORMATS and file.is_file()]
    left.num_others += len(found) - len(files)
    deep = [file for file in files if file.parent != folder]
    if use_labels and deep and len(deep) < len(files):
        raise ValueError(
            f"{folder} holds pictures beside folders of pictures ({deep[0].relative_to(folder).as_posix()!r}): put all "
            "into folders named by their labels, or leave labels out: --no-labels."
        )
    for file in files:
        name = file.relative_to(folder).as_posix()
        try:
            yield Picture(name, _decoded(file), name.partition("/")[0] if use_labels and deep else None)
        except ValueError as error:
            left.broken.append(f"{name!r} {error}")


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, hidden ones and those of hidden folders apart; no link leads out of it."""

    def refuse(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Name one that holds pictures.")
    top = os.path.realpath(folder)
    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in [*folders, *names]:
            path = Path(where, name)
            shown = path.relative_to(folder).as_posix()
            try:
                shown.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{shown!r} is no name in UTF-8: rename it.") from None
            if path.is_symlink():
                try:
                    target = os.path.realpath(path, strict=True)
                except OSError:
                    raise ValueError(f"{shown!r} is a link that leads nowhere or to itself: remove it.") from None
                if os.path.commonpath([top, target]) != top:
                    raise ValueError(f"{shown!r} is a link that leads out of {folder}: put the file itself there.")
                if os.path.isdir(target):
                    raise ValueError(f"{shown!r} is a link to a folder: put the folder itself there.")
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _odd_size(width: int, height: int) -> str:
    """Return how large a picture is and might be, the end of a sentence; nothing where it can be read."""
    if min(width, height) >= MIN_PICTURE and max(width, height) <= MAX_PICTURE:
        return ""
    return f"{width} x {height} pixels: sides of {MIN_PICTURE} to {MAX_PICTURE} can be read"


def _decoded(path: Path) -> Image.Image:
    """Read a picture file. Raises ValueError, the end of a sentence that begins with its name."""
    if path.stat().st_size == 0:
        raise ValueError("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded before we look
            file = Image.open(path, formats=sorted(set(FORMATS.values())))
        with file:
            is_animated = file.format != "MPO" and getattr(file, "n_frames", 1) > 1  # a phone's JPEG, with small copies
            odd = _odd_size(*file.size) or ("animated: save one of its frames as a picture" if is_animated else "")
            if not odd:
                file.load()
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I"):  # 16 bits
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                if image.has_transparency_data:
                    return image.convert("RGBA")
                return image if image.mode == "L" else image.convert("RGB")
    except PermissionError:
        raise ValueError("may not be read: change its permissions") from None
    except UnidentifiedImageError:
        raise ValueError("is no picture of PNG, JPEG, WebP or BMP") from None
    except Image.DecompressionBombError:  # by its header, of more pixels than Pillow opens at all
        raise ValueError(f"has far too many pixels: sides of {MIN_PICTURE} to {MAX_PICTURE} can be read") from None
    except Exception as error:  # a decoder that is fed with anything may raise anything
        raise ValueError(f"is damaged ({reason(error)})") from None
    raise ValueError(f"is {odd}")


def _of_arrays(path: Path) -> Iterator[Picture]:
    """Read `.npy`, or `.npz` with `images`, `labels` (whole numbers) and `label_names`; the last two may be absent."""
    try:
        found: Any = np.load(path, allow_pickle=False)
        found = {"images": found} if isinstance(found, np.ndarray) else found
        arrays = {name: found[name] for name in ("images", "labels", "label_names") if name in found}
        if odd := [name for name, value in arrays.items() if not isinstance(value, np.ndarray)]:
            raise ValueError(f"{odd[0]!r} is none")
    except (*DAMAGED, MemoryError) as error:
        raise ValueError(f"{path} holds no plain arrays of numpy ({error}). Save it by numpy.savez.") from None
    if "images" not in arrays:
        raise ValueError(f"{path} has no array 'images', only {', '.join(found) or 'nothing'}.")
    images, labels, names = arrays["images"], arrays.get("labels"), arrays.get("label_names", np.empty(0, str))
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)) or not len(images):
        raise ValueError(f"{path}: images must be N x H x W or N x H x W x 3, got an array of shape {images.shape}.")
    if images.dtype == bool:
        images = images.astype(np.uint8) * 255
    elif images.dtype.kind == "f" and np.isfinite(images).all() and images.min() >= 0 and images.max() <= 1:
        images = (images * 255).round().astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images must be uint8, bool, or floats from 0 to 1, got other {images.dtype}.")
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path}: labels must be {len(images)} whole numbers, got {labels.dtype} of {labels.shape}.")
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names)) < len(names):
        raise ValueError(f"{path}: label_names must be a list of different names.")
    yield from _of_arrays_in_memory(images, labels, names.tolist())


def _of_arrays_in_memory(
    images: np.ndarray, labels: np.ndarray | None, names: list[str], what: str = "image", is_test: bool = False
) -> Iterator[Picture]:
    """Yield each of N x H x W (x 1 or 3) uint8 images, named `what` and its number."""
    height, width = images.shape[1:3]
    if odd := _odd_size(width, height):
        raise ValueError(f"images are {odd}.")
    named = dict(enumerate(names))
    for i, image in enumerate(images[..., 0] if images.shape[3:] == (1,) else images):
        label = None if labels is None else named.get(int(labels[i]), str(labels[i]))
        yield Picture(f"{what} {i}", Image.fromarray(image), label, is_test)


def _of_idx(folder: Path) -> Iterator[Picture]:
    """Read `train-images-idx3-ubyte` and, if they are there, its labels and `t10k-...`; gzipped or not."""
    for part, is_test in (("train", False), ("t10k", True)):
        images = _idx(folder, f"{part}-images-idx3-ubyte", 3)
        if images is not None:
            labels = _idx(folder, f"{part}-labels-idx1-ubyte", 1)
            if labels is not None and len(labels) != len(images):
                raise ValueError(f"{folder}: {part} has {len(images)} images and {len(labels)} labels.")
            yield from _of_arrays_in_memory(images, labels, [], part, is_test)
        elif not is_test:
            raise ValueError(f"{folder} has no train-images-idx3-ubyte, gzipped or not.")


def _idx(folder: Path, name: str, num_dims: int) -> np.ndarray | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            try:
                with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                    if file.read(4) != bytes([0, 0, 8, num_dims]):
                        raise ValueError("its first bytes are another format's")
                    shape = np.frombuffer(file.read(4 * num_dims), ">u4", num_dims).tolist()
                    # One byte more shows what follows, and is all that is unpacked of it.
                    return np.frombuffer(file.read(math.prod(shape) + 1), np.uint8).reshape(shape)
            except (ValueError, EOFError, zlib.error, gzip.BadGzipFile, MemoryError, OverflowError) as error:
                raise ValueError(
                    f"{path} is no IDX file of unsigned bytes ({str(error) or 'too many for the memory here'})."
                ) from None
    return None


def _of_cifar(folder: Path) -> Iterator[Picture]:
    """Read the binary version of CIFAR-10 or -100: labels, then red, green and blue of 32 x 32; never a pickle."""
    named = sorted(folder.glob("*meta.txt")) + sorted(folder.glob("fine_*.txt"))
    names = named[-1].read_text("utf-8", "replace").split() if named else []
    files = sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"{folder} has no .bin file: take the binary version of CIFAR, not the one of pickles.")
    for file in files:
        raw, size = np.fromfile(file, np.uint8), 3 * CIFAR_SIDE**2
        num_labels = next((n for n in (1, 2) if len(raw) and len(raw) % (size + n) == 0), None)
        if num_labels is None:
            raise ValueError(f"{file} is no file of CIFAR's: its length is no multiple of {size + 1} or {size + 2}.")
        rows = raw.reshape(-1, size + num_labels)
        images = rows[:, num_labels:].reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1)
        labels = rows[:, num_labels - 1]
        yield from _of_arrays_in_memory(np.ascontiguousarray(images), labels, names, file.stem, "test" in file.name)
