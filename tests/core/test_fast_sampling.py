"""The compiled cached sampler is the naive one: the same levels, the same logits, only sooner."""

import logging
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import pixelcnn.fast_sampling as fast_sampling
from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig, build_model, naive_sample, sample
from pixelcnn.compiled_sampling import build_engine
from pixelcnn.config import ModelConfig

SHAPES = [(1, 5, 6), (1, 1, 7), (1, 7, 1), (3, 4, 5), (2, 3, 3)]


def configs() -> list[ModelConfig]:
    found: list[ModelConfig] = []
    for shape in SHAPES:
        colours = shape[0]
        for num_levels in (2, 5):
            common = {"image_shape": shape, "num_levels": num_levels, "num_labels": 3}
            found.append(PixelCNNConfig(**common, num_features=4 * colours, num_blocks=3))
            found.append(
                PixelCNNConfig(**common, num_features=9 * colours, num_blocks=1, kernel_size=5, first_kernel_size=5)
            )
            found += [
                GatedPixelCNNConfig(**common, num_features=4 * colours, num_layers=layers, kernel_size=kernel)
                for kernel, layers in ((3, 3), (5, 1), (5, 2))
            ]
    return found


def name(config: ModelConfig) -> str:
    depth = config.num_blocks if isinstance(config, PixelCNNConfig) else config.num_layers
    return f"{type(config).__name__}-{config.image_shape}-K{config.num_levels}-{config.kernel_size}x{depth}"


def model_of(config: ModelConfig, dtype: torch.dtype):
    torch.manual_seed(3)
    model = build_model(config).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "table")):  # zeros would hide a bias that is left out
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def cached_logits(model, levels: Tensor, label: Tensor) -> Tensor:
    """Force images through the cached path; return every logit that it computes on the way."""
    engine = build_engine(model)
    shape = model.config.image_shape
    found = []
    for image, number in zip(levels, label.tolist(), strict=True):
        logits = np.zeros((model.config.num_levels, *shape), engine.dtype)
        known = np.zeros(shape[1:], dtype=bool)
        u = np.zeros(shape)
        state, bias = engine.new_state(), engine.label_bias(number)
        engine.rows(bias, state, image.numpy().copy(), known, u, 1.0, logits, 0, shape[1])
        found.append(torch.from_numpy(logits))
    return torch.stack(found)


@pytest.mark.parametrize("config", configs(), ids=name)
def test_cached_logits_equal_one_full_forward_pass(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    levels = torch.randint(0, config.num_levels, (3, *config.image_shape))
    label = torch.tensor([-1, 0, 2])
    with torch.no_grad():
        expected = model(levels, label)
    torch.testing.assert_close(cached_logits(model, levels, label), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", configs(), ids=name)
def test_sample_equals_naive_in_float64(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    for seed in range(2):  # the second time finds the engine of the first
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(3, *config.image_shape, generator=generator, dtype=torch.float64)
        label = torch.tensor([-1, 0, 2])
        drawing = torch.randint(0, config.num_levels, u.shape, generator=generator)
        observed = torch.rand(3, 1, *config.image_shape[1:], generator=generator) < 0.5
        assert torch.equal(sample(model, u, label), naive_sample(model, u, label))
        assert torch.equal(sample(model, u, temperature=0.7), naive_sample(model, u, temperature=0.7))
        assert torch.equal(sample(model, u, label, 0.0), naive_sample(model, u, label, 0.0))
        completed = sample(model, u, label, drawing=drawing, observed=observed)
        assert torch.equal(completed, naive_sample(model, u, label, drawing=drawing, observed=observed))
        assert torch.equal(completed[observed.expand_as(u)], drawing[observed.expand_as(u)])


@pytest.mark.parametrize(
    "config",
    [
        PixelCNNConfig(image_shape=(1, 12, 12), num_levels=2, num_features=16, num_blocks=4),
        GatedPixelCNNConfig(image_shape=(3, 8, 8), num_levels=256, num_features=24, num_layers=4, kernel_size=5),
    ],
    ids=name,
)
def test_float32_logits_agree_within_rounding_over_the_whole_range(config: ModelConfig) -> None:
    model = model_of(config, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # gates and units far into saturation, too
    levels = torch.randint(0, config.num_levels, (2, *config.image_shape))
    with torch.no_grad():
        expected = model(levels)
    scale = expected.abs().max().item()
    difference = (cached_logits(model, levels, torch.tensor([-1, -1])) - expected).abs().max().item()
    assert difference < 1e-5 * scale


def test_every_float32_difference_lies_at_a_boundary() -> None:
    config = GatedPixelCNNConfig(image_shape=(1, 6, 6), num_levels=16, num_features=8, num_layers=3, kernel_size=3)
    model = model_of(config, torch.float32)
    u = torch.rand(64, 1, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cached, naive = sample(model, u), naive_sample(model, u)
    for i in (cached != naive).flatten(1).any(dim=1).nonzero().flatten().tolist():
        first = int((cached[i] != naive[i]).flatten().nonzero()[0])
        with torch.no_grad():
            logits = model(naive[i : i + 1])[0, :, 0].flatten(1)[:, first].double()
        boundaries = torch.softmax(logits, 0).cumsum(0)
        assert (boundaries - u[i].flatten()[first]).abs().min() < 1e-5


def tiny():
    config = PixelCNNConfig(image_shape=(1, 6, 5), num_levels=3, num_features=4, num_blocks=2)
    return model_of(config, torch.float64), torch.rand(4, 1, 6, 5, generator=torch.Generator().manual_seed(0))


def test_rows_are_handed_out_in_order_and_final() -> None:
    model, u = tiny()
    observed = torch.zeros(4, 1, 6, 5, dtype=torch.bool)
    observed[:2, :, 3:] = True  # two images end early
    drawing = torch.ones(4, 1, 6, 5, dtype=torch.int64)
    rows: list[tuple[int, Tensor]] = []
    levels = sample(
        model, u, drawing=drawing, observed=observed, on_row=lambda row, values: rows.append((row, values.clone()))
    )
    assert [row for row, _ in rows] == list(range(6))
    assert torch.equal(torch.stack([values for _, values in rows], dim=2), levels)
    assert torch.equal(levels, naive_sample(model, u, drawing=drawing, observed=observed))


def test_a_callback_can_stop_between_rows() -> None:
    model, u = tiny()
    seen = []

    def stop(row: int, _: Tensor) -> None:
        seen.append(row)
        if row == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(model, u, on_row=stop)
    assert seen == [0, 1, 2]


def test_changed_weights_are_noticed() -> None:
    model, u = tiny()
    before = sample(model, u)
    with torch.no_grad():
        model.logits.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    after = sample(model, u)
    assert not torch.equal(before, after)
    assert torch.equal(after, naive_sample(model, u))


def test_one_image_does_not_depend_on_its_neighbours() -> None:
    model, u = tiny()
    assert torch.equal(sample(model, u)[2:3], sample(model, u[2:3]))


def test_without_numba_the_naive_sampler_answers_with_one_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, u = tiny()
    expected = sample(model, u)
    monkeypatch.setitem(sys.modules, "pixelcnn.compiled_sampling", None)
    monkeypatch.setattr(fast_sampling, "_notices", set())
    rows = []
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(model, u, on_row=lambda row, _: rows.append(row)), expected)
        sample(model, u)
    assert [record.getMessage() for record in caplog.records] == [
        "sampling without the compiled sampler: numba is not installed"
    ]
    assert rows == list(range(6))


def test_wrong_arguments_are_refused_as_by_the_naive_sampler() -> None:
    model, u = tiny()
    for arguments in ({"u": u[0]}, {"u": u + 1}, {"u": u, "temperature": -1.0}, {"u": u, "drawing": u.long()}):
        with pytest.raises(ValueError, match=r"u |temp|draw") as naive_error:
            naive_sample(model, **arguments)
        with pytest.raises(ValueError, match=r"u |temp|draw") as cached_error:
            sample(model, **arguments)
        assert str(cached_error.value) == str(naive_error.value)
