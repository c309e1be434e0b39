"""The sampler that callers use: the same function of (model, u) as `naive_sample`, by the fastest way at hand.

On the CPU that is the compiled cached sampler; elsewhere, or without numba, the cached one in torch.
"""

import importlib
import logging
import math
import queue
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pixelcnn.config import ModelConfig
from pixelcnn.models.base import OTHER_NETWORKS, AutoregressiveModel, joint_parameters
from pixelcnn.models.layers import shift_down
from pixelcnn.sampling import cached
from pixelcnn.sampling.naive import Canvas, OnRow, new_canvas, sample_by_network

if TYPE_CHECKING:
    from pixelcnn.sampling.compiled import Engine

logger = logging.getLogger(__name__)

MAX_BATCH_IMAGES = 4  # that a thread samples as one batch
_NOT_IN_ENGINE = {*OTHER_NETWORKS, "context_network"}  # parts of a model whose weights its engine does not have

# Of each model what its weights were told by, the engine, and the memory of those weights: no others can lie there.
_engines: "weakref.WeakKeyDictionary[AutoregressiveModel, tuple[Any, Engine, Any]]" = weakref.WeakKeyDictionary()
_num_threads: int | None = None  # of the sampler; None: as many as torch has
_compiling: threading.Thread | None = None  # compiles the sampler in the background


def engine_name(model: AutoregressiveModel) -> str:
    """Return `cached, compiled`, or `cached, in torch: ` and the reason: callers compare it, logs show it."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        return f"cached, in torch: the model is on {parameter.device.type}"
    if parameter.dtype not in (torch.float32, torch.float64):
        return f"cached, in torch: the weights are {parameter.dtype}"
    if reason := what_compiling_lacks():
        return f"cached, in torch: {reason}"
    if _compiling is not None and _compiling.is_alive() and threading.current_thread() is not _compiling:
        return "cached, in torch: the compiled sampler is not ready yet"
    return "cached, compiled"


def what_compiling_lacks() -> str | None:
    """Return why nothing can be compiled on this machine; None if it can."""
    try:
        importlib.import_module("pixelcnn.sampling.compiled")
    except ModuleNotFoundError:
        return "numba is not installed"
    except (ImportError, RuntimeError) as error:  # of numba: a NumPy that it does not know; no folder for compiled code
        return str(error)
    return None


def _engine_of(model: AutoregressiveModel) -> "Engine":
    """Return the compiled engine with the model's present weights."""
    from pixelcnn.sampling.compiled import build_engine

    # Training changes weights in place, and somebody a mask: their version counters tell. Walked by hand: torch's own
    # walk over all parameters takes a quarter of the time of a digit.
    key, modules = list[Any](), list[torch.nn.Module]([model])
    for module in modules:
        for p in (*module._parameters.values(), *module._buffers.values()):
            if p is not None:
                # A tensor of inference mode has no counter: its bytes tell.
                version = hash(p.numpy().tobytes()) if p.is_inference() else p._version
                key.append((p.data_ptr(), version, p.dtype))
        if module._modules:
            left_out = _NOT_IN_ENGINE if module is model else ()
            modules += [x for name, x in module._modules.items() if x is not None and name not in left_out]
    if model not in _engines or _engines[model][0] != key:
        memory = [x.untyped_storage() for x in (*joint_parameters(model), *model.buffers())]
        _engines[model] = key, build_engine(model), memory
    return _engines[model][1]


@cache
def _log_once(name: str) -> None:
    logger.log(logging.DEBUG if name == "cached, compiled" else logging.WARNING, "sampling %s", name)


def draw(model: AutoregressiveModel, canvas: Canvas) -> tuple[Tensor, Tensor | None]:
    """Complete images by the fastest sampler at hand; say once in the log why it is not the compiled one.

    Returns:
        (B, C, H, W) int64 levels; and (B,) float64 nats from the compiled sampler: the log-probability of what was
        drawn, given its label; None from the other one.
    """
    name = engine_name(model)
    _log_once(name)
    sampler = _sample_missing if name == "cached, compiled" else cached.sample_missing
    return sample_by_network(sampler, model, canvas)


def set_sampler_threads(num: int) -> None:
    """Sample on so many threads from now on, and leave torch one.

    For a process that shares the machine. The small networks that look at a drawing are torch's, and its threads wait
    for each other many times in each: with another program on one of two cores that takes ten times as long as on one
    thread. The sampler's threads wait for nobody.
    """
    global _num_threads
    torch.set_num_threads(1)
    _num_threads = num


@torch.no_grad()
def warm_up(model: AutoregressiveModel) -> float:
    """Compile the model's sampler and lay out its weights, so that no first user waits; return the seconds it took.

    Some the first time on a machine, later less than one: the compiled code is kept on disk.
    """
    start, name = time.perf_counter(), engine_name(model)
    _log_once(name)
    if name == "cached, compiled":
        for network in filter(None, (model, model.completer)):
            canvas = new_canvas(network, torch.zeros(1, *model.config.image_shape))
            canvas.missing.view(-1)[1:] = False  # a single pixel is missing
            _sample_missing(network, canvas)
    took = time.perf_counter() - start
    logger.info("sampling %s; ready after %.1f s", engine_name(model), took)
    return took


class _RowAbove(AutoregressiveModel):
    """The smallest network: each pixel sees the one above it."""

    def features(self, x: Any, label: Any, context: Any) -> Any:
        return shift_down(x)


def compile_sampler() -> float:
    """Compile the sampler before there is a model, its code being the same for all; return what `warm_up` does."""
    return warm_up(_RowAbove(ModelConfig(image_shape=(1, 4, 4), num_levels=2, num_features=8), in_maps=1))


def compile_in_background() -> threading.Thread:
    """Compile the sampler in a thread, which is returned: until it ends, all is sampled in torch.

    For a process whose first user is not to wait for it. Later images are of the same model and noise, and equal but
    for rounding.
    """
    global _compiling

    def work() -> None:
        # By another process, which leaves the code on disk: beside a compiler the threads of this one would rarely
        # have their turn.
        command = ["nice", sys.executable, "-m", "pixelcnn", "compile"]
        subprocess.run(command, capture_output=True, check=False)
        compile_sampler()

    _compiling = threading.Thread(target=work, name="compile", daemon=True)
    _compiling.start()
    return _compiling


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
    Weights may have changed since the last call, in place under `torch.no_grad()`. What else changes of a network (a
    weight's `.data`, a hook, what `features` reads) goes unnoticed: copy the model then.

    Args:
        on_row: called with each finished row's index and (B, C, W) levels, in order; what it raises stops the sampling.

    Raises:
        ValueError: a shape, dtype or range differs from what `naive_sample` asks for.
    """
    return draw(model, new_canvas(model, u, label, temperature, drawing, observed, on_row))[0]


def _row_by_row(
    pool: ThreadPoolExecutor, advance: Callable[..., None], num: int, height: int, on_row: Callable[[int], None]
) -> None:
    """Let threads advance batches row by row, and tell of each row that all have reached; what that raises stops them.

    The batch that has waited longest is next, and none waits for another: one that the machine holds up is late alone.
    """
    # Rows, each as often as a batch has reached it; or what a thread has raised.
    reached: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    counts, is_stopped = Counter[int](), threading.Event()

    def work(b: int, y: int) -> None:
        if y == height or is_stopped.is_set():
            return
        try:
            advance(b, y, y + 1)
            reached.put(y)
            pool.submit(work, b, y + 1)
        except BaseException as error:
            reached.put(error)

    for b in range(num):
        pool.submit(work, b, 0)
    try:
        for y in range(height):
            while counts[y] < num:
                row = reached.get()
                if isinstance(row, BaseException):
                    raise row
                counts[row] += 1
            on_row(y)
    finally:
        is_stopped.set()


def _sample_missing(model: AutoregressiveModel, canvas: Canvas) -> Tensor:
    """Sample what is missing in place, as `sample_by_network` asks; compiled code runs without Python's lock."""
    levels, missing, on_row, (num, _, height, _) = canvas.levels, canvas.missing, canvas.on_row, canvas.levels.shape
    engine = _engine_of(model)
    work = engine.work(canvas)
    drawings = [(image.tobytes(), hole.tobytes()) for image, hole in zip(work.levels, work.missing, strict=True)]
    contexts: dict[Hashable, Any] = {}  # of each drawing by itself, so that it does not depend on those beside it
    for i, drawing in enumerate(drawings):
        if work.has_context[i] and drawing not in contexts and model.context_network is not None:
            maps = model.contexts(levels[i : i + 1], ~missing[i : i + 1, None])
            contexts[drawing] = [x[0].permute(1, 2, 0).flatten().numpy() for x in maps if x is not None]
    # Rows below the last missing pixel need no work; candidates of one drawing share what is known above the first.
    rows_of = [hole.nonzero()[:, 0].tolist() for hole in missing.any(dim=2)]
    stops = [rows[-1] + 1 if rows else 0 for rows in rows_of]
    keys = list(zip(canvas.label.tolist(), drawings, strict=True))
    copies, known_rows = Counter(keys), dict[Hashable, Any]()
    begins = [rows[0] if rows and copies[key] > 1 else 0 for rows, key in zip(rows_of, keys, strict=True)]
    num_threads = max(1, min(_num_threads or torch.get_num_threads(), num))
    # Images that begin with the same row, that row, and their end. So many batches keep all threads at work, and one
    # thread that is held up does not hold up all.
    batches, states = list[tuple[list[int], int, int]](), dict[int, Any]()
    for start in sorted({*begins}):
        images = sorted((i for i in range(num) if begins[i] == start), key=stops.__getitem__)
        num_parts = min(num_threads * math.ceil(len(images) / num_threads / MAX_BATCH_IMAGES), len(images))
        ends = [k * len(images) // num_parts for k in range(num_parts + 1)]
        parts = [images[first:end] for first, end in pairwise(ends)]
        batches += [(part, start, max(stops[i] for i in part)) for part in parts]

    def sample_rows(state: Any, images: list[int], start: int, stop: int) -> None:
        engine.rows(state, work, np.array(images), float(canvas.temperature), start, stop)

    def new_state(i: int) -> Any:
        return engine.new_state(contexts.get(drawings[i], []))

    def sample_known_rows(i: int) -> None:
        known_rows[keys[i]] = engine.joined([new_state(i)])
        sample_rows(known_rows[keys[i]], [i], 0, begins[i])

    def advance(b: int, y0: int = 0, y1: int = height) -> None:
        """Sample a batch's rows of y0..y1-1; its state lives from its first row to its last."""
        images, start, stop = batches[b]
        if start < y1 and y0 < stop:
            if b not in states:
                states[b] = engine.joined([known_rows[keys[i]] if start else new_state(i) for i in images])
            sample_rows(states[b], images, max(start, y0), min(stop, y1))
            if stop <= y1:
                del states[b]

    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        for_each: Any = map if num_threads == 1 else pool.map  # to start a thread takes a tenth of a digit's time
        list(for_each(sample_known_rows, {keys[i]: i for i in range(num) if begins[i]}.values()))
        if on_row is None:
            list(for_each(advance, range(len(batches))))
        else:
            _row_by_row(pool, advance, len(batches), height, lambda y: on_row(y, levels[:, :, y]))
    return -torch.from_numpy(work.nats)
