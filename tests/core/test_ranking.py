"""Ranking: the scores are what they are said to be, strangers come first, and what does not fit is named."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from benchmarks.ranking import auroc
from pixelcnn import load_checkpoint, log_prob, save_checkpoint, save_dataset
from pixelcnn.__main__ import main
from pixelcnn.images import to_png
from pixelcnn.packing import rank
from pixelcnn.packing.ranking import beyond_complexity
from tests.core.test_packing import checkpoint_of
from tests.core.tiny import random_levels, toy_dataset

ROOT = Path(__file__).parents[2]
SHAPE = (1, 6, 5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint_of(tmp_path_factory.mktemp("ranking") / "model", shape=SHAPE, num_levels=4)


def released(name: str) -> torch.Tensor:
    return safetensors.torch.load_file(ROOT / "tests" / "released" / f"{name}.safetensors")["levels"].long()


def test_corrected_is_what_lies_beyond_a_line_that_strangers_hardly_move() -> None:
    size = torch.arange(60.0, 160.0, dtype=torch.float64)
    nats = 12 + 0.7 * size
    nats[::10] += 50  # strangers
    nats[5] -= 30
    corrected = beyond_complexity(nats, size)
    expected = nats - (12 + 0.7 * size)
    assert (corrected - expected).abs().max() < 1e-6
    # One picture, or pictures of one size, are set against their own middle.
    assert beyond_complexity(nats[:1], size[:1]).abs().item() < 1e-9
    corrected = beyond_complexity(torch.tensor([3.0, 4.0, 5.0]).double(), torch.full((3,), 70.0).double())
    torch.testing.assert_close(corrected, torch.tensor([-1.0, 0.0, 1.0]).double())


def test_things_among_digits_come_first() -> None:
    """Binarised clothes are simple shapes, turned digits are strokes: by nats alone they hide."""
    digits, things = released("mnist"), (released("fashion_mnist")[:20] > 127).long()
    turned = digits[-20:].rot90(1, dims=(2, 3))
    model, _ = load_checkpoint(ROOT / "weights" / "gated_pixelcnn-mnist")
    for strangers, least in ((things, 0.97), (turned, 0.85)):
        levels = torch.cat([digits[:-20], strangers])
        with torch.inference_mode():
            nats = -torch.cat([log_prob(model, part) for part in levels.split(50)]).double()
        size = torch.tensor([len(to_png(image, 2, optimize=True)) for image in levels], dtype=torch.float64)
        is_stranger = torch.arange(len(levels)) >= 180
        corrected = auroc(beyond_complexity(nats, size), is_stranger)
        assert corrected >= least
        assert corrected > auroc(nats, is_stranger) + 0.02


def test_files_named_by_numbers_are_named(checkpoint, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for i, image in enumerate(random_levels(SHAPE, 4, 3)):
        (tmp_path / "in" / f"{i:05}.png").write_bytes(to_png(image, 4))
    assert sorted(rank(checkpoint, tmp_path / "in").names) == ["00000.png", "00001.png", "00002.png"]
    assert rank(checkpoint, tmp_path / "in" / "00000.png").names == ["00000.png"]


def test_names_that_no_packed_file_keeps_are_ranked(checkpoint, tmp_path, capsys) -> None:
    """Screenshots are named by the time, with colons."""
    (tmp_path / "in").mkdir()
    names = ["2024-01-01 12:30:00.png", "back\\slash.png"]
    for name, image in zip(names, random_levels(SHAPE, 4, 2), strict=True):
        (tmp_path / "in" / name).write_bytes(to_png(image, 4))
    assert sorted(rank(checkpoint, tmp_path / "in").names) == names
    assert rank(checkpoint, tmp_path / "in" / names[0]).names == names[:1]
    (tmp_path / "in" / os.fsdecode(b"\xff.png")).write_bytes(to_png(image, 4))
    given = ["--checkpoint", str(checkpoint), "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out.png")]
    assert main(["rank", *given]) == 1
    assert r"the name '\udcff.png' cannot be kept. Rename that file." in capsys.readouterr().err


def test_the_table_and_the_sheet(checkpoint, tmp_path, capsys) -> None:
    levels = random_levels(SHAPE, 4, 40)
    (tmp_path / "in" / "more").mkdir(parents=True)
    for i, image in enumerate(levels):
        (tmp_path / "in" / ("more" if i % 2 else "") / f"a, {i:02}.png").write_bytes(to_png(image, 4))
    (tmp_path / "in" / "note.txt").write_text("none")
    out = tmp_path / "sheet.png"
    assert main(["rank", "--checkpoint", str(checkpoint), "--images", str(tmp_path / "in"), "--out", str(out)]) == 0
    printed, said = capsys.readouterr()
    assert said == f"wrote {out}; left out: 1 file not named .png\n"
    rows = list(csv.DictReader(printed.splitlines()))
    assert [int(row["rank"]) for row in rows] == list(range(1, 41))
    numbers = [int(row["path"][-6:-4]) for row in rows]
    assert sorted(numbers) == list(range(40))
    with torch.no_grad():
        nats = -log_prob(load_checkpoint(checkpoint)[0], levels).double()
    size = torch.tensor([len(to_png(image, 4, optimize=True)) for image in levels], dtype=torch.float64)
    corrected = beyond_complexity(nats, size)
    assert numbers == corrected.argsort(descending=True).tolist()
    for row, i in zip(rows, numbers, strict=True):
        assert float(row["nats"]) == pytest.approx(nats[i].item(), abs=1e-3)
        assert float(row["bits_per_dim"]) == pytest.approx(nats[i].item() / (30 * np.log(2)), abs=1e-4)
        assert float(row["corrected_nats"]) == pytest.approx(corrected[i].item(), abs=1e-2)
        assert int(row["png_bytes"]) == size[i]
    by_nats = sorted(rows, key=lambda row: int(row["rank_by_nats"]))
    assert [int(row["path"][-6:-4]) for row in by_nats] == nats.argsort(descending=True).tolist()
    # Four rows of eight: the sixteen strangest, then the sixteen most usual.
    sheet = np.asarray(Image.open(out))[2:, 2:]
    cells = [sheet[26 * (k // 8) :, 22 * (k % 8) :][:24:4, :20:4] for k in range(32)]
    for cell, i in zip(cells, [*numbers[:16], *numbers[-16:]], strict=True):
        assert np.array_equal(cell, levels[i, 0] * 85)


def test_an_array_and_a_dataset_rank_as_their_pictures(checkpoint, tmp_path) -> None:
    levels = random_levels(SHAPE, 4, 7)
    np.save(tmp_path / "x.npy", levels.byte().numpy())
    found = rank(checkpoint, tmp_path / "x.npy")
    assert sorted(found.names) == [str(i) for i in range(7)]
    assert torch.equal(found.ends, levels[[int(name) for name in found.names]])
    # The training split of a binary dataset is drawn, always the same.
    binary = checkpoint_of(tmp_path / "binary", shape=SHAPE, num_levels=2)
    save_dataset(tmp_path / "toy.safetensors", toy_dataset(SHAPE, 2, protocol="dynamic"))
    first, again = (rank(binary, tmp_path / "toy.safetensors", split="train") for _ in range(2))
    assert first.ends.max() == 1
    assert torch.equal(first.nats, again.nats)
    with torch.no_grad():
        nats = -log_prob(load_checkpoint(binary)[0], first.ends).double()
    torch.testing.assert_close(nats, first.nats)  # all 24 are shown, as they were scored
    # A grey picture is rounded to the model's levels.
    Image.fromarray(np.full((6, 5), 200, np.uint8)).save(tmp_path / "grey.png")
    assert bool((rank(binary, tmp_path / "grey.png").ends == 1).all())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "absent does not exist."),
        ("empty", "folder", "empty holds no PNG file (*.png)."),
        ("broken.png", b"\x89PNG no more", "broken.png' does not fit the model: image is no readable PNG"),
        ("small.png", (5, 5), "small.png' does not fit the model: image must be 5 x 6 pixels, got 5 x 5."),
        ("x.npy", b"no array", "x.npy is no .npy array"),
        ("x.jpg", b"", "x.jpg must be a folder of PNG files"),
    ],
)
def test_pictures_that_cannot_be_ranked_are_named(checkpoint, tmp_path, capsys, name, content, message) -> None:
    given, out = tmp_path / name, tmp_path / "out.png"
    if content == "folder":
        given.mkdir()
    elif isinstance(content, bytes):
        given.write_bytes(content)
    elif content:
        Image.new("L", content).save(given)
    command = ["rank", "--checkpoint", str(checkpoint), "--images", str(given), "--out"]
    assert main([*command, str(out)]) == 1
    printed, error = capsys.readouterr()
    assert message in error
    assert error.count("\n") == 1
    assert printed == ""
    assert not out.exists()
    assert main([*command, str(tmp_path / "no" / "out.png")]) == 1
    assert "--out must be a .png in a folder that exists" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "out.jpg")]) == 2
    assert "out.jpg must end in .png." in capsys.readouterr().err


def test_a_model_that_diverged_is_named(checkpoint, tmp_path, capsys) -> None:
    model, scores = load_checkpoint(checkpoint)
    torch.nn.init.constant_(model.logits.bias, float("nan"))
    save_checkpoint(tmp_path / "model", model, scores)
    np.save(tmp_path / "in.npy", random_levels(SHAPE, 4, 3).byte().numpy())
    images = ["--images", str(tmp_path / "in.npy"), "--out", str(tmp_path / "out.png")]
    assert main(["rank", "--checkpoint", str(tmp_path / "model"), *images]) == 1
    assert capsys.readouterr().err == (
        "error: the model's likelihoods are not finite: its training diverged. Use an earlier model.\n"
    )


def test_a_sheet_that_cannot_be_written_is_said_before_any_work(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.setattr("pixelcnn.packing.rank", None)
    command = ["rank", "--checkpoint", "any", "--images", str(tmp_path / "in"), "--out"]
    assert main([*command, str(tmp_path / "in" / "ranking.png")]) == 1
    assert "--out must be a .png that is not among --images" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    assert main([*command, str(tmp_path / "ranking.png")]) == 1
    assert "in a folder that exists and that you may write to" in capsys.readouterr().err
