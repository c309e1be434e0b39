"""The benchmark counts work and differences rightly, and says how it measured."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pixelcnn.bench as bench_module
from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig
from pixelcnn.bench import (
    CACHED,
    CACHED_TORCH,
    CROPPED,
    NAIVE,
    NAIVE_COMPILED,
    SAMPLERS,
    bench,
    count_differences,
    time_naive,
    time_sampler,
    work_per_pixel,
    write_json,
)
from pixelcnn.config import ModelConfig
from tests.core.test_fast_sampling import model_of

CONFIG = PixelCNNConfig(image_shape=(1, 5, 6), num_levels=3, num_features=4, num_blocks=2)
# Its context networks have a layer less for images of side 4.
COMPLETING = replace(CONFIG, num_labels=2, context_features=2, context_width=3, completer_features=3, label_features=3)
GATED = GatedPixelCNNConfig(image_shape=(1, 5, 6), num_levels=3, num_features=4, num_layers=2, kernel_size=3)


def test_work_is_counted_as_by_hand() -> None:
    # First layer 7x7 mask A: 24 taps. Per block: 8 to 4, five taps 4 to 4 (two of them in the row), 4 to 8, 4 to 8.
    first, head = 24 * 8 + 8 * 8, 8 * 8 + 8 * 3
    block = 8 * 4 + 5 * 16 + 4 * 8 + 4 * 8
    total, in_order = work_per_pixel(model_of(CONFIG, torch.float32))
    unread = 4 * 8  # what the last block adds to the stream
    assert total == first + 2 * block + head - unread
    assert in_order == 3 * 8 + 8 * 8 + 2 * (8 * 4 + 2 * 16 + 4 * 8 + 4 * 8) + head - unread
    # Vertical 2x3 kernels, links 8 to 8, horizontal one tap then two, outputs 4 to 4.
    total, in_order = work_per_pixel(model_of(GATED, torch.float32))
    head = 4 * 8 + 8 * 3
    assert in_order == (8 + 16) + (2 * 4 * 8 + 16) + head
    assert total == in_order + 6 * 8 + 6 * 4 * 8 + 2 * 64


@pytest.mark.parametrize("config", [CONFIG, GATED])
def test_no_difference_is_counted_for_the_samplers(config: ModelConfig) -> None:
    counted = count_differences(model_of(config, torch.float32), 20, torch.float64)
    assert counted == {
        "num_images": 20,
        "num_images_that_differ": 0,
        "num_levels_that_differ": 0,
        "max_distance_to_boundary": 0.0,
    }


def test_a_wrong_level_is_counted_with_its_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_module.sample

    def wrong(model, u):
        levels = right(model, u)
        levels[3, 0, 4, 5] = (levels[3, 0, 4, 5] + 1) % 3  # the last pixel: no other level changes
        return levels

    monkeypatch.setattr(bench_module, "sample", wrong)
    counted = count_differences(model_of(CONFIG, torch.float32), 9, torch.float64)
    assert (counted["num_images_that_differ"], counted["num_levels_that_differ"]) == (1, 1)
    assert 1e-6 < counted["max_distance_to_boundary"] < 1


def test_an_extrapolated_baseline_says_so() -> None:
    model = model_of(CONFIG, torch.float32)
    assert time_naive(model, 2, 60.0).note == "1 thread"
    assert time_naive(model, 2, 60.0, CROPPED, passes=10).note == "1 thread; extrapolated from 10 of 30 passes"


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (RuntimeError("no C++ compiler\nmore"), "skipped: RuntimeError: no C++ compiler"),
        (AssertionError(), "skipped: AssertionError: "),
    ],
)
def test_a_compiler_that_is_missing_is_a_skipped_row(
    error: Exception, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(torch, "compile", broken)
    timing = time_sampler(NAIVE_COMPILED, model_of(CONFIG, torch.float32), 1, 0.1)
    assert math.isnan(timing.seconds)
    assert timing.note == note


def test_the_sampler_in_torch_is_not_taken_for_the_compiled_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "cached, in torch: numba is not installed"
    monkeypatch.setattr(bench_module, "engine_name", lambda _: missing)
    result = bench(model_of(CONFIG, torch.float32), [1], [CACHED_TORCH, CACHED], 0.01, 0, [4])
    in_torch, compiled = result["timings"]
    assert in_torch["seconds_per_image"] > 0
    assert (compiled["seconds_per_image"], compiled["note"]) == (None, f"skipped: {missing}")
    assert "sides" not in result
    assert f"no image sides are timed: {missing}" in capsys.readouterr().out


def test_its_own_work_is_not_called_anothers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (1.0, 1.0, 1.0))
    bench(model_of(CONFIG, torch.float32), [], [], 0.01, 0, [])
    assert "load of the last minute: 1.0 on " in (said := capsys.readouterr().out)
    assert "this program's own included" in said


@pytest.mark.parametrize("config", [CONFIG, COMPLETING], ids=["draws", "completes"])
def test_tables_and_figures_agree(config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samplers = [name for name in SAMPLERS if name != NAIVE_COMPILED]
    result = bench(model_of(config, torch.float32), [1, 3], samplers, 0.02, 4, [4, 8])
    lines = capsys.readouterr().out.splitlines()
    write_json(tmp_path / "new" / "bench.json", result)
    result = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [(row["batch_size"], row["sampler"]) for row in result["timings"]] == [
        (n, s) for n in (1, 3) for s in samplers
    ]
    timings = {(row["batch_size"], row["sampler"]): row["seconds_per_image"] for row in result["timings"]}
    line = next(line for line in lines if line.startswith("    3") and CACHED in line)
    assert f"{timings[3, NAIVE] / timings[3, CACHED]:.1f}x" in line
    assert f"{timings[3, CROPPED] / timings[3, CACHED]:.1f}x" in line
    assert result["exactness"]["float64"]["num_levels_that_differ"] == 0
    assert [row["side"] for row in result["sides"]] == [4, 8]
    assert "float64: 0 of 4 images differ from the naive sampler's, in 0 levels" in lines
