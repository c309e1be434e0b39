"""The sampler that callers use: the same function of (model, u) as `naive_sample`, by the fastest way at hand.

On the CPU that is the compiled cached sampler; elsewhere, or without numba, the cached one in torch. An architecture
that neither knows is sampled naively.
"""

import importlib
import logging
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pixelcnn.cached_sampling import OnRow, cached_sample, has_cache
from pixelcnn.model import AutoregressiveModel
from pixelcnn.sampling import naive_sample, prepare_canvas, sample_in_parts

if TYPE_CHECKING:
    from pixelcnn.compiled_sampling import Engine

logger = logging.getLogger(__name__)

MAX_IN_STEP = 4  # images that a thread samples together

_engines: "weakref.WeakKeyDictionary[AutoregressiveModel, tuple[Any, Engine]]" = weakref.WeakKeyDictionary()
_notices: set[str] = set()


def engine_name(model: AutoregressiveModel) -> str:
    """Return how `sample` samples this model, and why no faster: a sentence's end for logs."""
    parameter = next(model.parameters())
    if not has_cache(model):
        return f"naively: there is no cached sampler for {type(model).__name__}"
    if parameter.device.type != "cpu":
        return f"cached, in torch: the model is on {parameter.device.type}"
    if parameter.dtype not in (torch.float32, torch.float64):
        return f"cached, in torch: the weights are {parameter.dtype}"
    try:
        importlib.import_module("pixelcnn.compiled_sampling")
    except ImportError:
        return "cached, in torch: numba is not installed"
    return "cached, compiled"


def _engine_of(model: AutoregressiveModel) -> "Engine":
    """Return the compiled engine with the model's present weights."""
    from pixelcnn.compiled_sampling import build_engine

    # Training changes weights in place: their version counters tell.
    parameters = list(model.parameters())
    key = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters]
    known = _engines.get(model)
    if known is None or known[0] != key:
        known = (key, build_engine(model))
        _engines[model] = known
    return known[1]


def _choose(model: AutoregressiveModel) -> str:
    """Return `engine_name`'s first word or two; say once in the log why it is not the compiled one."""
    name = engine_name(model)
    if name not in _notices:
        _notices.add(name)
        level = logging.DEBUG if name == "cached, compiled" else logging.WARNING
        logger.log(level, "sampling %s", name)
    return name.split(":")[0]


def warm_up(model: AutoregressiveModel) -> float:
    """Compile the model's sampler and lay out its weights, so that no first user waits for it.

    The compiled code is kept on disk, for the next process.

    Returns:
        The seconds it took: some the first time on a machine, less than one later.
    """
    start = time.perf_counter()
    if _choose(model) == "cached, compiled":
        shape = model.config.image_shape
        u = torch.zeros(1, *shape, dtype=torch.float64)
        levels = torch.zeros(1, *shape, dtype=torch.int64)
        missing = torch.zeros(
            1, *shape[1:], dtype=torch.bool
        )  # all is known: the network that reads it is compiled, too
        for network in (model, model.completer):
            if network is not None:
                _sample_compiled(network, u, None, 1.0, levels, missing, None)
    took = time.perf_counter() - start
    logger.info("sampling %s; ready after %.1f s", engine_name(model), took)
    return took


@torch.no_grad()
def sample(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
    on_row: OnRow | None = None,
) -> Tensor:
    """Sample images in raster order: the arguments and the result are those of `naive_sample`.

    Equal to it in float64; in float32 a level can differ where `u` lies within rounding of a boundary between two.

    Args:
        on_row: called with each finished row, (B, C, W), in order; what it raises stops the sampling. (For an
            architecture without a cached sampler it is called for all rows at the end.)

    Returns:
        (B, C, H, W) int64 levels in [0, K).

    Raises:
        ValueError: a shape, dtype or range differs from what `naive_sample` asks for.
    """
    return sample_and_score(model, u, label, temperature, drawing, observed, on_row)[0]


@torch.no_grad()
def sample_and_score(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
    on_row: OnRow | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sample as `sample` does; return also what the compiled sampler knows then: how probable each image was.

    Returns:
        (B, C, H, W) int64 levels; and (B,) float64 nats, the log-probability of the missing sub-pixels at temperature
        1, from the logits that they were drawn from. None in place of it from the other samplers.
    """
    chosen = _choose(model)
    if chosen == "cached, in torch":
        return cached_sample(model, u, label, temperature, drawing, observed, on_row), None
    if chosen == "naively":
        levels = naive_sample(model, u, label, temperature, drawing, observed)
        for row in range(u.shape[2] if on_row is not None else 0):
            on_row(row, levels[:, :, row])  # type: ignore[misc]
        return levels, None
    levels, missing = prepare_canvas(model, u, label, temperature, drawing, observed)
    if model.completer is not None and drawing is not None and observed is not None:
        parts = model.networks(observed)
        if len(parts) > 1:
            scores: list[Tensor] = []

            def sample_part(*arguments: Any, **named: Any) -> Tensor:
                levels, log_probs = sample_and_score(*arguments, **named)
                assert log_probs is not None
                scores.append(log_probs)
                return levels

            levels = sample_in_parts(sample_part, parts, u, label, temperature, drawing, observed, on_row)
            return levels, torch.cat(scores)[torch.cat([index for _, index in parts]).argsort()]
        model = parts[0][0]
    levels = levels.contiguous()
    return levels, _sample_compiled(model, u, label, temperature, levels, missing, on_row)


def _one_of_each(keys: Sequence[Hashable]) -> list[int]:
    """Return a place of each key, once where several are equal."""
    return list({key: i for i, key in enumerate(keys)}.values())


def _contexts(
    engine: "Engine",
    drawings: list[Hashable],
    levels: Tensor,
    missing: Tensor,
    for_each: Callable[[Any, list[Any]], None],
) -> list[Any]:
    """Return the map of each image's drawing, or None where nothing is to be added; equal drawings share one.

    Args:
        drawings: a key of each image's drawing, equal where the drawings are.
        levels: (B, C, H, W) int64, 0 where missing.
        missing: (B, H, W) bool.
        for_each: calls a function with each thing of a list.
    """
    read, known = engine.context, (~missing).contiguous().numpy()
    if read is None:
        return [None] * len(drawings)
    made: dict[Hashable, Any] = {}

    def make(i: int) -> None:
        made[drawings[i]] = read(levels[i].numpy(), known[i]) if known[i].any() else None

    for_each(make, _one_of_each(drawings))
    return [made[key] for key in drawings]


def _in_step(begins: list[int], stops: list[int], num_threads: int) -> list[tuple[list[int], int, int]]:
    """Divide images into groups that are sampled in step: those that begin with the same row.

    There are as many groups as keep all threads at work, so that one thread that is held up does not hold up all.

    Args:
        begins: the first row to be sampled of each image.
        stops: the row after the last one.

    Returns:
        Of each group the images, the first row and the row after the last one.
    """
    groups = []
    for start, members in groupby(sorted(range(len(begins)), key=lambda i: (begins[i], stops[i])), begins.__getitem__):
        images = list(members)
        num_groups = num_threads * math.ceil(len(images) / num_threads / MAX_IN_STEP)
        for part in np.array_split(images, min(num_groups, len(images))):
            groups.append((part.tolist(), start, max(stops[i] for i in part)))
    return groups


def _sample_compiled(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None,
    temperature: float,
    levels: Tensor,
    missing: Tensor,
    on_row: OnRow | None,
) -> Tensor:
    """Sample what is missing in place, images in parallel: the compiled code runs without Python's lock.

    Args:
        levels: (B, C, H, W) int64, contiguous; 0 where missing.
        missing: (B, H, W) bool.

    Returns:
        (B,) float64 nats, the log-probability of what was missing.
    """
    engine = _engine_of(model)
    num_threads = max(1, min(torch.get_num_threads(), len(u)))
    with ThreadPoolExecutor(max_workers=num_threads) as pool:

        def for_each(work: Callable[[Any], object], things: list[Any]) -> None:
            if num_threads == 1 or len(things) <= 1:
                for thing in things:
                    work(thing)
            else:
                list(pool.map(work, things))

        labels = [-1] * len(u) if label is None else label.tolist()
        drawings: list[Hashable] = [
            (image.numpy().tobytes(), hole.numpy().tobytes()) for image, hole in zip(levels, missing, strict=True)
        ]
        contexts = _contexts(engine, drawings, levels, missing, for_each)
        work, nats = engine.new_work(levels, missing, u, labels, contexts)

        def sample_rows(state: Any, images: list[int], start: int, stop: int) -> None:
            engine.rows(state, work, np.array(images), float(temperature), start, stop)

        # Rows below the last missing pixel need no work.
        holes = missing.any(dim=2).numpy()
        stops = [int(hole.nonzero()[0].max(initial=-1)) + 1 for hole in holes]
        # Candidates of one drawing share the state after the rows in which nothing is missing.
        keys = list(zip(labels, drawings, strict=True))
        copies = Counter(keys)
        begins = [int(hole.argmax()) if copies[key] > 1 else 0 for hole, key in zip(holes, keys, strict=True)]
        known_rows: dict[Any, Any] = {}

        def sample_known_rows(i: int) -> None:
            known_rows[keys[i]] = engine.new_state(1)
            sample_rows(known_rows[keys[i]], [i], 0, begins[i])

        def begin(images: list[int]) -> Any:
            """Return the buffers of images that all begin with the same row."""
            if begins[images[0]] > 0:
                return engine.joined([known_rows[keys[i]] for i in images])
            return engine.new_state(len(images))

        for_each(sample_known_rows, [i for i in _one_of_each(keys) if begins[i] > 0])
        groups = _in_step(begins, stops, num_threads)
        if on_row is None:
            # Buffers live while their images are sampled: memory does not grow with the batch.
            for_each(lambda group: sample_rows(begin(group[0]), *group), groups)
            return -nats
        states = [begin(images) for images, _, _ in groups]
        for row in range(levels.shape[2]):

            def sample_row(g: int, y: int = row) -> None:
                sample_rows(states[g], groups[g][0], y, y + 1)

            for_each(sample_row, [g for g, (_, start, stop) in enumerate(groups) if start <= row < stop])
            on_row(row, levels[:, :, row])
    return -nats
