"""Cached sampling, compiled for the CPU with numba: the same function of (model, u) as `naive_sample`.

Here a plan (plan.py) is laid out for the machine, in plain Python: weights in the order in which they are read, each
buffer's place in an image's state, each step as a row of a table. kernels.py follows it.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pixelcnn.models.attention import BLOCK, Attention
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.sampling import kernels
from pixelcnn.sampling.kernels import CHUNK, PANELS, SPLITS, STEP, UNROLLED, VECTOR_BYTES, Array, Program, Work
from pixelcnn.sampling.naive import Canvas
from pixelcnn.sampling.plan import Buffer, Plan, Step

FAR = 2**40  # rows: farther than any image is high
MOST_INPUTS = 96  # of a row's product: so much of a panel stays in the first-level cache for all columns


@dataclass(frozen=True)
class Engine:
    """A model's weights laid out for sampling.

    Args:
        weights: flat, in the order in which they are read.
        program: what to do with them.
        fresh: (state_size,) an image's state before its first row.
        context: where the map of a drawing lies in it, (H, W, context_features); None for a network that reads none.
    """

    weights: Array
    program: Program
    fresh: Array
    context: int | None

    @property
    def arithmetic(self) -> str:
        """Return what the last bits of results depend on."""
        return f"{self.weights.dtype} on {kernels.MACHINE}"

    def new_state(self, contexts: list[Array | None]) -> Array:
        """Return the states of a batch's images, given the flat map of each one's drawing; None adds nothing."""
        states = self.joined([self.fresh] * len(contexts))
        for i, context in enumerate(contexts):
            if context is not None and self.context is not None:
                start = i * self.program.state_size + self.context
                states[start : start + len(context)] = context
        return states

    def joined(self, states: list[Array]) -> Array:
        """Return states, all before the same row, as the state of a batch."""
        size = self.program.state_size
        spare = np.zeros(CHUNK, self.weights.dtype)  # products read whole chunks
        parts = [*(state[: len(state) // size * size] for state in states), spare]
        return torch.cat([torch.from_numpy(part) for part in parts]).numpy()  # as aligned as vectors are

    def rows(self, state: Array, work: Work, index: Array, temperature: float, y0: int, y1: int) -> None:
        """Sample rows y0..y1-1 of the images `index` of `work` in place; `state` is theirs."""
        num_numbers = max(self.program.num_levels, SPLITS) * max(self.program.num_mixtures, 1)
        scratch = np.empty((len(index), 6, num_numbers))
        holes = work.missing[index].any(axis=0)
        kernels._rows(self.weights, self.program, state, scratch, work, index, holes, temperature, y0, y1)

    def work(self, canvas: Canvas) -> tuple[Work, Tensor]:
        """Return what `rows` works on, and where it adds up the nats of what it draws, (B,) float64."""
        nats = torch.zeros(len(canvas.levels), dtype=torch.float64)
        has_context = ~canvas.missing.flatten(1).all(dim=1)
        tensors = (canvas.levels, canvas.missing, canvas.u.double().contiguous(), canvas.label, has_context, nats)
        arrays: list[Any] = [tensor.numpy() for tensor in tensors]
        probs, coded = np.empty((len(nats), self.program.num_levels), np.float32), np.zeros(len(nats), np.int32)
        return Work(*arrays, coder=0, probs=probs, coded=coded), nats

    def code(self, levels: Tensor, labels: list[int], exchange: Callable[[Array, Array], None]) -> Tensor:
        """Go through whole images as a sampler does, while a coder takes or says each level.

        Args:
            levels: (B, C, H, W) int64, contiguous: those to be coded; or any, which are then replaced.
            labels: B numbers, -1 for none.
            exchange: called for each sub-pixel of the batch in turn, with the (B, K) float32 probabilities of its
                levels and the (B,) int32 levels themselves, which it may replace. They are of the same bits whatever
                levels come later, and however many images there are.

        Returns:
            (B,) float64, the images' nats.
        """
        num, missing = len(levels), torch.ones_like(levels[:, 0], dtype=torch.bool)
        work, nats = self.work(Canvas(torch.zeros(levels.shape), torch.tensor(labels), 1.0, levels, missing))
        raised: list[BaseException] = []

        def call() -> None:
            # An exception cannot pass through compiled code, which goes on to the end without the coder.
            if not raised:
                try:
                    exchange(work.probs, work.coded)
                except BaseException as error:
                    raised.append(error)

        function = ctypes.CFUNCTYPE(None)(call)
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        self.rows(self.new_state([None] * num), work._replace(coder=address), np.arange(num), 1.0, 0, levels.shape[2])
        if raised:
            raise raised[0]
        return nats


class _Layout:
    """Lays out a plan: gives each buffer its place, each matrix its offset, each step its row in a table."""

    def __init__(self, plan: Plan, model: AutoregressiveModel) -> None:
        self.plan, self.config = plan, model.config
        self.dtype = model.head.weight.dtype
        self.lanes = VECTOR_BYTES // self.dtype.itemsize
        most = (max(buffer.num_channels for buffer in plan.buffers) // self.lanes + 1) * self.lanes
        self.size = most  # an image's state begins with zeros
        self.weights, self.num_weights = [torch.zeros(most, dtype=self.dtype)], most  # and so do the weights
        self.fresh: list[tuple[int, Tensor]] = []  # what is not zero at first, and where
        self.attentions: dict[Attention, dict[str, int]] = {}
        self.rectified = {step.out for step in (*plan.row_steps, *plan.pixel_steps) if step.is_rectified}
        # What is read at its own pixel alone lies in the order in which it is read last: sums of products of several
        # such maps then are one product.
        last = {step.source: i for i, step in enumerate(plan.pixel_steps)}
        self.places = {buffer: self.place(buffer) for buffer in sorted(plan.buffers, key=lambda b: last.get(b, -1))}

    def take(self, size: int) -> int:
        """Return where in a state so many numbers can be kept."""
        place = self.size
        self.size += kernels.rounded_up(size, self.lanes)  # as aligned as vectors are
        return place

    def place(self, buffer: Buffer) -> tuple[int, int, int, int]:
        """Give a buffer its place: see kernels.PLACE."""
        n, (_, height, width) = buffer.num_channels, self.config.image_shape
        if buffer.is_local:
            return self.take(n), 0, 1, 0
        if buffer is self.plan.context:  # all of it, as the context network gives it
            return self.take(height * width * n), width * n, height, n
        # Not a power of two from row to row: the cache would take the same cells of all rows for one another.
        row = (buffer.left + width + buffer.right) * n + self.lanes
        return self.take(buffer.num_rows * row) + buffer.left * n, row, buffer.num_rows, n

    def vector(self, values: Tensor) -> int:
        """Append values to the weights as they are; return their offset."""
        place, spare = self.num_weights, -values.numel() % self.lanes
        self.weights.append(pad(values.detach().to("cpu", self.dtype).flatten(), (0, spare)))
        self.num_weights += values.numel() + spare
        return place

    def attend(self, attention: Attention) -> dict[str, int]:
        """Return where an attention block keeps its keys and values, as a step names it."""
        if attention not in self.attentions:
            wide, heads, features = PANELS[0] * self.lanes, attention.heads, attention.key_features
            capacity = kernels.rounded_up(1 + attention.num_blocks, wide)
            size = capacity * kernels.rounded_up(features, self.lanes)  # of a head's keys, and of its values
            keys, values = self.take(heads * size), self.take(heads * size)
            self.attentions[attention] = {
                **{"keys": keys, "values": values, "scores": self.take(capacity), "capacity": capacity},
                **{"heads": heads, "features": features, "columns": attention.block_columns},
            }
            for channel in range(heads * features):  # the constant that every pixel sees comes first
                head, d = divmod(channel, features)
                self.fresh.append((keys + head * size + d * wide, attention.null_key[channel]))
                place = values + head * size + d // self.lanes * self.lanes * capacity + d % self.lanes
                self.fresh.append((place, attention.null_value[channel]))
        return self.attentions[attention]

    def new_step(self, kind: int, out: Any = None, base: Any = None, x: Any = None, **values: Any) -> Any:
        """Return a step of a table. An operand is a buffer and a channel; None: the zeros that a state begins with."""
        step = np.zeros((), STEP)
        for name, operand in (("out", out), ("base", base), ("x", x)):
            step[name] = (0, 0, 1, 0) if operand is None else self.places[operand[0]]
            step[name]["at"] += 0 if operand is None else operand[1]
        for name, value in {"kind": kind, "every": 1, "columns": self.config.image_shape[2], **values}.items():
            step[name] = value
        return step

    def laid_out(self, step: Step) -> list[Any]:
        """Return a step of the plan as steps of a table."""
        out, here, attention = step.out, step.out.channels_of(step.turn), step.attention
        values: dict[str, Any] = {"rows_up": step.rows_up, "is_late": out.is_late, "reach": min(out.reach, FAR)}
        values["is_for_draws_alone"] = out.is_for_draws_alone
        if step.kind == "sum":
            return self.products(step, values)
        if attention is None:
            x = (step.source, 2 * here.start)
            return [self.new_step(kernels.GATE, (out, here.start), None, x, num_out=here.stop - here.start, **values)]
        values |= self.attend(attention)
        if step.kind == "attend":
            features = attention.key_features
            for name in ("keys", "values"):
                values[name] += here.start // features * values["capacity"] * kernels.rounded_up(features, self.lanes)
            values["heads"] = (here.stop - here.start) // features
            return [self.new_step(kernels.ATTEND, (out, here.start), None, (step.source, here.start), **values)]
        steps, values = [], values | {"every": BLOCK}
        for row, matrix in enumerate(attention.matrices):
            values["rows_up"] = BLOCK - 1 - row
            first = {"bias": attention.table.flatten(0, 1), "bias_of": "place"} if row == 0 else {"base": out}
            steps += self.products(replace(step, kind="sum", matrix=matrix, **first), values)
        for made in steps:
            made["x"]["column"] *= BLOCK
        return [*steps, self.new_step(kernels.KEYS, None, None, (out, 0), **values)]

    def products(self, step: Step, values: dict[str, Any]) -> list[Any]:
        """Return a sum as steps of a table: one for each panel of its matrix, and for each part of its inputs."""
        source, here, steps = step.source, step.out.channels_of(step.turn), []
        is_by_row, num_out = step.turn is None, here.stop - here.start
        matrix = torch.zeros(0, num_out) if step.matrix is None else step.matrix
        values = values | {"is_of_context": source is not None and source is self.plan.context}
        if step.bias is not None:
            values["bias"] = self.vector(step.bias)
            values |= {f"of_{step.bias_of}": num_out} if step.bias_of else {}
        values["is_sparse"] = step.is_of_positive and not is_by_row
        values["is_raw"] = values["is_sparse"] and source not in self.rectified
        first = 0
        while first < num_out:
            values["vectors"] = next((n for n in PANELS if first + n * self.lanes <= num_out), 1)
            width = values["vectors"] * self.lanes
            panel = pad(matrix[:, first : first + width], (0, max(0, first + width - num_out)))
            to = (step.out, here.start + first)
            base = None if step.base is None else (step.base, here.start + first)
            place, bias = 0 if source is None else step.first_column * source.num_channels, dict[str, int]()
            for part in panel.tensor_split(max(1, -(-len(panel) // MOST_INPUTS)) if is_by_row else 1):
                own = values | {"num_out": num_out - first, "num_in": len(part), **bias}
                own["weights"] = self.vector(pad(part, (0, 0, 0, -len(part) % UNROLLED)))
                steps.append(self.new_step(kernels.SUM, to, base, source and (source, place), **own))
                base, place, bias = to, place + len(part), {"bias": 0, "of_label": 0, "of_place": 0}
            steps[-1]["is_rectified"] = step.is_rectified
            values |= {"bias": values["bias"] + width} if "bias" in values else {}
            first += width
        return steps

    def merged(self, steps: list[Step]) -> list[Step]:
        """Merge products that are added one after the other, where their sources lie one after the other, too."""
        found: list[Step] = []
        for step in steps:
            last, is_next = found[-1] if found else step, False
            if step.base is step.out is last.out and step.bias is None and step.is_of_positive == last.is_of_positive:
                before, here = (x.source if x.source is not None and x.source.is_local else None for x in (last, step))
                if before is not None and here is not None and last.matrix is not None and step.matrix is not None:
                    is_next = self.places[before][0] + len(last.matrix) == self.places[here][0]
            if is_next:
                matrix = torch.cat([x.matrix for x in (found.pop(), step) if x.matrix is not None])
                step = replace(last, matrix=matrix, is_rectified=step.is_rectified)
            found.append(step)
        return found


def build_engine(model: AutoregressiveModel) -> Engine:
    """Lay a model's weights, float32 or float64, out for compiled sampling."""
    plan, config, output = Plan(model), model.config, model.output
    layout, num_colours = _Layout(plan, model), config.image_shape[0]
    row_steps = [row for step in plan.row_steps for row in layout.laid_out(step)]
    pixel_steps: list[Any] = []
    for c in range(num_colours + 1):
        of_turn = [step for step in plan.pixel_steps if step.turn == c]
        pixel_steps += [row for step in layout.merged(of_turn) for row in layout.laid_out(step)]
        if c < (1 if config.num_mixtures else num_colours):
            drawn = {"num_out": output.num_per_draw, "colour": c, "reach": FAR}  # the network sees known levels, too
            parameters = (plan.logits, c * output.num_per_draw)
            pixel_steps.append(layout.new_step(kernels.DRAW, (plan.image, c), None, parameters, **drawn))
    weights = torch.cat([*layout.weights, torch.zeros(layout.lanes, dtype=layout.dtype)]).numpy()
    fresh = np.zeros(layout.size, weights.dtype)
    for place, value in layout.fresh:
        fresh[place] = float(value)
    program = Program(
        row_steps=np.array(row_steps, STEP),
        pixel_steps=np.array(pixel_steps, STEP),
        state_size=layout.size,
        num_levels=config.num_levels,
        num_mixtures=config.num_mixtures,
    )
    return Engine(weights, program, fresh, None if plan.context is None else layout.places[plan.context][0])
