"""The benchmark of packing measures a folder of one's own, into its place on the page."""

import pytest

from benchmarks import packing
from benchmarks.command import command
from benchmarks.packing import Row, table
from pixelcnn.images import to_picture, to_png
from tests.core.test_packing import checkpoint_of
from tests.core.tiny import random_levels


def test_a_folder_and_its_model(tmp_path, monkeypatch, capsys) -> None:
    page, folder = tmp_path / "page.md", tmp_path / "mine"
    page.write_text(packing.PAGE.read_text())
    folder.mkdir()
    for i, image in enumerate(random_levels((1, 4, 5), 3, 6)):
        (folder / f"{i}.png").write_bytes(to_png(image, 3))
    checkpoint = checkpoint_of(tmp_path / "own-mine")
    monkeypatch.setattr(packing, "PAGE", page)
    monkeypatch.setattr(packing, "TOOLS", ())

    def by_pillow_alone(levels, num_levels, num_alone):
        pictures = [to_picture(image, num_levels) for image in levels]
        return [packing.by_pillow("PNG", some, format="PNG") for some in (pictures[:num_alone], pictures)]

    monkeypatch.setattr(packing, "by_codecs", by_pillow_alone)
    assert command(packing.measure, ["--folder", str(folder), "--checkpoint", str(checkpoint), "--alone", "2"]) == 0
    before, after = packing.PAGE.read_text().split("<!-- python -m benchmarks.packing --folder -->\n")
    assert "### `own-mine`, 6 pictures of a folder, `mine`" in after
    assert "0 mismatches." in after
    assert "### `gated_pixelcnn-mnist`, 10,000 test images" in before
    assert command(packing.measure, ["--folder", str(folder)]) == 1
    assert "--folder and --checkpoint go together, and without pairs." in capsys.readouterr().err


def test_its_mistakes_are_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(packing, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(packing.shutil, "which", lambda tool: None if tool == "xz" else tool)
    assert command(packing.measure, []) == 1
    assert capsys.readouterr().err.startswith("packing: xz must be installed")
    for option in ("--alone", "--images"):
        assert command(packing.measure, [option, "0"]) == 2
        assert f"Invalid value for '{option}'" in capsys.readouterr().err


def test_without_data_the_page_keeps_its_tables(tmp_path, monkeypatch, capsys) -> None:
    page = tmp_path / "page.md"
    page.write_text(packing.PAGE.read_text())
    (tmp_path / "weights/gated_pixelcnn-mnist").mkdir(parents=True)
    (tmp_path / "weights/gated_pixelcnn-mnist/config.json").touch()
    (tmp_path / "weights/.gated_pixelcnn-mnist.lock").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packing, "TOOLS", ())
    monkeypatch.setattr(packing, "PAGE", page)
    before = page.read_text()
    assert command(packing.measure, []) == 1
    said = capsys.readouterr()
    assert said.out == "left out: gated_pixelcnn-mnist, for want of data/mnist.safetensors\n"
    assert said.err.startswith("packing: nothing is measured")
    assert page.read_text() == before


def test_the_best_of_a_file_each_is_none_of_all(tmp_path) -> None:
    checkpoint, levels = checkpoint_of(tmp_path / "own-mine"), random_levels((1, 4, 5), 3, 6)
    sizes = {"ours": 600, "some of ours": 600, "the sampler": 0, "PNG": 900, "all, xz": 700}
    rows = [Row(name, 6, num_bytes, 1.0, 1.0) for name, num_bytes in sizes.items()]
    text = table(checkpoint, "test images", levels, rows, 0.0)
    assert "Against the best other, all, xz: 14% smaller" in text
    assert "Against the best of a file each, PNG: 33% smaller" in text


@pytest.mark.parametrize(("channels", "mode"), [(1, "1"), (3, "RGB")])
def test_pictures_of_two_levels_keep_their_colours(monkeypatch, channels: int, mode: str) -> None:
    coded = []

    def by_nothing(name, pictures, *_, **__) -> Row:
        coded.extend(pictures)
        return Row(name, len(pictures), 0, 0.0, 0.0)

    monkeypatch.setattr(packing, "by_pillow", by_nothing)
    monkeypatch.setattr(packing, "by_programs", by_nothing)
    monkeypatch.setattr(packing, "by_archiver", lambda name, *_: Row(name, 6, 0, 0.0, 0.0))
    rows = packing.by_codecs(random_levels((channels, 4, 5), 2, 6), 2, num_alone=2)
    assert {picture.mode for picture in coded} == {mode}
    assert [row.num_images for row in rows] == [2, 2, 2, 2, 6, 6, 6, 6]
