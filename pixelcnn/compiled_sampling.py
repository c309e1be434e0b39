"""Cached sampling, compiled for the CPU with numba: the same function of (model, u) as `naive_sample`.

Nothing is computed twice. Whatever depends on rows above alone is matrix work over a whole row, done when the row
begins: the vertical stack of Gated PixelCNN, and in PixelCNN the part of each kernel that lies above. A pixel then
adds what lies to its left and at its centre, layer by layer; with several colours, the maps of one colour at a time.
Known pixels take no head and no draw. Weights lie as (input, output), so that the inner loops run over contiguous
outputs and the compiler turns them into vector instructions.

Cached activations: Ramachandran et al. 2017, arXiv:1704.06001. Here they are kept for a few rows only (a ring), so
the cost of a pixel does not grow with the image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from pixelcnn.layers import MaskedConv2d
from pixelcnn.model import AutoregressiveModel, GatedPixelCNN, PixelCNN

# Fused multiply-add is allowed; nothing else that changes a result is.
_compiled = njit(nogil=True, cache=True, fastmath={"contract"})

Array = np.ndarray[Any, Any]


@_compiled
def _add_matvec(out, weight, x, i0, i1, o0, o1):
    """out[o0:o1] += x[i0:i1] @ weight[i0:i1, o0:o1]."""
    i = i0
    while i + 8 <= i1:
        a0, a1, a2, a3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        a4, a5, a6, a7 = x[i + 4], x[i + 5], x[i + 6], x[i + 7]
        for o in range(o0, o1):
            out[o] += (
                a0 * weight[i, o]
                + a1 * weight[i + 1, o]
                + a2 * weight[i + 2, o]
                + a3 * weight[i + 3, o]
                + a4 * weight[i + 4, o]
                + a5 * weight[i + 5, o]
                + a6 * weight[i + 6, o]
                + a7 * weight[i + 7, o]
            )
        i += 8
    while i < i1:
        a0 = x[i]
        for o in range(o0, o1):
            out[o] += a0 * weight[i, o]
        i += 1


@_compiled
def _relu(out, x, o0, o1):
    zero = x.dtype.type(0)
    for o in range(o0, o1):
        out[o] = x[o] if x[o] > zero else zero


@_compiled
def _exp32(out, whole, x, n):
    """exp of float32 values in [-87, 87], within about 1e-7: 2^k times a polynomial, in vector instructions.

    `whole` is an int32 view's buffer of 2^k, written as float32 bits.
    """
    bits = whole.view(np.int32)
    for i in range(n):
        k = np.floor(x[i] * np.float32(1.44269504) + np.float32(0.5))
        bits[i] = (np.int32(k) + np.int32(127)) << np.int32(23)
        # Reduced argument, |r| <= ln(2) / 2, with ln 2 in two parts; then Taylor to the 7th power (error 5e-9).
        r = (x[i] - k * np.float32(0.693359375)) + k * np.float32(2.12194440e-4)
        p = np.float32(1 / 5040)
        p = p * r + np.float32(1 / 720)
        p = p * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(0.5)
        p = p * r + np.float32(1)
        out[i] = p * r + np.float32(1)
    for i in range(n):
        out[i] *= whole[i]


@_compiled
def _gate32(out, gates, scratch, a0, b0, n):
    """out[a0:a0+n] = tanh(gates[a0:a0+n]) * sigmoid(gates[b0:b0+n]), float32."""
    arguments, exps, whole = scratch[0], scratch[1], scratch[2]
    for i in range(n):
        a = gates[a0 + i]
        a = min(max(a, np.float32(-15)), np.float32(15))  # tanh is +-1 in float32 from 9 on
        b = min(max(gates[b0 + i], np.float32(-80)), np.float32(80))
        arguments[i] = np.float32(-2) * a
        arguments[n + i] = -b
    _exp32(exps, whole, arguments, 2 * n)
    one = np.float32(1)
    for i in range(n):
        e = exps[i]
        out[a0 + i] = (one - e) / ((one + e) * (one + exps[n + i]))


@_compiled
def _gate64(out, gates, scratch, a0, b0, n):
    """The same in float64, by the C library."""
    for i in range(n):
        out[a0 + i] = math.tanh(gates[a0 + i]) / (1.0 + math.exp(-gates[b0 + i]))


@_compiled
def _gate(out, gates, scratch, a0, b0, n):
    if gates.itemsize == 4:
        _gate32(out, gates, scratch, a0, b0, n)
    else:
        _gate64(out, gates, scratch, a0, b0, n)


@_compiled
def _draw(logits, cumulative, k0, num_levels, u, temperature):
    """Return the level that `sampling.draw_level` would return."""
    if temperature == 0:
        best = 0
        for k in range(1, num_levels):
            if logits[k0 + k] > logits[k0 + best]:
                best = k
        return best
    most = -np.inf
    for k in range(num_levels):
        most = max(most, np.float64(logits[k0 + k]))
    total = 0.0
    for k in range(num_levels):
        cumulative[k] = math.exp((logits[k0 + k] - most) / temperature)
        total += cumulative[k]
    reached = 0.0
    for k in range(num_levels - 1):
        reached += cumulative[k] / total
        if reached > u:
            return k
    return num_levels - 1


@_compiled
def _head_and_draw(w, s, features, y, x, c, levels, logits_out, u, missing, temperature):
    """Score colour c of pixel (y, x) from the network's features; draw it where it is missing."""
    head_w, head_b, logits_w, logits_b = w
    hidden, positive, logits, cumulative = s
    num_colours = levels.shape[0]
    num_levels = logits_w.shape[1] // num_colours
    num_in, num_head = head_w.shape[0] // num_colours, head_w.shape[1] // num_colours
    h0, h1 = c * num_head, (c + 1) * num_head
    k0, k1 = c * num_levels, (c + 1) * num_levels
    # The maps of earlier colours are there from their own turn.
    _relu(positive[0], features, c * num_in, (c + 1) * num_in)
    hidden[h0:h1] = head_b[h0:h1]
    _add_matvec(hidden, head_w, positive[0], 0, (c + 1) * num_in, h0, h1)
    _relu(positive[1], hidden, h0, h1)
    logits[k0:k1] = logits_b[k0:k1]
    _add_matvec(logits, logits_w, positive[1], 0, h1, k0, k1)
    if logits_out.shape[0]:
        for k in range(num_levels):
            logits_out[k, c, y, x] = logits[k0 + k]
    if missing[y, x]:
        levels[c, y, x] = _draw(logits, cumulative, k0, num_levels, u[c, y, x], temperature)


@_compiled
def _pixelcnn_rows(w, head, label_bias, s, head_s, levels, missing, u, temperature, logits_out, y0, y1):
    """Sample rows y0..y1-1 of one image in place."""
    first_above, first_left, first_centre, first_b, first_skip_w, first_skip_b = w[0]
    reduce_w, reduce_b, above_w, left_w, centre_w, conv_b, expand_w, expand_b, skip_w, skip_b = w[1]
    image, cache, first_row, above_row, stream, positive_stream, base, positive, skips = s
    num_colours, height, width = levels.shape
    num_levels = head[2].shape[1] // num_colours
    num_blocks, num_features = reduce_b.shape
    num_head = skip_b.shape[1]
    first_half, half = image.shape[0] - height, (cache.shape[2] - width) // 2
    num_slots = cache.shape[1]
    inner, outer, skip_maps = num_features // num_colours, 2 * num_features // num_colours, num_head // num_colours
    scale = image.dtype.type(2) / image.dtype.type(num_levels - 1)
    always = logits_out.shape[0] > 0

    for y in range(y0, y1):
        slot = y % num_slots
        for x in range(width):
            first_row[x] = first_b
        tap = 0
        for dy in range(first_half):
            for dx in range(2 * first_half + 1):
                for x in range(width):
                    _add_matvec(first_row[x], first_above[tap], image[y + dy, x + dx], 0, num_colours, 0, first_b.size)
                tap += 1
        for layer in range(num_blocks):
            for x in range(width):
                for o in range(num_features):
                    above_row[layer, x, o] = conv_b[layer, o] + label_bias[layer, o]
            tap = 0
            for dy in range(-half, 0):
                row = cache[layer, (y + dy) % num_slots]
                for dx in range(2 * half + 1):
                    for x in range(width):
                        _add_matvec(
                            above_row[layer, x], above_w[layer, tap], row[x + dx], 0, num_features, 0, num_features
                        )
                    tap += 1

        for x in range(width):
            stream[0] = first_row[x]
            for tap in range(first_half):
                pixel = image[y + first_half, x + tap]
                _add_matvec(stream[0], first_left[tap], pixel, 0, num_colours, 0, first_b.size)
            for layer in range(num_blocks):
                base[layer] = above_row[layer, x]
                for tap in range(half):
                    left = cache[layer, slot, x + tap]
                    _add_matvec(base[layer], left_w[layer, tap], left, 0, num_features, 0, num_features)
            for c in range(num_colours):
                i0, i1, o0, o1 = c * inner, (c + 1) * inner, c * outer, (c + 1) * outer
                s0, s1 = c * skip_maps, (c + 1) * skip_maps
                pixel = image[y + first_half, x + first_half]
                _add_matvec(stream[0], first_centre, pixel, 0, c, o0, o1)
                skips[s0:s1] = first_skip_b[s0:s1]
                _add_matvec(skips, first_skip_w, stream[0], 0, o1, s0, s1)
                for layer in range(num_blocks):
                    here = cache[layer, slot, x + half]
                    _relu(positive_stream[layer], stream[layer], o0, o1)
                    here[i0:i1] = reduce_b[layer, i0:i1]
                    _add_matvec(here, reduce_w[layer], positive_stream[layer], 0, o1, i0, i1)
                    _relu(here, here, i0, i1)
                    _add_matvec(base[layer], centre_w[layer], here, 0, i1, i0, i1)
                    _relu(positive[layer], base[layer], i0, i1)
                    for o in range(s0, s1):
                        skips[o] += skip_b[layer, o]
                    _add_matvec(skips, skip_w[layer], positive[layer], 0, i1, s0, s1)
                    if layer + 1 < num_blocks:
                        for o in range(o0, o1):
                            stream[layer + 1, o] = stream[layer, o] + expand_b[layer, o]
                        _add_matvec(stream[layer + 1], expand_w[layer], positive[layer], 0, i1, o0, o1)
                if always or missing[y, x]:
                    _head_and_draw(head, head_s, skips, y, x, c, levels, logits_out, u, missing, temperature)
                level = image.dtype.type(levels[c, y, x])
                image[y + first_half, x + first_half, c] = level * scale - image.dtype.type(1)


@_compiled
def _gated_rows(w, head, label_bias, s, head_s, levels, missing, u, temperature, logits_out, y0, y1):
    """Sample rows y0..y1-1 of one image in place."""
    first_v, first_left, first_centre, v_w, v_b, link_w, link_b, left_w, centre_w, h_b, out_w, out_b = w
    v_label, h_label = label_bias
    image, v_cache, h_cache, v_gates, link_row, gates, gated, scratch = s
    num_colours, height, width = levels.shape
    num_levels = head[2].shape[1] // num_colours
    num_layers, num_features = out_b.shape
    num_gates = 2 * num_features
    half = image.shape[0] - height
    num_slots = half + 1
    maps = num_features // num_colours
    scale = image.dtype.type(2) / image.dtype.type(num_levels - 1)
    always = logits_out.shape[0] > 0

    for y in range(y0, y1):
        # The vertical stack of the row above, over its full width, and its link to this row.
        for layer in range(num_layers):
            for x in range(width):
                for o in range(num_gates):
                    link_row[layer, x, o] = link_b[layer, o] + h_b[layer, o] + h_label[layer, o]
        if y > 0:
            for layer in range(num_layers):
                for x in range(width):
                    v_gates[x] = v_b[layer]
                tap = 0
                for dy in range(half + 1):
                    for dx in range(2 * half + 1):
                        for x in range(width):
                            if layer == 0:
                                pixel = image[y - 1 + dy, x + dx]
                                _add_matvec(v_gates[x], first_v[tap], pixel, 0, num_colours, 0, num_gates)
                            else:
                                above = v_cache[layer - 1, (y - 1 + dy - half) % num_slots, x + dx]
                                _add_matvec(v_gates[x], v_w[layer - 1, tap], above, 0, num_features, 0, num_gates)
                        tap += 1
                for x in range(width):
                    _add_matvec(link_row[layer, x], link_w[layer], v_gates[x], 0, num_gates, 0, num_gates)
                    if layer + 1 < num_layers:
                        for o in range(num_gates):
                            v_gates[x, o] += v_label[layer, o]
                        new = v_cache[layer, (y - 1) % num_slots, x + half]
                        _gate(new, v_gates[x], scratch, 0, num_features, num_features)

        for x in range(width):
            for layer in range(num_layers):
                gates[layer] = link_row[layer, x]
                for tap in range(half):
                    if layer == 0:
                        pixel = image[y + half, x + tap]
                        _add_matvec(gates[layer], first_left[tap], pixel, 0, num_colours, 0, num_gates)
                    else:
                        left = h_cache[layer, x + tap]
                        _add_matvec(gates[layer], left_w[layer - 1, tap], left, 0, num_features, 0, num_gates)
            for c in range(num_colours):
                m0, m1 = c * maps, (c + 1) * maps
                for layer in range(num_layers):
                    # Maps of this colour lie in both halves, that of tanh and that of sigmoid.
                    for part in range(2):
                        g0, g1 = part * num_features + m0, part * num_features + m1
                        if layer == 0:
                            pixel = image[y + half, x + half]
                            _add_matvec(gates[layer], first_centre, pixel, 0, c, g0, g1)
                        else:
                            here = h_cache[layer, x + half]
                            _add_matvec(gates[layer], centre_w[layer - 1], here, 0, m1, g0, g1)
                    _gate(gated[layer], gates[layer], scratch, m0, num_features + m0, maps)
                    new = h_cache[layer + 1, x + half]
                    for o in range(m0, m1):
                        new[o] = out_b[layer, o] + (h_cache[layer, x + half, o] if layer > 0 else 0)
                    _add_matvec(new, out_w[layer], gated[layer], 0, m1, m0, m1)
                if always or missing[y, x]:
                    features = h_cache[num_layers, x + half]
                    _head_and_draw(head, head_s, features, y, x, c, levels, logits_out, u, missing, temperature)
                level = image.dtype.type(levels[c, y, x])
                image[y + half, x + half, c] = level * scale - image.dtype.type(1)


def _array(tensor: Tensor) -> Array:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _weight(conv: MaskedConv2d) -> Tensor:
    return (conv.weight * conv.mask).detach()  # (out, in, kh, kw)


def _taps(weight: Tensor) -> Tensor:
    """(out, in, kh, kw) -> (kh * kw, in, out), one (in, out) matrix for each tap in raster order."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1)


def _stack(tensors: list[Tensor], like: tuple[int, ...]) -> Array:
    """Stack layers along a new first axis; `like` is the shape of one, for a network that has none."""
    return _array(torch.stack(tensors)) if tensors else np.zeros((0, *like))


@dataclass(frozen=True)
class Engine:
    """A model's weights laid out for sampling, and the functions that make state and sample rows.

    Args:
        dtype: of the weights.
        new_state: returns fresh buffers for one image.
        label_bias: returns what a label adds.
        rows: samples rows of one image in place.
    """

    dtype: Any
    new_state: Callable[[], Any]
    label_bias: Callable[[int], Any]
    rows: Callable[..., None]


def _head_weights(model: AutoregressiveModel) -> tuple[Array, ...]:
    matrices = []
    for conv in (model.head, model.logits):
        matrices += [_array(_weight(conv)[:, :, 0, 0].T), _array(conv.bias)]
    return tuple(matrices)


def _head_state(model: AutoregressiveModel, dtype: Any) -> tuple[Array, ...]:
    in_maps, head = model.head.weight.shape[1], model.head.weight.shape[0]
    return (
        np.zeros(head, dtype),
        np.zeros((2, max(in_maps, head)), dtype),
        np.zeros(model.logits.weight.shape[0], dtype),
        np.zeros(model.config.num_levels, np.float64),
    )


def _label_rows(tables: list[Any], label: int, shape: tuple[int, int], dtype: Any) -> Array:
    if label < 0 or tables[0] is None:
        return np.zeros(shape, dtype)
    return _array(torch.stack([table[label] for table in tables if table is not None]))


def _pixelcnn_engine(model: PixelCNN) -> Engine:
    config = model.config
    blocks: list[Any] = list(model.blocks)
    colours, height, width = config.image_shape
    first_half, half = config.first_kernel_size // 2, config.kernel_size // 2
    h, num_blocks = config.num_features, config.num_blocks
    first = _taps(_weight(model.first))  # (taps, C, 2h)
    num_above = first_half * config.first_kernel_size
    convs = torch.stack([_taps(_weight(block.conv)) for block in blocks])  # (L, taps, h, h)
    above = half * config.kernel_size

    def matrices(name: str) -> Array:
        return _array(torch.stack([_weight(getattr(block, name))[:, :, 0, 0].T for block in blocks]))

    def biases(name: str) -> Array:
        return _array(torch.stack([getattr(block, name).bias for block in blocks]))

    weights = (
        (
            _array(first[:num_above]),
            _array(first[num_above : num_above + first_half]),
            _array(first[num_above + first_half]),
            _array(model.first.bias),
            _array(_weight(model.first_skip)[:, :, 0, 0].T),
            _array(model.first_skip.bias),
        ),
        (
            matrices("reduce"),
            biases("reduce"),
            _array(convs[:, :above]),
            _array(convs[:, above : above + half]),
            _array(convs[:, above + half]),
            biases("conv"),
            matrices("expand"),
            biases("expand"),
            matrices("skip"),
            biases("skip"),
        ),
    )
    head = _head_weights(model)
    dtype = head[0].dtype
    tables = [None if b.label_bias is None else b.label_bias.table for b in blocks]

    def new_state() -> Any:
        return (
            (
                np.zeros((height + first_half, width + 2 * first_half, colours), dtype),
                np.zeros((num_blocks, half + 1, width + 2 * half, h), dtype),
                np.zeros((width, 2 * h), dtype),
                np.zeros((num_blocks, width, h), dtype),
                np.zeros((num_blocks, 2 * h), dtype),
                np.zeros((num_blocks, 2 * h), dtype),
                np.zeros((num_blocks, h), dtype),
                np.zeros((num_blocks, h), dtype),
                np.zeros(config.head_features, dtype),
            ),
            _head_state(model, dtype),
        )

    def rows(bias: Any, state: Any, *arguments: Any) -> None:
        _pixelcnn_rows(weights, head, bias, *state, *arguments)

    return Engine(dtype, new_state, lambda label: _label_rows(tables, label, (num_blocks, h), dtype), rows)


def _gated_engine(model: GatedPixelCNN) -> Engine:
    config = model.config
    layers: list[Any] = list(model.layers)
    colours, height, width = config.image_shape
    half, p, num_layers = config.kernel_size // 2, config.num_features, config.num_layers
    v_taps = [_taps(_weight(layer.v_conv)) for layer in layers]
    h_taps = [_taps(_weight(layer.h_conv)) for layer in layers]
    num_taps = len(v_taps[0])
    weights: tuple[Array, ...] = (
        _array(v_taps[0]),
        _array(h_taps[0][:half]),
        _array(h_taps[0][half]),
        _stack(v_taps[1:], (num_taps, p, 2 * p)),
        _array(torch.stack([layer.v_conv.bias for layer in layers])),
        _array(torch.stack([layer.link.weight[:, :, 0, 0].T for layer in layers])),
        _array(torch.stack([layer.link.bias for layer in layers])),
        _stack([taps[:half] for taps in h_taps[1:]], (half, p, 2 * p)),
        _stack([taps[half] for taps in h_taps[1:]], (p, 2 * p)),
        _array(torch.stack([layer.h_conv.bias for layer in layers])),
        _array(torch.stack([_weight(layer.h_out)[:, :, 0, 0].T for layer in layers])),
        _array(torch.stack([layer.h_out.bias for layer in layers])),
    )
    head = _head_weights(model)
    dtype = head[0].dtype
    weights = tuple(array.astype(dtype, copy=False) for array in weights)
    v_tables = [None if layer.v_label_bias is None else layer.v_label_bias.table for layer in layers]
    h_tables = [None if layer.h_label_bias is None else layer.h_label_bias.table for layer in layers]

    def new_state() -> Any:
        return (
            (
                np.zeros((height + half, width + 2 * half, colours), dtype),
                np.zeros((num_layers, half + 1, width + 2 * half, p), dtype),
                np.zeros((num_layers + 1, width + half, p), dtype),
                np.zeros((width, 2 * p), dtype),
                np.zeros((num_layers, width, 2 * p), dtype),
                np.zeros((num_layers, 2 * p), dtype),
                np.zeros((num_layers, p), dtype),
                np.zeros((3, 2 * p), dtype),
            ),
            _head_state(model, dtype),
        )

    def label_bias(label: int) -> Any:
        shape = (num_layers, 2 * p)
        return _label_rows(v_tables, label, shape, dtype), _label_rows(h_tables, label, shape, dtype)

    def rows(bias: Any, state: Any, *arguments: Any) -> None:
        _gated_rows(weights, head, bias, *state, *arguments)

    return Engine(dtype, new_state, label_bias, rows)


def build_engine(model: AutoregressiveModel) -> Engine:
    """Lay a model's weights out for compiled sampling.

    Raises:
        ValueError: the architecture or the dtype of the weights has no compiled sampler.
    """
    if model.head.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"compiled sampling takes float32 or float64 weights, got {model.head.weight.dtype}.")
    if isinstance(model, PixelCNN):
        return _pixelcnn_engine(model)
    if isinstance(model, GatedPixelCNN):
        return _gated_engine(model)
    raise ValueError(f"compiled sampling knows PixelCNN and GatedPixelCNN, got {type(model).__name__}.")
