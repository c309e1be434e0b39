"""The compiled cached sampler is the naive one: the same levels, the same logits, only sooner."""

import gc
import itertools
import logging
import os
import sys
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pixelcnn.sampling.compiled as compiled
import pixelcnn.sampling.fast as fast_sampling
from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig, build_model, level_probs, log_prob, naive_sample, sample
from pixelcnn.completion import score_completions
from pixelcnn.config import ModelConfig
from pixelcnn.models.attentive_pixelcnn import AttentivePixelCNNConfig
from pixelcnn.packing.coder import code
from pixelcnn.sampling.fast import compile_in_background, engine_name, set_sampler_threads, warm_up
from tests.core.tiny import in_raster_order, sample_and_score

# Shapes, each with the levels of its images.
IMAGES = [((1, 5, 6), 2), ((1, 5, 6), 5), ((1, 1, 7), 2), ((1, 7, 1), 5), ((3, 4, 5), 2), ((2, 3, 3), 5)]


def configs() -> list[ModelConfig]:
    found: list[ModelConfig] = []
    for shape, num_levels in IMAGES:
        colours = shape[0]
        common = {"image_shape": shape, "num_levels": num_levels, "num_labels": 3}
        found.append(PixelCNNConfig(**common, num_features=4 * colours, num_blocks=3))
        found.append(
            PixelCNNConfig(
                **common, num_features=9 * colours, num_blocks=2, kernel_size=5, first_kernel_size=5, max_dilation=2
            )
        )
        found += [
            GatedPixelCNNConfig(**common, num_features=4 * colours, num_layers=layers, kernel_size=kernel)
            for kernel, layers in ((3, 3), (5, 1), (5, 2))
        ]
        attention = {"attention_every": 1, "num_heads": 2, "key_features": 3, "max_dilation": 2}
        found.append(
            AttentivePixelCNNConfig(**common, **attention, num_features=4 * colours, num_layers=3, kernel_size=3)
        )
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
            if key.endswith(
                ("bias", "table", "context.weight", "enter.weight", "null_value")
            ):  # zeros would hide a term that is left out
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


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
def test_float32_log_probabilities_agree_within_rounding_over_the_whole_range(config: ModelConfig) -> None:
    model = model_of(config, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # gates and units far into saturation, too
    u = torch.rand(2, *config.image_shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    levels, score = sample_and_score(model, u)
    with torch.no_grad():
        torch.testing.assert_close(score().float(), log_prob(model, levels), rtol=1e-5, atol=1e-5)


def test_a_narrow_network_attends_to_what_lies_above_alone() -> None:
    """Keys are looked at a panel at a time, which is wider than all that this network has."""
    attention = {"attention_every": 1, "key_features": 4}
    shape = {"image_shape": (1, 12, 12), "num_levels": 2, "num_features": 4, "num_layers": 3, "kernel_size": 3}
    model = model_of(AttentivePixelCNNConfig(**shape, **attention), torch.float64)
    u = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels, score = sample_and_score(model, u)
    with torch.no_grad():
        torch.testing.assert_close(score(), log_prob(model, levels), rtol=1e-12, atol=0)


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


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The sampler's threads."""
    monkeypatch.setattr(fast_sampling, "_num_threads", request.param)
    num: int = request.param
    return num


def test_threads_of_the_sampler_are_not_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_sampling, "_num_threads", None)
    pools, begin = [], fast_sampling.ThreadPoolExecutor
    monkeypatch.setattr(
        fast_sampling, "ThreadPoolExecutor", lambda max_workers: pools.append(max_workers) or begin(max_workers)
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sample(*tiny())
        set_sampler_threads(3)
        assert torch.get_num_threads() == 1
        sample(*tiny())
    finally:
        torch.set_num_threads(before)
    assert pools == [2, 3]


@pytest.mark.usefixtures("threads")
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


def test_a_thread_that_is_held_up_holds_up_its_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other thread takes all other batches to their ends meanwhile."""
    monkeypatch.setattr(fast_sampling, "_num_threads", 2)
    monkeypatch.setattr(fast_sampling, "MAX_BATCH_IMAGES", 1)
    model, u = tiny()
    warm_up(model)  # or the other thread would wait for a compiler
    done, ended = [], threading.Event()
    advance = compiled.Engine.rows

    def rows(self, state, work, images, temperature, y0, y1) -> None:
        if images[0] == 0 and y0 == 0:
            assert ended.wait(10)
        advance(self, state, work, images, temperature, y0, y1)
        done.append((images[0], y0))
        if {(i, 5) for i in range(1, 4)} <= {*done}:
            ended.set()

    monkeypatch.setattr(compiled.Engine, "rows", rows)
    seen = []
    levels = sample(model, u, on_row=lambda row, _: seen.append((row, len(done))))
    assert torch.equal(levels, naive_sample(model, u))
    assert seen[0] >= (0, 3 * 6 + 1), "no row is handed out before all have it"


@pytest.mark.usefixtures("threads")
def test_what_fails_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_: object) -> None:
        raise MemoryError("of a thread")

    monkeypatch.setattr(compiled.Engine, "rows", rows)
    with pytest.raises(MemoryError, match="of a thread"):
        sample(*tiny(), on_row=lambda *_: None)


@pytest.mark.usefixtures("threads")
def test_a_callback_can_stop_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, u = tiny()
    seen, sampled, events, event, advance = [], [], [], threading.Event, compiled.Engine.rows
    monkeypatch.setattr(threading, "Event", lambda: events.append(event()) or events[-1])

    def rows(self, state, work, images, temperature, y0, y1) -> None:
        if y0 == 4:
            events[0].wait(10)  # that the sampling is stopped
        sampled.append(y0)
        advance(self, state, work, images, temperature, y0, y1)

    def stop(row: int, _: Tensor) -> None:
        seen.append(row)
        if row == 2:
            raise InterruptedError

    monkeypatch.setattr(compiled.Engine, "rows", rows)
    with pytest.raises(InterruptedError):
        sample(model, u, on_row=stop)
    assert seen == [0, 1, 2]
    assert 5 not in sampled, "nothing is sampled for nobody"


def test_nothing_is_compiled_anew_for_a_label_that_is_expanded() -> None:
    model = model_of(configs()[0], torch.float64)
    u = torch.rand(3, *model.config.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, known = sample(model, u, torch.tensor([1, 1, 1])), list(compiled.kernels._rows.signatures)
    assert torch.equal(sample(model, u, torch.tensor(1).expand(3)), expected)
    assert compiled.kernels._rows.signatures == known


def test_nothing_is_compiled_anew_for_images_that_lie_otherwise_in_memory() -> None:
    model = model_of(configs()[-1], torch.float64)
    channels, height, width = model.config.image_shape
    levels = torch.randint(0, model.config.num_levels, (3, channels, width, height)).transpose(2, 3)
    observed = (torch.rand(3, 1, width, height) < 0.5).transpose(2, 3)
    expected = score_completions(model, levels.contiguous(), observed.contiguous())
    known = list(compiled.kernels._rows.signatures)
    assert torch.equal(score_completions(model, levels, observed), expected)
    assert compiled.kernels._rows.signatures == known


def test_changed_weights_are_noticed() -> None:
    model, u = tiny()
    seen = [sample(model, u)]
    model.head.mask.zero_()
    seen.append(sample(model, u))
    with torch.no_grad():
        model.logits.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    seen.append(sample(model, u))
    model.logits.bias = torch.nn.Parameter(model.logits.bias.new_tensor([0.0, 9.0, 0.0]))
    seen.append(sample(model, u))
    model.head.weight.data = torch.zeros_like(model.head.weight)
    model.logits.bias.data = model.logits.bias.new_tensor([0.0, 0.0, 9.0])
    seen.append(sample(model, u))
    assert torch.equal(seen[-1], naive_sample(model, u))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(seen, 2))


def test_changed_weights_of_inference_mode_are_noticed_which_has_no_counters() -> None:
    with torch.inference_mode():
        model, u = tiny()
        before = sample(model, u)
        for weight in model.parameters():
            weight.mul_(-3)
        assert torch.equal(sample(model, u), naive_sample(model, u))
        assert not torch.equal(sample(model, u), before)


def test_no_other_weights_come_to_lie_where_those_of_the_engine_lay() -> None:
    """They would pass for them, as after `load_state_dict(..., assign=True)`, twice between two samples."""
    model, u = tiny()
    values = np.array([9.0, 0.0, 0.0])
    memory = weakref.ref(values)
    model.logits.bias = torch.nn.Parameter(torch.from_numpy(values))
    del values
    sample(model, u)
    model.logits.bias = torch.nn.Parameter(torch.zeros_like(model.logits.bias))
    gc.collect()
    assert memory() is not None
    sample(model, u)
    gc.collect()
    assert memory() is None, "nor is it kept for longer"


@pytest.mark.parametrize("config", [*configs()[::3], *WIDE], ids=name)
def test_not_a_bit_of_an_image_depends_on_how_many_are_sampled_in_step(config: ModelConfig) -> None:
    model = model_of(config, torch.float32)
    u = torch.rand(9, *config.image_shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    label = torch.tensor([-1 if config.num_labels == 0 else i % 4 - 1 for i in range(9)])
    alone = [sample_and_score(model, u[i : i + 1], label[i : i + 1]) for i in range(9)]
    for images in ([8, 1, 5, 0], [2, 7], [6, 4, 3], list(range(9)), [4, 3, 2, 1, 0, 5, 6, 7]):
        levels, score = sample_and_score(model, u[images], label[images])
        nats = score()  # nats tell of the last bit of every logit
        for i, own_levels, own_nats in zip(images, levels, nats, strict=True):
            assert torch.equal(alone[i][0][0], own_levels)
            assert torch.equal(alone[i][1]()[0], own_nats)


@pytest.mark.parametrize("output", [{}, {"output": "logistic_mixture", "num_mixtures": 3}], ids=str)
def test_a_coder_gets_the_models_probabilities_and_says_the_levels(output: dict) -> None:
    shape = (3, 4, 5)
    common = {"image_shape": shape, "num_levels": 6, "num_labels": 2, "num_features": 6}
    model = model_of(GatedPixelCNNConfig(**common, num_layers=2, kernel_size=3, **output), torch.float64)
    engine, levels, labels = compiled.build_engine(model), torch.randint(0, 6, (5, *shape)), [-1, 0, 1, 0, -1]
    order = in_raster_order(levels).int().numpy()  # (B, D)

    def probs_of(images: list[int], start: Tensor, *, says: bool) -> tuple[np.ndarray, Tensor, Tensor]:
        seen: list[np.ndarray] = []

        def exchange(probs: np.ndarray, coded: np.ndarray) -> None:
            here = order[images, len(seen)]
            seen.append(probs.copy())
            if says:
                coded[:] = here
            assert np.array_equal(coded, here)

        start = start.clone()
        nats = code(engine, start, [labels[i] for i in images], exchange)
        return np.stack(seen, axis=1), start, nats  # (B, D, K)

    everyone = list(range(5))
    probs, _, nats = probs_of(everyone, levels, says=False)
    label = torch.tensor(labels)
    assert np.allclose(probs, in_raster_order(level_probs(model, levels, label).detach()), atol=1e-6)
    assert torch.allclose(nats, -log_prob(model, levels, label).detach(), rtol=1e-6)
    heard, said, _ = probs_of(everyone, torch.zeros_like(levels), says=True)
    assert torch.equal(said, levels)
    assert np.array_equal(heard, probs)  # bit for bit
    for i in everyone:
        assert np.array_equal(probs_of([i], levels[i : i + 1], says=False)[0][0], probs[i])

    def fail(probs: np.ndarray, coded: np.ndarray) -> None:
        raise ArithmeticError("no more")

    with pytest.raises(ArithmeticError, match="no more"):
        code(engine, levels.clone(), labels, fail)


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


def notices_of(model, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Sample twice; return what the log says."""
    fast_sampling._log_once.cache_clear()
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
    monkeypatch.setitem(sys.modules, "pixelcnn.sampling.compiled", None)
    model, _ = tiny()
    assert notices_of(model, caplog) == ["sampling cached, in torch: numba is not installed"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("cannot cache function '_rows': no locator available"),
        ImportError("Numba needs NumPy 2.4 or less. Got NumPy 2.5."),
    ],
    ids=["no folder for compiled code", "a newer NumPy"],
)
def test_where_numba_cannot_be_used_the_torch_sampler_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(fast_sampling.importlib, "import_module", fail)
    model, _ = tiny()
    assert notices_of(model, caplog) == [f"sampling cached, in torch: {error}"]


def test_weights_of_half_precision_are_not_for_the_compiled_sampler() -> None:
    assert engine_name(tiny()[0].bfloat16()) == "cached, in torch: the weights are torch.bfloat16"


def test_no_images_are_no_trouble() -> None:
    model, _ = tiny()
    u, rows = torch.rand(0, *model.config.image_shape, dtype=torch.float64), []
    assert sample(model, u, on_row=lambda row, _: rows.append(row)).shape == u.shape
    assert rows == list(range(u.shape[2]))


def test_while_the_sampler_is_compiled_aside_it_samples_in_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_compiled, commands = threading.Event(), []

    def run(command: list[str], **_: Any) -> None:
        commands.append(command)
        is_compiled.wait()

    monkeypatch.setattr("pixelcnn.sampling.fast.subprocess.run", run)
    model, u = tiny()
    expected = naive_sample(model, u)
    thread = compile_in_background()
    try:
        said = ["sampling cached, in torch: the compiled sampler is not ready yet"]
        assert notices_of(model, caplog) == said
        assert torch.equal(sample(model, u), expected)
    finally:
        is_compiled.set()
        thread.join()
    assert commands == [["nice", sys.executable, "-m", "pixelcnn", "compile"]]
    assert engine_name(model) == "cached, compiled"
    assert torch.equal(sample(model, u), expected)


def test_warm_up_compiles_and_lays_out_without_a_sample(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, u = tiny()
    with caplog.at_level(logging.INFO):
        assert warm_up(model) > 0
    assert "sampling cached, compiled; ready after" in caplog.text
    monkeypatch.setattr("pixelcnn.sampling.compiled.build_engine", None)  # it is there already
    assert torch.equal(sample(model, u), naive_sample(model, u))


@pytest.mark.parametrize("config", WIDE, ids=name)
def test_networks_wider_than_a_vector_register_are_sampled_alike(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
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
@pytest.mark.repeated
def test_many_images_on_two_threads_hold_no_difference(config: ModelConfig) -> None:
    model, num = model_of(config, torch.float64), int(os.environ.get("PIXELCNN_TEST_IMAGES", 60))
    u = torch.rand(num, *config.image_shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = naive_sample(model, u)
    torch.set_num_threads(2)
    try:
        assert torch.equal(sample(model, u), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("config", [*configs(), *WIDE], ids=name)
def test_the_log_probability_of_its_steps_is_that_of_the_finished_image(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    label = torch.tensor([0, -1, 2]) if config.num_labels else None
    u = torch.rand(3, *config.image_shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    levels, score = sample_and_score(model, u, label)
    with torch.no_grad():
        torch.testing.assert_close(score(), log_prob(model, levels, label), rtol=0, atol=1e-9)


def test_keys_of_known_rows_far_above_are_there():
    config = AttentivePixelCNNConfig(image_shape=(1, 14, 5), num_levels=3, num_features=4, num_layers=3, kernel_size=3)
    model = model_of(config, torch.float64)
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(8, 1, 14, 5, generator=generator, dtype=torch.float64)
    drawing = torch.randint(0, 3, u.shape, generator=generator)
    observed = torch.zeros(8, 1, 14, 5, dtype=torch.bool)
    observed[:, :, :12] = True
    expected = naive_sample(model, u, drawing=drawing, observed=observed)
    assert torch.equal(sample(model, u, drawing=drawing, observed=observed), expected)
