"""Time a step of the trainer against the plain training loop of the same network, and against the machine.

The plain loop is what one writes first: float32, contiguous images, kernels stored whole and multiplied by their
masks, Adam. All are timed in turn, step by step in one run, so that other work on the machine slows all alike.
"""

import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typer import Option

from benchmarks.command import command
from pixelcnn.bench import matrix_peak, processor_name, resized, work_per_pixel
from pixelcnn.checkpoint import load_checkpoint
from pixelcnn.data import Dataset
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.layers import MaskedConv2d
from pixelcnn.training import TrainConfig, Trainer
from pixelcnn.training.config import PRECISIONS

PLAIN = "plain loop: float32, contiguous, whole kernels"
TRAINERS: dict[str, dict[str, Any]] = {  # each by its settings
    "this trainer, float32": {"precision": "float32"},
    "this trainer, float32, compiled": {"precision": "float32", "compiled": True},
    "this trainer, bfloat16 autocast": {"precision": "bfloat16"},
}


class _WholeKernel(MaskedConv2d):
    """The same convolution with its kernel stored whole, zeros right and below included, on contiguous images."""

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, _ = (size // self.spacing for size in self.padding)
        side = max(left, right)
        kernel = F.pad(self.weight * self.mask, (side - left, side - right, 0, top))
        padding = (top * self.spacing, side * self.spacing)
        return F.conv2d(x.contiguous(), kernel, self.bias, padding=padding, dilation=self.spacing)


def plain_network(model: AutoregressiveModel) -> AutoregressiveModel:
    """Return a copy of a model that computes the same function with whole kernels."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, MaskedConv2d):
            module.__class__ = _WholeKernel
    return model


def plain_step(model: AutoregressiveModel, optimizer: torch.optim.Optimizer, levels: Tensor) -> None:
    """Take a step of the plain loop."""
    optimizer.zero_grad()
    parameters = model(levels)
    is_softmax = model.config.output == "categorical"
    loss = F.cross_entropy(parameters, levels) if is_softmax else -model.output.log_prob(parameters, levels).mean()
    torch.autograd.backward(loss)
    optimizer.step()


def bench_training(model: AutoregressiveModel, batch_size: int, num_rounds: int) -> dict[str, float]:
    """Print and return images per second, by name, with ratios to the plain loop and shares of the matrix peak.

    Copies of the joint model are trained on random images: time does not depend on what they show. Of the rounds, steps
    of each loop, the median counts.
    """
    model = resized(model, *model.config.image_shape[1:])  # the plain loop shows it no drawings
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, *config.image_shape)
    images = torch.randint(config.num_levels, shape, generator=generator).to(torch.uint8)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    data = Dataset(
        name="random",
        num_levels=config.num_levels,
        protocol="random",
        label_names=[str(i) for i in range(config.num_labels)],
        images=dict.fromkeys(("train", "validation", "test"), images),
        labels=dict.fromkeys(("train", "validation", "test"), labels),
    )
    plain = plain_network(model).train()
    steps: dict[str, Callable[[], object]] = {
        PLAIN: partial(plain_step, plain, torch.optim.Adam(plain.parameters(), lr=1e-4), images.long())
    }
    settings = TrainConfig(batch_size=batch_size, learning_rate=1e-4, max_epochs=1e6)
    for name, changed in TRAINERS.items():
        trained = copy.deepcopy(model).train()
        steps[name] = Trainer(trained, data, dataclasses.replace(settings, **changed)).train_step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - start)
    speed = {name: batch_size / statistics.median(taken) for name, taken in times.items()}
    peaks = {precision: matrix_peak(getattr(torch, precision)) for precision in PRECISIONS}
    # Forward once, backward twice; only what the masks let through is work.
    work = 3 * work_per_pixel(model)[0] * config.image_shape[1] * config.image_shape[2]
    print(f"{processor_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {batch_size}")
    print(f"{'':48} {'images/s':>9} {'ratio':>6} {'of matrix peak':>15}")
    for name, value in speed.items():
        share = work * value / peaks[TRAINERS.get(name, {}).get("precision", "float32")]
        print(f"{name:48} {value:9.1f} {value / speed[PLAIN]:5.2f}x {share:15.0%}")
    return speed


def main(
    checkpoint: Annotated[str, Option()],
    batch_size: Annotated[int, Option(min=1)] = 32,
    rounds: Annotated[int, Option(help="steps of each loop; the median counts", min=1)] = 20,
    threads: Annotated[int | None, Option(help="torch's own choice if left out", min=1)] = None,
) -> None:
    """Time the steps of a checkpoint's training."""
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.manual_seed(0)
    bench_training(load_checkpoint(checkpoint)[0], batch_size, rounds)


if __name__ == "__main__":
    sys.exit(command(main))
