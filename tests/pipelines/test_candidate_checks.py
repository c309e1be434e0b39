"""The checks before a comparison: they agree with the exhaustive count of leaks, and are quick."""

import dataclasses
import math
import time
from types import SimpleNamespace

import pytest
import torch

from pipelines.promotion import checks as candidate_checks
from pipelines.promotion.checks import check_candidate, check_sampling_time, count_leaking_cuts
from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig, build_model
from pixelcnn.likelihood import count_leaks
from pixelcnn.models.layers import MaskedConv2d

CONFIGS = [
    PixelCNNConfig(image_shape=(1, 5, 6), num_levels=2, num_features=8, num_blocks=1, kernel_size=3),
    PixelCNNConfig(image_shape=(3, 4, 3), num_levels=5, num_features=12, num_blocks=1, kernel_size=3),
    GatedPixelCNNConfig(image_shape=(1, 5, 6), num_levels=2, num_features=8, num_layers=2, kernel_size=3),
    GatedPixelCNNConfig(image_shape=(3, 4, 3), num_levels=5, num_features=12, num_layers=2, kernel_size=3),
]


def model_and_image(config):
    torch.manual_seed(0)
    return build_model(config).eval(), torch.randint(config.num_levels, config.image_shape)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_sound_model_passes(config) -> None:
    model, levels = model_and_image(config)
    assert count_leaking_cuts(model, levels) == 0
    check_candidate(model, levels, 60)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_missing_mask_is_found(config) -> None:
    """One convolution at a time loses its mask: the few cuts find what the exhaustive count finds."""
    model, levels = model_and_image(config)
    leaking = 0
    for module in model.modules():
        if not isinstance(module, MaskedConv2d):
            continue
        mask = module.mask.clone()
        module.mask.fill_(1)
        all_leaks, _ = count_leaks(model, levels)
        assert (count_leaking_cuts(model, levels) > 0) == (all_leaks > 0)
        leaking += all_leaks > 0
        module.mask.copy_(mask)
    assert leaking > 0


@pytest.mark.parametrize("which", ["completer", "completer.added"])
def test_a_completer_that_leaks_is_found(which: str) -> None:
    widths = {"context_features": 2, "completer_features": 4, "added_features": 4}
    model, levels = model_and_image(dataclasses.replace(CONFIGS[0], **widths))
    check_candidate(model, levels, 60)
    model.get_submodule(which).blocks[0].conv.mask.fill_(1)
    assert count_leaking_cuts(model, levels) == 0
    with pytest.raises(ValueError, match="it leaks"):
        check_candidate(model, levels, 60)


def test_what_is_no_number_is_named() -> None:
    model, levels = model_and_image(CONFIGS[0])
    with torch.no_grad():
        model.logits.bias[0] = math.nan
    with pytest.raises(ValueError, match="the model's logits are not finite numbers"):
        check_candidate(model, levels, 60)


def test_a_slow_sampler_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_and_image(CONFIGS[0])
    rows: list[int] = []

    def slow(model, u, on_row):
        for row in range(u.shape[2]):
            rows.append(row)
            on_row(row, u[:, :, row])

    monkeypatch.setattr(candidate_checks, "sample", slow)
    monkeypatch.setattr(candidate_checks, "time", SimpleNamespace(monotonic=lambda: 2.0 * len(rows)))  # 2 s a row
    with pytest.raises(ValueError, match=r"too slowly: 40 % of one image took 4\.00 s, .* allows 3 s for the whole"):
        check_sampling_time(model, 3)
    assert rows == [0, 1], "it was not waited for"


def test_the_leak_check_is_quick_on_large_images() -> None:
    config = GatedPixelCNNConfig(image_shape=(3, 32, 32), num_levels=256, num_features=24, num_layers=3, kernel_size=3)
    model, levels = model_and_image(config)
    start = time.process_time()
    assert count_leaking_cuts(model, levels) == 0
    assert time.process_time() - start < 20  # some 3,000 changes one by one take minutes
