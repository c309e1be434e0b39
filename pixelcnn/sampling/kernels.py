"""The compiled kernels of cached sampling, and the interpreter that follows a plan with them.

A plan (plan.py) arrives as two tables of steps, row work and pixel work (compiled.py lays them out). Taking a step is
one call of a kernel, so the interpreter is compiled once for all architectures, and costs a few nanoseconds a step.

- Matrices are cut into panels of one to four vectors' width, one panel after the other: the inner loop
  reads memory in order and keeps its sums in registers. It is written in vector instructions (`_tile`), because
  compilers do not find that form by themselves.
- Row work is multiplied some columns at a time, pixel work some images at a time, so that a weight is read once for
  all of them. The order of a sum does not depend on how many there are, nor on the processor: not a bit of an image
  depends on those beside it or on the machine.
- Behind a rectifier most numbers are zeros. Their products are skipped at a pixel: their weights are not even read.

Arrays are flat; a place in one is an offset. An image's state ends with as many numbers to spare as `_tile` reads at a
time, and state and weights begin with as many zeros as a product has outputs at most.

All of it is one file: numba keeps compiled code on disk until the file of a function changes, and would not notice a
change of what the function calls elsewhere.
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.registry import cpu_target
from numba.extending import intrinsic, register_jitable

# The compiler may change no result: `fma` says where a product is fused with a sum, on all machines.
# error_model: a check for division by zero would keep a loop from becoming vector instructions.
_options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
_compiled: Any = njit(**_options)
_inlined: Any = njit(**_options, forceinline=True)
_intrinsic: Any = intrinsic
_reordered: Any = njit(**_options, fastmath={"reassoc", "nnan", "nsz"}, forceinline=True)  # for max

Array = np.ndarray[Any, Any]
ir = cgutils.ir  # numba's own builder of LLVM code

# The same for all machines, or sums would be of another order: the compiler cuts vectors to the width of the registers.
VECTOR_BYTES = 64
MACHINE = f"{cpu_target.target_context.codegen().magic_tuple()[1]}, numba {numba.__version__}"
PANELS = (4, 3, 2, 1)  # vectors beside each other
COLUMNS = 4  # cells that are multiplied at a time
# Whether the registers hold the sums of so many cells and of a panel's vectors and chains; else one after the other.
HAS_ROOM = "+avx512f" in get_host_cpu_features()
UNROLLED = 4  # inputs are taken so many at a time: matrices are filled up with zeros
CHUNK = 64  # inputs whose signs are looked at together
SPLITS = 4  # levels that a draw from a mixture looks at together
NO_FLOOR = -np.inf
MIN_LOG_SCALE = -7.0  # as in outputs.LogisticMixture
_u: Any = np.uintp  # an index that cannot be negative: loops over it become vector instructions


def _tile(num_columns: int, is_sparse: bool = False) -> Any:
    """Return the innermost product, as vector instructions for numba's code.

    tile(s, w, o, o_step, b, b_step, e, e_step, x, x_step, num_in, at, floor, vectors, count) does

        s[o:] = max(floor, s[b:] + w[e:] + s[x:][:num_in] @ panel)

    for each column, every operand a step further, where panel is the (num_in, vectors * lanes) matrix at w[at:].
    `vectors` is one of PANELS. Of a single vector's results the first `count` are written; of more, all. If
    `is_sparse`, what is not positive in the inputs counts as zero, and its products are skipped; the others are added
    in the same order.
    """

    def tile(_, s, w, o, o_step, b, b_step, e, e_step, x, x_step, num_in, at, floor, vectors, count):
        signature = types.void(s, w, *[types.intp] * 10, types.float64, types.intp, types.intp)

        def generate(context, builder, signature, arguments):
            arrays = (context.make_array(t)(context, builder, a) for t, a in zip((s, w), arguments[:2], strict=True))
            state, weights = (array.data for array in arrays)
            o, o_step, b, b_step, e, e_step, x, x_step, num_in, at, floor, vectors, count = arguments[2:]
            element, i32, index = context.get_data_type(s.dtype), ir.IntType(32), ir.IntType(64)
            size, whole, add = context.get_abi_sizeof(element), partial(ir.Constant, index), builder.add
            lanes = VECTOR_BYTES // size
            vector = ir.VectorType(element, lanes)
            zero, undefined = ir.Constant(vector, None), ir.Constant(vector, ir.Undefined)
            variable = partial(cgutils.alloca_once_value, builder)  # registers hold it
            fma_type = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{lanes}f{8 * size}")

            def load(data, offset):
                return builder.load(builder.bitcast(builder.gep(data, [offset]), vector.as_pointer()), align=size)

            def splat(value):
                first = builder.insert_element(undefined, value, ir.Constant(i32, 0))
                return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(i32, lanes), None))

            def place(start, step, r, v=0):
                return add(add(start, builder.mul(step, whole(r))), whole(v * lanes))

            def number(k, r=0):
                return builder.load(builder.gep(state, [add(place(x, x_step, r), k)]))

            def positive(k):
                """Return as bits which of the inputs k .. k + CHUNK - 1 are positive."""
                bits = whole(0)
                for v in range(CHUNK // lanes):
                    is_positive = builder.fcmp_ordered(">", load(state, add(place(x, x_step, 0, v), k)), zero)
                    part = builder.zext(builder.bitcast(is_positive, ir.IntType(lanes)), index)
                    bits = builder.or_(bits, builder.shl(part, whole(v * lanes)))
                left = builder.sub(num_in, k)
                within = builder.sub(builder.shl(whole(1), left), whole(1))
                return builder.select(builder.icmp_signed("<", left, whole(CHUNK)), builder.and_(bits, within), bits)

            def product(num_vectors):
                # A sum waits for its last addition: few vectors' sums are made of several, added at the end.
                num_chains, is_whole = max(1, UNROLLED // num_vectors), HAS_ROOM or num_columns == 1
                for own in [range(num_vectors)] if is_whole else [[v] for v in range(num_vectors)]:
                    sums = {}  # of each cell, (column, vector), the variables of its chains
                    for cell in [(r, v) for r in range(num_columns) for v in own]:
                        first = load(state, place(b, b_step, *cell)), load(weights, place(e, e_step, *cell))
                        others = [variable(zero) for _ in range(1, num_chains)]
                        sums[cell] = [variable(builder.fadd(*first)), *others]
                    for chains in [range(num_chains)] if is_whole else [[chain] for chain in range(num_chains)]:
                        step = whole(CHUNK if is_sparse else UNROLLED)
                        with cgutils.for_range_slice(builder, whole(0), num_in, step) as (k, _):
                            (add_positive if is_sparse else add_all)(sums, chains, num_vectors, k)
                    for cell, chains in sums.items():
                        write(cell, reduce(builder.fadd, map(builder.load, chains)), num_vectors)

            def add_products(sums, chain, num_vectors, k, inputs):
                """Add the products of input k, one number for each column, to a chain of each cell."""
                row, splats = add(at, builder.mul(k, whole(num_vectors * lanes))), [splat(value) for value in inputs]
                # Each vector of the panel is read once, for all columns.
                panel = {v: load(weights, add(row, whole(v * lanes))) for v in dict.fromkeys(v for _, v in sums)}
                for (r, v), chains in sums.items():
                    builder.store(builder.call(fma, [splats[r], panel[v], builder.load(chains[chain])]), chains[chain])

            def add_all(sums, chains, num_vectors, k):
                num_chains = max(1, UNROLLED // num_vectors)
                for i in range(UNROLLED):
                    if i % num_chains in chains:
                        here = add(k, whole(i))
                        inputs = [number(here, r) for r in range(num_columns)]
                        add_products(sums, i % num_chains, num_vectors, here, inputs)

            def add_positive(sums, chains, num_vectors, k):
                """Take each chain's next positive input of the chunk, or zero, as often as one of them has any."""
                bits, own = positive(k), sum(1 << i for i in range(0, CHUNK, len(chains)))
                left = [variable(builder.and_(bits, whole(own << chain))) for chain in chains]
                nums = [builder.ctpop(builder.load(bits)) for bits in left]
                most = reduce(lambda m, n: builder.select(builder.icmp_signed(">", m, n), m, n), nums)
                with cgutils.for_range(builder, most):
                    for chain in chains:
                        bits = builder.load(left[chain])
                        next_ = builder.and_(builder.cttz(bits, ir.Constant(ir.IntType(1), 0)), whole(CHUNK - 1))
                        is_there, here = builder.icmp_signed("!=", bits, whole(0)), add(k, next_)
                        input_ = builder.select(is_there, number(here), ir.Constant(element, 0.0))
                        add_products(sums, chain, num_vectors, here, [input_])
                        builder.store(builder.and_(bits, builder.sub(bits, whole(1))), left[chain])

            def write(cell, total, num_vectors):
                least = splat(floor if element == floor.type else builder.fptrunc(floor, element))
                total = builder.select(builder.fcmp_ordered(">", total, least), total, least)
                pointer = builder.gep(state, [place(o, o_step, *cell)])
                is_whole = builder.icmp_signed(">=", count if num_vectors == 1 else whole(lanes), whole(lanes))
                with builder.if_else(is_whole) as (full, part):
                    with full:
                        builder.store(total, builder.bitcast(pointer, vector.as_pointer()), align=size)
                    with part, cgutils.for_range(builder, count) as lane:
                        value = builder.extract_element(total, builder.trunc(lane.index, i32))
                        builder.store(value, builder.gep(pointer, [lane.index]))

            for num_vectors in PANELS:
                with builder.if_then(builder.icmp_signed("==", vectors, whole(num_vectors))):
                    product(num_vectors)
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(tile)


_tile_of_many, _tile_of_one, _tile_of_positive = _tile(COLUMNS), _tile(1), _tile(1, is_sparse=True)


@_inlined
def _product(step, s, w, num, o, o_step, b, b_step, e, e_step, x, x_step, num_in):
    """Take a step of kind SUM on `num` cells, each operand a step further: see `_tile`."""
    floor, at, vectors, count, r = 0.0 if step.is_rectified else NO_FLOOR, step.weights, step.vectors, step.num_out, 0
    while r < num:
        to, of, bias, x0 = o + r * o_step, b + r * b_step, e + r * e_step, x + r * x_step
        is_many = r + COLUMNS <= num and not step.is_raw
        if is_many:
            _tile_of_many(s, w, to, o_step, of, b_step, bias, e_step, x0, x_step, num_in, at, floor, vectors, count)
        elif step.is_sparse:
            _tile_of_positive(s, w, to, 0, of, 0, bias, 0, x0, 0, num_in, at, floor, vectors, count)
        else:
            _tile_of_one(s, w, to, 0, of, 0, bias, 0, x0, 0, num_in, at, floor, vectors, count)
        r += COLUMNS if is_many else 1


@_intrinsic
def _fma(_, a, b, c):
    """a * b + c, rounded once: an instruction of every x86-64 processor since 2013, a slow function before."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, a, a), generate


@_intrinsic
def _call(_, address):
    """Call a C function without arguments and result."""

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@register_jitable(**_options)
def rounded_up(number, step):
    """Return the next multiple of `step`: in compiled code, and to the plain Python that lays a plan out for it."""
    return (number + step - 1) // step * step


# The Taylor series of exp, from the last term to the first: to the 7th power (error 5e-9), to the 13th.
_TERMS32 = tuple(np.float32(1 / math.factorial(k)) for k in range(7, -1, -1))
_TERMS64 = tuple(1 / math.factorial(k) for k in range(13, -1, -1))


@_inlined
def _series(terms, r):
    total = terms[0]
    for k in range(1, len(terms)):
        total = _fma(total, r, terms[k])
    return total


@_inlined
def _exp32(x):
    """exp of a float32 in [-87, 87], within about 1e-7: 2^k times a series, without a branch."""
    k = np.floor(_fma(x, np.float32(1.44269504), np.float32(0.5)))
    r = _fma(k, np.float32(2.12194440e-4), _fma(k, np.float32(-0.693359375), x))  # |r| <= ln(2) / 2, ln 2 in two parts
    return _series(_TERMS32, r) * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)


@_inlined
def _exp64(x):
    """exp of a float64 in [-1400, 0], within about 3e-16: likewise."""
    k = np.floor(_fma(x, 1.4426950408889634, 0.5))
    r = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10
    half = np.int64(k) >> 1  # 2^k in two steps, for results that are nearly or just 0
    whole = np.int64((half + 1023) << 52).view(np.float64)
    return _series(_TERMS64, r) * whole * np.int64((np.int64(k) - half + 1023) << 52).view(np.float64)


@_compiled
def _gate(s, o, x, n):
    """s[o:][:n] = tanh(s[x:][:n]) * sigmoid(s[x + n :][:n])"""
    o, x, n, one = _u(o), _u(x), _u(n), np.float32(1)
    if s.itemsize == 4:
        for k in range(n):
            a = min(max(s[x + k], np.float32(-15)), np.float32(15))  # tanh is +-1 in float32 from 9 on
            b = min(max(s[x + n + k], np.float32(-80)), np.float32(80))
            e = _exp32(np.float32(-2) * a)
            s[o + k] = (one - e) / ((one + e) * (one + _exp32(-b)))
    else:
        for k in range(n):
            s[o + k] = math.tanh(s[x + k]) / (1.0 + math.exp(-s[x + n + k]))


@_reordered
def _largest(logits, num_levels):
    most = logits[0]
    for k in range(num_levels):
        most = max(most, logits[k])
    return most


@_inlined
def _sum(values, num_levels):
    """Eight sums side by side, as vector instructions have them, added at the end."""
    a = b = c = d = e = f = g = h = 0.0
    k = 0
    while k + 8 <= num_levels:
        a, b, c, d = a + values[k], b + values[k + 1], c + values[k + 2], d + values[k + 3]
        e, f, g, h = e + values[k + 4], f + values[k + 5], g + values[k + 6], h + values[k + 7]
        k += 8
    while k < num_levels:
        a += values[k]
        k += 1
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@_inlined
def _exponentials(logits, exps, num_levels, temperature):
    """exps[k] = exp((logits[k] - most) / temperature), in float64; return their sum, and `most`, the largest logit."""
    most = np.float64(_largest(logits, num_levels))
    for k in range(num_levels):
        exps[k] = _exp64(max((np.float64(logits[k]) - most) / temperature, -1400.0))
    return _sum(exps, num_levels), most


@_compiled
def _draw(logits, exps, num_levels, u, temperature):
    """Return the level that `outputs.draw_level` would return, and its nats at temperature 1, in float64.

    A level that is to be scored, and not drawn, comes as u = level + 1; at temperature 1.
    """
    if temperature == 0:
        level = int(np.argmax(logits[:num_levels]))
    else:
        total, most = _exponentials(logits, exps, num_levels, temperature)
        level, reached = int(u) - 1, exps[0] / total
        if u < 1:  # the first whose cumulative probability exceeds u
            level = 0
            while level < num_levels - 1 and not reached > u:
                level += 1
                reached += exps[level] / total
    if temperature != 1:
        total, most = _exponentials(logits, exps, num_levels, 1.0)
    return level, math.log(total) + most - np.float64(logits[level])


@_compiled
def _to_sigmoids(values, num):
    for k in range(num):
        small = _exp64(max(-abs(values[k]), -1400.0))
        values[k] = (1.0 if values[k] >= 0 else small) / (1.0 + small)


@_inlined
def _place_components(p, c, levels, scratch, num_mixtures, num_levels):
    """Find the components' means and inverse scales for colour c, the pixel's earlier ones being known."""
    means, inverses, terms = scratch[0], scratch[1], scratch[3]
    num_colours = levels.size
    for i in range(num_mixtures):
        means[i] = p[(1 + c) * num_mixtures + i]
        inverses[i] = _exp64(max(-max(np.float64(p[(1 + num_colours + c) * num_mixtures + i]), MIN_LOG_SCALE), -1400.0))
    for before in range(c):
        pair = (1 + 2 * num_colours + c * (c - 1) // 2 + before) * num_mixtures
        for i in range(num_mixtures):  # tanh(x) = 2 sigmoid(2 x) - 1
            terms[i] = 2.0 * np.float64(p[pair + i])
        _to_sigmoids(terms, num_mixtures)
        for i in range(num_mixtures):
            means[i] += (2.0 * terms[i] - 1.0) * (levels[before] * (2.0 / (num_levels - 1)) - 1.0)


@_inlined
def _weigh_components(p, c, levels, scratch, num_mixtures, num_levels):
    """Find what `_place_components` does, and the components' weights.

    p: as outputs.LogisticMixture has them. The first rows of scratch hold what is found, which the next colour goes on
    with, after `_prob_of_mixture` or `_log_prob_of_far_level`.
    """
    weights, terms = scratch[2], scratch[3]
    if c == 0:
        total, _ = _exponentials(p, weights, num_mixtures, 1.0)
    else:
        for i in range(num_mixtures):
            weights[i] = terms[i]
        total = _sum(weights, num_mixtures)
    for i in range(num_mixtures):
        weights[i] /= total
    _place_components(p, c, levels, scratch, num_mixtures, num_levels)


@_inlined
def _prob_of_mixture(scratch, level, num_mixtures, num_levels):
    """The probability of a level, by products alone: s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)) of sigmoids s."""
    means, inverses, weights, terms = scratch[0], scratch[1], scratch[2], scratch[3]
    x, n = level * (2.0 / (num_levels - 1)) - 1.0, _u(num_mixtures)
    for i in range(n):
        half, centre = inverses[i] / (num_levels - 1), (x - means[i]) * inverses[i]
        terms[i] = centre + half
        terms[n + i] = half - centre
    _to_sigmoids(terms, 2 * num_mixtures)
    is_first, is_last = 1.0 * (level == 0), 1.0 * (level == num_levels - 1)  # nothing lies beyond these
    for i in range(n):
        width = 2.0 * inverses[i] / (num_levels - 1)
        inside = width * (1.0 - 0.5 * width) if width < 1e-5 else 1.0 - _exp64(max(-width, -1400.0))
        prob = max(terms[i], is_last) * max(terms[n + i], is_first) * max(inside, is_first, is_last)
        terms[i] = weights[i] * max(prob, 1e-280)
    return max(_sum(terms, num_mixtures), 1e-300)


@_inlined
def _log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


@_inlined
def _log_of_sum(logs, num):
    most, total = _largest(logs, num), 0.0
    for i in range(num):
        total += math.exp(logs[i] - most)
    return most + math.log(total)


@_compiled
def _log_prob_of_far_level(p, c, levels, level, scratch, num_mixtures, num_levels):
    """The log-probability of a level that is too far from all components for `_prob_of_mixture`: by logs, so slower.

    The components' weights are found anew too: those that an earlier colour is far from may be too small for a product.
    """
    means, inverses, terms = scratch[0], scratch[1], scratch[3]
    logs, before = scratch[2, num_mixtures:], 0.0
    for i in range(num_mixtures):
        logs[i] = p[i]
    for colour in range(c + 1):
        before = _log_of_sum(logs, num_mixtures)
        _place_components(p, colour, levels, scratch, num_mixtures, num_levels)
        this = level if colour == c else levels[colour]
        x = this * (2.0 / (num_levels - 1)) - 1.0
        for i in range(num_mixtures):
            half, centre = inverses[i] / (num_levels - 1), (x - means[i]) * inverses[i]
            if this < num_levels - 1:
                logs[i] += _log_sigmoid(centre + half)
            if this > 0:
                logs[i] += _log_sigmoid(half - centre)
            if 0 < this < num_levels - 1:
                logs[i] += math.log(-math.expm1(-2.0 * half))
    after = _log_of_sum(logs, num_mixtures)
    for i in range(num_mixtures):
        terms[i] = math.exp(logs[i] - after)
    return after - before


@_inlined
def _log_prob_of_mixture(p, c, levels, level, scratch, num_mixtures, num_levels):
    prob = _prob_of_mixture(scratch, level, num_mixtures, num_levels)
    if prob > 1e-60:  # far above what one component has at least there
        return math.log(prob)
    return _log_prob_of_far_level(p, c, levels, level, scratch, num_mixtures, num_levels)


@_inlined
def _reached_by_mixture(scratch, start, step, num, num_mixtures, num_levels):
    """Return the cumulative probabilities of levels start, start + step, ..., at their upper edges: `num` of them."""
    means, inverses, weights, edges, sums = scratch[0], scratch[1], scratch[2], scratch[4], scratch[5]
    width = 2.0 / (num_levels - 1)
    for i in range(num_mixtures):
        inverse, first = inverses[i], 1.0 / (num_levels - 1) - 1.0 - means[i]
        for k in range(num):
            edges[i * num + k] = ((start + k * step) * width + first) * inverse
    _to_sigmoids(edges, num_mixtures * num)
    sums[:num] = 0.0
    for i in range(num_mixtures):
        for k in range(num):
            sums[k] += weights[i] * edges[i * num + k]
    return sums


@_compiled
def _draw_from_mixture(p, c, levels, scratch, num_mixtures, num_levels, u, temperature):
    """Return the level that is drawn from what `_weigh_components` found, and its nats at temperature 1.

    At temperature 1 the cumulative distribution is looked at for SPLITS levels at a time, which are then a step apart;
    at another one the probabilities of all levels are.
    """
    level, step = int(u) - 1, 1  # to be scored, as in `_draw`
    if temperature != 1:
        for k in range(num_levels):
            scratch[4, k] = _log_prob_of_mixture(p, c, levels, k, scratch, num_mixtures, num_levels)
        level, _ = _draw(scratch[4], scratch[5], num_levels, u, temperature)
    elif u < 1:  # the smallest whose cumulative probability exceeds u lies in level..level + step - 1
        level, step = 0, num_levels
    while step > 1:
        step = (step + SPLITS - 1) // SPLITS
        reached = _reached_by_mixture(scratch, level + step - 1, step, SPLITS, num_mixtures, num_levels)
        k = 0
        while k < SPLITS - 1 and reached[k] <= u:
            k += 1
        level += k * step
    level = min(level, num_levels - 1)
    return level, -_log_prob_of_mixture(p, c, levels, level, scratch, num_mixtures, num_levels)


@_compiled
def _level_probs(own, scratch, num_mixtures, num_levels, probs):
    """probs[k] = the probability of level k, from logits or what `_weigh_components` found; at least 1e-37."""
    total, sums = 1.0, scratch[5]
    if num_mixtures:
        sums = _reached_by_mixture(scratch, 0, 1, num_levels, num_mixtures, num_levels)
        sums[num_levels - 1] = 1.0
        for k in range(num_levels - 1, 0, -1):
            sums[k] -= sums[k - 1]
    else:
        total, _ = _exponentials(own, sums, num_levels, 1.0)
    for k in range(num_levels):
        probs[k] = max(sums[k] / total, 1e-37)


@_compiled
def _times_state(s, out, x, num_in, at, vectors, count):
    """s[out:] = s[x:][:num_in] @ panel, which lies in the state, too, at s[at:]: see `_tile`."""
    _tile_of_one(s, s, out, 0, 0, 0, 0, 0, x, 0, num_in, at, NO_FLOOR, vectors, count)


@_inlined
def _attend(step, s, start, head, out, query, num_keys):
    """s[out:] = the mean of a head's first values, weighted by the softmax of query times key over sqrt(features).

    Keys lie as (panels, inputs, keys of a panel), values as (panels, keys, lanes): both are panels of `_tile`.
    """
    lanes, scores = VECTOR_BYTES // s.itemsize, start + step.scores
    first_of_head = start + head * step.capacity * rounded_up(step.features, lanes)
    keys, values, num_in = first_of_head + step.keys, first_of_head + step.values, rounded_up(step.features, UNROLLED)
    for k in range(0, num_keys, PANELS[0] * lanes):
        _times_state(s, scores + k, query, num_in, keys + k * num_in, PANELS[0], 0)
    shares, n = s[scores : scores + rounded_up(num_keys, UNROLLED)], _u(num_keys)
    most, scale = _largest(shares, n), s.dtype.type(1 / math.sqrt(step.features))
    if s.itemsize == 4:
        for k in range(n):
            shares[k] = _exp32(max((shares[k] - most) * scale, np.float32(-87)))
    else:
        for k in range(n):
            shares[k] = _exp64(max((shares[k] - most) * scale, -1400.0))
    total = s.dtype.type(_sum(shares, n))
    for k in range(n, shares.size):
        shares[k] = 0
    for first in range(0, step.features, lanes):
        panel = values + first * step.capacity
        _times_state(s, out + first, scores, shares.size, panel, 1, step.features - first)
    for d in range(out, out + step.features):
        s[d] /= total


class Work(NamedTuple):
    """Some images that are sampled."""

    levels: Array  # (B, C, H, W) int64: completed in place
    missing: Array  # (B, H, W) bool
    u: Array  # (B, C, H, W) float64: noise in [0, 1); or level + 1 for a level to be scored, not drawn
    labels: Array  # (B,) int64, -1 for none
    has_context: Array  # (B,) bool: something of its drawing is known
    nats: Array  # (B,) float64: what the drawn levels cost is added
    # A coder in place of the noise: it is called once for the batch's sub-pixels, with what they are drawn from.
    coder: int  # address of a C function without arguments; 0 for none
    probs: Array  # (B, K) float32
    coded: Array  # (B,) int32: their levels in `levels` before the call, those to go on with after it


class Program(NamedTuple):
    """A plan, laid out: sampling/plan.py says what it means."""

    weights: Array  # flat, in the order in which they are read
    row_steps: Array  # of STEP
    pixel_steps: Array  # of STEP
    fresh: Array  # an image's state before its first row
    contexts: Array  # int64: where each map of a drawing lies in it, (H, W, context_features); 0 if no layer reads it
    num_levels: int
    num_mixtures: int  # components of a mixture of logistics; 0 for logits of the levels


SUM, GATE, ATTEND, KEYS, DRAW = range(5)  # what a step does

# Where an operand lies in an image's state: its column 0; how many numbers from a row to the next, how many rows there
# are before the first is used again; from a column to the next.
PLACE = np.dtype([(name, np.int64) for name in ("at", "row", "rows", "column")])

# A step, as a row of a table: offsets into the weights, sizes, and yes or no (1, 0). A bias lies `of_label` numbers
# further for each label, `of_place` for each cell of the image. Row work takes a step on `columns` cells (blocks of
# them, for keys) of every row, or of every other one. `is_sparse`: inputs that are not positive are skipped; `is_raw`:
# they are stored before the rectifier, so that only the sparse tile may read them. `every`: rows per step. `capacity`:
# keys that a head has room for.
_NUMBERS = (
    *("kind", "num_out", "vectors", "num_in", "weights", "bias", "of_label", "of_place"),
    *("is_rectified", "is_sparse", "is_raw"),
    *("rows_up", "every", "columns", "is_of_context", "is_late", "reach", "is_for_draws_alone"),
    *("colour", "keys", "values", "scores", "capacity", "heads", "features"),
)
STEP = np.dtype([*((name, PLACE) for name in ("out", "base", "x")), *((name, np.int64) for name in _NUMBERS)])


@_inlined
def _at(place, y):
    return place.at + (y % place.rows) * place.row


@_inlined
def _add_keys(step, s, start, y):
    """Put the keys and values of the blocks of rows y - 1 and y where attention reads them."""
    lanes, num_in = VECTOR_BYTES // s.itemsize, rounded_up(step.features, UNROLLED)
    wide = PANELS[0] * lanes
    for head in range(step.heads):
        first_of_head = start + head * step.capacity * rounded_up(step.features, lanes)
        keys, values = first_of_head + step.keys, first_of_head + step.values
        for column in range(step.columns):
            block, of = 1 + y // 2 * step.columns + column, start + step.x.at + column * step.x.column
            for d in range(step.features):
                key = keys + block // wide * wide * num_in + d * wide + block % wide
                s[key] = s[of + head * step.features + d]
                value = values + d // lanes * lanes * step.capacity + block * lanes + d % lanes
                s[value] = s[of + (step.heads + head) * step.features + d]


@_compiled
def _take_row(step, s, start, w, label, has_context, y):
    """Take a step for row y of the image whose state begins at s[start]."""
    if (y + 1) % step.every:
        return
    out, base, above = start + _at(step.out, y), start + _at(step.base, y), y - step.rows_up
    x = start + _at(step.x, above)
    if step.kind == GATE:
        for column in range(step.columns):
            _gate(s, out + column * step.out.column, x + column * step.x.column, step.num_out)
    elif step.kind == KEYS:
        _add_keys(step, s, start, y)
    else:
        # Above the image lie zeros.
        num_in = step.num_in if above >= 0 and (has_context or not step.is_of_context) else 0
        bias = step.bias + (label + 1) * step.of_label + y // step.every * step.columns * step.of_place
        o, b, e = step.out.column, step.base.column, step.of_place
        _product(step, s, w, step.columns, out, o, base, b, bias, e, x, step.x.column, num_in)


@_compiled
def _rows(program, s, scratch, work, index, holes, temperature, y0, y1):
    """Sample rows y0..y1-1 of some images in place; their states lie one after the other in s.

    holes: (H, W) bool, where one of the images misses a pixel.
    """
    w, levels, missing, num_images, size = program.weights, work.levels, work.missing, index.size, program.fresh.size
    (height, width), num_levels, num_mixtures = holes.shape, program.num_levels, program.num_mixtures
    scale, one = w.dtype.type(2) / w.dtype.type(num_levels - 1), w.dtype.type(1)
    places = np.empty((program.pixel_steps.size, 3), np.int64)  # of out, base and x in this row
    # Where a step is taken: 0 beyond the last missing pixel, too, since later rows need it; 1 up to it; 2 where one of
    # the images misses the pixel.
    extent = np.empty(program.pixel_steps.size, np.int64)
    first_missing = 0
    while first_missing < height and not holes[first_missing].any():
        first_missing += 1

    for y in range(y0, y1):
        end = width  # the column after the last one that is missing
        while end > 0 and not holes[y, end - 1]:
            end -= 1
        for k in range(program.row_steps.size):
            step = program.row_steps[k]
            row = y - step.is_late
            if row < 0 or (row < first_missing - step.reach if step.reach else end == 0):
                continue
            for g in range(num_images):
                i = index[g]
                _take_row(step, s, g * size, w, work.labels[i], work.has_context[i], row)
        for k in range(program.pixel_steps.size):
            step = program.pixel_steps[k]
            places[k, 0], places[k, 1], places[k, 2] = _at(step.out, y), _at(step.base, y), _at(step.x, y)
            is_needed = step.reach > 0 and y >= first_missing - step.reach
            extent[k] = 2 if step.is_for_draws_alone else 0 if is_needed else 1

        for x in range(width):
            here = 2 if holes[y, x] else 1 if x < end else 0
            for k in range(program.pixel_steps.size):
                step = program.pixel_steps[k]
                if extent[k] > here:
                    continue
                out, base = places[k, 0] + x * step.out.column, places[k, 1] + x * step.base.column
                of, n = places[k, 2] + x * step.x.column, step.num_out
                if step.kind == SUM:
                    _product(step, s, w, num_images, out, size, base, size, step.bias, 0, of, size, step.num_in)
                elif step.kind == GATE:
                    for g in range(num_images):
                        _gate(s, out + g * size, of + g * size, n)
                elif step.kind == ATTEND:
                    for g in range(num_images):
                        for head in range(step.heads):
                            at = g * size + head * step.features
                            _attend(step, s, g * size, head, out + at, of + at, 1 + y // 2 * step.columns)
                else:  # DRAW: and the network sees the level
                    for c in range(step.colour, levels.shape[1] if num_mixtures else step.colour + 1):
                        for g in range(num_images):
                            i, own, found = index[g], s[of + g * size : of + g * size + n], scratch[g]
                            colours = levels[i, :, y, x]
                            if num_mixtures and missing[i, y, x]:
                                _weigh_components(own, c, colours, found, num_mixtures, num_levels)
                            if work.coder:
                                _level_probs(own, found, num_mixtures, num_levels, work.probs[i])
                                work.coded[i] = levels[i, c, y, x]
                            elif missing[i, y, x]:
                                u = work.u[i, c, y, x]
                                if num_mixtures:
                                    level, cost = _draw_from_mixture(
                                        own, c, colours, found, num_mixtures, num_levels, u, temperature
                                    )
                                else:
                                    level, cost = _draw(own, found[0], num_levels, u, temperature)
                                levels[i, c, y, x] = level
                                work.nats[i] += cost
                        if work.coder:
                            _call(work.coder)
                        for g in range(num_images):
                            i = index[g]
                            if work.coder:
                                levels[i, c, y, x] = work.coded[i]
                                work.nats[i] -= math.log(work.probs[i, work.coded[i]])
                                if num_mixtures:  # what the next colour goes on with
                                    _prob_of_mixture(scratch[g], work.coded[i], num_mixtures, num_levels)
                            seen = w.dtype.type(levels[i, c, y, x]) * scale - one
                            s[out + g * size + c - step.colour] = seen
