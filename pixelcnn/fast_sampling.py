"""The sampler that callers use: the same function of (model, u) as `naive_sample`, by the fastest way at hand.

On the CPU that is the compiled cached sampler; elsewhere, or without numba, the cached one in torch. An architecture
that neither knows is sampled naively.
"""

import importlib
import logging
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixelcnn.cached_sampling import OnRow, cached_sample, has_cache
from pixelcnn.model import AutoregressiveModel
from pixelcnn.sampling import naive_sample, prepare_canvas, sample_in_parts

if TYPE_CHECKING:
    from pixelcnn.compiled_sampling import Engine

logger = logging.getLogger(__name__)

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
        for network in (model, model.completer):
            if network is not None:
                _sample_compiled(network, u, None, 1.0, levels, u[:, 0] == 0, None, None, rows=0)
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
    return levels, _sample_compiled(model, u, label, temperature, levels, missing, observed, on_row, rows=u.shape[2])


def _contexts(model: AutoregressiveModel, levels: Tensor, observed: Tensor | None) -> list[Tensor | None]:
    """Return the map of each image's drawing, (context_features, H, W), or None where nothing is to be added.

    Each is made by itself, so that no bit of an image depends on those beside it; equal ones are made once.

    Args:
        levels: (B, C, H, W) int64, 0 where not observed.
    """
    if observed is None or not model.config.context_features:
        return [None] * len(levels)
    made: dict[bytes, Tensor | None] = {}
    keys = [
        image.numpy().tobytes() + known.numpy().tobytes() for image, known in zip(levels, observed.cpu(), strict=True)
    ]
    for i, key in enumerate(keys):
        if key not in made:
            context = model.context(levels[i : i + 1], observed[i : i + 1]) if bool(observed[i].any()) else None
            made[key] = None if context is None else context[0]
    return [made[key] for key in keys]


def _copied(state: Any) -> Any:
    return tuple(map(_copied, state)) if isinstance(state, tuple) else state.copy()


def _sample_compiled(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None,
    temperature: float,
    levels: Tensor,
    missing: Tensor,
    observed: Tensor | None,
    on_row: OnRow | None,
    rows: int,
) -> Tensor:
    """Sample the first `rows` rows in place, images in parallel: the compiled code runs without Python's lock.

    Returns:
        (B,) float64 nats, the log-probability of what was missing in these rows.
    """
    engine = _engine_of(model)
    labels = [-1] * len(u) if label is None else label.tolist()
    contexts = _contexts(model, levels, observed)
    noise = u.double().contiguous().numpy()
    no_logits = torch.empty(0, *u.shape[1:], dtype=model.head.weight.dtype).numpy()
    nats = torch.zeros(len(u), 1, dtype=torch.float64)
    images, holes = levels.numpy(), missing.contiguous().numpy()
    # Rows below the last missing pixel need no work.
    stops = [min(rows, int(hole.any(axis=1).nonzero()[0].max(initial=-1)) + 1) for hole in holes]

    keys = [(label, id(context)) for label, context in zip(labels, contexts, strict=True)]
    # Candidates of one drawing share its biases. Those of a single image live no longer than its other buffers.
    shared = {
        key: engine.biases(labels[i], contexts[i])
        for key, i in dict(zip(keys, range(len(keys)), strict=True)).items()
        if contexts[i] is None or keys.count(key) > 1
    }

    def biases_of(i: int) -> Any:
        return shared[keys[i]] if keys[i] in shared else engine.biases(labels[i], contexts[i])

    def sample_rows(i: int, biases: Any, state: Any, start: int, stop: int) -> None:
        out = nats[i].numpy()
        engine.rows(biases, state, images[i], holes[i], noise[i], float(temperature), no_logits, out, start, stop)

    # And they share the state after the rows in which nothing is missing: it is computed for one of them.
    drawings = [(labels[i], images[i].tobytes(), holes[i].tobytes()) for i in range(len(u))]
    starts = [min(int(hole.any(axis=1).argmax()), stop) for hole, stop in zip(holes, stops, strict=True)]
    known_rows: dict[Any, Any] = {
        key: None
        for key, i in dict(zip(drawings, range(len(drawings)), strict=True)).items()
        if starts[i] > 0 and drawings.count(key) > 1
    }

    def sample_known_rows(i: int) -> None:
        known_rows[drawings[i]] = engine.new_state()
        sample_rows(i, biases_of(i), known_rows[drawings[i]], 0, starts[i])

    def begin(i: int) -> tuple[Any, Any, int]:
        """Return biases and state of an image, and the first row that is to be sampled."""
        if drawings[i] in known_rows:
            return biases_of(i), _copied(known_rows[drawings[i]]), starts[i]
        return biases_of(i), engine.new_state(), 0

    def sample_whole(i: int) -> None:
        biases, state, start = begin(i)
        sample_rows(i, biases, state, start, stops[i])

    def for_each(work: Any, images: Iterable[int]) -> None:
        images = list(images)
        if num_threads == 1 or len(images) <= 1:
            for i in images:
                work(i)
        else:
            list(pool.map(work, images))

    num_threads = max(1, min(torch.get_num_threads(), len(u)))
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        for_each(sample_known_rows, [drawings.index(key) for key in known_rows])
        if on_row is None:
            # An image's buffers live while it is sampled: memory does not grow with the batch.
            for_each(sample_whole, range(len(u)))
            return -nats[:, 0]
        begun = [begin(i) for i in range(len(u))]
        for row in range(rows):
            due = [i for i in range(len(u)) if begun[i][2] <= row < stops[i]]
            for_each(lambda i, y=row: sample_rows(i, *begun[i][:2], y, y + 1), due)
            on_row(row, levels[:, :, row])
    return -nats[:, 0]
