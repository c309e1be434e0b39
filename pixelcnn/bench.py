"""Time the samplers against fair baselines and against the machine, and count where they differ from the model.

All figures of a table come from one run. A baseline that would take too long is timed on some of its forward passes,
evenly spread over the image, and the table says so. Each baseline gets one thread or all, whichever is faster for it.
"""

import copy
import dataclasses
import gc
import json
import math
import os
import platform
import statistics
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.benchmark.utils.common import set_torch_threads

from pixelcnn.data import replaced
from pixelcnn.likelihood import level_probs
from pixelcnn.models.base import AutoregressiveModel, joint_parameters
from pixelcnn.models.outputs import draw_level
from pixelcnn.models.registry import build_model
from pixelcnn.sampling.cached import cached_sample
from pixelcnn.sampling.fast import engine_name, sample, warm_up
from pixelcnn.sampling.plan import Plan

NAIVE, CROPPED, NAIVE_COMPILED = "naive", "naive, rows so far", "naive, torch.compile"
CACHED_TORCH, CACHED = "cached, torch", "cached, compiled"
SAMPLERS = (NAIVE, CROPPED, NAIVE_COMPILED, CACHED_TORCH, CACHED)


def work_per_pixel(model: AutoregressiveModel) -> tuple[float, int]:
    """Return the multiply-adds that a pixel needs, and how many of them are pixel work: alone in a batch, a pixel reads
    as many weights for them."""
    plan = Plan(model)
    by_row, by_pixel = (
        sum(step.matrix.numel() // step.stride**2 for step in steps if step.matrix is not None)
        for steps in (plan.row_steps, plan.pixel_steps)
    )
    attentions = {step.attention for step in plan.row_steps if step.attention is not None}
    attended = sum(one.num_blocks * one.heads * one.key_features for one in attentions)  # half of them are above
    return by_row + by_pixel + attended, by_pixel


def median_s(work: Callable[[], object], seconds: float) -> float:
    """Return the median time of `work` over at least 3 runs, and as many more as fit into `seconds`."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 100):
        times.append(timeit.timeit(work, setup=gc.enable, number=1))  # as everybody runs it
    return statistics.median(times)


def processor_name() -> str:
    """Return what the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matrix_peak(dtype: torch.dtype = torch.float32) -> float:
    """Measure multiply-adds per second of the best matrix product that torch does, on its current threads."""
    best = 0.0
    for size in (256, 512, 1024):
        a, b = torch.rand(2, size, size).to(dtype)
        best = max(best, size**3 / min(timeit.repeat(partial(torch.mm, a, b), number=1, repeat=10)))
    return best


def cache_bandwidth() -> float:
    """Measure the bytes per second at which one thread's dot product reads half a megabyte, again and again."""
    with set_torch_threads(1):
        a, b = torch.rand(2, 1 << 16)
        return float(a.nbytes + b.nbytes) / min(timeit.repeat(partial(torch.dot, a, b), number=1, repeat=300))


def resized(model: AutoregressiveModel, height: int, width: int) -> AutoregressiveModel:
    """Return the same joint network for another image size: none of its weights depends on it."""
    shape = (model.config.image_shape[0], height, width)
    joint = build_model(dataclasses.replace(model.config.without_context(), image_shape=shape))
    weights = model.state_dict()
    joint.load_state_dict({name: weights[name] for name in joint.state_dict()})
    return joint.eval()


class Timing(NamedTuple):
    """Seconds per image (NaN where there are none), and a note on how they were found."""

    seconds: float
    note: str = ""


@torch.no_grad()
def time_naive(
    model: AutoregressiveModel, batch_size: int, seconds: float, kind: str = NAIVE, passes: int | None = None
) -> Timing:
    """Time one forward pass per sub-pixel: of the whole image, or (CROPPED) of the rows so far: nothing below is read.

    Passes beyond these seconds, or this number, are extrapolated from the others.
    """
    channels, height, width = model.config.image_shape
    levels = torch.zeros(batch_size, channels, height, width, dtype=torch.int64)
    u = torch.rand(batch_size)
    cropped = [resized(model, y + 1, width) for y in range(height)] if kind == CROPPED else []
    network: Any = torch.compile(model, dynamic=False) if kind == NAIVE_COMPILED else model

    def step(place: int) -> None:
        y, x, c = place // (width * channels), place // channels % width, place % channels
        parameters = cropped[y](levels[:, :, : y + 1]) if cropped else network(levels)
        logits = model.output.level_logits(parameters[..., y, x], c, levels[:, :c, y, x])
        levels[:, c, y, x] = draw_level(logits, u, 1.0)

    num = channels * height * width
    trials = {}
    for threads in {1, torch.get_num_threads()}:
        with set_torch_threads(threads):
            step(num // 2)  # compile and warm up
            trials[threads] = max(min(timeit.repeat(partial(step, num // 2), number=1, repeat=2)), 1e-6)
    threads = min(trials, key=trials.__getitem__)
    count = min(num, max(8, int(seconds / trials[threads])), passes or num)
    with set_torch_threads(threads):
        start = time.perf_counter()
        for i in range(count):
            step(int((i + 0.5) * num / count))
        took = (time.perf_counter() - start) * num / count
    note = f"{threads} thread" if threads == 1 else f"{threads} threads"
    return Timing(took / batch_size, note if count == num else f"{note}; extrapolated from {count} of {num} passes")


def time_sampler(name: str, model: AutoregressiveModel, batch_size: int, seconds: float) -> Timing:
    """Time one of SAMPLERS on whole images of random noise."""
    if name == NAIVE:
        return time_naive(model, batch_size, seconds)
    if name in (CROPPED, NAIVE_COMPILED):
        try:
            return time_naive(model, batch_size, seconds, name)
        except Exception as error:  # whatever the compiler lacks here; weights that depend on the image's size
            reason = str(error).strip().partition("\n")[0]  # an assert of its own may say nothing
            return Timing(math.nan, f"skipped: {type(error).__name__}: {reason[:60]}")
    u = torch.rand(batch_size, *model.config.image_shape, generator=torch.Generator().manual_seed(0))
    if name == CACHED and (engine := engine_name(model)) != CACHED:
        return Timing(math.nan, f"skipped: {engine}")
    if name == CACHED:
        return Timing(median_s(lambda: sample(model, u), seconds) / batch_size)
    with set_torch_threads(1):  # more threads make small products slower
        work = partial(cached_sample, model, u)
        once = timeit.timeit(work, setup=gc.enable, number=1)
        took = once if once > seconds else median_s(work, seconds)
    return Timing(took / batch_size, "1 thread" + ("; one run" if once > seconds else ""))


@torch.no_grad()
def count_differences(model: AutoregressiveModel, num_images: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compare sampled images with the model's own conditionals.

    One full forward pass over a finished image gives every sub-pixel's logits given all earlier ones; the level drawn
    from them with the same noise must be the one that was sampled. Where that holds for all sub-pixels, the image is
    the naive sampler's, step by step. `max_distance_to_boundary` is how far `u` lies at most from a boundary of the
    cumulative distribution where levels differ (0 if none do).
    """
    model, generator = copy.deepcopy(model).to(dtype), torch.Generator().manual_seed(1)
    u = torch.rand(num_images, *model.config.image_shape, generator=generator, dtype=torch.float64)
    found = {"num_images": num_images, "num_images_that_differ": 0, "num_levels_that_differ": 0}
    distance = 0.0
    for part, noise in zip(sample(model, u).split(8), u.split(8), strict=True):
        logits = level_probs(model, part).log().movedim(1, -1)  # (B, C, H, W, K)
        wrong = draw_level(logits, noise, 1.0) != part
        found["num_images_that_differ"] += int(wrong.flatten(1).any(dim=1).sum())
        found["num_levels_that_differ"] += int(wrong.sum())
        if wrong.any():
            boundaries = torch.softmax(logits[wrong].double(), dim=-1).cumsum(dim=-1)
            distance = max(distance, float((boundaries - noise[wrong][:, None]).abs().amin(dim=1).max()))
    return {**found, "max_distance_to_boundary": distance}


def bench(
    model: AutoregressiveModel,
    batch_sizes: list[int],
    samplers: list[str],
    seconds: float,
    num_exact: int,
    sides: list[int],
) -> dict[str, Any]:
    """Time some of SAMPLERS on a model in float32 on the CPU, print tables, and return the figures.

    Args:
        seconds: how long to measure each figure, about.
        num_exact: images to compare with the model; 0 for none.
        sides: image sides at which to time a pixel; empty for none.
    """
    channels, height, width = model.config.image_shape
    num_threads, num_pixels = torch.get_num_threads(), height * width
    warm_up_s, engine = warm_up(model), engine_name(model)
    macs, in_order = work_per_pixel(model)
    with set_torch_threads(1):
        peak = matrix_peak()
    bandwidth = cache_bandwidth()
    weights = buffers = 0  # bytes of the compiled sampler: of its weights, and of its buffers for one image
    if engine == CACHED:
        from pixelcnn.sampling.compiled import build_engine

        weights = sum(p.numel() * p.element_size() for p in joint_parameters(model))
        buffers = build_engine(model).fresh.nbytes
    print(
        f"{processor_name()}, {num_threads} threads, torch {torch.__version__}; {type(model).__name__}, "
        f"{sum(p.numel() for p in joint_parameters(model)):,} parameters, images {channels}x{height}x{width}, "
        f"{model.config.num_levels} levels"
    )
    print(f"sampled {engine} (ready after {warm_up_s:.1f} s)")
    print(
        f"a sub-pixel: {macs / channels:,.0f} multiply-adds, {in_order * 4 / channels / 1024:,.0f} KiB of weights read "
        f"in order; in all {weights / 2**20:.2f} MiB of weights, {buffers / 2**20:.2f} MiB of buffers per image"
    )
    print(
        f"measured here, on one thread: {peak * 2 / 1e9:.0f} GFLOP/s of matrix products, reading at "
        f"{bandwidth / 1e9:.0f} GB/s; for one image alone, the weights read in order take "
        f"{in_order * 4 * num_pixels / bandwidth * 1e3:.2f} ms"
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(
            f"load of the last minute: {load:.1f} on {os.cpu_count()} processors, this program's own included; beside "
            "other work times are too long"
        )
    rows: list[dict[str, Any]] = []
    print("batch  sampler                ms/image  to naive to cropped  bound ms  x bound")
    for batch_size in batch_sizes:
        # The work at the measured peak of as many threads as there are images for.
        bound = macs * num_pixels / (peak * min(num_threads, batch_size))
        found: dict[str, float] = {}
        for name in samplers:
            if name == NAIVE_COMPILED and batch_size != batch_sizes[0]:
                continue  # compiling takes long: once will do
            timing = time_sampler(name, model, batch_size, seconds)
            found[name] = timing.seconds
            row = {"batch_size": batch_size, "sampler": name, "note": timing.note, "bound_seconds_per_image": bound}
            rows.append(row | {"seconds_per_image": None if math.isnan(timing.seconds) else timing.seconds})
            ratios = [f"{found[base] / timing.seconds:.1f}x" if base in found else "" for base in (NAIVE, CROPPED)]
            print(
                f"{batch_size:>5}  {name:<20} {timing.seconds * 1e3:>10.2f} {ratios[0]:>9} {ratios[1]:>10} "
                f"{bound * 1e3:>9.2f} {timing.seconds / bound:>7.1f}x" + (f"  ({timing.note})" if timing.note else "")
            )
    result: dict[str, Any] = {
        "processor": processor_name(),
        "num_threads": num_threads,
        "load": load,
        "torch": torch.__version__,
        "model": type(model).__name__,
        "image_shape": list(model.config.image_shape),
        "multiply_adds_per_pixel": macs,
        "weights_read_in_order_per_pixel": in_order,
        "matrix_peak_flops_per_thread": 2 * peak,
        "cache_bandwidth_bytes_per_s": bandwidth,
        "weights_bytes": weights,
        "buffers_bytes_per_image": buffers,
        "warm_up_s": warm_up_s,
        "timings": rows,
    }
    if num_exact:
        result["exactness"] = {}
        for name in ("float64", "float32"):
            counted = result["exactness"][name] = count_differences(model, num_exact, getattr(torch, name))
            images, levels = counted["num_images_that_differ"], counted["num_levels_that_differ"]
            line = f"{name}: {images} of {num_exact} images differ from the naive sampler's, in {levels} levels"
            if levels:
                line += f", each with u within {counted['max_distance_to_boundary']:.0e} of a boundary"
            print(line)
    if sides and engine != CACHED:
        print(f"no image sides are timed: {engine}")
    elif sides:
        result["sides"] = _bench_sides(model, sides, seconds)
    return result


def _bench_sides(model: AutoregressiveModel, sides: list[int], seconds: float) -> list[dict[str, Any]]:
    found = []
    print(f"{'side':>5} {'cached us/pixel':>16} {'naive us/pixel':>15} {'ratio':>9}")
    for side in sides:
        network = resized(model, side, side)
        cached = time_sampler(CACHED, network, 1, seconds).seconds / side**2
        naive, note = time_naive(network, 1, seconds, passes=200)
        naive /= side**2
        found.append({"side": side, "cached_s_per_pixel": cached, "naive_s_per_pixel": naive})
        print(f"{side:>5} {cached * 1e6:>16.2f} {naive * 1e6:>15.0f} {naive / cached:>8.0f}x  (naive {note})")
    return found


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write the figures that `bench` returned; a file is never seen half-written."""
    with replaced(path) as new:
        new.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
