"""Cached sampling, compiled for the CPU with numba: the same function of (model, u) as `naive_sample`.

The algorithm is that of cached_sampling.py, which says it in torch; here it is laid out for the machine.

- A row of pixels lies in memory as (column, map), so what a kernel's row covers is one run of numbers: a kernel's row
  is one matrix, and what lies left of a pixel joins its centre in one product.
- With several colours, each colour has its own matrices, holding just the inputs that it may see.
- The rows above are multiplied four columns at a time, so that a weight is read once for four products.
- Matrices are cut into panels as wide as two vector registers, one panel after the other: the inner loop reads
  memory in order and keeps its sums in registers. It is written in vector instructions (`_tile`), because compilers
  do not find that form by themselves.
- Some images are sampled in step, so that a weight is read once for a pixel of each. A sum's order does not depend on
  how many there are: not a bit of an image depends on those beside it.
- The map of a drawing is made here as well, so that nothing waits for torch's threads, and enters as one more input.
- Activations are kept for a few rows only (a ring), so the cost of a pixel does not grow with the image.
- Rows without a missing pixel are computed only as far as later ones see them.

Arrays are flat; a place in one is an offset. Every array that a product reads has a vector's length to spare at its
end.

All of it is one file: numba keeps compiled code on disk until the file of a function changes, and would not notice a
change of what the function calls elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from pixelcnn.layers import MaskedConv2d
from pixelcnn.model import AutoregressiveModel, GatedPixelCNN, PixelCNN

# Fused multiply-add is allowed; nothing else that changes a result is.
# error_model: a check for division by zero would keep a loop from becoming vector instructions.
_options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_compiled: Any = njit(**_options, fastmath={"contract"})
_inlined: Any = njit(**_options, fastmath={"contract"}, forceinline=True)
_reordered: Any = njit(**_options, fastmath={"contract", "reassoc", "nnan", "nsz"}, forceinline=True)  # for max and sum

Array = np.ndarray[Any, Any]
ir = cgutils.ir  # numba's own builder of LLVM code

VECTOR_BYTES = 64  # wider than the machine's registers is fine: LLVM splits it
NO_FLOOR = -np.inf
BLOCK = 128  # inputs of a panel that are read again and again: 16 KiB
_u: Any = np.uintp  # an index that cannot be negative: loops over it become vector instructions


def _tile(num_columns: int, num_vectors: int, num_chains: int) -> Any:
    """Return the innermost product, as vector instructions for numba's code.

    tile(out, o, o_step, base, b, b_step, x, i, x_step, num_in, w, at, floor, count) does, for each r < num_columns,

        out[o + r * o_step :] = max(floor, base[b + r * b_step :] + x[i + r * x_step :][:num_in] @ panel)

    where panel is the (num_in, num_vectors * lanes) matrix at w[at:]. Of a single vector's results the first `count`
    are written; more than one are written in full.

    Args:
        num_chains: independent sums per result, added at the end: a sum waits for its last addition.
    """

    def tile(_, out, o, o_step, base, b, b_step, x, i, x_step, num_in, w, at, floor, count):
        n = types.intp
        signature = types.void(out, n, n, base, n, n, x, n, n, n, w, n, types.float64, n)

        def generate(context, builder, signature, arguments):
            element = context.get_data_type(out.dtype)
            size = context.get_abi_sizeof(element)
            lanes = VECTOR_BYTES // size
            vector, index = ir.VectorType(element, lanes), ir.IntType(64)

            def data(k):
                return context.make_array(signature.args[k])(context, builder, arguments[k]).data

            def whole(value):
                return ir.Constant(index, value)

            def load(pointer, offset):
                place = builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())
                return builder.load(place, align=size)

            def splat(value):
                undefined = ir.Constant(vector, ir.Undefined)
                first = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
                return builder.shuffle_vector(first, undefined, zeros)

            out_data, base_data, x_data, w_data = data(0), data(3), data(6), data(10)
            _, o, o_step, _, b, b_step, _, i, x_step, num_in, _, at, floor, count = arguments
            cells = [(r, v) for r in range(num_columns) for v in range(num_vectors)]

            def place(start, step, r, v):
                return builder.add(builder.add(start, builder.mul(step, whole(r))), whole(v * lanes))

            zero = ir.Constant(vector, [ir.Constant(element, 0.0)] * lanes)
            chains = [[load(base_data, place(b, b_step, r, v)) for r, v in cells]]
            chains += [[zero] * len(cells) for _ in range(num_chains - 1)]

            def loop(start, chains, step):
                """Add the products of inputs start, start + 1, ... while `step` of them are left."""
                before = builder.block
                head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
                builder.branch(head)
                builder.position_at_end(head)
                k = builder.phi(index)
                sums = [[builder.phi(vector) for _ in cells] for _ in chains]
                builder.cbranch(builder.icmp_signed("<=", builder.add(k, whole(step)), num_in), body, after)
                builder.position_at_end(body)
                new = [list(chain) for chain in sums]
                for s in range(step):
                    input_ = builder.add(k, whole(s))
                    row = builder.add(at, builder.mul(input_, whole(num_vectors * lanes)))
                    weights = [load(w_data, builder.add(row, whole(v * lanes))) for v in range(num_vectors)]
                    offsets = [builder.add(place(i, x_step, r, 0), input_) for r in range(num_columns)]
                    inputs = [splat(builder.load(builder.gep(x_data, [offset]))) for offset in offsets]
                    chain = new[s % num_chains]
                    for cell, (r, v) in enumerate(cells):
                        product = builder.fmul(inputs[r], weights[v], flags=["contract"])
                        chain[cell] = builder.fadd(chain[cell], product, flags=["contract"])
                k.add_incoming(start, before)
                k.add_incoming(builder.add(k, whole(step)), body)
                for phis, firsts, nexts in zip(sums, chains, new, strict=True):
                    for phi, first, next_ in zip(phis, firsts, nexts, strict=True):
                        phi.add_incoming(first, before)
                        phi.add_incoming(next_, body)
                builder.branch(head)
                builder.position_at_end(after)
                return k, sums

            k, chains = loop(whole(0), chains, 4)
            _, chains = loop(k, chains, 1)
            least = splat(floor if element == floor.type else builder.fptrunc(floor, element))
            for cell, (r, v) in enumerate(cells):
                total = chains[0][cell]
                for chain in chains[1:]:
                    total = builder.fadd(total, chain[cell])
                total = builder.select(builder.fcmp_ordered(">", total, least), total, least)
                pointer = builder.gep(out_data, [place(o, o_step, r, v)])

                def store_all(pointer=pointer, total=total):
                    builder.store(total, builder.bitcast(pointer, vector.as_pointer()), align=size)

                if num_vectors > 1:
                    store_all()
                    continue
                with builder.if_else(builder.icmp_signed(">=", count, whole(lanes))) as (full, part):
                    with full:
                        store_all()
                    with part, cgutils.for_range(builder, count) as lane:
                        number = builder.extract_element(total, builder.trunc(lane.index, ir.IntType(32)))
                        builder.store(number, builder.gep(pointer, [lane.index]))
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(tile)


_tile_1x1, _tile_1x2 = _tile(1, 1, 4), _tile(1, 2, 4)
_tile_4x1, _tile_4x2 = _tile(4, 1, 2), _tile(4, 2, 1)
# For a pixel of two images: their sums are added in the order of those of one.
_tile_2x1, _tile_2x2 = _tile(2, 1, 4), _tile(2, 2, 4)


@_inlined
def _products(out, o, o_step, base, b, b_step, x, i, x_step, num_images, num_in, w, at, num_out, floor):
    """out[o:] = max(floor, base[b:] + x[i : i + num_in] @ matrix), a step further for each image.

    The (num_in, num_out) matrix is the one packed at w[at:].
    """
    lanes = VECTOR_BYTES // w.itemsize
    k = 0
    while k < num_out:
        wide = k + 2 * lanes <= num_out
        panel, count, r = at + num_in * k, min(lanes, num_out - k), 0
        while r < num_images:
            to, of, of_x = o + r * o_step + k, b + r * b_step + k, i + r * x_step
            if r + 2 <= num_images:
                if wide:
                    _tile_2x2(out, to, o_step, base, of, b_step, x, of_x, x_step, num_in, w, panel, floor, count)
                else:
                    _tile_2x1(out, to, o_step, base, of, b_step, x, of_x, x_step, num_in, w, panel, floor, count)
                r += 2
            else:
                if wide:
                    _tile_1x2(out, to, 0, base, of, 0, x, of_x, 0, num_in, w, panel, floor, count)
                else:
                    _tile_1x1(out, to, 0, base, of, 0, x, of_x, 0, num_in, w, panel, floor, count)
                r += 1
        k += 2 * lanes if wide else lanes


@_compiled
def _add_products(out, o, o_step, x, i, x_step, num_columns, num_in, w, at, num_out):
    """out[o + r * o_step :] += x[i + r * x_step :][:num_in] @ matrix, for each column r of a row."""
    lanes = VECTOR_BYTES // w.itemsize
    k = 0
    while k < num_out:
        wide = k + 2 * lanes <= num_out
        width = 2 * lanes if wide else lanes
        count = min(lanes, num_out - k)
        # A part of the panel that stays in the first-level cache for all columns.
        for first in range(0, num_in, BLOCK):
            n, panel, r = min(BLOCK, num_in - first), at + num_in * k + first * width, 0
            while r < num_columns:
                to, of = o + r * o_step + k, i + r * x_step + first
                if r + 4 <= num_columns:
                    if wide:
                        _tile_4x2(out, to, o_step, out, to, o_step, x, of, x_step, n, w, panel, NO_FLOOR, count)
                    else:
                        _tile_4x1(out, to, o_step, out, to, o_step, x, of, x_step, n, w, panel, NO_FLOOR, count)
                    r += 4
                else:
                    if wide:
                        _tile_1x2(out, to, 0, out, to, 0, x, of, 0, n, w, panel, NO_FLOOR, count)
                    else:
                        _tile_1x1(out, to, 0, out, to, 0, x, of, 0, n, w, panel, NO_FLOOR, count)
                    r += 1
        k += width


@_compiled
def _fill_columns(out, o, num_columns, bias, b, n):
    """Write bias[b : b + n] into each column of a row."""
    o, b, n = _u(o), _u(b), _u(n)
    for _ in range(num_columns):
        for k in range(n):
            out[o + k] = bias[b + k]
        o += n


@_inlined
def _add(out, o, x, i, y, j, n):
    """out[o : o + n] = x[i : i + n] + y[j : j + n]."""
    o, i, j = _u(o), _u(i), _u(j)
    for k in range(_u(n)):
        out[o + k] = x[i + k] + y[j + k]


@_inlined
def _relu(out, o, x, i, y, j, n):
    """out[o : o + n] = max(0, x[i : i + n] + y[j : j + n])."""
    o, i, j = _u(o), _u(i), _u(j)
    zero = x.dtype.type(0)
    for k in range(_u(n)):
        total = x[i + k] + y[j + k]
        out[o + k] = total if total > zero else zero


def _bitcast(_, bits):
    """The float of the same bits as an integer."""
    floats: Any = types.float32 if bits == types.int32 else types.float64

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_data_type(signature.return_type))

    return floats(bits), generate


_from_bits: Any = intrinsic(_bitcast)


@_inlined
def _exp32(x):
    """exp of a float32 in [-87, 87], within about 1e-7: 2^k times a polynomial, without a branch."""
    k = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    # Reduced argument, |r| <= ln(2) / 2, with ln 2 in two parts; then Taylor to the 7th power (error 5e-9).
    r = (x - k * np.float32(0.693359375)) + k * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040)
    p = p * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    return p * _from_bits(np.int32((np.int32(k) + np.int32(127)) << np.int32(23)))


@_inlined
def _exp64(x):
    """exp of a float64 in [-1400, 0], within about 3e-16: likewise, to the 13th power."""
    k = np.floor(x * 1.4426950408889634 + 0.5)
    r = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10
    p = 1 / 6227020800
    p = p * r + 1 / 479001600
    p = p * r + 1 / 39916800
    p = p * r + 1 / 3628800
    p = p * r + 1 / 362880
    p = p * r + 1 / 40320
    p = p * r + 1 / 5040
    p = p * r + 1 / 720
    p = p * r + 1 / 120
    p = p * r + 1 / 24
    p = p * r + 1 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    half = np.int64(k) >> 1  # 2^k in two steps, for results that are nearly or just 0
    return p * _from_bits((half + 1023) << 52) * _from_bits((np.int64(k) - half + 1023) << 52)


@_inlined
def _gate32(a, b):
    """tanh(a) * sigmoid(b) of float32 numbers."""
    a = min(max(a, np.float32(-15)), np.float32(15))  # tanh is +-1 in float32 from 9 on
    b = min(max(b, np.float32(-80)), np.float32(80))
    e, one = _exp32(np.float32(-2) * a), np.float32(1)
    return (one - e) / ((one + e) * (one + _exp32(-b)))


@_inlined
def _gate(out, o, gates, g, n):
    """out[o : o + n] = tanh(gates[g : g + n]) * sigmoid(gates[g + n : g + 2 * n])."""
    o, g, n = _u(o), _u(g), _u(n)
    if gates.itemsize == 4:
        for k in range(n):
            out[o + k] = _gate32(gates[g + k], gates[g + n + k])
    else:
        for k in range(n):
            out[o + k] = math.tanh(gates[g + k]) / (1.0 + math.exp(-gates[g + n + k]))


@_reordered
def _largest(logits, num_levels):
    most = logits[0]
    for k in range(num_levels):
        most = max(most, logits[k])
    return most


@_reordered
def _sum(values, num_levels):
    total = 0.0
    for k in range(num_levels):
        total += values[k]
    return total


@_inlined
def _exponentials(logits, exps, num_levels, temperature):
    """exps[k] = exp((logits[k] - most) / temperature), in float64; return their sum, and `most`, the largest logit."""
    most = np.float64(_largest(logits, num_levels))
    for k in range(num_levels):
        exps[k] = _exp64(max((np.float64(logits[k]) - most) / temperature, -1400.0))
    return _sum(exps, num_levels), most


@_compiled
def _draw(logits, exps, num_levels, u, temperature):
    """Return the level that `sampling.draw_level` would return, and its nats at temperature 1, in float64."""
    level = num_levels - 1
    if temperature == 0:
        level = 0
        for k in range(1, num_levels):
            if logits[k] > logits[level]:
                level = k
    else:
        total, most = _exponentials(logits, exps, num_levels, temperature)
        reached = 0.0
        for k in range(num_levels - 1):
            reached += exps[k] / total
            if reached > u:
                level = k
                break
    if temperature != 1:
        total, most = _exponentials(logits, exps, num_levels, 1.0)
    return level, math.log(total) + most - np.float64(logits[level])


@_inlined
def _head_and_draw(w, at, s, y, x, c, work, index, temperature):
    """Score colour c of pixel (y, x) from the rectified features; draw it in the images in which it is missing."""
    head, head_b, logits_at, logits_b, num_in, num_head, num_levels = at
    features, hidden, logits, exps = s
    levels, missing, u, _, _, _, logits_out, nats = work
    num_colours, num_images = levels.shape[1], index.size
    # The maps of earlier colours are there from their own turn.
    _products(
        hidden, c * num_head, num_colours * num_head, w, head_b + c * num_head, 0,
        features, 0, num_colours * num_in, num_images, (c + 1) * num_in, w, head[c], num_head, 0.0,
    )  # fmt: skip
    _products(
        logits, 0, num_levels, w, logits_b + c * num_levels, 0,
        hidden, 0, num_colours * num_head, num_images, (c + 1) * num_head, w, logits_at[c], num_levels, NO_FLOOR,
    )  # fmt: skip
    for g in range(num_images):
        n = index[g]
        own = logits[g * num_levels : (g + 1) * num_levels]
        if logits_out.shape[0]:
            for k in range(num_levels):
                logits_out[n, k, c, y, x] = own[k]
        if missing[n, y, x]:
            level, cost = _draw(own, exps, num_levels, u[n, c, y, x], temperature)
            levels[n, c, y, x] = level
            nats[n] += cost


@_inlined
def _first_missing_row(missing, index):
    """Return the first row in which one of the images misses a pixel; their height if there is none."""
    height, width = missing.shape[1:]
    for y in range(height):
        for g in range(index.size):
            for x in range(width):
                if missing[index[g], y, x]:
                    return y
    return height


@_inlined
def _num_unseen(first_missing, y, half):
    """Return how many layers, of the last ones, no missing pixel sees in row y: each sees `half` rows up."""
    return (max(0, first_missing - y) + half - 1) // half


@_inlined
def _end_of_missing(missing, index, y):
    """Return the column after the last one that one of the images misses in a row; 0 if there is none."""
    for end in range(missing.shape[2], 0, -1):
        for g in range(index.size):
            if missing[index[g], y, end - 1]:
                return end
    return 0


@_compiled
def _pixelcnn_rows(w, sizes, at, head, s, head_s, work, index, temperature, y0, y1):
    """Sample rows y0..y1-1 of some images in place."""
    first_half, half, num_blocks, num_features, num_head, num_context = sizes
    first_above, first_b, first_left, first_skip, skips_b, above, reduce, reduce_b, conv, stream_b, grow = at[:11]
    bias, projection = at[11:]
    image, cache, first_row, above_row, first, stream, positive_stream, positive = s
    levels, missing, _, labels, contexts, which, logits_out, _ = work
    num_images = index.size
    _, num_colours, height, width = levels.shape
    num_levels = head[6]
    num_slots = half + 1
    image_step, cache_step = (width + 2 * first_half) * num_colours, (width + 2 * half) * num_features
    h, num_first = num_features, 2 * num_features
    inner, outer, skips = h // num_colours, num_first // num_colours, num_head // num_colours
    # From an image's numbers to those of the next.
    image_size, cache_size = (height + first_half) * image_step, num_blocks * num_slots * cache_step
    first_size, above_size, stream_size = width * num_first, num_blocks * width * h, outer + skips
    deep_size, positive_size = num_blocks * num_first, num_blocks * h
    scale = w.dtype.type(2) / w.dtype.type(num_levels - 1)
    always = logits_out.shape[0] > 0
    first_missing = 0 if always else _first_missing_row(missing, index)

    for y in range(y0, y1):
        end = width if always else _end_of_missing(missing, index, y)
        depth = num_blocks - _num_unseen(first_missing, y, half)  # so many blocks' results are seen
        # What lies above, over the whole row.
        for g in range(num_images if depth >= 0 else 0):
            o = g * first_size
            _fill_columns(first_row, o, width, w, first_b, num_first)
            n = (2 * first_half + 1) * num_colours
            for dy in range(first_half):
                i = g * image_size + (y + dy) * image_step
                _add_products(first_row, o, num_first, image, i, num_colours, width, n, w, first_above[dy], num_first)
            for layer in range(depth):
                o = g * above_size + layer * width * h
                _fill_columns(above_row, o, width, w, bias + ((labels[index[g]] + 1) * num_blocks + layer) * h, h)
                if which[index[g]] >= 0:
                    i = (which[index[g]] * height + y) * width * num_context
                    _add_products(
                        above_row, o, h, contexts, i, num_context, width, num_context, w, projection[layer], h
                    )
                for dy in range(half):
                    i = g * cache_size + (layer * num_slots + (y - half + dy) % num_slots) * cache_step
                    _add_products(above_row, o, h, cache, i, h, width, (2 * half + 1) * h, w, above[layer, dy], h)

        for x in range(width):
            pixel = (y + first_half) * image_step + (x + first_half) * num_colours
            for c in range(num_colours):
                o = c * outer
                if depth >= 0:
                    # Of this colour: the residual stream, then the skip connections' sum, both without their biases.
                    i, n = pixel - first_half * num_colours, first_half * num_colours + c
                    _products(
                        first, o, num_first, first_row, x * num_first + o, first_size,
                        image, i, image_size, num_images, n, w, first_left[c], outer, NO_FLOOR,
                    )  # fmt: skip
                    for g in range(num_images):
                        for k in range(outer):
                            stream[g * stream_size + k] = first[g * num_first + o + k]
                    _products(
                        stream, outer, stream_size, w, skips_b + c * skips, 0,
                        first, 0, num_first, num_images, o + outer, w, first_skip[c], skips, NO_FLOOR,
                    )  # fmt: skip
                for layer in range(min(depth + 1, num_blocks)):
                    p, i, num_in = layer * num_first, layer * h, (c + 1) * inner
                    here = (layer * num_slots + y % num_slots) * cache_step + (x + half) * h
                    for g in range(num_images):
                        to, b = g * deep_size + p + o, stream_b + p + o
                        _relu(positive_stream, to, stream, g * stream_size, w, b, outer)
                    _products(
                        cache, here + c * inner, cache_size, w, reduce_b + i + c * inner, 0,
                        positive_stream, p, deep_size, num_images, o + outer, w, reduce[layer, c], inner, 0.0,
                    )  # fmt: skip
                    if layer == depth:
                        break  # the rows below see this much of it
                    _products(
                        positive, i + c * inner, positive_size,
                        above_row, (layer * width + x) * h + c * inner, above_size,
                        cache, here - half * h, cache_size,
                        num_images, half * h + num_in, w, conv[layer, c], inner, 0.0,
                    )  # fmt: skip
                    start = 0 if layer + 1 < num_blocks else outer  # nothing reads the last block's stream
                    _products(
                        stream, start, stream_size, stream, start, stream_size, positive, i, positive_size,
                        num_images, num_in, w, grow[layer, c], outer + skips - start, NO_FLOOR,
                    )  # fmt: skip
                if x < end:
                    for g in range(num_images):
                        to, b = g * num_head + c * skips, stream_b + num_blocks * num_first
                        _relu(head_s[0], to, stream, g * stream_size + outer, w, b, skips)
                    _head_and_draw(w, head, head_s, y, x, c, work, index, temperature)
                for g in range(num_images):
                    level = w.dtype.type(levels[index[g], c, y, x])
                    image[g * image_size + pixel + c] = level * scale - w.dtype.type(1)


@_compiled
def _gated_rows(w, sizes, at, head, s, head_s, work, index, temperature, y0, y1):
    """Sample rows y0..y1-1 of some images in place."""
    half, num_layers, num_features, num_context = sizes
    v_conv, v_b, link, h_conv, h_out, out_b, zeros, v_label, h_label, v_context, h_context = at
    image, v_cache, h_cache, v_gates, link_row, gates, gated, residual = s
    levels, missing, _, labels, contexts, which, logits_out, _ = work
    num_images = index.size
    _, num_colours, height, width = levels.shape
    num_levels = head[6]
    num_slots = half + 1
    p, num_gates, maps = num_features, 2 * num_features, num_features // num_colours
    image_step, v_step, h_step = (width + 2 * half) * num_colours, (width + 2 * half) * p, (width + half) * p
    # From an image's numbers to those of the next.
    image_size, v_size, h_size = (
        (height + half) * image_step,
        num_layers * num_slots * v_step,
        (num_layers + 1) * h_step,
    )
    link_size, gated_size = num_layers * width * num_gates, num_layers * p
    scale = w.dtype.type(2) / w.dtype.type(num_levels - 1)
    always = logits_out.shape[0] > 0
    first_missing = 0 if always else _first_missing_row(missing, index)

    for y in range(y0, y1):
        end = width if always else _end_of_missing(missing, index, y)
        # The vertical stack of the row above, over its full width, and its link to this row.
        depth = num_layers - _num_unseen(first_missing, y, half) if y > 0 else 0
        for g in range(num_images):
            has_context = which[index[g]] >= 0
            at_context = which[index[g]] * height * width * num_context
            at_label = (labels[index[g]] + 1) * num_layers * num_gates
            if end > 0:
                for layer in range(num_layers):
                    o = g * link_size + layer * width * num_gates
                    _fill_columns(link_row, o, width, w, h_label + at_label + layer * num_gates, num_gates)
                    if has_context:
                        i, n = at_context + y * width * num_context, num_context
                        _add_products(link_row, o, num_gates, contexts, i, n, width, n, w, h_context[layer], num_gates)
            for layer in range(depth):
                _fill_columns(v_gates, 0, width, w, v_b + layer * num_gates, num_gates)
                for dy in range(half + 1):
                    at_w = v_conv[layer, dy]
                    if layer == 0:
                        i, n = g * image_size + (y - 1 + dy) * image_step, (2 * half + 1) * num_colours
                        _add_products(v_gates, 0, num_gates, image, i, num_colours, width, n, w, at_w, num_gates)
                    else:
                        i = ((layer - 1) * num_slots + (y - 1 + dy - half) % num_slots) * v_step
                        i, n = g * v_size + i, (2 * half + 1) * p
                        _add_products(v_gates, 0, num_gates, v_cache, i, p, width, n, w, at_w, num_gates)
                if end > 0:
                    o, n = g * link_size + layer * width * num_gates, num_gates
                    _add_products(link_row, o, n, v_gates, 0, n, width, n, w, link[layer], n)
                if layer + 1 < num_layers:
                    if has_context:
                        i, n = at_context + (y - 1) * width * num_context, num_context
                        _add_products(v_gates, 0, num_gates, contexts, i, n, width, n, w, v_context[layer], num_gates)
                    o = g * v_size + (layer * num_slots + (y - 1) % num_slots) * v_step + half * p
                    for x in range(width):
                        i = x * num_gates
                        _add(v_gates, i, v_gates, i, w, v_label + at_label + layer * num_gates, num_gates)
                        _gate(v_cache, o + x * p, v_gates, i, p)

        for x in range(width):
            pixel = (y + half) * image_step + (x + half) * num_colours
            for c in range(num_colours):
                # What lies right of the last missing pixel nobody sees before the next row.
                for layer in range(num_layers if x < end else 0):
                    b, at_w = (layer * width + x) * num_gates + c * 2 * maps, h_conv[layer, c]
                    here = layer * h_step + (x + half) * p  # the layer's input
                    if layer == 0:
                        i, n = pixel - half * num_colours, half * num_colours + c
                        _products(
                            gates, 0, 2 * maps, link_row, b, link_size,
                            image, i, image_size, num_images, n, w, at_w, 2 * maps, NO_FLOOR,
                        )  # fmt: skip
                    else:
                        i, n = here - half * p, half * p + (c + 1) * maps
                        _products(
                            gates, 0, 2 * maps, link_row, b, link_size,
                            h_cache, i, h_size, num_images, n, w, at_w, 2 * maps, NO_FLOOR,
                        )  # fmt: skip
                    for g in range(num_images):
                        _gate(gated, g * gated_size + layer * p + c * maps, gates, g * 2 * maps, maps)
                        # The first layer's input is the image, in place of which zeros lie here: no residual.
                        i = g * h_size + here + c * maps
                        _add(residual, g * maps, h_cache, i, w, out_b + layer * p + c * maps, maps)
                    _products(
                        h_cache, here + h_step + c * maps, h_size, residual, 0, maps,
                        gated, layer * p, gated_size, num_images, (c + 1) * maps, w, h_out[layer, c], maps, NO_FLOOR,
                    )  # fmt: skip
                if x < end:
                    for g in range(num_images):
                        i = g * h_size + num_layers * h_step + (x + half) * p + c * maps
                        _relu(head_s[0], g * p + c * maps, h_cache, i, w, zeros, maps)
                    _head_and_draw(w, head, head_s, y, x, c, work, index, temperature)
                for g in range(num_images):
                    level = w.dtype.type(levels[index[g], c, y, x])
                    image[g * image_size + pixel + c] = level * scale - w.dtype.type(1)


@_inlined
def _convolve(out, num_out, x, num_in, w, at, dilation, height, width):
    """Add a 3x3 convolution of x, (height, width, num_in), to out; what lies outside the image costs nothing."""
    for y in range(height):
        for i in range(3):
            above = y + (i - 1) * dilation
            if above < 0 or above >= height:
                continue
            for j in range(3):
                right = (j - 1) * dilation
                o, of = (y * width + max(0, -right)) * num_out, (above * width + max(0, right)) * num_in
                num_columns = width - abs(right)  # or less than nothing
                _add_products(out, o, num_out, x, of, num_in, num_columns, num_in, w, at[i, j], num_out)


@_compiled
def _context(w, sizes, at, levels, observed, num_levels, s, out):
    """Write the map that `layers.ContextNetwork` makes of a drawing, (height, width, features)."""
    num_maps, num_features = sizes
    first, first_b, convs, dilations, convs_b, last, last_b = at
    x, positive = s
    num_colours, height, width = levels.shape
    num_pixels = height * width
    scale = w.dtype.type(2) / w.dtype.type(num_levels - 1)

    for y in range(height):
        for column in range(width):
            i = (y * width + column) * (num_colours + 1)
            known = w.dtype.type(observed[y, column])
            for c in range(num_colours):
                positive[i + c] = known * (w.dtype.type(levels[c, y, column]) * scale - w.dtype.type(1))
            positive[i + num_colours] = known
    _fill_columns(x, 0, num_pixels, w, first_b, num_maps)
    _convolve(x, num_maps, positive, num_colours + 1, w, first, 1, height, width)
    for layer in range(dilations.size):
        for i in range(num_pixels):
            _relu(positive, i * num_maps, x, i * num_maps, w, convs_b, num_maps)
            _add(x, i * num_maps, x, i * num_maps, w, convs_b + (layer + 1) * num_maps, num_maps)
        _convolve(x, num_maps, positive, num_maps, w, convs[layer], dilations[layer], height, width)
    for i in range(num_pixels):
        _relu(positive, i * num_maps, x, i * num_maps, w, convs_b, num_maps)
    _fill_columns(out, 0, num_pixels, w, last_b, num_features)
    _add_products(out, 0, num_features, positive, 0, num_maps, num_pixels, num_maps, w, last, num_features)


class _Weights:
    """Collects matrices and vectors into one flat array, in the order in which they are read."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.parts: list[Tensor] = []
        self.size = 0
        self.dtype = dtype
        self.lanes = VECTOR_BYTES // dtype.itemsize

    def vector(self, values: Tensor) -> int:
        """Append values as they are; return their offset."""
        offset = self.size
        self.parts.append(values.detach().to("cpu", self.dtype).flatten())
        self.size += values.numel()
        return offset

    def matrix(self, matrix: Tensor) -> int:
        """Append an (in, out) matrix as panels of two vectors' width, the rest as panels of one; return its offset."""
        offset, column, num_out = self.size, 0, matrix.shape[1]
        while column < num_out:
            width = 2 * self.lanes if column + 2 * self.lanes <= num_out else self.lanes
            panel = matrix[:, column : column + width]
            self.vector(torch.nn.functional.pad(panel, (0, width - panel.shape[1])))
            column += width
        return offset

    def array(self) -> Array:
        """Return all of it, with a vector to spare at the end."""
        return torch.cat([*self.parts, torch.zeros(self.lanes, dtype=self.dtype)]).numpy()


@dataclass(frozen=True)
class Engine:
    """A model's weights laid out for sampling, and the functions that make state and sample rows.

    Args:
        dtype: of the weights.
        new_state: (num_images) returns fresh buffers for some images that are sampled in step.
        rows: (state, work, index, temperature, y0, y1) samples rows y0..y1-1 of the images `index` of `work`, whose
            buffers are `state`, in place.
        context: (levels (C, H, W), observed (H, W)) returns the map of a drawing, (H, W, context_features), flat; None
            for a model without a context network.
    """

    dtype: np.dtype[Any]
    new_state: Callable[[int], Any]
    rows: Callable[..., None]
    context: Callable[[Array, Array], Array] | None

    def new_work(
        self,
        levels: Tensor,
        missing: Tensor,
        u: Tensor,
        labels: list[int],
        contexts: list[Array | None],
        logits: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Return what `rows` works on, and where it adds up the nats of what it draws, (B,) float64.

        Args:
            levels: (B, C, H, W) int64, contiguous: the images, completed in place.
            missing: (B, H, W) bool.
            u: (B, C, H, W) uniform noise.
            labels: B numbers, -1 for none.
            contexts: B maps of drawings, as `context` returns them; None where nothing is to be added.
            logits: (B, K, C, H, W), for the logits of all pixels, which are then all computed; None for no logits.
        """
        made = {id(context): context for context in contexts if context is not None}
        place = {key: i for i, key in enumerate(made)}
        nats = torch.zeros(len(levels), dtype=torch.float64)
        work = (
            levels.numpy(),
            missing.contiguous().numpy(),
            u.double().contiguous().numpy(),
            _offsets(labels),
            np.concatenate([*made.values(), _zeros(0, self.dtype)]),
            _offsets([place.get(id(context), -1) for context in contexts]),
            np.empty((0,) * 5, self.dtype) if logits is None else logits.numpy(),
            nats.numpy(),
        )
        return work, nats

    @staticmethod
    def joined(states: list[Any]) -> Any:
        """Return the buffers for some images in step, each of which has come as far by itself."""

        def join(arrays: tuple[Array, ...]) -> Array:
            spare = VECTOR_BYTES // arrays[0].itemsize
            return np.concatenate([*(array[:-spare] for array in arrays), arrays[0][-spare:]])

        return tuple(tuple(map(join, zip(*groups, strict=True))) for groups in zip(*states, strict=True))


def _weight(conv: MaskedConv2d) -> Tensor:
    return (conv.weight * conv.mask).detach()  # (out, in, kh, kw)


def _matrix(conv: Any) -> Tensor:
    weight = _weight(conv) if isinstance(conv, MaskedConv2d) else conv.weight
    return weight[:, :, 0, 0].T  # of a 1x1 layer: (in, out)


def _row_matrix(weight: Tensor) -> Tensor:
    """(out, in, kw), one row of a kernel -> (kw * in, out)."""
    return weight.permute(2, 1, 0).flatten(0, 1)


def _offsets(values: Any) -> Array:
    return np.array(values, dtype=np.intp)


def _colour(matrix: Tensor, c: int, num_colours: int, before: int = 0, own: bool = True) -> Tensor:
    """Cut colour c's outputs out of an (in, out) matrix, and the inputs that they see.

    Args:
        before: inputs that lie left of the pixel, which all outputs see.
        own: whether the colour sees its own inputs (mask B), or earlier ones only (mask A).
    """
    num_in, num_out = (matrix.shape[0] - before) // num_colours, matrix.shape[1] // num_colours
    return matrix[: before + (c + own) * num_in, c * num_out : (c + 1) * num_out]


def _lay_out_head(model: AutoregressiveModel, weights: _Weights) -> tuple[Any, ...]:
    colours = range(model.config.image_shape[0])
    num_in, num_head = model.head.weight.shape[1] // len(colours), model.head.weight.shape[0] // len(colours)
    matrices = [
        _offsets([weights.matrix(_colour(_matrix(conv), c, len(colours))) for c in colours])
        for conv in (model.head, model.logits)
    ]
    biases = [weights.vector(conv.bias) for conv in (model.head, model.logits)]
    return matrices[0], biases[0], matrices[1], biases[1], num_in, num_head, model.config.num_levels


def _zeros(size: int, dtype: np.dtype[Any]) -> Array:
    return np.zeros(size + VECTOR_BYTES // dtype.itemsize, dtype)


def _head_state(model: AutoregressiveModel, dtype: np.dtype[Any], num_images: int) -> tuple[Array, ...]:
    num_head, num_in = model.head.weight.shape[:2]
    levels = num_images * model.config.num_levels
    maps = (_zeros(num_images * size, dtype) for size in (num_in, num_head))
    return *maps, _zeros(levels, dtype), _zeros(levels, np.dtype(np.float64))


def _label_table(tables: list[Any], bias: Tensor) -> Tensor:
    """Return each layer's bias with what a label adds, (1 + num_labels, layers, maps): first without a label."""
    if tables[0] is None:
        return bias[None]
    added = torch.stack([table.table for table in tables], dim=1)  # (num_labels, layers, maps)
    return bias + torch.cat([torch.zeros_like(added[:1]), added])


def _lay_out_context(model: AutoregressiveModel, weights: _Weights) -> tuple[Any, ...]:
    """Lay out the network that reads a drawing; nothing for a model without one."""
    network: Any = model.context_network
    if network is None:
        return ()

    def matrices(conv: Any) -> list[list[int]]:
        return [[weights.matrix(conv.weight[:, :, i, j].T) for j in range(3)] for i in range(3)]

    biases = [layer.bias for layer in network.layers]
    return (
        _offsets(matrices(network.first)),
        weights.vector(network.first.bias),
        _offsets([matrices(layer) for layer in network.layers]),
        _offsets([layer.dilation[0] for layer in network.layers]),
        weights.vector(torch.stack([torch.zeros_like(network.first.bias), *biases])),
        weights.matrix(_matrix(network.last)),
        weights.vector(network.last.bias),
    )


def _context_reader(
    model: AutoregressiveModel, w: Array, at: tuple[Any, ...]
) -> Callable[[Array, Array], Array] | None:
    """Return `Engine.context` for the network that `_lay_out_context` laid out."""
    network, config = model.context_network, model.config
    if network is None:
        return None
    sizes = (network.last.in_channels, network.last.out_channels)
    num_pixels = config.image_shape[1] * config.image_shape[2]

    def context(levels: Array, observed: Array) -> Array:
        maps = max(network.last.in_channels, network.first.in_channels)
        out = _zeros(num_pixels * network.last.out_channels, w.dtype)
        buffers = tuple(_zeros(num_pixels * maps, w.dtype) for _ in range(2))
        _context(w, sizes, at, levels, observed, config.num_levels, buffers, out)
        return out[: num_pixels * network.last.out_channels]

    return context


def _context_matrices(weights: _Weights, projections: list[Any], order: Tensor | None = None) -> Array:
    """Lay out how the map of a drawing enters each layer, as matrices; nothing if it does not.

    Args:
        order: of the maps that it is added to.
    """
    matrices = [] if projections[0] is None else [_matrix(projection) for projection in projections]
    return _offsets([weights.matrix(matrix if order is None else matrix[:, order]) for matrix in matrices])


def _pixelcnn_engine(model: PixelCNN) -> Engine:
    config = model.config
    blocks: list[Any] = list(model.blocks)
    num_colours, height, width = config.image_shape
    colours = range(num_colours)
    first_half, half = config.first_kernel_size // 2, config.kernel_size // 2
    h, num_blocks = config.num_features, config.num_blocks
    first = _weight(model.first)  # (2h, C, first_half + 1, 2 * first_half + 1)
    convs = [_weight(block.conv) for block in blocks]
    weights = _Weights(first.dtype)
    first_left = _row_matrix(first[:, :, -1, : first_half + 1])
    above = [_row_matrix(first[:, :, dy]) for dy in range(first_half)]
    # Biases are summed over the layers: the stream's and the skips' sums are kept without theirs.
    stream_b = torch.stack([torch.zeros_like(model.first.bias), *(block.expand.bias for block in blocks)]).cumsum(0)
    stream_b = torch.cat([stream_b[:num_blocks].flatten(), torch.zeros(config.head_features, dtype=first.dtype)])
    skips_b = torch.stack([model.first_skip.bias, *(block.skip.bias for block in blocks)]).sum(0)

    def grow(i: int, c: int) -> Tensor:
        parts = [_colour(_matrix(conv), c, num_colours) for conv in (blocks[i].expand, blocks[i].skip)]
        return torch.cat(parts, dim=1) if i + 1 < num_blocks else parts[1]

    def conv(i: int, c: int) -> Tensor:
        return _colour(_row_matrix(convs[i][:, :, -1, : half + 1]), c, num_colours, before=half * h)

    at: list[Any] = [
        _offsets([weights.matrix(matrix) for matrix in above]),
        weights.vector(model.first.bias),
        _offsets(
            [weights.matrix(_colour(first_left, c, num_colours, first_half * num_colours, own=False)) for c in colours]
        ),
        _offsets([weights.matrix(_colour(_matrix(model.first_skip), c, num_colours)) for c in colours]),
        weights.vector(skips_b),
        _offsets([[weights.matrix(_row_matrix(weight[:, :, dy])) for dy in range(half)] for weight in convs]),
    ]
    reduce_b = weights.vector(torch.stack([block.reduce.bias for block in blocks]))
    pixel: list[list[list[int]]] = [[], [], []]
    for i, block in enumerate(blocks):
        pixel[0].append([weights.matrix(_colour(_matrix(block.reduce), c, num_colours)) for c in colours])
        pixel[1].append([weights.matrix(conv(i, c)) for c in colours])
        pixel[2].append([weights.matrix(grow(i, c)) for c in colours])
    at += [_offsets(pixel[0]), reduce_b, _offsets(pixel[1]), weights.vector(stream_b), _offsets(pixel[2])]
    conv_b = torch.stack([block.conv.bias for block in blocks])
    at.append(weights.vector(_label_table([block.label_bias for block in blocks], conv_b)))
    at.append(_context_matrices(weights, [block.context for block in blocks]))
    head, reader = _lay_out_head(model, weights), _lay_out_context(model, weights)
    w = weights.array()
    dtype = w.dtype
    sizes = (first_half, half, num_blocks, h, config.head_features, config.context_features)

    def new_state(num_images: int) -> Any:
        image = (height + first_half) * (width + 2 * first_half) * num_colours
        cache = num_blocks * (half + 1) * (width + 2 * half) * h
        outer_and_skips = (2 * h + config.head_features) // num_colours
        others = (width * 2 * h, num_blocks * width * h, 2 * h, outer_and_skips, num_blocks * 2 * h, num_blocks * h)
        own = tuple(_zeros(num_images * size, dtype) for size in (image, cache, *others))
        return own, _head_state(model, dtype, num_images)

    def rows(state: Any, *arguments: Any) -> None:
        _pixelcnn_rows(w, sizes, tuple(at), head, *state, *arguments)

    return Engine(dtype, new_state, rows, _context_reader(model, w, reader))


def _gated_engine(model: GatedPixelCNN) -> Engine:
    config = model.config
    layers: list[Any] = list(model.layers)
    num_colours, height, width = config.image_shape
    colours = range(num_colours)
    half, p, num_layers = config.kernel_size // 2, config.num_features, config.num_layers
    maps = p // num_colours
    # The horizontal gates' order: for each colour its tanh maps, then its sigmoid maps.
    order = torch.arange(2 * p).reshape(2, num_colours, maps).transpose(0, 1).flatten()
    v_convs, h_convs = [_weight(layer.v_conv) for layer in layers], [_weight(layer.h_conv)[order] for layer in layers]
    weights = _Weights(v_convs[0].dtype)

    def h_conv(i: int, c: int) -> Tensor:
        before = half * (p if i > 0 else num_colours)
        return _colour(_row_matrix(h_convs[i][:, :, 0]), c, num_colours, before, own=i > 0)

    v_conv = [[weights.matrix(_row_matrix(weight[:, :, dy])) for dy in range(half + 1)] for weight in v_convs]
    v_b = weights.vector(torch.stack([layer.v_conv.bias for layer in layers]))
    link = [weights.matrix(_matrix(layer.link)[:, order]) for layer in layers]
    pixel: list[list[list[int]]] = [[], []]
    for i, layer in enumerate(layers):
        pixel[0].append([weights.matrix(h_conv(i, c)) for c in colours])
        pixel[1].append([weights.matrix(_colour(_matrix(layer.h_out), c, num_colours)) for c in colours])
    out_b = weights.vector(torch.stack([layer.h_out.bias for layer in layers]))
    zeros = weights.vector(torch.zeros(p))
    h_b = torch.stack([layer.link.bias + layer.h_conv.bias for layer in layers])
    v_label = _label_table([layer.v_label_bias for layer in layers], torch.zeros_like(h_b))
    h_label = _label_table([layer.h_label_bias for layer in layers], h_b)[:, :, order]
    at = (
        *(_offsets(v_conv), v_b, _offsets(link), _offsets(pixel[0]), _offsets(pixel[1]), out_b, zeros),
        *(weights.vector(table) for table in (v_label, h_label)),
        _context_matrices(weights, [layer.v_context for layer in layers]),
        _context_matrices(weights, [layer.h_context for layer in layers], order),
    )
    head, reader = _lay_out_head(model, weights), _lay_out_context(model, weights)
    w = weights.array()
    dtype = w.dtype
    sizes = (half, num_layers, p, config.context_features)

    def new_state(num_images: int) -> Any:
        image = (height + half) * (width + 2 * half) * num_colours
        v_cache = num_layers * (half + 1) * (width + 2 * half) * p
        h_cache = (num_layers + 1) * (width + half) * p
        others = (width * 2 * p, num_layers * width * 2 * p, 2 * maps, num_layers * p, maps)
        own = tuple(_zeros(num_images * size, dtype) for size in (image, v_cache, h_cache, *others))
        return own, _head_state(model, dtype, num_images)

    def rows(state: Any, *arguments: Any) -> None:
        _gated_rows(w, sizes, at, head, *state, *arguments)

    return Engine(dtype, new_state, rows, _context_reader(model, w, reader))


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
