import dataclasses
import hashlib
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from pixelcnn import Dataset, load_dataset, save_dataset
from pixelcnn.data import binarize
from tests.core.tiny import beginning, exactly, toy_dataset


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("protocol", "num_levels"), [("8-bit", 256), ("dynamic", 2)])
def test_round_trip(tmp_path, protocol, num_levels):
    saved = toy_dataset((3, 2, 4), num_levels, protocol, data_hash="")
    path = tmp_path / "deep" / "toy.safetensors"
    save_dataset(path, saved, extra={"permutation": torch.arange(5)})
    loaded = load_dataset(path)
    for field in ("name", "num_levels", "protocol", "label_names"):
        assert getattr(loaded, field) == getattr(saved, field)
    for split in ("train", "validation", "test"):
        assert torch.equal(loaded.images[split], saved.images[split])
        assert torch.equal(loaded.labels[split], saved.labels[split])
    assert loaded.image_shape == (3, 2, 4)
    assert loaded.data_hash == hashlib.md5(path.read_bytes()).hexdigest()
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.get_tensor("permutation").tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in path.parent.iterdir()] == ["toy.safetensors"]
    (tmp_path / "file").touch()
    assert path.stat().st_mode == (tmp_path / "file").stat().st_mode  # others may read it, as any file


def test_equal_data_are_equal_bytes(tmp_path):
    for i in range(5):
        save_dataset(tmp_path / f"{i}.safetensors", toy_dataset())
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(5)}) == 1


def test_splits_that_are_one_tensor_are_saved(tmp_path):
    toy = toy_dataset()
    test, path = {"images": toy.images["test"], "labels": toy.labels["test"]}, tmp_path / "toy.safetensors"
    parts = {part: {**getattr(toy, part), "validation": tensor} for part, tensor in test.items()}
    save_dataset(path, dataclasses.replace(toy, **parts))
    loaded = load_dataset(path)
    for split in ("validation", "test"):
        assert torch.equal(loaded.images[split], test["images"])
        assert torch.equal(loaded.labels[split], test["labels"])


def test_a_failure_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "toy.safetensors"
    save_dataset(path, toy_dataset())
    before = path.read_bytes()

    def fail(self, _content):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=r"toy.safetensors could not be saved \(No space left.*\). Make room on"):
        save_dataset(path, toy_dataset(num_train=30))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["toy.safetensors"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_missing_file_is_named(tmp_path, is_folder):
    path = tmp_path / "mnist.safetensors"
    if is_folder:
        path.mkdir()
    with pytest.raises(
        ValueError, match=exactly(f"{path} does not exist. Make it: python -m pipelines.steps prepare mnist")
    ):
        load_dataset(path)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "mnist.safetensors"
    save_dataset(path, toy_dataset())
    path.write_bytes(path.read_bytes()[:keep])
    message = (
        beginning(f"{path} is no prepared dataset (")
        + r".*\)\. Make it again: python -m pipelines\.steps prepare mnist$"
    )
    with pytest.raises(ValueError, match=message):
        load_dataset(path)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"dataset": "{"}, {"dataset": "{}"}, {"dataset": "[" * 10**5}]
)
def test_another_safetensors_file_is_named(tmp_path, metadata):
    path = tmp_path / "mnist.safetensors"
    save_file({"weights": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"mnist.safetensors is no prepared dataset"):
        load_dataset(path)


def change(split: str, images: torch.Tensor | None = None, labels: torch.Tensor | None = None, **others) -> Dataset:
    good = toy_dataset(num_levels=3)
    images = good.images[split] if images is None else images
    labels = good.labels[split] if labels is None else labels
    return dataclasses.replace(
        good, images={**good.images, split: images}, labels={**good.labels, split: labels}, **others
    )


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_impossible_splits_are_named(split):
    shape_message = f"toy: split {split} must hold \\(N, C, H, W\\) uint8 images and N labels."
    for images in (torch.zeros(24, 3, 3, dtype=torch.uint8), torch.zeros(24, 1, 3, 3)):
        with pytest.raises(ValueError, match=shape_message):
            change(split, images, torch.zeros(24, dtype=torch.int64))
    with pytest.raises(ValueError, match=shape_message):
        change(split, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=shape_message):
        change(split, torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"toy: split {split} has levels above 2."):
        change(split, torch.full((24, 1, 3, 3), 3, dtype=torch.uint8), torch.zeros(24, dtype=torch.int64))


def test_only_the_dynamic_training_split_may_hold_intensities():
    assert toy_dataset(num_levels=2, protocol="dynamic").images["train"].max() > 1
    with pytest.raises(ValueError, match=r"toy: split train has levels above 1."):
        dataclasses.replace(toy_dataset(num_levels=2, protocol="dynamic"), protocol="8-bit")


def test_levels_of_bytes_are_the_bytes():
    toy = toy_dataset(num_levels=256)
    for split in ("train", "validation", "test"):
        levels = toy.levels(split, torch.tensor([3, 1]))
        assert levels.dtype == torch.int64
        assert torch.equal(levels, toy.images[split][[3, 1]].long())


def test_dynamic_binarisation_is_drawn_at_each_read_of_training_only():
    toy = toy_dataset((1, 8, 8), num_levels=2, protocol="dynamic")
    index, one = slice(0, 6), generator(0)
    first, second = toy.levels("train", index, one), toy.levels("train", index, one)
    assert first.dtype == torch.int64
    assert set(first.unique().tolist()) == {0, 1}
    assert not torch.equal(first, second)
    assert torch.equal(toy.levels("train", index, generator(0)), first)
    for split in ("validation", "test"):
        assert torch.equal(toy.levels(split, index, one), toy.images[split][:6].long())


def test_binarisation_follows_the_intensity():
    intensities = torch.tensor([0, 64, 255], dtype=torch.uint8)[:, None].expand(3, 20_000)
    share = binarize(intensities, generator(0)).double().mean(dim=1)
    assert share[0] == 0
    assert share[2] == 1
    assert abs(share[1].item() - 64 / 255) < 0.015  # five standard errors


def test_binarisation_at_the_ends_of_the_noise(monkeypatch):
    intensities = torch.tensor([0, 1, 254, 255], dtype=torch.uint8)
    for u, expected in ((0.0, [0, 1, 1, 1]), (1 - 2**-24, [0, 0, 0, 1])):  # what torch.rand can give at most
        monkeypatch.setattr(torch, "rand", lambda shape, generator, u=u: torch.full(shape, u))
        assert binarize(intensities, None).tolist() == expected


@pytest.mark.parametrize("num_images", [None, 5, 100])
def test_batches_cover_the_first_images_in_order_and_come_out_the_same_twice(num_images):
    toy = toy_dataset((1, 8, 8), num_levels=2, protocol="dynamic", num_train=7)
    for split in ("train", "validation", "test"):
        num = min(len(toy.images[split]), num_images or 100)
        batches = list(toy.batches(split, batch_size=3, num_images=num_images))
        assert [len(levels) for levels, _ in batches] == [3] * (num // 3) + [num % 3] * (num % 3 > 0)
        levels, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(labels, toy.labels[split][:num])
        if split != "train":
            assert torch.equal(levels, toy.images[split][:num].long())
        again = torch.cat([levels for levels, _ in toy.batches(split, 3, num_images)])
        assert torch.equal(again, levels)
