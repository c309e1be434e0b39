"""Packing: what comes out is what went in, as small as the likelihood says; damage is noticed and never a picture."""

import json
import math
import os
import random
import resource
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixelcnn import build_model, load_checkpoint, log_prob, packed_bytes, save_checkpoint, save_dataset
from pixelcnn.__main__ import main
from pixelcnn.images import to_png
from pixelcnn.packing import container, pack, unpack
from pixelcnn.packing.coder import Coder
from pixelcnn.packing.container import Header, Reader, block_bytes
from pixelcnn.packing.pictures import Unpacked
from tests.core.tiny import Shape, exactly, random_levels, tiny_config, toy_dataset

SHAPE = (1, 4, 5)
# Of numba's names, to be emulated in turn; half a minute each, so that `make test-slow` alone names some.
PROCESSORS = os.environ.get("PIXELCNN_TEST_PROCESSORS", "").split()
# What the probe is on any machine: another order of sums changes it, and makes packed files unreadable.
PROBES = {
    "pixelcnn": "f6037c32311a771e",
    "gated_pixelcnn": "9082c9ab8d3e6c0f",
    "attentive_pixelcnn": "385da2fda6eb3a48",
    "gated_pixelcnn, a mixture in colour": "2b90dcb1ca87962c",
}
DAMAGES = int(os.environ.get("PIXELCNN_TEST_DAMAGES", "40"))


def checkpoint_of(
    folder: Path,
    architecture: str = "pixelcnn",
    shape: Shape = SHAPE,
    num_levels: int = 3,
    num_labels: int = 2,
    **changes,
) -> Path:
    torch.manual_seed(0)
    model = build_model(replace(tiny_config(architecture, shape, num_levels, num_labels), **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    save_checkpoint(folder, model, {})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("packing") / "model")


def array_of(path: Path, num: int, shape: Shape = SHAPE, num_levels: int = 3) -> np.ndarray:
    """Write `num` images to a `.npy` file; return them."""
    levels = random_levels(shape, num_levels, num).byte().numpy()
    np.save(path, levels)
    return levels


@pytest.mark.parametrize(
    ("architecture", "shape", "num_levels", "num_labels", "changes"),
    [
        ("pixelcnn", (1, 5, 4), 2, 0, {}),
        ("gated_pixelcnn", (3, 4, 5), 256, 3, {}),
        ("attentive_pixelcnn", (1, 4, 4), 5, 0, {}),
        ("gated_pixelcnn", (3, 3, 3), 256, 2, {"output": "logistic_mixture", "num_mixtures": 3}),
    ],
)
@pytest.mark.parametrize("with_labels", [False, True])
def test_what_comes_out_is_what_went_in(
    tmp_path, architecture, shape, num_levels, num_labels, changes, with_labels
) -> None:
    model = checkpoint_of(tmp_path / "model", architecture, shape, num_levels, num_labels, **changes)
    levels = array_of(tmp_path / "in.npy", 21, shape, num_levels)
    labels = None
    if with_labels and num_labels:
        labels = np.arange(21) % (num_labels + 1) - 1
        np.save(tmp_path / "labels.npy", labels)
    given = tmp_path / "labels.npy" if labels is not None else None
    pack(model, tmp_path / "in.npy", tmp_path / "x.pxl", labels=given, block_images=8)
    assert unpack(model, tmp_path / "x.pxl", tmp_path / "out.npy") == 21
    assert np.array_equal(np.load(tmp_path / "out.npy"), levels)
    assert (tmp_path / "out.labels.npy").exists() == (labels is not None)
    assert labels is None or np.array_equal(np.load(tmp_path / "out.labels.npy"), labels)
    unpack(model, tmp_path / "x.pxl", tmp_path / "some", images=(7, 17))
    assert sorted(path.name for path in (tmp_path / "some").glob("*.png"))[::9] == ["00007.png", "00016.png"]
    assert labels is None or np.array_equal(np.load(tmp_path / "some" / "labels.npy"), labels[7:17])
    # The same file comes of the pictures as of the array.
    unpack(model, tmp_path / "x.pxl", tmp_path / "all")
    pack(model, tmp_path / "all", tmp_path / "again.pxl", labels=given, block_images=8)
    assert (tmp_path / "again.pxl").read_bytes() == (tmp_path / "x.pxl").read_bytes()


@pytest.mark.parametrize("num_levels", [2, 256])
def test_a_file_is_as_large_as_the_likelihood_says(tmp_path, num_levels) -> None:
    checkpoint = checkpoint_of(tmp_path / "model", num_levels=num_levels)
    levels = array_of(tmp_path / "in.npy", 3000, num_levels=num_levels)
    with torch.no_grad():
        nats = -log_prob(load_checkpoint(checkpoint)[0], torch.from_numpy(levels).long()).double().sum().item()
    made = pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl")
    assert made.num_bytes == (tmp_path / "x.pxl").stat().st_size
    assert made.nats == pytest.approx(nats, rel=1e-5)
    least = packed_bytes(-nats)
    assert least == math.ceil(nats / math.log(2) / 8)
    assert 0 <= made.num_bytes - made.num_header_bytes - least <= 0.002 * least
    assert made.num_header_bytes < 400


def test_a_file_does_not_depend_on_the_number_of_threads(checkpoint, tmp_path) -> None:
    levels = array_of(tmp_path / "in.npy", 100)
    files = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        pack(checkpoint, tmp_path / "in.npy", tmp_path / f"{num_threads}.pxl", block_images=16)
        unpack(checkpoint, tmp_path / f"{num_threads}.pxl", tmp_path / f"{num_threads}.npy")
        assert np.array_equal(np.load(tmp_path / f"{num_threads}.npy"), levels)
        files.append((tmp_path / f"{num_threads}.pxl").read_bytes())
    torch.set_num_threads(1)
    assert files[0] == files[1]


def test_commands_keep_names_labels_and_subfolders(checkpoint, tmp_path, capsys) -> None:
    levels = random_levels(SHAPE, 3, 3)
    names = ["a.png", "b/a.png", "b/ü 2.png"]
    (tmp_path / "in" / "b").mkdir(parents=True)
    for name, image in zip(names, levels, strict=True):
        (tmp_path / "in" / name).write_bytes(to_png(image, 3))
    (tmp_path / "in" / "notes.txt").write_text("not packed")
    # A palette is another way to write the same pixels.
    Image.open(tmp_path / "in" / "a.png").convert("P").save(tmp_path / "in" / "a.png")
    file, out = tmp_path / "x.pxl", tmp_path / "out"
    command = ["--checkpoint", str(checkpoint)]
    assert main(["pack", *command, "--images", str(tmp_path / "in"), "--out", str(file)]) == 0
    size = f"{file.stat().st_size:,}"
    assert capsys.readouterr().out == f"left out: 1 file not named .png\nwrote {file}: 3 images in {size} bytes\n"
    assert main(["unpack", *command, str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote 3 images to {out}\n"
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == names
    for name, image in zip(names, levels, strict=True):
        assert (out / name).read_bytes() == to_png(image, 3)
    one = tmp_path / "one.png"
    assert main(["unpack", *command, str(file), "--out", str(one), "--images", "1"]) == 0
    assert capsys.readouterr().out == f"wrote 1 image to {one}\n"
    assert one.read_bytes() == to_png(levels[1], 3)
    assert main(["unpack", *command, str(file), "--out", str(tmp_path / "no.png"), "--images", "0:2"]) == 1
    message = f"error: {tmp_path}/no.png can hold one image, not 2. Name a folder or a .npy file, or one image.\n"
    assert capsys.readouterr().err == message
    assert main(["unpack", *command, str(file), "--out", str(tmp_path / "no"), "--images", "2:4"]) == 1
    assert capsys.readouterr().err == f"error: {file} holds the images 0 to 2, got 2 to 3.\n"
    assert main(["unpack", *command, str(file), "--out", str(tmp_path / "no"), "--images", "two"]) == 1
    assert capsys.readouterr().err == "error: --images must be a number, or two of them like 100:200, got 'two'.\n"


def test_a_datasets_split_and_a_single_picture(tmp_path) -> None:
    data = toy_dataset()
    save_dataset(tmp_path / "toy.safetensors", data)
    checkpoint = checkpoint_of(tmp_path / "model", shape=(1, 3, 3))
    file = tmp_path / "toy.safetensors"
    pack(checkpoint, file, tmp_path / "x.pxl", labels=file, split="validation")
    unpack(checkpoint, tmp_path / "x.pxl", tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), data.images["validation"])
    assert np.array_equal(np.load(tmp_path / "out.labels.npy"), data.labels["validation"])
    (tmp_path / "one.png").write_bytes(to_png(data.images["test"][0].long(), 3))
    pack(checkpoint, tmp_path / "one.png", tmp_path / "one.pxl")
    unpack(checkpoint, tmp_path / "one.pxl", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "one.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    with pytest.raises(ValueError, match=exactly("--split must be one of train, validation, test, got 'all'.")):
        pack(checkpoint, file, tmp_path / "y.pxl", split="all")


def test_progress_is_told_and_a_failure_leaves_nothing(checkpoint, tmp_path) -> None:
    array_of(tmp_path / "in.npy", 40)
    seen = []
    command = (checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl")
    pack(*command, block_images=20, on_progress=lambda done, num: seen.append((done, num)))
    assert seen == [(16, 40), (20, 40), (36, 40), (40, 40)]
    before = sorted(tmp_path.iterdir())

    def fail(done: int, num: int) -> None:
        if done > 20:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        pack(*command[:2], tmp_path / "y.pxl", block_images=20, on_progress=fail)
    for out in ("y.npy", "y"):
        with pytest.raises(RuntimeError, match="power cut"):
            unpack(checkpoint, tmp_path / "x.pxl", tmp_path / out, on_progress=fail)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("out", "room"), [("y.npy", 2500), ("y", 2500), ("y.npy", 600)])
def test_a_full_disk_leaves_nothing(tmp_path, out: str, room: int) -> None:
    """400 images of two pixels take 928 bytes, their labels 3,328."""
    shape = (1, 1, 2)
    unpacked = Unpacked(tmp_path / out, tiny_config("pixelcnn", shape, 3), lambda i: f"{i}.png")
    unpacked.write(random_levels(shape, 3, 400), torch.zeros(400, dtype=torch.int64))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            unpacked.commit()
        unpacked.discard()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_labels_come_before_their_images_and_never_without(tmp_path, monkeypatch) -> None:
    rename, renamed = Path.rename, []

    def fail_at_images(file: Path, target: Path) -> None:
        if file.name == "y.npy":
            raise OSError("Input/output error")
        renamed.append(file.name)
        rename(file, target)

    monkeypatch.setattr(Path, "rename", fail_at_images)
    unpacked = Unpacked(tmp_path / "y.npy", tiny_config("pixelcnn", SHAPE, 3), str)
    unpacked.write(random_levels(SHAPE, 3, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(OSError, match="Input/output error"):
        unpacked.commit()
    unpacked.discard()
    assert renamed == ["y.labels.npy"]
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_disk_takes_for_another_replaces_no_picture(tmp_path) -> None:
    """As A.png and a.png, where capitals make no other name. Nor does the terminal obey one."""
    unpacked = Unpacked(tmp_path / "out", tiny_config("pixelcnn", SHAPE, 3), lambda i: "\x1b]0;a\x07.png")
    message = (
        f"{tmp_path}/out cannot hold a second '\\x1b]0;a\\x07.png': on its disk capitals make no other name. "
        "Name a .npy file."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        unpacked.write(random_levels(SHAPE, 3, 2), None)
    unpacked.discard()
    assert list(tmp_path.iterdir()) == []


def changed(array: np.ndarray, value: int) -> np.ndarray:
    array = array.astype(np.int64)
    array[2, 0, 1, 1] = value
    return array


def test_what_cannot_be_packed_is_named(checkpoint, tmp_path) -> None:
    array = array_of(tmp_path / "in.npy", 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no picture")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "c:a.png").write_bytes(to_png(torch.zeros(SHAPE, dtype=torch.int64), 3))
    for name, picture in {
        "large": Image.new("L", (6, 4)),
        "grey": Image.new("L", (5, 4), 100),
        "red": Image.new("RGB", (5, 4), (255, 0, 0)),
        "clear": Image.new("LA", (5, 4), (255, 0)),
        "deep": Image.new("I;16", (5, 4)),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.png").write_bytes(to_png(torch.zeros(SHAPE, dtype=torch.int64), 3))
        picture.save(tmp_path / name / "00001.png")
    np.save(tmp_path / "floats.npy", array.astype(np.float32))
    np.save(tmp_path / "shape.npy", array[:, :, 1:])
    np.save(tmp_path / "none.npy", array[:0])
    np.save(tmp_path / "high.npy", changed(array, 3))
    np.save(tmp_path / "low.npy", changed(array, -1))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "file.txt").write_text("no images")
    holds = "must hold at least one image (1, 4, 5) of whole numbers, as an array (N, C, H, W), got"
    levels = (
        "does not fit the model: image must hold the 3 levels of grey of the model and nothing else (black is the "
        "first one, white the last one): others would be changed."
    )
    save_dataset(tmp_path / "data.safetensors", toy_dataset(SHAPE, 3))
    before = sorted(tmp_path.iterdir())
    for name, message in {
        "empty": "{} holds no PNG file (*.png).",
        "other": "{} holds no PNG file (*.png).",
        "nowhere": "{} does not exist.",
        "named": "{}: the name 'c:a.png' cannot be kept. Rename that file.",
        "large": "'{}/00001.png' does not fit the model: image must be 5 x 4 pixels, got 6 x 4.",
        "grey": "'{}/00001.png' " + levels,
        "red": "'{}/00001.png' " + levels,
        "clear": "'{}/00001.png' " + levels,
        "deep": "'{}/00001.png' does not fit the model: image is a PNG of 16 bits per channel: save it with 8.",
        "floats.npy": "{} " + holds + " float32 (4, 1, 4, 5).",
        "shape.npy": "{} " + holds + " uint8 (4, 1, 3, 5).",
        "none.npy": "{} " + holds + " uint8 (0, 1, 4, 5).",
        "high.npy": "{} does not fit the model: its levels are 0 to 2, got 0 to 3.",
        "low.npy": "{} does not fit the model: its levels are 0 to 2, got -1 to 2.",
        "file.txt": "{} must be a folder of PNG files, a .png, a .npy or a prepared dataset (.safetensors).",
    }.items():
        with pytest.raises(ValueError, match=exactly(message.format(tmp_path / name))):
            pack(checkpoint, tmp_path / name, tmp_path / "x.pxl")
    np.savez(tmp_path / "several.npz", array)
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "several.npy").read_bytes()[:-9])
    whole = (tmp_path / "in.npy").read_bytes()
    for name, shape in {"flipped": b"((, 1, 4, 5)", "huge": b"(4%s,)" % (b"0" * 30), "odd": b"(True, 1, 4)"}.items():
        (tmp_path / f"{name}.npy").write_bytes(whole.replace(b"(4, 1, 4, 5)", shape, 1))
    for name in ("broken.npy", "pickle.npy", "several.npy", "cut.npy", "flipped.npy", "huge.npy", "odd.npy"):
        with pytest.raises(ValueError, match=f"{name} is no .npy array"):
            pack(checkpoint, tmp_path / name, tmp_path / "x.pxl")
    for name in ("several.npy", "cut.npy", "flipped.npy", "huge.npy", "odd.npy"):
        (tmp_path / name).unlink()
    np.save(tmp_path / "labels.npy", np.array([0, 1, 2, 0]))
    np.save(tmp_path / "few.npy", np.array([0, 1]))
    for name, message in {
        "labels.npy": "{} must hold labels from -1 (none) to 1.",
        "few.npy": "{} must hold 4 whole numbers, got int64 (2,).",
        "nowhere.npy": "{} does not exist.",
    }.items():
        with pytest.raises(ValueError, match=exactly(message.format(tmp_path / name))):
            pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl", labels=tmp_path / name)
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=exactly("--split must be one of train, validation, test, got 'tset'.")):
        pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl", labels=tmp_path / "data.safetensors", split="tset")
    with pytest.raises(ValueError, match=exactly("block_images must be a whole number of at least 1, got 0.")):
        pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl", block_images=0)
    assert sorted(tmp_path.iterdir()) == before
    unlabelled = checkpoint_of(tmp_path / "model", num_labels=0)
    with pytest.raises(ValueError, match=exactly("the model knows no labels. Leave --labels out.")):
        pack(unlabelled, tmp_path / "in.npy", tmp_path / "x.pxl", labels=tmp_path / "in.npy")
    with pytest.raises(ValueError, match=exactly("packing takes up to 256 levels, the model has 300.")):
        Coder(build_model(tiny_config("pixelcnn", SHAPE, 300)), 16)


def test_what_is_there_is_never_replaced(checkpoint, tmp_path, monkeypatch) -> None:
    array_of(tmp_path / "in.npy", 4)
    pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl")
    (tmp_path / "folder").mkdir()
    unpack(checkpoint, tmp_path / "x.pxl", tmp_path / "folder")  # an empty one has nothing to lose
    (tmp_path / "empty.npy").mkdir()
    message = "{} is there already. Name another one, or remove it."
    with pytest.raises(ValueError, match=exactly(message.format(tmp_path / "x.pxl"))):
        pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl")
    for name in ("in.npy", "folder", "empty.npy"):
        with pytest.raises(ValueError, match=exactly(message.format(tmp_path / name))):
            unpack(checkpoint, tmp_path / "x.pxl", tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "hollow")
    for name in ("", "hollow"):  # a link to nothing, and to an empty folder
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=exactly(message.format(tmp_path / "link"))):
            unpack(checkpoint, tmp_path / "x.pxl", tmp_path / "link")
    monkeypatch.chdir(tmp_path / "hollow")
    with pytest.raises(ValueError, match=exactly(message.format("."))):
        unpack(checkpoint, tmp_path / "x.pxl", Path())
    absent = tmp_path / "absent" / "x"
    message = f"{absent} cannot be written: {absent.parent} is no folder that you may write to."
    with pytest.raises(ValueError, match=exactly(message)):
        pack(checkpoint, tmp_path / "in.npy", absent)
    with pytest.raises(ValueError, match=exactly(message)):
        unpack(checkpoint, tmp_path / "x.pxl", absent)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is no folder that you may write to"):
        pack(checkpoint, tmp_path / "in.npy", tmp_path / "y.pxl")


def test_labels_that_are_there_are_never_replaced(checkpoint, tmp_path) -> None:
    """They go beside the images, under a name that nobody has typed."""
    array_of(tmp_path / "in.npy", 4)
    np.save(tmp_path / "labels.npy", np.array([0, 1, -1, 0]))
    pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl", labels=tmp_path / "labels.npy")
    theirs = tmp_path / "out.labels.npy"
    theirs.write_bytes(b"theirs")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=exactly(f"{theirs} is there already. Name another one, or remove it.")):
        unpack(checkpoint, tmp_path / "x.pxl", tmp_path / "out.npy")
    assert theirs.read_bytes() == b"theirs"
    assert sorted(tmp_path.iterdir()) == before


def test_another_model_version_or_machine_is_refused(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    array_of(tmp_path / "in.npy", 4)
    file = tmp_path / "x.pxl"
    pack(checkpoint, tmp_path / "in.npy", file)
    before = sorted(tmp_path.iterdir())

    def refused(model: Path, path: Path = file) -> str:
        assert main(["unpack", "--checkpoint", str(model), str(path), "--out", str(tmp_path / "out")]) == 1
        out, error = capsys.readouterr()
        assert out == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error[7:-1].replace(str(path), "x.pxl")

    other = checkpoint_of(tmp_path.parent / f"{tmp_path.name}-other", "gated_pixelcnn")
    binary = checkpoint_of(tmp_path.parent / f"{tmp_path.name}-binary", num_levels=2)
    mine = json.loads((checkpoint / "config.json").read_text())["weights_sha256"]
    for folder in (other, binary):
        its = json.loads((folder / "config.json").read_text())["weights_sha256"]
        assert refused(folder) == (
            f"x.pxl holds images (1, 4, 5) of 3 levels, packed by the weights {mine[:12]}..., those in {folder} are "
            f"{its[:12]}.... Name the checkpoint that packed it."
        )
    newer = tmp_path.parent / f"{tmp_path.name}.pxl"
    newer.write_bytes(file.read_bytes()[:8] + b"\x02\x00" + file.read_bytes()[10:])
    assert refused(checkpoint, newer) == "x.pxl is of format version 2, this program reads version 1."
    assert refused(checkpoint, tmp_path / "nowhere.pxl") == "x.pxl is no file."
    probe = Coder.probe
    monkeypatch.setattr(Coder, "probe", lambda coder: probe(coder)[::-1])
    foreign = "x.pxl cannot be unpacked here: it was packed by float32 on "
    assert refused(checkpoint).startswith(foreign)
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["pixelcnn.packing.pack"], "ENGINE", "another")
        assert refused(checkpoint).startswith(foreign)
    monkeypatch.setitem(sys.modules, "pixelcnn.sampling.compiled", None)
    message = "packing needs the compiled sampler, but sampling is cached, in torch: numba is not installed."
    assert refused(checkpoint) == message
    assert sorted(tmp_path.iterdir()) == before


def test_the_probe_sees_the_last_bit_of_a_weight(checkpoint) -> None:
    model, _ = load_checkpoint(checkpoint)
    probes = {Coder(model, 16).probe(), Coder(model, 4).probe()}
    assert len(probes) == 1
    with torch.no_grad():
        weight = next(p for name, p in model.named_parameters() if name.endswith("bias"))
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert Coder(model, 16).probe() not in probes


@pytest.mark.parametrize("name", PROBES)
def test_the_arithmetic_is_the_same_on_every_machine(name: str) -> None:
    architecture, _, is_mixture = name.partition(",")
    colour = {"output": "logistic_mixture", "num_mixtures": 3} if is_mixture else {}
    model = build_model(tiny_config(architecture, (3 if colour else 1, 8, 8), 5, num_features=20, **colour))
    with torch.no_grad():
        for number, weight in enumerate(model.parameters()):  # torch's own random numbers differ by machine
            values = torch.arange(weight.numel(), dtype=torch.float64) * (number + 1) * 0.618033988749895 % 1
            weight.copy_((values - 0.5).view_as(weight))
    assert Coder(model.eval(), 16).probe()[:16] == PROBES[name]


@pytest.mark.repeated
@pytest.mark.timeout(600)  # the sampler is compiled anew
@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_lesser_processor_gives_the_same_pictures(checkpoint, tmp_path, processor: str) -> None:
    levels = array_of(tmp_path / "in.npy", 60)
    pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl")
    # Numba and torch's libraries, told to be content with less.
    less = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "ATEN_CPU_CAPABILITY": "default"}
    less |= {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    command = [sys.executable, "-m", "pixelcnn", "unpack", "--checkpoint", str(checkpoint), str(tmp_path / "x.pxl")]
    command += ["--out", str(tmp_path / "out.npy")]
    done = subprocess.run(command, env=os.environ | less, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "out.npy"), levels)
    print(f"{processor}: the same pictures")


def test_a_checkpoint_whose_saving_was_cut_off_packs_too(tmp_path) -> None:
    levels = array_of(tmp_path / "in.npy", 3)
    checkpoint_of(tmp_path / "model").rename(tmp_path / ".model.old")  # between the two renames of a saving
    pack(tmp_path / "model", tmp_path / "in.npy", tmp_path / "x.pxl")
    unpack(tmp_path / "model", tmp_path / "x.pxl", tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), levels)


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """Return a file that is not the one that was packed, in one of many ways."""
    place, other = rng.randrange(len(whole)), rng.randrange(len(whole))
    first, last = sorted((place, other))
    start = struct.unpack_from("<I", whole, 10)[0] + 18
    values = json.loads(zlib.decompress(whole[18:start]))
    key = rng.choice(list(values))
    values[key] = rng.choice([None, -1, 0, 1, 7, 2**70, "", "x", [], [1, 4, 5], {}, True, ["../a.png"] * 60, ["a.png"]])
    signed = zlib.compress(json.dumps(values).encode())
    junk = rng.randbytes(rng.randrange(1, 400))
    return rng.choice(
        [
            whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :],
            whole[:place] + rng.randbytes(4) + whole[place + 4 :],
            whole[:place],
            whole[: rng.randrange(20)],
            whole[:place] + junk + whole[place:],
            whole[:first] + whole[last:],
            whole + junk,
            whole + whole[start:],
            whole[:first] + bytes(last - first) + whole[last:],
            junk,
            whole[:18] + junk,
            whole[:10] + struct.pack("<II", len(signed), zlib.crc32(signed)) + signed + whole[start:],
            to_png(torch.zeros(SHAPE, dtype=torch.int64), 3),
        ]
    )


@pytest.mark.repeated
def test_a_damaged_file_is_refused_or_recovered_in_part(checkpoint, tmp_path) -> None:
    levels = array_of(tmp_path / "in.npy", 60)
    pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl", block_images=16)
    whole, rng = (tmp_path / "x.pxl").read_bytes(), random.Random(1)
    num_recovered = 0
    for _ in range(DAMAGES):
        content = damaged(whole, rng)
        if content == whole:
            continue
        file, out = tmp_path / "y.pxl", tmp_path / "out.npy"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"y.pxl .*\.$") as error:
            unpack(checkpoint, file, out)
        assert "\n" not in str(error.value)
        assert out.exists() == ("are whole and now in" in str(error.value))
        if out.exists():
            found = np.load(out)
            assert np.array_equal(found, levels[: len(found)])
            assert len(found) in (16, 32, 48, 60)
            num_recovered += 1
            out.unlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "x.pxl", "y.pxl"]
    assert DAMAGES / 10 < num_recovered < DAMAGES
    print(f"{DAMAGES} damaged files: {num_recovered} recovered in part, the others refused, no wrong picture")


def test_whole_blocks_before_the_damage_are_recovered(checkpoint, tmp_path) -> None:
    levels = array_of(tmp_path / "in.npy", 60)
    file, out = tmp_path / "x.pxl", tmp_path / "out"
    pack(checkpoint, tmp_path / "in.npy", file, block_images=16)
    content = bytearray(file.read_bytes())
    content[-30] ^= 1  # in the last block
    file.write_bytes(content)
    message = (
        f"{file} is damaged: the checksum of block 3 is wrong. Images 0 to 47 are whole and now in {out}; "
        "the rest is lost."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        unpack(checkpoint, file, out)
    assert [path.read_bytes() for path in sorted(out.iterdir())] == [
        to_png(image, 3) for image in torch.from_numpy(levels[:48]).long()
    ]
    assert unpack(checkpoint, file, tmp_path / "some.npy", images=(20, 40)) == 20  # the damage is elsewhere
    assert np.array_equal(np.load(tmp_path / "some.npy"), levels[20:40])
    message = f"{file} is damaged: the checksum of block 3 is wrong. No image could be recovered."
    with pytest.raises(ValueError, match=exactly(message)):
        unpack(checkpoint, file, tmp_path / "last.npy", images=(50, 52))
    assert not (tmp_path / "last.npy").exists()


def test_other_results_than_the_probes_are_noticed_by_the_images_checksum(checkpoint, tmp_path) -> None:
    array_of(tmp_path / "in.npy", 32)
    file = tmp_path / "x.pxl"
    pack(checkpoint, tmp_path / "in.npy", file, block_images=16)
    with open(file, "rb") as opened:
        reader = Reader(opened, "x.pxl")
        (_, code, crc), (_, _, _) = reader.blocks(range(2))
    start = reader.header.to_bytes()
    file.write_bytes(start + block_bytes(start, 0, code, crc) + block_bytes(start, 1, code, crc + 1))
    with pytest.raises(
        ValueError, match=r"the images of block 1 do not come out as they were packed\. Images 0 to 15 "
    ):
        unpack(checkpoint, file, tmp_path / "out.npy")
    for junk in (b"", b"abc", b"\xff" * 8):
        (tmp_path / "junk.pxl").write_bytes(start + block_bytes(start, 0, junk, crc))
        with pytest.raises(ValueError, match=r"junk.pxl is damaged: .*block 0.* No image could be recovered\.$"):
            unpack(checkpoint, tmp_path / "junk.pxl", tmp_path / "junk.npy")


TEXTS = ("weights_sha256", "engine", "arithmetic", "probe")


def header_of(*names: str) -> Header:
    common = {"image_shape": SHAPE, "num_levels": 3, "block_images": 1, "batch_images": 1, "has_labels": False}
    return Header(**common, **dict.fromkeys(TEXTS, "x"), num_images=len(names), names=[*names])


@pytest.mark.parametrize(
    "name", ["../a.png", "/a.png", "a", "b\\a.png", "c:a.png", "a/../../b.png", "a//b.png", ".png/"]
)
def test_names_cannot_lead_out_of_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="names must be as many plain relative names as there are images"):
        header_of(name)


def test_a_header_says_what_it_must_and_can_be_read_again(monkeypatch) -> None:
    header = header_of("a.png", "b.png")
    for changes, message in (
        *(({name: value}, f"{name} must be a text.") for name in TEXTS for value in (1, "\x1b[2J", "x" * 1001)),
        ({"names": ["a.png"] * 2}, "names must differ."),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            replace(header, **changes)
    monkeypatch.setattr(container, "most_text", lambda num_packed: 10)
    with pytest.raises(ValueError, match=r"^the pictures' names take too much room, .* Pack them in parts\.$"):
        header.to_bytes()


def test_a_small_file_takes_little_memory(checkpoint, tmp_path) -> None:
    """What it says of itself is bounded by its own size, and so is what is in memory at once."""
    array_of(tmp_path / "in.npy", 2)
    pack(checkpoint, tmp_path / "in.npy", tmp_path / "x.pxl")
    with open(tmp_path / "x.pxl", "rb") as file:
        header = Reader(file, "x.pxl").header
    with pytest.raises(ValueError, match=exactly("batch_images must be at most 64, got 65.")):
        replace(header, batch_images=65)
    text = json.dumps({**vars(header), "names": "NAMES"}).replace('"NAMES"', "[" + "{}," * 10**6 + "{}]")
    packed = zlib.compress(text.encode(), 9)
    start = struct.pack("<8sHII", b"\x89PXL\r\n\x1a\n", 1, len(packed), zlib.crc32(packed)) + packed
    (tmp_path / "bomb.pxl").write_bytes(start)
    assert len(start) < 10_000
    with pytest.raises(ValueError, match=r"has a header that makes no sense \(it is too long\)"):
        unpack(checkpoint, tmp_path / "bomb.pxl", tmp_path / "out")


def test_the_name_of_released_weights_is_enough(tmp_path, monkeypatch) -> None:
    released = Path(__file__).parents[2] / "weights" / "gated_pixelcnn-letters"
    images = random_levels((1, 28, 28), 2, 2)
    np.save(tmp_path / "in.npy", images.byte().numpy())
    monkeypatch.chdir(tmp_path)
    pack(Path(released.name), tmp_path / "in.npy", tmp_path / "x.pxl")
    unpack(Path(released.name), tmp_path / "x.pxl", tmp_path / "out.npy")
    assert np.array_equal(np.load(tmp_path / "out.npy"), images.numpy())


def test_blocks_that_change_places_are_noticed(checkpoint, tmp_path):
    array_of(tmp_path / "images.npy", 48)
    file = tmp_path / "images.pxl"
    pack(checkpoint, tmp_path / "images.npy", file, block_images=16)
    content, start, frames = file.read_bytes(), 18, []
    place = begin = start + struct.unpack_from("<I", content, 10)[0]
    while place < len(content):
        length = 12 + struct.unpack_from("<I", content, place)[0]
        frames.append(content[place : place + length])
        place += length
    file.write_bytes(content[:begin] + frames[1] + frames[0] + frames[2])
    with pytest.raises(ValueError, match="checksum of block 0 is wrong"):
        unpack(checkpoint, file, tmp_path / "out.npy")
