"""Cached sampling in plain torch: the same function of (model, u) as `naive_sample`, on any device with float64.

Nothing is computed twice: each step of the plan (plan.py) is a call of torch, the map of a drawing is made once. Only
the rows that a kernel reaches are kept, so the cost of a pixel does not grow with the image.

A row is drawn by the same calls as the one above it, on the same tensors. On CUDA, where starting a kernel takes longer
than most of these kernels, the third row is captured as a graph, and the others replay it.

Cached activations: Ramachandran et al. 2017, arXiv:1704.06001. compiled.py follows the same plan in compiled code; most
of the time here goes into calling torch.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pixelcnn.models.attention import BLOCK, Attention
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.outputs import draw_level
from pixelcnn.sampling.naive import Canvas, new_canvas, sample_by_network
from pixelcnn.sampling.plan import Buffer, Plan, Step

logger = logging.getLogger(__name__)

MAX_BATCH = 256  # images that are sampled together; a larger batch is split


@torch.no_grad()
def cached_sample(model: AutoregressiveModel, u: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """Sample images in raster order: the arguments and the result are those of `fast.sample`."""
    return sample_by_network(sample_missing, model, new_canvas(model, u, *arguments, **named))[0]


def sample_missing(model: AutoregressiveModel, canvas: Canvas) -> None:
    """Sample what is missing of one network's images in place: see `sample_by_network`."""
    # Rows are handed out of the whole batch: then it stays together.
    size = MAX_BATCH if canvas.on_row is None else max(len(canvas.u), 1)
    for start in range(0, max(len(canvas.u), 1), size):
        _RowSampler(model, canvas.part(slice(start, start + size), canvas.on_row)).sample()


class _Keys:
    """The keys and values of an attention block so far, after the constant that every pixel sees."""

    def __init__(self, attention: Attention, like: Tensor, batch: int) -> None:
        # Beyond the image's blocks lies room for a row of blocks that are not whole yet.
        self.num, self.columns, self.features = attention.num_blocks, attention.table.shape[1], attention.key_features
        self.kept = like.new_zeros(batch, 1 + self.num + self.columns, len(attention.null))
        self.kept[:, 0] = attention.null

    def add(self, made: Tensor, y: Tensor) -> None:
        """Add the blocks of the two rows above row y, (B, columns, channels)."""
        is_whole = y % BLOCK == 0
        first = 1 + torch.where(is_whole, (y // BLOCK - 1) * self.columns, self.num)
        self.kept.index_copy_(1, first + torch.arange(self.columns, device=y.device), made)

    def attend(self, query: Tensor, channels: slice, y: Tensor) -> Tensor:  # (B, channels) -> (B, channels)
        keys, values = (x[:, :, channels].unflatten(-1, (-1, self.features)) for x in self.kept.chunk(2, dim=-1))
        query = query.unflatten(1, (-1, self.features)) / math.sqrt(self.features)
        is_hidden = torch.arange(self.kept.shape[1], device=y.device) > y // BLOCK * self.columns
        scores = torch.einsum("bhd,bnhd->bhn", query, keys).masked_fill(is_hidden, -math.inf)
        return torch.einsum("bhn,bnhd->bhd", scores.softmax(dim=-1), values).flatten(1)


def _ready(step: Step, like: Tensor, label: Tensor, width: int) -> Step:
    """Return a step with its weights beside the model's, its bias for each image (B or 1, 1, outputs) or row."""
    matrix, bias = (None if values is None else values.to(like) for values in (step.matrix, step.bias))
    if bias is not None:
        bias = bias.unflatten(0, (-1, -(-width // step.stride))) if step.bias_of == "place" else bias[:, None]
        bias = bias[label + 1] if step.bias_of == "label" else bias
    return replace(step, matrix=matrix, bias=bias)


class _RowSampler:
    """Draws what is missing of a batch of images in place, one row after the other.

    `y` says which one; but for the first, `draw` then does the same: what it reads and writes stays where it is.
    """

    def __init__(self, model: AutoregressiveModel, canvas: Canvas) -> None:
        config, like, batch = model.config, model.head.weight, len(canvas.u)
        self.plan, self.output, self.num_levels, self.canvas = Plan(model), model.output, config.num_levels, canvas
        self.num_colours, self.height, self.width = config.image_shape
        self.y = torch.zeros(1, dtype=torch.int64, device=like.device)  # the row in turn
        contexts = model.contexts(canvas.levels, ~canvas.missing[:, None])
        self.contexts = [x if x is None else x.permute(0, 2, 3, 1) for x in contexts]  # (B, H, W, features)
        # The rows that are kept, the latest last: that of the row in turn, or of the one above if late.
        self.values: dict[Buffer, Tensor] = {}
        for buffer in self.plan.buffers:
            size = (1, 1) if buffer.is_local else (buffer.num_rows + 1, buffer.left + self.width + buffer.right)
            self.values[buffer] = like.new_zeros(batch, *size, buffer.num_channels)
        self.row_steps, self.pixel_steps = (
            [_ready(step, like, canvas.label, self.width) for step in steps]
            for steps in (self.plan.row_steps, self.plan.pixel_steps)
        )
        attentions = {step.attention for step in self.row_steps if step.attention is not None}
        self.keys = {attention: _Keys(attention, like, batch) for attention in attentions}

    def sample(self) -> None:
        any_missing, replay = self.canvas.missing.any(dim=0).tolist(), None
        # Rows below the last missing pixel need no work.
        num_rows = max((y + 1 for y in range(self.height) if any(any_missing[y])), default=0)
        for y in range(self.height):
            if y < num_rows:
                self.y.fill_(y)
                # The first row is unlike the others, and the second lets the libraries choose their kernels.
                if y == 2:
                    replay = _capture(partial(self.draw, [True] * self.width, is_first=False), self.y.device)
                (replay or partial(self.draw, any_missing[y], is_first=y == 0))()
            if self.canvas.on_row is not None:
                self.canvas.on_row(y, self.canvas.levels[:, :, y])

    def cells(self, buffer: Buffer, x: int, num: int, rows_up: int = 0, num_in: int = 0, stride: int = 1) -> Tensor:
        """Return cells from column x on, `rows_up` above the row in turn: (B, num, channels), without a copy.

        With `num_in` windows instead, which begin there, each one run of numbers: (B, num, num_in).
        """
        row = self.values[buffer][:, -1 - rows_up + buffer.is_late]  # (B, columns, channels)
        start = row.storage_offset() + (0 if buffer.is_local else buffer.left + x) * buffer.num_channels
        strides = (row.stride(0), stride * buffer.num_channels, 1)
        return row.as_strided((len(row), num, num_in or buffer.num_channels), strides, start)

    def take(self, step: Any, x: int, num: int) -> None:
        """Take a step at columns x..x+num-1."""
        out, source, here, late = step.out, step.source, step.out.channels_of(step.turn), int(step.out.is_late)
        num, rows_up = math.ceil(num / step.stride), step.rows_up + late
        result = self.cells(out, x, num, late)[:, :, here]
        if step.kind == "keys":
            self.keys[step.attention].add(result, self.y)
        elif step.kind == "gate":
            a, b = self.cells(source, x, num, rows_up)[:, :, 2 * here.start : 2 * here.stop].chunk(2, dim=-1)
            result.copy_(torch.tanh(a) * torch.sigmoid(b))
        elif step.kind == "attend":
            query = self.cells(source, x, num)[:, 0, here]
            result[:, 0] = self.keys[step.attention].attend(query, here, self.y)
        else:
            total = torch.zeros_like(result) if step.base is None else self.cells(step.base, x, num, late)[:, :, here]
            if step.bias is not None:
                total = total + (step.bias[(self.y - late) // step.stride] if step.bias_of == "place" else step.bias)
            if step.matrix is not None:
                window = self.cells(source, x + step.first_column, num, rows_up, len(step.matrix), step.stride)
                total = total + (window.relu() if step.is_of_positive else window) @ step.matrix
            result.copy_(total.relu() if step.is_rectified else total)

    def draw(self, is_needed: list[bool], is_first: bool) -> None:
        """Fill in row `y`. `is_needed` tells of each column whether its logits are needed."""
        for buffer, values in self.values.items():
            if not buffer.is_local:
                values.copy_(F.pad(values[:, 1:], (0, 0, 0, 0, 0, 1)))  # in place, for graphs
        for read, context in zip(self.plan.contexts, self.contexts, strict=True):
            if read is not None and context is not None:
                self.values[read][:, -1] = context.index_select(1, self.y)[:, 0]
        canvas = self.canvas
        u, levels, missing = (x.index_select(-2, self.y)[..., 0, :] for x in (canvas.u, canvas.levels, canvas.missing))
        for step in self.row_steps:
            if not (is_first and step.out.is_late):  # above the first row there is none
                self.take(step, 0, self.width)
        for x in range(self.width):
            for c in range(self.num_colours + 1):
                for step in self.pixel_steps:
                    if step.turn == c and (is_needed[x] or not step.out.is_for_draws_alone):
                        self.take(step, x, 1)
                if c == self.num_colours:
                    break  # the last steps need the whole pixel
                here = levels[:, c, x]
                if is_needed[x]:
                    maps = self.output.shaped(self.cells(self.plan.logits, x, 1)[:, 0])
                    logits = self.output.level_logits(maps, c, levels[:, :c, x])  # (B, K)
                    drawn = draw_level(logits, u[:, c, x], canvas.temperature)
                    here.copy_(torch.where(missing[:, x], drawn, here))
                image = self.cells(self.plan.image, x, 1)
                image[:, 0, c] = here.to(image.dtype) * (2 / (self.num_levels - 1)) - 1
        canvas.levels.index_copy_(2, self.y, levels[:, :, None])


def _capture(work: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """Capture `work` as a CUDA graph without running it; return its replay, or None where that cannot be."""
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        logger.warning("sampling without a CUDA graph, slower: %s", error)
        return None
    return graph.replay
