"""The picture and the tables of the samplers' benchmark."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.command import command
from benchmarks.plot import main, read
from pixelcnn import PixelCNNConfig, build_model
from pixelcnn.bench import CACHED, SAMPLERS, bench, write_json


def test_a_benchmark_becomes_a_picture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = PixelCNNConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4, num_blocks=1)
    samplers = [name for name in SAMPLERS if "torch.compile" not in name]
    result = bench(build_model(config).eval(), [1, 2], samplers, 0.01, 0, [4, 8])
    write_json(tmp_path / "tiny.json", result)
    assert command(main, [str(tmp_path)]) == 0
    path, table = tmp_path / "bench.png", (tmp_path / "bench.md").read_text().splitlines()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.md", "bench.png", "tiny.json"]
    heads, (of_two,) = table[2].split(" | "), [line for line in table if line.startswith("| `tiny` | 2 |")]
    found = {
        head: cell.removesuffix("x").replace(",", "") for head, cell in zip(heads, of_two.split(" | "), strict=True)
    }
    seconds = {row["sampler"]: row["seconds_per_image"] for row in result["timings"] if row["batch_size"] == 2}
    for name in samplers:
        assert float(found[name]) == pytest.approx(1e3 * seconds[name], rel=0.01)
        if "cached" not in name:
            ratio = float(found[f"cached, compiled against {name}"])
            assert ratio == pytest.approx(seconds[name] / seconds["cached, compiled"], rel=0.01)
    assert found["naive, torch.compile"] == ""
    assert "e+" not in of_two
    assert sum(line.startswith(("| `tiny` | 4 |", "| `tiny` | 8 |")) for line in table) == 2  # the sides
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_a_benchmark_without_sides_has_a_picture(tmp_path: Path) -> None:
    config = PixelCNNConfig(image_shape=(1, 4, 4), num_levels=2, num_features=4, num_blocks=1)
    write_json(tmp_path / "tiny.json", bench(build_model(config).eval(), [1], [CACHED], 0.01, 0, []))
    assert command(main, [str(tmp_path)]) == 0
    assert (tmp_path / "bench.png").exists()


def test_its_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(main, [str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"plot: {tmp_path} holds no benchmark. Make one: make bench\n"
    for torch_version in ("2.7.0", "2.8.0"):
        result = {"processor": "x", "num_threads": 2, "torch": torch_version}
        (tmp_path / f"{torch_version}.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match=r"holds figures of several machines or versions of torch\. Empty it"):
        read(tmp_path)
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ValueError, match=r"half\.json is no JSON. Make it again: make bench"):
        read(tmp_path)
