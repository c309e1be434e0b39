"""The sampler that callers use: the same function of (model, u) as `naive_sample`, by the fastest way at hand.

On the CPU that is the compiled cached sampler; elsewhere, or without numba, the naive one, with one notice.
"""

import logging
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixelcnn.model import AutoregressiveModel
from pixelcnn.sampling import naive_sample, prepare_canvas

if TYPE_CHECKING:
    from pixelcnn.compiled_sampling import Engine

logger = logging.getLogger(__name__)

# Called with a row's index and its levels, (B, C, W) int64, once the row is finished in every image.
OnRow = Callable[[int, Tensor], None]

_engines: "weakref.WeakKeyDictionary[AutoregressiveModel, tuple[Any, Engine]]" = weakref.WeakKeyDictionary()
_notices: set[str] = set()


def _engine_of(model: AutoregressiveModel) -> "Engine | None":
    """Return the compiled engine with the model's present weights; None where there is none."""
    parameters = list(model.parameters())
    reason = ""
    if parameters[0].device.type != "cpu":
        reason = f"the model is on {parameters[0].device.type}"
    elif parameters[0].dtype not in (torch.float32, torch.float64):
        reason = f"the weights are {parameters[0].dtype}"
    else:
        try:
            from pixelcnn.compiled_sampling import build_engine
        except ImportError:
            reason = "numba is not installed"
    if reason:
        if reason not in _notices:
            _notices.add(reason)
            logger.warning("sampling without the compiled sampler: %s", reason)
        return None
    # Training changes weights in place: their version counters tell.
    key = [(p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in parameters]
    known = _engines.get(model)
    if known is None or known[0] != key:
        known = (key, build_engine(model))
        _engines[model] = known
    return known[1]


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
        on_row: called after each finished row; what it raises stops the sampling. In the naive fallback it is called
            for all rows at the end.

    Returns:
        (B, C, H, W) int64 levels in [0, K).

    Raises:
        ValueError: a shape, dtype or range differs from what `naive_sample` asks for.
    """
    engine = _engine_of(model)
    height = u.shape[2] if u.dim() == 4 else 0
    if engine is None:
        levels = naive_sample(model, u, label, temperature, drawing, observed)
        if on_row is not None:
            for row in range(height):
                on_row(row, levels[:, :, row])
        return levels
    levels, missing = prepare_canvas(model, u, label, temperature, drawing, observed)
    labels = [-1] * len(u) if label is None else label.tolist()
    noise = u.double().contiguous().numpy()
    no_logits = torch.empty(0, *u.shape[1:], dtype=model.head.weight.dtype).numpy()
    levels = levels.contiguous()
    images, holes = levels.numpy(), missing.contiguous().numpy()
    biases = {label: engine.label_bias(label) for label in set(labels)}
    states = [engine.new_state() for _ in range(len(u))]

    def sample_rows(i: int, start: int, stop: int) -> None:
        engine.rows(
            biases[labels[i]], states[i], images[i], holes[i], noise[i], float(temperature), no_logits, start, stop
        )

    # Rows below the last missing pixel need no work.
    stops = [int(hole.any(axis=1).nonzero()[0].max(initial=-1)) + 1 for hole in holes]
    steps = [(0, height)] if on_row is None else [(row, row + 1) for row in range(height)]
    with ThreadPoolExecutor(max_workers=max(1, min(torch.get_num_threads(), len(u)))) as pool:
        for start, stop in steps:
            due = [i for i in range(len(u)) if start < stops[i]]
            if len(due) == 1:
                sample_rows(due[0], start, min(stop, stops[due[0]]))
            else:
                list(pool.map(lambda i, a=start, b=stop: sample_rows(i, a, min(b, stops[i])), due))
            if on_row is not None:
                on_row(start, levels[:, :, start])
    return levels
