"""The compiled cached sampler is the naive one: the same levels, the same logits, only sooner."""

import logging
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import pixelcnn.fast_sampling as fast_sampling
from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig, build_model, log_prob, naive_sample, sample
from pixelcnn.compiled_sampling import build_engine
from pixelcnn.config import ModelConfig
from pixelcnn.fast_sampling import warm_up
from pixelcnn.model import AutoregressiveModel

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


WIDE = [
    PixelCNNConfig(image_shape=(1, 5, 9), num_levels=256, num_features=40, num_blocks=2),
    PixelCNNConfig(image_shape=(3, 4, 6), num_levels=40, num_features=57, num_blocks=2, kernel_size=5),
    GatedPixelCNNConfig(image_shape=(1, 5, 9), num_levels=256, num_features=40, num_layers=2, kernel_size=7),
    GatedPixelCNNConfig(image_shape=(3, 4, 6), num_levels=33, num_features=57, num_layers=2, kernel_size=5),
]


def name(config: ModelConfig) -> str:
    depth = config.num_blocks if isinstance(config, PixelCNNConfig) else config.num_layers
    return f"{type(config).__name__}-{config.image_shape}-K{config.num_levels}-{config.kernel_size}x{depth}"


def model_of(config: ModelConfig, dtype: torch.dtype):
    torch.manual_seed(3)
    model = build_model(config).to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("bias", "table", "context.weight")):  # zeros would hide a term that is left out
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def cached_logits(model, levels: Tensor, label: Tensor, contexts: list | None = None) -> Tensor:
    """Force images through the cached path, in step; return every logit that it computes on the way."""
    engine, num = build_engine(model), len(levels)
    _, height, width = model.config.image_shape
    logits = torch.zeros(num, model.config.num_levels, *levels.shape[1:], dtype=model.head.weight.dtype)
    known = torch.zeros(num, height, width, dtype=torch.bool)
    contexts = contexts or [None] * num
    work, _ = engine.new_work(levels.clone(), known, torch.zeros(levels.shape), label.tolist(), contexts, logits)
    engine.rows(engine.new_state(num), work, np.arange(num), 1.0, 0, height)
    return logits


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


@pytest.mark.parametrize("config", [*configs()[::3], *WIDE], ids=name)
def test_not_a_bit_of_an_image_depends_on_how_many_are_sampled_in_step(config: ModelConfig) -> None:
    model = model_of(config, torch.float32)
    engine, (_, height, width) = build_engine(model), config.image_shape
    levels = torch.randint(0, config.num_levels, (9, *config.image_shape))
    label = [-1 if config.num_labels == 0 else i % 4 - 1 for i in range(9)]

    def logits_of(steps: list[list[int]]) -> Tensor:
        logits = torch.zeros(9, config.num_levels, *config.image_shape)
        known = torch.zeros(9, height, width, dtype=torch.bool)
        work, _ = engine.new_work(levels.clone(), known, torch.zeros(levels.shape), label, [None] * 9, logits)
        for images in steps:
            engine.rows(engine.new_state(len(images)), work, np.array(images), 1.0, 0, height)
        return logits

    alone = logits_of([[i] for i in range(9)])
    for steps in ([[8, 1, 5], [0, 2], [7, 6, 4, 3]], [list(range(9))], [[4, 3, 2, 1, 0], [5, 6, 7, 8]]):
        assert torch.equal(logits_of(steps), alone)


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("kind", [PixelCNNConfig, GatedPixelCNNConfig])
def test_what_a_known_row_leaves_out_nobody_misses(kind: type, kernel_size: int) -> None:
    depth = {"num_blocks": 2} if kind is PixelCNNConfig else {"num_layers": 3}
    config = kind(image_shape=(1, 14, 5), num_levels=3, num_features=4, kernel_size=kernel_size, **depth)
    model = model_of(config, torch.float64)
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(28, 1, 14, 5, generator=generator, dtype=torch.float64)
    drawing = torch.randint(0, 3, u.shape, generator=generator)
    observed = torch.zeros(28, 1, 14, 5, dtype=torch.bool)
    for i in range(14):
        observed[2 * i, :, :i] = True  # the first rows
        observed[2 * i + 1, :, :i] = observed[2 * i + 1, :, :, i % 5 :] = True  # and all to the right of a column
    expected = naive_sample(model, u, drawing=drawing, observed=observed)
    assert torch.equal(sample(model, u, drawing=drawing, observed=observed), expected)
    twice = [x.repeat_interleave(2, dim=0) for x in (u, drawing, observed)]
    together = sample(model, twice[0], drawing=twice[1], observed=twice[2])
    assert torch.equal(together, expected.repeat_interleave(2, dim=0))


def notices_of(model, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sample twice; return what the log says."""
    monkeypatch.setattr(fast_sampling, "_notices", set())
    u = torch.rand(2, *model.config.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows: list[int] = []
    with caplog.at_level(logging.WARNING):
        assert torch.equal(sample(model, u, on_row=lambda row, _: rows.append(row)), naive_sample(model, u))
        sample(model, u)
    assert rows == list(range(u.shape[2]))
    return [record.getMessage() for record in caplog.records]


def test_without_numba_the_torch_sampler_answers_with_one_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pixelcnn.compiled_sampling", None)
    monkeypatch.setattr(fast_sampling, "naive_sample", None)
    model, _ = tiny()
    assert notices_of(model, caplog, monkeypatch) == ["sampling cached, in torch: numba is not installed"]


def test_an_unknown_architecture_is_sampled_naively_with_one_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = tiny()

    class Other(AutoregressiveModel):
        features = type(model).features

    model.__class__ = Other
    expected = ["sampling naively: there is no cached sampler for Other"]
    assert notices_of(model, caplog, monkeypatch) == expected


def test_warm_up_compiles_and_lays_out_without_a_sample(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, u = tiny()
    with caplog.at_level(logging.INFO):
        assert warm_up(model) > 0
    assert "sampling cached, compiled; ready after" in caplog.text
    monkeypatch.setattr("pixelcnn.compiled_sampling.build_engine", None)  # it is there already
    assert torch.equal(sample(model, u), naive_sample(model, u))


@pytest.mark.parametrize("config", WIDE, ids=name)
def test_networks_wider_than_a_vector_register_are_sampled_alike(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    levels = torch.randint(0, config.num_levels, (2, *config.image_shape))
    with torch.no_grad():
        expected = model(levels)
    torch.testing.assert_close(cached_logits(model, levels, torch.tensor([-1, -1])), expected, rtol=0, atol=1e-10)
    u = torch.rand(2, *config.image_shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(sample(model, u), naive_sample(model, u))


@pytest.mark.parametrize("num_levels", [2, 3, 10, 256])
def test_noise_at_the_extremes_gives_the_naive_levels(num_levels: int) -> None:
    config = PixelCNNConfig(image_shape=(1, 3, 4), num_levels=num_levels, num_features=4, num_blocks=1)
    model = model_of(config, torch.float64)
    for value in (0.0, 1e-300, 2.0**-53, 0.5, 1 - 2.0**-24, 1 - 2.0**-53):
        u = torch.full((1, 1, 3, 4), value, dtype=torch.float64)
        # Cold enough for probabilities that are not above 0 any more: a level of such a one is never drawn.
        for temperature in (1e-300, 1e-3, 3e-3, 0.1, 1.0, 50.0):
            expected = naive_sample(model, u, None, temperature)
            assert torch.equal(sample(model, u, None, temperature), expected), (value, temperature)


@pytest.mark.parametrize(
    "config",
    [
        PixelCNNConfig(image_shape=(1, 6, 6), num_levels=2, num_features=8, num_blocks=2),
        GatedPixelCNNConfig(image_shape=(1, 6, 6), num_levels=16, num_features=8, num_layers=2, kernel_size=5),
        GatedPixelCNNConfig(image_shape=(3, 4, 4), num_levels=16, num_features=6, num_layers=2, kernel_size=3),
    ],
    ids=name,
)
def test_a_thousand_images_on_two_threads_hold_no_difference(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    u = torch.rand(1000, *config.image_shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = naive_sample(model, u)
    torch.set_num_threads(2)
    try:
        assert torch.equal(sample(model, u), expected)
    finally:
        torch.set_num_threads(1)


def test_the_log_probability_of_its_steps_is_that_of_the_finished_image() -> None:
    config = GatedPixelCNNConfig(
        image_shape=(3, 4, 5), num_levels=4, num_features=6, num_layers=2, kernel_size=3, num_labels=3
    )
    model = model_of(config, torch.float64)
    label = torch.tensor([0, -1, 2])
    u = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    engine = build_engine(model)
    levels, missing = torch.zeros(3, 3, 4, 5, dtype=torch.int64), torch.ones(3, 4, 5, dtype=torch.bool)
    logits = torch.zeros(3, 4, 3, 4, 5, dtype=torch.float64)  # as they are when a level is drawn from them
    work, nats = engine.new_work(levels, missing, u, label.tolist(), [None] * 3, logits)
    engine.rows(engine.new_state(3), work, np.arange(3), 1.0, 0, 4)
    total = torch.log_softmax(logits, dim=1).gather(1, levels[:, None]).sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(-nats, total, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(total, log_prob(model, levels, label), rtol=0, atol=1e-9)


def test_wrong_arguments_are_refused_as_by_the_naive_sampler() -> None:
    model, u = tiny()
    for arguments in ({"u": u[0]}, {"u": u + 1}, {"u": u, "temperature": -1.0}, {"u": u, "drawing": u.long()}):
        with pytest.raises(ValueError, match=r"u |temp|draw") as naive_error:
            naive_sample(model, **arguments)
        with pytest.raises(ValueError, match=r"u |temp|draw") as cached_error:
            sample(model, **arguments)
        assert str(cached_error.value) == str(naive_error.value)
