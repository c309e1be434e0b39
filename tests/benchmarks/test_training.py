"""The training benchmark compares like with like."""

import pytest
import torch

from benchmarks.training import PLAIN, TRAINERS, bench_training, plain_network
from tests.core.tiny import ARCHITECTURES, random_levels, tiny_model


@pytest.mark.parametrize("max_dilation", [1, 2])
@pytest.mark.parametrize("shape", [(1, 4, 5), (3, 3, 4)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plain_network_is_the_same_function(architecture, shape, max_dilation):
    model = tiny_model(architecture, shape, 4, max_dilation=max_dilation)
    plain = plain_network(model)
    levels = random_levels(shape, 4, 3)
    with torch.no_grad():
        expected, found = model(levels), plain(levels)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert type(plain.head) is not type(model.head), "its kernels are others"


@pytest.mark.parametrize("output", [{}, {"output": "logistic_mixture", "num_mixtures": 2}])
def test_the_table(capsys, monkeypatch, output):
    # Each takes half a minute, bfloat16 products where the processor has none.
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr("benchmarks.training.matrix_peak", lambda dtype: 1e9)
    model = tiny_model("pixelcnn", (1, 4, 4), 2, 2, context_features=3, **output)
    speed = bench_training(model.float(), batch_size=4, num_rounds=2)
    assert list(speed) == [PLAIN, *TRAINERS]
    assert min(speed.values()) > 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(speed)
    assert "1.00x" in lines[2]
    for line, value in zip(lines[2:], speed.values(), strict=True):
        assert f"{value:.1f}" in line
        assert f"{value / speed[PLAIN]:.2f}x" in line
