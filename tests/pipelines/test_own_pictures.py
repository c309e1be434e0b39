"""The pictures of a dataset of one's own, as its models know them, to be ranked by their own names."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import steps
from pixelcnn.__main__ import main
from pixelcnn.data import load_dataset
from tests.core.test_packing import checkpoint_of
from tests.pipelines.test_own import NAME, add, picture
from tests.pipelines.test_own import folder as folder  # a fixture


def test_a_dataset_of_files_is_ranked_by_their_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "more").mkdir()
    picture(99, 24, 24).save(folder / "more" / "large, too.bmp")
    (folder / "broken.jpg").write_bytes(b"no picture")
    assert add(folder, "--no-labels", "--skip-broken", "--side", "12", "--levels", "4", "--colour", "grey") == 0
    capsys.readouterr()
    assert steps.main(["pictures", NAME, "--out", "fitted"]) == 0
    assert capsys.readouterr().out == "wrote 31 pictures to fitted; left out: 1 that cannot be read\n"
    names = {file.relative_to("fitted").as_posix() for file in Path("fitted").rglob("*.png")}
    assert names == {*(f"{i}.png" for i in range(30)), "more/large, too.bmp.png"}
    learned = load_dataset(f"data/{NAME}.safetensors").images
    levels = np.rint(np.asarray(Image.open("fitted/7.png")) / 85)
    assert any((image[0].numpy() == levels).all() for part in learned.values() for image in part)
    picture(7).save(folder / "0.bmp")
    picture(8).save(folder / "0.bmp.png")
    assert steps.main(["pictures", NAME, "--out", "twice"]) == 1
    assert "'0.bmp.png' and another picture would both be 0.bmp.png: rename one." in capsys.readouterr().err
    checkpoint = checkpoint_of(Path("model"), shape=(1, 12, 12), num_levels=4)
    assert main(["rank", "--checkpoint", str(checkpoint), "--images", "fitted"]) == 0
    assert {row["path"] for row in csv.DictReader(capsys.readouterr().out.splitlines())} == names
    assert steps.main(["pictures", NAME, "--out", "fitted"]) == 1
    assert "fitted is there already." in capsys.readouterr().err
    assert steps.main(["pictures", "mnist5k", "--out", "others"]) == 1
    assert "Rank it by: pixelcnn rank --images data/mnist5k.safetensors --split test" in capsys.readouterr().err
    assert not Path("others").exists()
    assert [path.name for path in Path().glob(".fitted*")] == []
