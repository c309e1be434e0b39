"""A folder of pictures becomes a dataset without an edit of code; a bad folder is one sentence, and leaves nothing."""

import errno
import gzip
import io
import os
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from prefect.exceptions import ParameterTypeError

from pipelines import steps
from pipelines.datasets import own
from pipelines.datasets.checks import CheckParams, changes, summary_of
from pipelines.datasets.letters import write_letters
from pipelines.datasets.pictures import Picture, fitted
from pipelines.files import file_lock, read_lock
from pipelines.params import load_params
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.models.registry import build_model
from tests.local import run
from tests.pipelines.projects import ROOT, copy_project, tiny_params, write_params

NAME = "glyphs"


def picture(seed: int, width: int = 12, height: int = 12, mode: str = "L") -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode=None if mode != "CMYK" else "CMYK")


def fill(folder: Path, num: int, first: int = 0, **options: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + num):
        picture(i, **options).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a small project; return a folder of 30 grey pictures outside of it."""
    project = tmp_path / "project"
    project.mkdir()
    write_params(project, tiny_params())
    monkeypatch.chdir(project)
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    fill(tmp_path / "pictures", 30)
    return tmp_path / "pictures"


def state(top: Path) -> dict[str, bytes]:
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def add(folder: Path, *words: str, name: str = NAME) -> int:
    return steps.main(["add", name, "--images", str(folder), *words])


def only(num: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for file in sorted(folder.iterdir())[num:]:
            file.unlink()

    return build


def no_picture(folder: Path) -> None:
    for file in folder.iterdir():
        file.rename(file.with_suffix(".txt"))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def truncated(folder: Path) -> None:
    (folder / "x.png").write_bytes((folder / "7.png").read_bytes()[:120])


def short_chunk(folder: Path) -> None:
    """A PNG whose gamma, after its pixels, has two bytes instead of four."""
    head, end = (folder / "7.png").read_bytes()[:-12], (folder / "7.png").read_bytes()[-12:]
    chunk = b"gAMA" + bytes(2)
    (folder / "x.png").write_bytes(head + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + end)


def short_header(folder: Path) -> None:
    chunk = b"IHDR" + bytes(5)
    (folder / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 5) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def tiny_picture(folder: Path) -> None:
    picture(1, 1, 1).save(folder / "x.png")


def bomb(folder: Path, side: int = 10_000) -> None:
    """10,000 x 10,000 pixels in a few bytes; nothing of it may be decoded."""
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    (folder / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def animated(folder: Path) -> None:
    picture(1).save(folder / "x.webp", save_all=True, append_images=[picture(2), picture(3)])


def link(target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "x.png").symlink_to(target)


def link_to_folder(folder: Path) -> None:
    (folder / "x").symlink_to(folder)


def labels(a: str, num_a: int, b: str, num_b: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        shutil.rmtree(folder)
        fill(folder / a, num_a)
        fill(folder / b, num_b, first=1000)

    return build


def mixed_depth(folder: Path) -> None:
    fill(folder / "a", 3, first=100)


def only_tests(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (30, 3073), dtype=np.uint8)
    rows[:, 0] = 0  # their label
    rows.tofile(folder / "test_batch.bin")


def same(folder: Path) -> None:
    for file in folder.iterdir():
        picture(0).save(file)


def thin_lines(width: int, height: int, pen: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        only(0)(folder)
        for i in range(30):
            image = Image.new("L", (width, height), 255)
            image.paste(0, (i * pen, 0, (i + 1) * pen, height))
            image.save(folder / f"{i}.png")

    return build


def two_broken(folder: Path) -> None:
    for name in ("x.png", "y.png"):
        (folder / name).touch()


def odd_cifar(folder: Path) -> None:
    only(0)(folder)
    (folder / "x.bin").write_bytes(b"x" * 3072)


def empty_cifar(folder: Path) -> None:
    only(0)(folder)
    (folder / "x.bin").touch()


def cifar_with_links_out(folder: Path) -> None:
    odd_cifar(folder)
    (folder / "batches.meta.txt").symlink_to("/etc/passwd")  # to /dev/zero it was read until no memory was left


def idx_with_links_out(folder: Path) -> None:
    (folder.parent / "outside").write_bytes(struct.pack(">4B3i", 0, 0, 8, 3, 30, 8, 8) + bytes(30 * 64))
    (folder / "train-images-idx3-ubyte").symlink_to(folder.parent / "outside")


def idx_with_fewer_labels(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4B3i", 0, 0, 8, 3, 30, 8, 8) + bytes(30 * 64))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, 29) + bytes(29))


def idx_with_labels_of_one_part(folder: Path) -> None:
    for part in ("train", "t10k"):
        header = struct.pack(">4B3i", 0, 0, 8, 3, 30, 8, 8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + np.random.default_rng(len(part)).bytes(30 * 64))
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4Bi", 0, 0, 8, 1, 30) + bytes(30))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (only(0), "holds no pictures: at least 20 are needed"),
    "one": (only(1), "holds 1 picture: at least 20 are needed"),
    "five": (only(5), "holds 5 pictures: at least 20 are needed"),
    "no image": (no_picture, "holds no pictures (30 files of other kinds)"),
    "all alike": (same, "holds 1 different pictures to learn from: at least 20"),
    "tests alone": (only_tests, "holds 0 different pictures to learn from: at least 20"),
    "thin": (
        thin_lines(600, 600, 5),
        "every picture is blank, once it is 28 x 28: its lines are too thin. Say a larger",
    ),
    "thin alike": (
        thin_lines(400, 400, 8),
        "different pictures to learn from: at least 20 are needed. 16 others are like them",
    ),
    "zero bytes": (write("x.png", b""), "'x.png' is empty. Mend or remove it, or leave such pictures out"),
    "text": (write("x.png", b"hello"), "'x.png' is no picture of PNG, JPEG, WebP or BMP"),
    "truncated": (truncated, "'x.png' is damaged ("),
    "short chunk": (short_chunk, "'x.png' is damaged ("),
    "short header": (short_header, "'x.png' is damaged (Truncated IHDR chunk)"),
    "newline": (write("a\nb ü.png", b""), r"'a\nb ü.png' is empty"),
    "not utf-8": (lambda folder: Path(os.fsdecode(bytes(folder) + b"/\xff.png")).touch(), "is no name in UTF-8"),
    "1 x 1": (tiny_picture, "'x.png' is 1 x 1 pixels: sides of 4 to 4096 can be read"),
    "bomb": (bomb, "'x.png' is 10000 x 10000 pixels"),
    "animated": (animated, "'x.webp' is animated"),
    "link out": (link("/etc/passwd"), "'x.png' is a link that leads out of"),
    "link to nothing": (link("nothing.png"), "'x.png' is a link that leads nowhere or to itself"),
    "loop": (link("x.png"), "'x.png' is a link that leads nowhere or to itself"),
    "loop of folders": (link_to_folder, "'x' is a link to a folder"),
    "label of one": (labels("a", 20, "b", 1), "label 'b' has 1 picture: a label needs 3"),
    "labels by case": (labels("a", 20, "A", 5), "labels 'A' and 'a' differ by case alone"),
    "half labels": (mixed_depth, "holds pictures beside folders of pictures ('a/100.png')"),
    "gone": (shutil.rmtree, "does not exist. Name a folder of pictures"),
    "two broken": (two_broken, "2 pictures cannot be used, the first of them: 'x.png' is empty. Mend or remove them"),
    "larger bomb": (lambda folder: bomb(folder, 20_000), "'x.png' has far too many pixels: sides of 4 to 4096"),
    "odd cifar": (odd_cifar, "x.bin is no file of CIFAR's: its length is no multiple of 3073 or 3074"),
    "empty cifar": (empty_cifar, "x.bin is no file of CIFAR's: its length is no multiple of 3073 or 3074"),
    "link of cifar": (cifar_with_links_out, "'batches.meta.txt' is a link that leads out of "),
    "link of idx": (idx_with_links_out, "'train-images-idx3-ubyte' is a link that leads out of "),
    "other idx": (write("train-images-idx3-ubyte", b"no IDX"), "no IDX file of unsigned bytes (its first bytes are"),
    "idx in part": (
        write("train-images-idx3-ubyte.gz", b"\x1f\x8b"),
        "train-images-idx3-ubyte.gz is no IDX file of unsign",
    ),
    "idx labels": (idx_with_fewer_labels, "train has 30 images and 29 labels"),
    "idx without labels": (idx_with_labels_of_one_part, "30 pictures have no label. Add theirs, or say --no-labels."),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_folder_is_one_sentence(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    build, said = BAD[kind]
    build(folder)
    before = state(Path.cwd())
    assert add(folder) == 1
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("add: ")
    assert (shown.err.count("\n"), shown.out) == (1, "")
    assert state(Path.cwd()) == before, "nothing stays behind"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../x", "'../x' is no name of a dataset: use small letters"),
        ("Glyphs", "'Glyphs' is no name"),
        ("a-b", "'a-b' is no name"),
        ("glyphs_", "'glyphs_' is no name of a dataset: use small letters"),
        ("mnist", "there is a dataset 'mnist' already: choose another name"),
        ("promotions", "'promotions' is an experiment of MLflow's that holds no trainings: choose another name"),
        ("evaluations", "'evaluations' is an experiment of MLflow's"),
    ],
)
def test_a_name_that_is_taken_or_none(folder: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(Path.cwd())
    assert add(folder, name=name) == 1
    assert said in capsys.readouterr().err
    assert state(Path.cwd()) == before


def test_without_permission(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, *_: Path(path) != folder)  # root may read everything
    assert add(folder) == 1
    assert capsys.readouterr().err == f"add: {folder} may not be read: change its permissions.\n"


def test_a_folder_within_that_cannot_be_read_is_not_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir, within = os.scandir, folder / "within"
    fill(within, 5, first=100)

    def refuse(path: str) -> object:
        if str(path) == str(within):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert add(folder, "--no-labels") == 1
    assert capsys.readouterr().err == f"add: {within} cannot be read: Permission denied.\n"


def test_a_picture_that_may_not_be_read_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Image.open

    def refuse(path: Path, **options: object) -> Image.Image:
        if path.name == "7.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, **options)

    monkeypatch.setattr(Image, "open", refuse)
    assert add(folder) == 1
    assert "add: '7.png' may not be read: change its permissions. Mend or remove it" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["pixelcnn.data.save", "pipelines.datasets.own._record"])
def test_a_full_disk(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = state(Path.cwd())
    monkeypatch.setattr(at, full)
    assert add(folder) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert state(Path.cwd()) == before


def test_pictures_of_every_mode_are_read_alike(folder: Path) -> None:
    """16 bits, palette, CMYK, transparency, turned by EXIF; names with spaces, Unicode, newlines."""
    wide = np.repeat(np.arange(0, 240, 20, dtype=np.uint8)[None], 12, axis=0)
    expected = {}
    for name, image, strengths in (
        ("16 bit.png", Image.fromarray(wide.astype(np.uint16) << 8), wide),
        ("palette ü.png", Image.fromarray(wide).convert("P"), wide),
        ("grey\nlines.bmp", Image.fromarray(wide.T.copy()), wide.T),
        ("alpha.png", Image.merge("LA", [Image.fromarray(wide), Image.new("L", (12, 12), 0)]), np.zeros_like(wide)),
        ("lossless.webp", Image.fromarray(wide[:, ::-1].copy()).convert("RGB"), wide[:, ::-1]),
    ):
        image.save(folder / name, lossless=True) if name.endswith("webp") else image.save(folder / name)
        expected[name] = strengths
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(wide).save(folder / "turned.png", exif=exif)
    expected["turned.png"] = np.rot90(wide, -1)
    Image.new("CMYK", (12, 12), (0, 0, 0, 255 - 51)).save(folder / "print.jpg", quality=100)
    expected["print.jpg"] = np.full_like(wide, 51)
    small = Image.new("L", (6, 6))  # beside the picture itself, as in a phone's
    Image.fromarray(wide).save(folder / "phone.jpg", "MPO", save_all=True, append_images=[small], quality=100)
    expected["phone.jpg"] = wide
    source = own.source_of(folder)
    read = {p.name: np.asarray(p.on("black").convert("L")) for p in own.read_pictures(source, True, own.Left())}
    for name, strengths in expected.items():
        assert np.abs(read[name].astype(int) - strengths).max() <= 3, name


def test_a_folder_becomes_a_pair_and_goes_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ink on paper, in two labels: binary, inverted; the network fits the data."""
    shutil.rmtree(folder)
    for i in range(60):
        image = Image.new("L", (16, 12), 255)
        image.putpixel((i % 16, i // 16 + 3), 0)
        image.putpixel((0, 11), 0)
        target = folder / ("left" if i % 16 < 8 else "right") / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    shutil.copy(folder / "left/0.png", folder / "left/copy.png")
    with Image.open(folder / "left/0.png") as image:  # other bytes, and the same once it has two levels
        shaded = np.asarray(image) // 255 * np.arange(240, 256, dtype=np.uint8)
        Image.fromarray(shaded).save(folder / "left/shaded.png")
    (folder / "left/note.txt").write_text("no picture")
    Path("own").mkdir()
    Path("own/params.yaml").write_text("# mine\ndatasets: {}\npairs: {}\n")
    before, code = state(Path.cwd()), state(Path(own.__file__).parents[1])
    assert add(folder) == 0
    said = capsys.readouterr().out
    assert "found: 62 pictures, 1 other files" in said
    assert "labels: 2: left (34), right (28)" in said
    assert "exact duplicates: 2, each taken once" in said
    assert "learned as: 16 x 12, binary, 2 levels (threshold)" in said
    assert "inverted: ink is dark; 48 train, 6 validation, 6 test" in said
    assert state(Path(own.__file__).parents[1]).keys() == code.keys(), "no code was touched"
    data, params = load_dataset(f"data/{NAME}.safetensors"), load_params()
    assert (data.image_shape, data.label_names, data.num_levels) == ((1, 12, 16), ["left", "right"], 2)
    for split, images in data.images.items():
        assert set(images.unique().tolist()) == {0, 1}
        columns = images[:, 0, 3:7].sum(dim=1).argmax(dim=1)
        assert torch.equal(data.labels[split], (columns >= 8).long()), "each picture kept its label"
    pair = params.pair(f"gated_pixelcnn-{NAME}")
    assert (pair.network.image_shape, pair.network.num_labels) == ((1, 12, 16), 2)
    build_model(pair.network)
    assert "# mine" in Path("own/params.yaml").read_text()
    with Image.open(f"reports/data/{NAME}.png") as sheet:
        assert sheet.width > 8 * 16
    assert steps.main(["prepare", NAME]) == 0
    assert load_dataset(f"data/{NAME}.safetensors").data_hash == data.data_hash
    assert add(folder) == 1
    assert f"there is a dataset '{NAME}' already: remove it first" in capsys.readouterr().err
    assert steps.main(["remove", NAME]) == 0
    assert state(Path.cwd()) == before
    assert steps.main(["remove", "mnist"]) == 1
    assert "'mnist' stands in params.yaml, not in own/params.yaml: it belongs to the project" in capsys.readouterr().err


@pytest.mark.parametrize("ground", [0, 180])
def test_dark_ink_is_level_1(folder: Path, ground: int) -> None:
    """Black on what is transparent; and dark on grey paper, hardly black or white, once two levels are wished for."""
    shutil.rmtree(folder)
    folder.mkdir()
    strokes = np.zeros((30, 12, 12), bool)
    for i, stroke in enumerate(strokes):
        stroke[1 + i % 10, 1 : 4 + i // 10] = True
        paper = np.full((12, 12, 4), ground, np.uint8)
        paper[..., 3] = 255 if ground else 0
        paper[stroke] = (ground // 3, ground // 3, ground // 3, 255)
        Image.fromarray(paper).save(folder / f"{i}.png")
    opaque = Image.fromarray(np.tile(np.arange(12, dtype=np.uint8) * 20, (12, 1)))
    if not ground:
        opaque.save(folder / "scan.png")  # has more greys than all the others
    assert add(folder, *(["--levels", "2"] if ground else [])) == 0
    data = load_dataset(f"data/{NAME}.safetensors")
    learned = {image.numpy().tobytes() for images in data.images.values() for image in images}
    assert (
        learned > {stroke.tobytes() for stroke in strokes} if not ground else learned == {s.tobytes() for s in strokes}
    )
    assert (data.num_levels, len(learned)) == (2, 30 if ground else 31)


@pytest.mark.parametrize("ink", [255, 0])
def test_scans_beside_transparent_pictures_lie_on_white_if_all_are_seen_there(folder: Path, ink: int) -> None:
    """White ink is seen on black alone; of dark ink on paper with round corners black would show the corners."""
    for i in range(55):
        image = Image.new("LA", (12, 12), (255, 255 if i < 30 or not ink else 0))
        image.putpixel((i % 12, 1 + i // 12), (0 if i < 30 else ink, 255))
        for j, opacity in enumerate((0, 60, 120, 180) if i > 50 and not ink else ()):
            image.putpixel((j, 0), (255, opacity))
        image.save(folder / f"{i}.png")
    assert add(folder) == 0
    assert load_params().datasets[NAME].ground == ("black" if ink else "white")
    assert sum(map(len, load_dataset(f"data/{NAME}.safetensors").images.values())) == 55


def test_a_pair_of_ones_own_is_trained_and_evaluated(project: Path, tmp_path: Path) -> None:
    """Colour, not square, no labels: down to the card, which knows no word of this dataset."""
    fill(tmp_path / "pictures", 30, width=24, height=16, mode="RGB")
    assert add(tmp_path / "pictures", "--minutes", "0.01") == 0
    values, pair = yaml.safe_load(Path("own/params.yaml").read_text()), f"gated_pixelcnn-{NAME}"
    values["pairs"][pair]["network"] |= {"num_features": 3, "num_layers": 1}
    Path("own/params.yaml").write_text(yaml.safe_dump(values))
    for command in ("train", "evaluate"):
        assert steps.main([command, pair]) == 0
    model, scores = load_checkpoint(f"models/{pair}")
    assert (model.config.image_shape, model.config.num_labels) == ((3, 16, 24), 0)
    assert scores["data_hash"] == load_dataset(f"data/{NAME}.safetensors").data_hash
    assert "16 levels, evenly spaced" in Path(f"models/{pair}/README.md").read_text()


def test_names_that_yaml_takes_for_something_else(folder: Path, tmp_path: Path) -> None:
    """YAML 1.1, which reads the entries, and 1.2, which writes them, differ about these."""
    for label in ("no", "yes", "1:30", "?"):
        fill(tmp_path / "labelled" / label, 15, first=ord(label[0]))
    folder = folder.rename("off")
    assert add(folder, name="on") == 0
    assert add(tmp_path / "labelled") == 0
    for name in ("on", NAME):
        assert steps.main(["prepare", name]) == 0
    datasets = load_params().datasets
    assert datasets[NAME].label_names == ("1:30", "?", "no", "yes")
    assert datasets["on"].source.path == "off"
    lock = f"stages: {{prepare@on: {{}}, prepare@{NAME}: {{label_names: [no, '1e5']}}}}\n"
    Path("own/dvc.lock").write_text(f"<<<<<<< HEAD\n{lock}=======\n{lock}>>>>>>> theirs\n")
    assert steps.main(["remove", "on"]) == 1
    assert load_params().datasets.keys() >= {"on", NAME}, "nothing is taken out where the rest could not follow"
    Path("own/dvc.lock").write_text(lock)
    assert steps.main(["remove", "on"]) == 0
    assert load_params().datasets[NAME] == datasets[NAME]
    recorded = read_lock(Path("own/dvc.lock"), "stages")
    assert recorded == {f"prepare@{NAME}": {"label_names": ["no", "1e5"]}}, "what is recorded of others stays"


def test_two_who_add_take_turns(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each writes own/params.yaml anew: the second must see what the first wrote."""
    with ThreadPoolExecutor() as pool, file_lock(own.CHANGES_LOCK, "this test", print):
        second = pool.submit(own.add, NAME, folder, own.Wishes())
        while "adding glyphs waits for process" not in caplog.text:
            assert not second.done()
            time.sleep(0.01)
        Path("own/params.yaml").write_text(yaml.safe_dump({"datasets": {"first": tiny_params()["datasets"]["mnist"]}}))
    second.result()
    assert {NAME, "first"} <= load_params().datasets.keys()
    assert not own.CHANGES_LOCK.exists()


def test_a_dataset_that_is_served_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(folder) == 0
    served = Path(os.environ["BENTOML_HOME"]) / f"models/pixelcnn-{NAME}"
    (served / "v1-0123").mkdir(parents=True)
    (served / "latest").write_text("v1-0123")
    assert steps.main(["remove", NAME]) == 1
    model, home = f"pixelcnn-{NAME}", os.environ["BENTOML_HOME"]
    said = f"{model}:v1-0123 is served: `BENTOML_HOME={home} bentoml models delete {model}` ends that"
    assert said in capsys.readouterr().err, "of all its versions: without the newest, the one before would be served"
    assert NAME in load_params().datasets
    assert steps.main(["remove", NAME, "--force"]) == 0
    assert NAME not in load_params().datasets
    served.rename(served.with_name("pixelcnn-mnist5k"))
    for name, why in (("mnist5k", "it belongs to the project"), (NAME, f"unknown dataset '{NAME}'")):
        assert steps.main(["remove", name]) == 1
        said = capsys.readouterr().err
        assert why in said
        assert "bentoml" not in said, "nobody is told to give up a served model first"


@pytest.mark.parametrize(
    ("mode", "words", "shape", "levels", "protocol"),
    [
        ("L", [], (1, 12, 12), 16, "quantized"),
        ("RGB", [], (3, 12, 12), 16, "quantized"),
        ("RGB", ["--side", "10x6", "--colour", "grey", "--levels", "256"], (1, 6, 10), 256, "8-bit"),
        ("L", ["--levels", "2", "--fit", "crop", "--side", "8"], (1, 8, 8), 2, "threshold"),
    ],
)
def test_sizes_colours_and_levels(
    folder: Path, mode: str, words: list[str], shape: tuple, levels: int, protocol: str
) -> None:
    fill(folder, 30, mode=mode)
    fill(folder, 1, first=90, width=300, height=4)  # another size, of which hardly a row would be left, another mode
    assert add(folder, *words) == 0
    data = load_dataset(f"data/{NAME}.safetensors")
    assert (data.image_shape, data.num_levels, data.protocol, data.label_names) == (shape, levels, protocol, [])
    assert levels // 2 <= int(data.images["train"].max()) < levels
    network = load_params().pair(f"gated_pixelcnn-{NAME}").network
    assert (network.output == "logistic_mixture") == (levels == 256)
    build_model(network)


def test_large_pictures_of_many_levels_are_learned_in_small_batches(folder: Path) -> None:
    for name, words, batch_size in (
        ("large", ["--side", "20"], 4),
        ("ink", ["--side", "20", "--levels", "2"], 16),
        ("small", [], 16),
    ):
        assert add(folder, *words, name=name) == 0
        assert load_params().pair(f"gated_pixelcnn-{name}").train.batch_size == batch_size


def test_a_dataset_that_params_yaml_names_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its entry every command would fail."""
    assert add(folder) == 0
    values, pair = yaml.safe_load(Path("own/params.yaml").read_text()), f"gated_pixelcnn-{NAME}"
    params = tiny_params()
    params["evaluate"]["judges"] = {"mnist": NAME}
    write_params(Path(), params | {"pairs": params["pairs"] | values.pop("pairs")})
    Path("own/params.yaml").write_text(yaml.safe_dump(values))
    before = state(Path.cwd())
    assert steps.main(["remove", NAME]) == 1
    said = f"remove: params.yaml still names '{NAME}', in pairs.{pair} and evaluate: take that out first.\n"
    assert capsys.readouterr().err == said
    assert state(Path.cwd()) == before
    write_params(Path(), tiny_params())
    assert steps.main(["remove", NAME]) == 0
    assert NAME not in yaml.safe_load(Path("own/params.yaml").read_text())["datasets"]


def test_what_is_left_of_an_earlier_dataset_of_the_name_keeps_nobody_out(folder: Path) -> None:
    """Its entry was taken out by hand: other pictures are no change of what is there no more."""
    assert add(folder) == 0
    Path("own/params.yaml").unlink()
    inverted(folder)
    assert add(folder) == 0


def test_nothing_is_fetched_of_pictures_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(folder) == 0
    assert steps.main(["fetch", NAME]) == 1
    said = f"fetch: {NAME} is not fetched: its images are read where they lie, in {folder}.\n"
    assert capsys.readouterr().err == said


def test_a_key_that_is_there_twice_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(folder) == 0
    with open("own/params.yaml", "a") as file:
        file.write("pairs: {}\n")
    before = state(Path.cwd())
    for words in (["add", "more", "--images", str(folder)], ["remove", NAME]):
        assert steps.main(words) == 1
        said = capsys.readouterr().err
        assert "own/params.yaml cannot be edited, line " in said
        assert said.endswith(': found duplicate key "pairs".\n')
    assert state(Path.cwd()) == before


def test_broken_pictures_can_be_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.png").write_bytes(b"")
    assert add(folder, "--skip-broken") == 0
    assert "left out, broken: 1, e.g. 'x.png' is empty" in capsys.readouterr().out


def test_other_formats(folder: Path, tmp_path: Path) -> None:
    """Arrays, IDX and CIFAR's batches give the same pictures as PNG files do."""
    images = np.stack([np.asarray(picture(i, mode="RGB", width=32, height=32)) for i in range(30)])
    numbers = np.arange(30) % 3
    np.savez(tmp_path / "x.npz", images=images, labels=numbers, label_names=np.array(["a", "b", "c"]))
    (tmp_path / "cifar").mkdir()
    rows = np.concatenate([numbers[:, None].astype(np.uint8), images.transpose(0, 3, 1, 2).reshape(30, -1)], axis=1)
    rows[:15].tofile(tmp_path / "cifar/data_batch_1.bin")
    rows[15:].tofile(tmp_path / "cifar/data_batch_2.bin")
    (tmp_path / "cifar/batches.meta.txt").write_text("a\nb\nc\n")
    for path in (tmp_path / "x.npz", tmp_path / "cifar"):
        assert add(path, "--levels", "256", name=path.stem) == 0
        data = load_dataset(f"data/{path.stem}.safetensors")
        assert data.label_names == ["a", "b", "c"]
        found = {image.numpy().transpose(1, 2, 0).tobytes() for part in data.images.values() for image in part}
        assert found == {image.tobytes() for image in images}
        read = own.read_pictures(own.source_of(path), False, own.Left())
        assert len({one.name for one in read}) == 30, "each has a name of its own"
    (tmp_path / "idx").mkdir()
    grey = np.ascontiguousarray(images[..., 0])
    raw = struct.pack(">4B3i", 0, 0, 8, 3, *grey.shape) + grey.tobytes()
    (tmp_path / "idx/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "idx/train-labels-idx1-ubyte").write_bytes(
        struct.pack(">4Bi", 0, 0, 8, 1, 30) + numbers.astype(np.uint8).tobytes()
    )
    assert add(tmp_path / "idx", "--levels", "256", name="idx") == 0
    assert load_dataset("data/idx.safetensors").label_names == ["0", "1", "2"]
    np.save(tmp_path / "p.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds no plain arrays of numpy"):
        own.add("p", tmp_path / "p.npy", own.Wishes())


def test_pictures_beside_a_bin_file_are_no_cifar(folder: Path) -> None:
    (folder / "x.bin").write_bytes(b"x")
    assert own.source_of(folder).kind == "folder"
    fill(folder.parent / "labelled" / "a", 1)
    (folder.parent / "labelled" / "x.bin").write_bytes(b"x")
    assert own.source_of(folder.parent / "labelled").kind == "folder"


def test_a_picture_that_is_added_sets_none_aside_that_was_learned(folder: Path) -> None:
    """Or a champion would be scored on images that it has seen."""
    assert add(folder) == 0
    learned = load_dataset(f"data/{NAME}.safetensors").images["train"]
    picture(99).save(folder / "-1.png")  # the first by name
    assert steps.main(["prepare", NAME]) == 0
    images = load_dataset(f"data/{NAME}.safetensors").images
    assert sum(map(len, images.values())) == 31
    held_out = {image.numpy().tobytes() for split in ("validation", "test") for image in images[split]}
    assert not held_out & {image.numpy().tobytes() for image in learned}


def test_a_test_set_stays_one_and_holds_no_picture_that_is_learned(folder: Path, tmp_path: Path) -> None:
    """Twice in a source, and on both sides of its own split, a picture would flatter every score."""
    pictures = np.stack([np.asarray(picture(i)) for i in range(40)])
    (tmp_path / "idx").mkdir()
    for part, images in (("train", pictures[:30]), ("t10k", pictures[25:])):
        raw = struct.pack(">4B3i", 0, 0, 8, 3, *images.shape) + images.tobytes()
        (tmp_path / f"idx/{part}-images-idx3-ubyte").write_bytes(raw)
    assert add(tmp_path / "idx", "--levels", "256") == 0
    data = load_dataset(f"data/{NAME}.safetensors")
    train, validation, test = ([image.numpy().tobytes() for image in data.images[split]] for split in data.images)
    assert sorted(train + validation) == sorted(image.tobytes() for image in pictures[:30])
    assert sorted(test) == sorted(image.tobytes() for image in pictures[30:])


def test_images_of_arrays_that_differ_in_strength_alone_are_different(folder: Path, tmp_path: Path) -> None:
    """The letters of which there are released weights hold such a pair."""
    images = np.stack([np.asarray(picture(i)) for i in range(30)])
    np.save(tmp_path / "x.npy", np.concatenate([images, images[:2] ^ 1, images[:3]]))
    assert add(tmp_path / "x.npy", "--levels", "2", "--colour", "binary") == 0
    assert sum(map(len, load_dataset(f"data/{NAME}.safetensors").images.values())) == 32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((30, 20, 1), np.uint8)}, "images are 1 x 20 pixels: sides of 4 to 4096 can be read"),
        ({"images": np.uint8(5)}, r"images must be N x H x W or N x H x W x 3, got an array of shape \(\)"),
        ({"images": np.zeros((30, 8, 8, 2), np.uint8)}, r"N x H x W x 3, got an array of shape \(30, 8, 8, 2\)"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, r"N x H x W x 3, got an array of shape \(0, 8, 8\)"),
        (
            {"images": np.zeros((30, 8, 8), np.int64)},
            "or floats from 0 to 1, got other int64",
        ),
        *(({"images": np.full((30, 8, 8), x)}, "got other float64") for x in (-0.1, 1.1, np.nan)),
        (
            {"images": np.arange(30 * 64, dtype=np.uint8).reshape(30, 8, 8) % 2},
            "every picture is blank, .* 0 to 1 of 255",
        ),
        ({"labels": np.arange(29)}, r"labels must be 30 whole numbers, got int64 of \(29,\)"),
        ({"labels": np.zeros(30)}, "labels must be 30 whole numbers, got float64"),
        ({"label_names": np.arange(3)}, "label_names must be a list of different names"),
        ({"label_names": np.array(3)}, "label_names must be a list of different names"),
        ({"label_names": np.array([["a"], ["b"], ["c"]])}, "label_names must be a list of different names"),
        ({"label_names": np.array(["a", "b", "a"])}, "label_names must be a list of different names"),
        ({"label_names": np.array(["a", "b", "c\n"])}, r"label 'c\\n' must be 1 to 60 printable characters"),
        ({"label_names": np.array(["a", "b", "c" * 61])}, "must be 1 to 60 printable characters"),
    ],
)
def test_odd_arrays(folder: Path, tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", **{"images": images, "labels": np.arange(30) % 3, **arrays})
    with pytest.raises(ValueError, match=message):
        own.add("x", tmp_path / "x.npz", own.Wishes())


def test_arrays_of_other_names_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "x.npz", pictures=np.zeros((30, 8, 8), np.uint8))
    assert add(tmp_path / "x.npz") == 1
    assert capsys.readouterr().err == f"add: {tmp_path}/x.npz has no array 'images', only pictures.\n"


def test_damaged_arrays_are_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, (30, 8, 8), np.uint8))
    whole, half = path.read_bytes(), path.stat().st_size // 2
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((30, 8, 8), np.uint8))
    for damaged in (
        whole[:half],
        whole[:half] + bytes([whole[half] ^ 255]) + whole[half + 1 :],
        whole.replace(b"\x00\x00\x08\x00", b"\x00\x00\x63\x00"),  # as if of another compression
        buffer.getvalue().replace(b"(30", b"((0"),
        buffer.getvalue().replace(b"(30, 8, 8), }".ljust(25), b"(10000000000000, 8, 8), }"),
    ):
        path.write_bytes(damaged)
        assert add(path) == 1
        assert "holds no plain arrays of numpy" in capsys.readouterr().err


def test_no_more_is_read_of_arrays_than_is_needed(folder: Path, tmp_path: Path) -> None:
    """A small file may hold, or say that it holds, more than the memory."""
    path, much = tmp_path / "x.npz", bytes(2**26)
    np.savez_compressed(path, other=np.frombuffer(much, np.uint8), images=np.zeros((1, 8, 8), np.uint8))
    file = tmp_path / "idx/train-images-idx3-ubyte.gz"
    file.parent.mkdir()
    tracemalloc.start()
    try:
        assert len(list(own.read_pictures(own.source_of(path), False, own.Left()))) == 1
        assert tracemalloc.get_traced_memory()[1] < len(much)
        for shape in ((1, 8, 8), (2**31 - 1, 2**31 - 1, 1), (2**32 - 1,) * 3):
            file.write_bytes(gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *shape) + much))
            tracemalloc.reset_peak()
            with pytest.raises(ValueError, match="is no IDX file of unsigned bytes"):
                list(own.read_pictures(own.source_of(file.parent), False, own.Left()))
            assert tracemalloc.get_traced_memory()[1] < len(much)
    finally:
        tracemalloc.stop()


def test_one_that_is_there_is_kept_if_it_is_of_the_same_place(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(folder, "--keep") == 0
    before = state(Path.cwd())
    assert add(folder, "--keep", "--side", "8") == 0
    assert f"{NAME} is there already, with its entry in own/params.yaml" in capsys.readouterr().out
    assert state(Path.cwd()) == before
    fill(tmp_path / "others", 30, first=500)
    assert add(tmp_path / "others", "--keep") == 1


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (".", "holds the project itself"),
        ("..", "holds the project itself"),
        ("params.yaml", "is no folder, and no"),
        ("~unknown.user/x", "~unknown.user/x names no folder (Could not determine home directory.)"),
    ],
)
def test_what_is_no_place_of_pictures(folder: Path, images: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(Path(images)) == 1
    assert said in capsys.readouterr().err


def test_few_greys_are_levels_of_their_own(folder: Path) -> None:
    """Sprites of four greys, most of it black and white, are no ink."""
    for i, file in enumerate(sorted(folder.iterdir())):
        pixels = np.random.default_rng(i).choice([0, 85, 170, 255], (12, 12), p=[0.45, 0.05, 0.05, 0.45])
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    assert add(folder) == 0
    data = load_dataset(f"data/{NAME}.safetensors")
    assert (data.num_levels, data.protocol) == (4, "quantized")


def test_what_is_compared_is_that_of_the_training_images() -> None:
    images = {"train": torch.tensor([[0, 3], [1, 3]]), "validation": torch.tensor([[0, 0]]), "test": torch.zeros(3, 2)}
    labels = {"train": torch.tensor([1, -1]), "validation": torch.tensor([0]), "test": torch.zeros(3).long()}
    shaped = {split: part.to(torch.uint8).view(-1, 1, 1, 2) for split, part in images.items()}
    words = {"name": "toy", "num_levels": 4, "protocol": "quantized", "label_names": ["a", "b"]}
    summary = summary_of(Dataset(**words, images=shaped, labels=labels))
    assert summary["images"] == {"train": 2, "validation": 1, "test": 3}
    assert summary["image_shape"] == [1, 1, 2]
    assert summary["labels"] == {"a": 0.5, "b": 0.5}
    assert summary["mean_image"] == pytest.approx([1 / 6, 1.0])
    assert [share for share in summary["strengths"] if share] == [0.25, 0.25, 0.5]


def test_strengths_of_drawn_levels_are_compared_as_bytes() -> None:
    images = {
        split: torch.tensor([0, most], dtype=torch.uint8).view(-1, 1, 1, 1)
        for split, most in (("train", 255), ("validation", 1), ("test", 1))
    }
    labels = dict.fromkeys(images, torch.tensor([0, 0]))
    words = {"name": "toy", "num_levels": 2, "protocol": "dynamic", "label_names": ["a"]}
    summary = summary_of(Dataset(**words, images=images, labels=labels))
    assert (summary["mean_image"], len(summary["strengths"])) == ([0.5], 16)


def test_each_kind_of_change_has_its_limit() -> None:
    limits = CheckParams(images=0.1, strengths=0.1, labels=0.1, mean_image=0.1)
    old = {"images": {"train": 100}, "image_shape": [1, 1, 2], "strengths": [0.5, 0.5]}
    old |= {"labels": {"a": 0.5, "b": 0.5}, "mean_image": [0.0, 1.0]}

    def beyond(**new: object) -> list[str]:
        return [what for what, _, is_beyond in changes(old, old | new, limits) if is_beyond]

    assert beyond() == beyond(images={"train": 110}) == []
    assert beyond(images={"train": 111}) == ["images"]
    assert beyond(strengths=[0.39, 0.61]) == ["strengths"]
    assert beyond(labels={"a": 0.5, "c": 0.5}) == ["labels"]
    assert beyond(mean_image=[0.3, 1.0]) == ["mean_image"]
    assert beyond(image_shape=[1, 2, 1], mean_image=[1.0]) == ["image_shape"]


def test_the_flow_adds_a_dataset(folder: Path, without_prefect: None) -> None:
    from pipelines.flows.add_dataset import add_dataset

    (folder / "x.png").write_bytes(b"")
    for wrong in ({"levels": 300}, {"levels": 1}, {"minutes": 0}):
        with pytest.raises(ParameterTypeError, match=f"{next(iter(wrong))}: Input should be "):
            add_dataset.validate_parameters({"name": NAME, "images": str(folder), **wrong})
    lines = add_dataset.fn(NAME, str(folder), side="10x6", flips=True, skip_broken=True)
    assert any(line.startswith("learned as: 10 x 6, grey, 16 levels") for line in lines)
    assert load_params().datasets[NAME].flips
    assert load_dataset(f"data/{NAME}.safetensors").image_shape == (1, 6, 10)
    deployed = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert "pipelines/flows/add_dataset.py:add_dataset" in [one["entrypoint"] for one in deployed]


def test_letters_have_labels_and_are_the_same_each_time(folder: Path) -> None:
    num = write_letters(Path("letters.npz"), variants=1)
    with np.load("letters.npz") as made:
        images, labels, names = made["images"], made["labels"], made["label_names"].tolist()
    assert "".join(names) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert images.shape == (num, 28, 28)
    assert np.bincount(labels).tolist() == [num // 52] * 52
    ink = images.reshape(num, -1).mean(axis=1)
    assert ink[labels == names.index("M")].mean() > 1.5 * ink[labels == names.index("i")].mean()
    write_letters(Path("again.npz"), variants=1)
    assert Path("again.npz").read_bytes() == Path("letters.npz").read_bytes()
    with pytest.raises(ValueError, match=r"params\.yaml must end in \.npz"):
        write_letters(Path("params.yaml"), variants=1)
    assert add(Path("letters.npz")) == 0, "that A and a are two labels is no mistake"
    assert load_params().datasets[NAME].label_names == tuple(names)


def few(folder: Path) -> None:
    for i in range(18):
        (folder / f"{i}.png").unlink()


def inverted(folder: Path) -> None:
    for file in folder.iterdir():
        with Image.open(file) as image:
            Image.fromarray(np.asarray(image) // 2).save(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (few, "images 30 before, 12 now"),
        (inverted, "strengths differ by 0.4"),
        (lambda folder: [(folder / f"{i}.png").rename(folder / f"x{i}.png") for i in range(30)], ""),
    ],
    ids=["fewer", "darker", "renamed"],
)
def test_a_changed_dataset_waits_to_be_confirmed(
    folder: Path, change: Callable, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(folder) == 0
    before = Path(f"data/{NAME}.safetensors").read_bytes()
    change(folder)
    assert steps.main(["prepare", NAME]) == bool(said)
    if said:
        error = capsys.readouterr().err
        assert f"prepare: {NAME} has changed too much since it was prepared last: " in error
        assert said in error
        assert "**beyond**" in Path(f"reports/data/{NAME}.md").read_text()
        assert Path(f"data/{NAME}.safetensors").read_bytes() == before
        assert steps.main(["prepare", NAME]) == 1, "asking again confirms nothing"
        assert steps.main(["confirm", NAME]) == 0
        assert steps.main(["prepare", NAME]) == 0
        assert Path(f"data/{NAME}.safetensors").read_bytes() != before
    assert steps.main(["confirm", NAME]) == 1
    assert f"no version of {NAME} waits to be confirmed" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["", "{}", "[]"])
def test_a_damaged_summary_of_the_last_version_is_named(
    folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(folder) == 0
    last = Path(f"data/checked/{NAME}.json")
    last.write_text(damage)
    assert steps.main(["prepare", NAME]) == 1
    assert f"prepare: {last}, with which {NAME} is compared, is damaged. Remove it" in capsys.readouterr().err
    last.unlink()
    assert steps.main(["prepare", NAME]) == 0


def test_a_failure_of_dvc_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --quiet DVC says nothing but its exit code."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / ".dvc", ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
    Path(".dvc/config").write_text("[core")
    with pytest.raises(ValueError, match=r"could not record own/dvc.yaml:prepare@glyphs: .*config"):
        own._record(NAME)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_dvc_sees_a_changed_picture_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    project = tmp_path / "copy"
    project.mkdir()
    copy_project(project)
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    fill(tmp_path / "others", 30, first=500)
    environment = {**os.environ, "PYTHONPATH": str(project), "DVC_NO_ANALYTICS": "1"}

    def call(*words: str) -> str:
        done = run([sys.executable, "-m", *words], cwd=project, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def stale() -> set[str]:
        lines = call("dvc", "status", "own/dvc.yaml").splitlines()
        return {line.split(":")[1] for line in lines if line.startswith("own/") and "prepare@" in line}

    call("pipelines.steps", "add", "first", "--images", str(folder))
    git = (project / ".git").rename(tmp_path / "git")  # as in a container
    call("pipelines.steps", "add", "second", "--images", str(tmp_path / "others"))
    git.rename(project / ".git")
    assert stale() == set(), "adding prepares, and DVC knows"
    lock = yaml.safe_load((project / "own/dvc.lock").read_text())["stages"]
    recorded = lock["prepare@first"]["outs"][0]["md5"]
    assert recorded == load_dataset(project / "data/first.safetensors").data_hash
    for change in (
        lambda: fill(folder, 1, first=77),
        (folder / "77.png").unlink,
        lambda: picture(9).save(folder / "3.png"),
    ):
        change()
        assert stale() == {"prepare@first"}
        call("dvc", "commit", "-q", "-f", "own/dvc.yaml:prepare@first")
    call("pipelines.steps", "remove", "second")
    assert stale() == set()
    assert "prepare@second" not in (project / "own/dvc.lock").read_text()
    before = (project / "data/first.safetensors").read_bytes()
    few(folder)
    refused = run([sys.executable, "-m", "dvc", "repro", "own/dvc.yaml:prepare@first"], cwd=project, env=environment)
    assert "first has changed too much since it was prepared last" in refused.stdout + refused.stderr
    assert (project / "data/first.safetensors").read_bytes() == before, "what is refused takes nothing away"


def test_hidden_files_and_folders_are_no_pictures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a Mac leaves beside pictures, and what it packs into an archive."""
    for name in (".DS_Store", "._0.png", ".cache/0.png", "__MACOSX/0.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert add(folder) == 0
    assert "found: 30 pictures, 0 other files" in capsys.readouterr().out


def test_an_add_that_fails_leaves_the_entries_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert add(folder, name="first") == 0
    before = state(Path.cwd())
    monkeypatch.setattr(own, "_record", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        add(folder)
    assert state(Path.cwd()) == before


def test_pictures_that_are_gone_or_relabelled_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels("a", 20, "b", 20)(folder)
    assert add(folder) == 0
    (folder / "a").rename(folder / "c")
    assert steps.main(["prepare", NAME]) == 1
    assert "has label 'c', which is not one of the dataset's. Add the dataset anew." in capsys.readouterr().err
    shutil.rmtree(folder)
    assert steps.main(["prepare", NAME]) == 1
    assert f"{folder} is no folder. Name one that holds pictures." in capsys.readouterr().err


def test_a_dataset_that_has_become_too_small_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(folder) == 0
    only(6)(folder)
    assert steps.main(["prepare", NAME]) == 1
    assert f"{NAME} has 6 different images to train on, and sets 6 aside" in capsys.readouterr().err


def test_a_picture_that_breaks_after_it_was_added_stops_the_next_preparation(folder: Path) -> None:
    assert add(folder) == 0
    (folder / "0.png").write_bytes(b"")
    assert steps.main(["prepare", NAME]) == 1


def test_booleans_floats_and_one_channel_are_strengths(tmp_path: Path) -> None:
    ink = np.arange(30)[:, None, None] > np.arange(64).reshape(8, 8) % 30
    for array in (ink, ink.astype(float), ink[..., None], (ink * 255).astype(np.uint8)):
        np.save(tmp_path / "x.npy", array)
        read = own.read_pictures(own.source_of(tmp_path / "x.npy"), True, own.Left())
        assert (np.stack([np.asarray(one.image) for one in read]) == ink * 255).all()
    np.save(tmp_path / "x.npy", np.full((1, 4, 4), 0.999))
    (one,) = own.read_pictures(own.source_of(tmp_path / "x.npy"), True, own.Left())
    assert np.asarray(one.image).max() == 255, "rounded"


def test_cifar_100_is_read_by_its_fine_labels(tmp_path: Path) -> None:
    rows = np.zeros((3, 3074), np.uint8)
    rows[:, 0], rows[:, 1] = 1, range(3)
    rows.tofile(tmp_path / "train.bin")
    (tmp_path / "coarse_label_names.txt").write_text("x\ny\n")
    (tmp_path / "fine_label_names.txt").write_text("a\nb\nc\n")
    read = own.read_pictures(own.source_of(tmp_path), True, own.Left())
    assert [(one.label, one.image.size) for one in read] == [(label, (32, 32)) for label in "abc"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--side", "65"], "a side is 4 to 64 pixels, such as 28, or 48x32, got '65'"),
        (["--side", "3"], "got '3'"),
        (["--side", "8x8x8"], "got '8x8x8'"),
        (["--side", "x"], "got 'x'"),
        (["--colour", "binary", "--levels", "4"], "binary pictures have 2 levels, got 4."),
    ],
)
def test_wishes_that_cannot_be_met(
    folder: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(folder, *words) == 1
    assert said in capsys.readouterr().err


def test_near_doubles_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.asarray(picture(0)).copy()
    for i, file in enumerate(sorted(folder.iterdir())):
        pixels[0, 0] = 100 + i  # of 8 x 8 fields no mean changes by a level of them
        Image.fromarray(pixels).save(file)
    assert add(folder, "--levels", "256") == 0
    near = capsys.readouterr().out.partition("near ones: at least ")[2]
    assert int(near.partition(",")[0]) >= 15


@pytest.mark.parametrize(("fit", "edge"), [("crop", 200), ("stretch", 200), ("pad", 255)])
def test_a_picture_of_another_shape_fills_the_grid_or_lies_on_its_ground(fit: str, edge: int) -> None:
    entry = {
        "source": {"kind": "folder", "path": "x"},
        "image_shape": [1, 8, 8],
        "num_levels": 256,
        "protocol": "8-bit",
    }
    entry |= {"label_names": [], "num_validation": 1, "fit": fit, "ground": "white"}
    spec = own.DatasetParams.model_validate(entry)
    (found,) = fitted(Picture("x", Image.new("L", (16, 8), 200), None), spec)
    assert (found[3:5] == 200).all()
    assert (found[[0, -1]] == edge).all()


def test_a_version_that_was_refused_waits_no_more_once_another_one_passed(folder: Path) -> None:
    assert add(folder) == 0
    few(folder)
    assert steps.main(["prepare", NAME]) == 1
    fill(folder, 18)
    assert steps.main(["prepare", NAME]) == 0
    assert steps.main(["confirm", NAME]) == 1
