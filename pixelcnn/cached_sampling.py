"""Cached sampling in plain torch: the same function of (model, u) as `naive_sample`, on any device.

The naive sampler runs the whole network for each sub-pixel, though hardly anything changed. Here nothing is computed
twice:

- When a row begins, whatever depends on the rows above alone is computed for the whole row at once: the vertical
  stack of Gated PixelCNN and its link, and in PixelCNN the part of each kernel that lies above.
- A pixel then adds what lies to its left and at its centre, layer by layer. The layers' outputs are kept, because the
  pixels to the right will need them.
- With several colours, a sub-pixel computes the maps of its own colour only; those of earlier colours are there.
- The head runs at the pixel in turn alone, and not at all at a known pixel.
- The map of a drawing is made once; what it adds to each layer is computed row by row, for the whole row at once.

Only the rows that a kernel reaches are kept, so the cost of a pixel does not grow with the image.

A row is drawn by the same calls as the one above it, on the same tensors. On CUDA, where starting a kernel takes longer
than most of these kernels, the third row is captured as a graph, and the others replay it.

Cached activations: Ramachandran et al. 2017, arXiv:1704.06001. compiled_sampling.py is the same algorithm in compiled
code; most of the time here goes into calling torch.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pixelcnn.layers import MaskedConv2d, gate
from pixelcnn.model import AutoregressiveModel, GatedPixelCNN, PixelCNN
from pixelcnn.sampling import draw_level, prepare_canvas, sample_in_parts

logger = logging.getLogger(__name__)

# Called with a row's index and its levels, (B, C, W) int64, once the row is finished in every image.
OnRow = Callable[[int, Tensor], None]

# Called with a sub-pixel's place (channel, row, column) and its logits, (B, K).
OnLogits = Callable[[tuple[int, int, int], Tensor], None]

MAX_BATCH = 256  # images that are sampled together; a larger batch is split


class _ByColour:
    """An affine map of a pixel's values, of which one colour's outputs are computed at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, num_colours: int) -> None:  # (out, in), (out,)
        self.weights = weight.chunk(num_colours)
        self.biases = [None] * num_colours if bias is None else bias.chunk(num_colours)

    def __call__(self, x: Tensor, c: int) -> Tensor:  # (B, in) -> (B, out / colours)
        return F.linear(x, self.weights[c], self.biases[c])


def _masked(conv: MaskedConv2d) -> Tensor:
    return conv.weight * conv.mask  # (out, in, kh, kw)


def _pixelwise(conv: MaskedConv2d, num_colours: int) -> _ByColour:
    return _ByColour(_masked(conv)[:, :, 0, 0], conv.bias, num_colours)


def _left_and_centre(kernel: Tensor, half: int, num_colours: int) -> _ByColour:
    """Return what a kernel, (out, in, kh, kw), does with `half` pixels left of its centre and the centre itself."""
    return _ByColour(kernel[:, :, -1, : half + 1].flatten(1), None, num_colours)


def _own(c: int, num_maps: int, num_colours: int) -> slice:
    """Return which of the maps belong to colour c."""
    return slice(c * num_maps // num_colours, (c + 1) * num_maps // num_colours)


class _Rows:
    """The last rows of some maps, zero-padded on both sides: what a kernel of `num_rows` rows can reach."""

    def __init__(self, like: Tensor, batch: int, num_maps: int, num_rows: int, width: int, half: int) -> None:
        self.values = like.new_zeros(batch, num_maps, num_rows, width + 2 * half)  # the present row is the last
        self.half = half

    def new_row(self) -> None:
        self.values.copy_(F.pad(self.values[:, :, 1:], (0, 0, 0, 1)))  # in place, for graphs

    def window(self, x: int) -> Tensor:
        """Return the present row from `half` columns left of column x up to x, as (B, maps * (half + 1))."""
        return self.values[:, :, -1, x : x + self.half + 1].flatten(1)

    def put(self, maps: slice, x: int, values: Tensor) -> None:
        self.values[:, maps, -1, x + self.half] = values


class _ContextRows:
    """The map of a drawing, (B, context_features, H, W), a row of it at a time, always in the same places."""

    def __init__(self, context: Tensor) -> None:
        self.rows = context
        self.row, self.above = torch.zeros_like(context[:, :, 0]), torch.zeros_like(context[:, :, :1])

    def load(self, y: int) -> None:
        self.above[:, :, 0] = self.row
        self.row.copy_(self.rows[:, :, y])


class _PixelCNNCache:
    """What PixelCNN has computed of a batch of images so far."""

    def __init__(self, model: PixelCNN, batch: int, label: Tensor | None, context: Tensor | None) -> None:
        config = model.config
        self.num_colours, _, width = config.image_shape
        self.h, self.num_head = config.num_features, config.head_features
        first, n, half = _masked(model.first), self.num_colours, config.kernel_size // 2
        first_half = config.first_kernel_size // 2
        self.first_above, self.first_bias = first[:, :, :-1], model.first.bias
        self.first_left, self.first_skip = _left_and_centre(first, first_half, n), _pixelwise(model.first_skip, n)
        self.blocks: list[Any] = list(model.blocks)
        kernels = [_masked(block.conv) for block in self.blocks]
        self.above = [kernel[:, :, :-1] for kernel in kernels]
        self.left = [_left_and_centre(kernel, half, n) for kernel in kernels]
        self.reduce, self.expand, self.skip = (
            [_pixelwise(getattr(block, name), n) for block in self.blocks] for name in ("reduce", "expand", "skip")
        )
        self.bias = [block.conv.bias[:, None] for block in self.blocks]  # (h, 1)
        if label is not None and config.num_labels:
            self.bias = [b + block.label_bias(label)[..., 0] for b, block in zip(self.bias, self.blocks, strict=True)]
        self.context = None if context is None else _ContextRows(context)
        self.image = _Rows(first, batch, n, first_half + 1, width, first_half)
        self.reduced = [_Rows(first, batch, self.h, half + 1, width, half) for _ in self.blocks]
        # Of the pixel in turn: the residual stream before each block, each block's output, the skips' sum.
        self.stream = first.new_zeros(len(self.blocks) + 1, batch, 2 * self.h)
        self.outputs = first.new_zeros(len(self.blocks), batch, self.h)
        self.skips = first.new_zeros(batch, self.num_head)

    def begin_row(self, is_first: bool) -> None:
        self.image.new_row()
        above = F.conv2d(self.image.values[:, :, :-1], self.first_above, self.first_bias)
        self.first_row = above[:, :, 0]  # (B, 2h, W)
        self.rows = []
        for block, rows, kernel, bias in zip(self.blocks, self.reduced, self.above, self.bias, strict=True):
            rows.new_row()
            row = F.conv2d(rows.values[:, :, :-1], kernel)[:, :, 0] + bias  # (B, h, W)
            if self.context is not None:
                row = row + F.conv1d(self.context.row, block.context.weight[..., 0])
            self.rows.append(row)

    def features(self, x: int, c: int) -> Tensor:  # (B, head)
        outer, inner, head = (_own(c, maps, self.num_colours) for maps in (2 * self.h, self.h, self.num_head))
        self.stream[0, :, outer] = self.first_row[:, outer, x] + self.first_left(self.image.window(x), c)
        skips = self.first_skip(self.stream[0], c)
        for i, rows in enumerate(self.reduced):
            rows.put(inner, x, F.relu(self.reduce[i](F.relu(self.stream[i]), c)))
            self.outputs[i, :, inner] = F.relu(self.rows[i][:, inner, x] + self.left[i](rows.window(x), c))
            self.stream[i + 1, :, outer] = self.stream[i, :, outer] + self.expand[i](self.outputs[i], c)
            skips = skips + self.skip[i](self.outputs[i], c)
        self.skips[:, head] = skips
        return self.skips


class _GatedCache:
    """What Gated PixelCNN has computed of a batch of images so far."""

    def __init__(self, model: GatedPixelCNN, batch: int, label: Tensor | None, context: Tensor | None) -> None:
        config = model.config
        n, _, self.width = config.image_shape
        self.num_colours, self.p, half = n, config.num_features, config.kernel_size // 2
        self.layers: list[Any] = list(model.layers)
        # The horizontal gates by colour: the tanh maps of a colour, then its sigmoid maps.
        order = torch.arange(2 * self.p).reshape(2, n, -1).transpose(0, 1).flatten()
        self.v_kernels = [_masked(layer.v_conv) for layer in self.layers]
        self.links = [layer.link.weight[order, :, :, 0] for layer in self.layers]  # (2p, 2p, 1)
        self.h_left = [_left_and_centre(_masked(layer.h_conv)[order], half, n) for layer in self.layers]
        self.h_out = [_pixelwise(layer.h_out, n) for layer in self.layers]
        self.h_bias = [(layer.link.bias + layer.h_conv.bias)[order, None] for layer in self.layers]  # (2p, 1)
        self.v_label: list[Any] = [0.0] * len(self.layers)
        if label is not None and config.num_labels:
            self.v_label = [layer.v_label_bias(label) for layer in self.layers]  # (B, 2p, 1, 1)
            h_label = [layer.h_label_bias(label)[:, order, :, 0] for layer in self.layers]  # (B, 2p, 1)
            self.h_bias = [bias + more for bias, more in zip(self.h_bias, h_label, strict=True)]
        self.context = None if context is None else _ContextRows(context)
        self.h_context = [] if context is None else [layer.h_context.weight[order, :, :, 0] for layer in self.layers]
        like = self.v_kernels[0]
        inputs = [n] + [self.p] * (len(self.layers) - 1)
        # The vertical stack trails one row behind: its input ends with the row above.
        self.v_inputs = [_Rows(like, batch, maps, half + 1, self.width, half) for maps in inputs]
        # The horizontal stack's inputs, and its output.
        self.h_inputs = [_Rows(like, batch, maps, 1, self.width, half) for maps in [*inputs, self.p]]
        self.image = self.h_inputs[0]
        self.gated = like.new_zeros(len(self.layers), batch, self.p)

    def begin_row(self, is_first: bool) -> None:
        row = self.image.values  # the row above: (B, C, 1, W + 2 half)
        self.rows = []
        for i, rows in enumerate(self.v_inputs):
            h_bias, v_bias = self.h_bias[i], self.v_label[i]
            if self.context is not None:
                h_bias = h_bias + F.conv1d(self.context.row, self.h_context[i])  # (B, 2p, W)
                v_bias = v_bias + F.conv2d(self.context.above, self.layers[i].v_context.weight)  # (B, 2p, 1, W)
            if is_first:  # nothing lies above the first row, and its link sees zeros
                self.rows.append(h_bias.expand(len(row), -1, self.width))
                continue
            rows.new_row()
            rows.values[:, :, -1:] = row
            gates = F.conv2d(rows.values, self.v_kernels[i], self.layers[i].v_conv.bias)  # (B, 2p, 1, W)
            self.rows.append(F.conv1d(gates[:, :, 0], self.links[i]) + h_bias)  # (B, 2p, W)
            row = F.pad(gate(gates + v_bias), (rows.half, rows.half))
        for inputs in self.h_inputs:
            inputs.new_row()

    def features(self, x: int, c: int) -> Tensor:  # (B, p)
        own, gates = _own(c, self.p, self.num_colours), _own(c, 2 * self.p, self.num_colours)
        for i, inputs in enumerate(self.h_inputs[:-1]):
            self.gated[i, :, own] = gate(self.rows[i][:, gates, x] + self.h_left[i](inputs.window(x), c))
            output = self.h_out[i](self.gated[i], c)
            if self.layers[i].has_residual:
                output = output + inputs.values[:, own, -1, x + inputs.half]
            self.h_inputs[i + 1].put(own, x, output)
        return self.h_inputs[-1].values[:, :, -1, x + self.image.half]


def has_cache(model: AutoregressiveModel) -> bool:
    """Return whether the architecture is one that `cached_sample` knows."""
    return isinstance(model, (PixelCNN, GatedPixelCNN))


@torch.no_grad()
def cached_sample(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None = None,
    temperature: float = 1.0,
    drawing: Tensor | None = None,
    observed: Tensor | None = None,
    on_row: OnRow | None = None,
    on_logits: OnLogits | None = None,
) -> Tensor:
    """Sample images in raster order: the arguments and the result are those of `naive_sample`.

    Equal to it in float64; in float32 a level can differ where `u` lies within rounding of a boundary between two.

    Args:
        on_row: called after each finished row; what it raises stops the sampling.
        on_logits: called for each sub-pixel, known ones too, with its logits given all earlier ones.

    Returns:
        (B, C, H, W) int64 levels in [0, K).

    Raises:
        ValueError: a shape, dtype or range differs from what `naive_sample` asks for, or the architecture is unknown.
    """
    if not has_cache(model):
        raise ValueError(f"cached sampling knows PixelCNN and GatedPixelCNN, got {type(model).__name__}.")
    levels, missing = prepare_canvas(model, u, label, temperature, drawing, observed)
    if model.completer is not None and drawing is not None and observed is not None:
        parts = model.networks(observed)
        if len(parts) > 1:
            if on_logits is not None:
                raise ValueError("on_logits must be None where one network draws some images, another the others.")
            return sample_in_parts(cached_sample, parts, u, label, temperature, drawing, observed, on_row)
        model = parts[0][0]
    # Rows are handed out of the whole batch: then it stays together.
    size = MAX_BATCH if on_row is None and on_logits is None else max(len(u), 1)
    for start in range(0, len(u), size):
        part = slice(start, start + size)
        part_label = None if label is None else label[part]
        context = model.context(drawing[part], observed[part]) if drawing is not None and observed is not None else None
        # A slice is a view: the levels are written in place.
        _sample_part(model, u[part], part_label, temperature, levels[part], missing[part], context, on_row, on_logits)
    return levels


class _RowSampler:
    """Draws the rows of a batch of images, one after the other.

    `load` says which one; but for the first, `draw` then does the same: what it reads and writes stays where it is.
    """

    def __init__(
        self, model: AutoregressiveModel, batch: int, label: Tensor | None, temperature: float, context: Tensor | None
    ) -> None:
        config = model.config
        self.num_colours, _, self.width = config.image_shape
        self.temperature, self.num_levels, self.num_head = temperature, config.num_levels, config.head_features
        self.cache: _PixelCNNCache | _GatedCache
        if isinstance(model, PixelCNN):
            self.cache = _PixelCNNCache(model, batch, label, context)
        else:
            assert isinstance(model, GatedPixelCNN)
            self.cache = _GatedCache(model, batch, label, context)
        self.head, self.logits = _pixelwise(model.head, self.num_colours), _pixelwise(model.logits, self.num_colours)
        weight = model.head.weight
        self.hidden = weight.new_zeros(batch, self.num_head)
        self.u = torch.zeros(batch, self.num_colours, self.width, dtype=torch.float64, device=weight.device)
        self.levels = torch.zeros(batch, self.num_colours, self.width, dtype=torch.int64, device=weight.device)
        self.missing = torch.zeros(batch, self.width, dtype=torch.bool, device=weight.device)

    def load(self, y: int, u: Tensor, levels: Tensor, missing: Tensor) -> None:
        """Take up row y of (B, C, H, W) noise and levels and of (B, H, W) holes."""
        self.y = y
        self.u.copy_(u[:, :, y])
        self.levels.copy_(levels[:, :, y])
        self.missing.copy_(missing[:, y])
        if self.cache.context is not None:
            self.cache.context.load(y)

    def draw(self, needs_head: list[bool], on_logits: OnLogits | None = None) -> None:
        """Fill in the row. `needs_head` tells of each column whether its logits are needed."""
        self.cache.begin_row(is_first=self.y == 0)
        for x in range(self.width):
            for c in range(self.num_colours):
                features = self.cache.features(x, c)
                here = self.levels[:, c, x]
                if needs_head[x]:
                    own = _own(c, self.num_head, self.num_colours)
                    self.hidden[:, own] = F.relu(self.head(F.relu(features), c))
                    logits = self.logits(self.hidden, c)  # (B, K)
                    if on_logits is not None:
                        on_logits((c, self.y, x), logits)
                    drawn = draw_level(logits, self.u[:, c, x], self.temperature)
                    here.copy_(torch.where(self.missing[:, x], drawn, here))
                scaled = here.to(self.hidden.dtype) * (2 / (self.num_levels - 1)) - 1
                self.cache.image.put(slice(c, c + 1), x, scaled[:, None])


def _capture(work: Callable[[], None], device: torch.device) -> Callable[[], None] | None:
    """Return what does the same work again by one call, without having done it; None where no device can."""
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


def _sample_part(
    model: AutoregressiveModel,
    u: Tensor,
    label: Tensor | None,
    temperature: float,
    levels: Tensor,
    missing: Tensor,
    context: Tensor | None,
    on_row: OnRow | None,
    on_logits: OnLogits | None,
) -> None:
    height, width = model.config.image_shape[1:]
    sampler = _RowSampler(model, len(u), label, temperature, context)
    any_missing, everywhere = missing.any(dim=0).tolist(), [True] * width
    # Rows below the last missing pixel need no work.
    num_rows = max((y + 1 for y in range(height) if any(any_missing[y])), default=0)
    replay: Callable[[], None] | None = None
    for y in range(height):
        if y < num_rows or on_logits is not None:
            sampler.load(y, u, levels, missing)
            # The first row is unlike the others, and the second lets the libraries choose their kernels.
            if y == 2 and on_logits is None:
                replay = _capture(lambda: sampler.draw(everywhere), u.device)
            if replay is not None:
                replay()
            else:
                sampler.draw(any_missing[y] if on_logits is None else everywhere, on_logits)
            levels[:, :, y] = sampler.levels
        if on_row is not None:
            on_row(y, levels[:, :, y])
