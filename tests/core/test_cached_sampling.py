"""The cached sampler in torch is the naive one: the same levels, the same logits."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pixelcnn.sampling.cached as cached_sampling
from pixelcnn import PixelCNNConfig, naive_sample
from pixelcnn.config import ModelConfig
from pixelcnn.sampling.cached import cached_sample
from tests.core.test_fast_sampling import configs, model_of, name


@pytest.mark.parametrize("config", configs(), ids=name)
def test_levels_equal_the_naive_ones(config: ModelConfig) -> None:
    model = model_of(config, torch.float64)
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(3, *config.image_shape, generator=generator, dtype=torch.float64)
    label = torch.tensor([-1, 0, 2])
    assert torch.equal(cached_sample(model, u, label), naive_sample(model, u, label))
    drawing = torch.randint(0, config.num_levels, u.shape, generator=generator)
    observed = torch.rand(3, 1, *config.image_shape[1:], generator=generator) < 0.5
    arguments = {"temperature": 0.7, "drawing": drawing, "observed": observed}
    assert torch.equal(cached_sample(model, u, label, **arguments), naive_sample(model, u, label, **arguments))
    assert torch.equal(cached_sample(model, u, temperature=0.0), naive_sample(model, u, temperature=0.0))


def tiny():
    config = PixelCNNConfig(image_shape=(1, 6, 5), num_levels=3, num_features=4, num_blocks=2, num_labels=2)
    return model_of(config, torch.float64), torch.rand(5, 1, 6, 5, generator=torch.Generator().manual_seed(0))


def test_a_large_batch_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    model, u = tiny()
    monkeypatch.setattr(cached_sampling, "MAX_BATCH", 2)
    sizes = []
    sampler = cached_sampling._RowSampler
    monkeypatch.setattr(
        cached_sampling, "_RowSampler", lambda m, canvas: (sizes.append(len(canvas.u)), sampler(m, canvas))[1]
    )
    label = torch.tensor([0, 1, -1, 0, 1])
    assert torch.equal(cached_sample(model, u, label), naive_sample(model, u, label))
    assert sizes == [2, 2, 1]


def test_rows_are_handed_out_in_order_and_can_stop() -> None:
    model, u = tiny()
    observed = torch.zeros(5, 1, 6, 5, dtype=torch.bool)
    observed[:, :, 4:] = True
    arguments = {"drawing": torch.ones(5, 1, 6, 5, dtype=torch.int64), "observed": observed}
    rows: list[Tensor] = []
    levels = cached_sample(model, u, **arguments, on_row=lambda row, values: rows.append(values.clone()))
    assert torch.equal(torch.stack(rows, dim=2), levels)
    assert torch.equal(levels, naive_sample(model, u, **arguments))

    seen = []

    def stop(row: int, _: Tensor) -> None:
        seen.append(row)
        if row == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        cached_sample(model, u, on_row=stop)
    assert seen == [0, 1, 2]
    seen.clear()
    cached_sample(model, u[:0], on_row=lambda row, _: seen.append(row))
    assert seen == [*range(6)], "also of no image"


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: the calls of some work, to be made again on the same memory, without their Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.num_replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        self.num_replays += 1
        if self.num_replays == 1:
            return  # recording has done the work once; a graph's capture does not
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("config", configs(), ids=name)
def test_a_captured_row_draws_every_other_row(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders: list[Recorder] = []

    def record(work, device):
        recorders.append(Recorder())
        with recorders[-1]:
            work()
        return recorders[-1].replay

    model = model_of(config, torch.float64)
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(3, *config.image_shape, generator=generator, dtype=torch.float64)
    drawing = torch.randint(0, config.num_levels, u.shape, generator=generator)
    observed = torch.rand(3, 1, *config.image_shape[1:], generator=generator) < 0.3
    observed[:, :, -1] = False
    arguments = (torch.tensor([-1, 0, 2]), 0.7, drawing, observed)
    monkeypatch.setattr(cached_sampling, "_capture", record)
    assert torch.equal(cached_sample(model, u, *arguments), naive_sample(model, u, *arguments))
    assert [r.num_replays for r in recorders] == [config.image_shape[1] - 2] * (config.image_shape[1] > 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_captured_rows_are_the_naive_ones(caplog: pytest.LogCaptureFixture) -> None:
    for config in configs():
        model = model_of(config, torch.float64).cuda()
        u = torch.rand(3, *config.image_shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).cuda()
        assert torch.equal(cached_sample(model, u), naive_sample(model, u)), name(config)
    assert "without a CUDA graph" not in caplog.text


def test_bfloat16_weights_are_sampled_too() -> None:
    model, u = tiny()
    levels = cached_sample(model.bfloat16(), u)
    assert levels.shape == u.shape
    assert sorted(levels.unique().tolist()) == list(range(model.config.num_levels))
    assert torch.equal(levels, cached_sample(model, u))
