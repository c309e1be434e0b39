"""Cached sampling, compiled for the CPU with numba: the same function of (model, u) as `naive_sample`.

Here a plan (plan.py) is laid out for the machine, in plain Python: weights in the order in which they are read, each
buffer's place in an image's state, each step as a row of a table. kernels.py follows it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pixelcnn.models.attention import Attention
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.sampling import kernels
from pixelcnn.sampling.kernels import CHUNK, PANELS, SPLITS, STEP, UNROLLED, VECTOR_BYTES, Array, Program, Work
from pixelcnn.sampling.naive import Canvas
from pixelcnn.sampling.plan import Buffer, Plan, Step

FAR = 2**40  # rows: farther than any image is high
MOST_INPUTS = 96  # of a row's product: so much of a panel stays in the first-level cache for all columns


class Engine(Program):
    """A model's weights laid out for sampling."""

    def new_state(self, contexts: list[Array]) -> Array:
        """Return an image's state before its first row, given the flat maps of its drawing; `joined` copies it."""
        state = self.fresh.copy() if contexts else self.fresh
        for place, context in zip(self.contexts, contexts, strict=False):
            if place:
                state[place : place + len(context)] = context
        return state

    def joined(self, states: list[Array]) -> Array:
        """Return images' states, all before the same row, as the state of a batch; products read whole chunks."""
        parts = [*(state[: self.fresh.size] for state in states), np.zeros(CHUNK, self.weights.dtype)]
        # Torch's memory, as aligned as vectors are; but no work for its threads, which would wait for more at full
        # speed, for tens of milliseconds, on processors that the sampler's threads need.
        joined = torch.from_numpy(self.weights).new_empty(sum(part.size for part in parts))
        return np.concatenate(parts, out=joined.numpy())

    def rows(self, state: Array, work: Work, index: Array, temperature: float, y0: int, y1: int) -> None:
        """Sample rows y0..y1-1 of the images `index` of `work` in place; `state` is theirs."""
        scratch = np.empty((len(index), 6, max(self.num_levels, SPLITS) * max(self.num_mixtures, 1)))
        holes = work.missing[index].any(axis=0)
        kernels._rows(self, state, scratch, work, index, holes, temperature, y0, y1)

    def work(self, canvas: Canvas) -> Work:
        """Return what `rows` works on: the canvas, and where it adds up the nats of what it draws."""
        num, missing = len(canvas.u), canvas.missing.numpy()
        u = np.array([image.double().numpy() for image in canvas.u]).reshape(canvas.u.shape)  # by image: see `joined`
        has_context: Any = ~missing.all(axis=(1, 2))
        probs, coded = np.empty((num, self.num_levels), np.float32), np.zeros(num, np.int32)
        levels, labels = canvas.levels.numpy(), canvas.label.numpy()
        return Work(levels, missing, u, labels, has_context, nats=np.zeros(num), coder=0, probs=probs, coded=coded)


class _Layout:
    """Lays out a plan: gives each buffer its place, each matrix its offset, each step its row in a table."""

    def __init__(self, plan: Plan, model: AutoregressiveModel) -> None:
        self.plan, self.config, self.dtype = plan, model.config, model.head.weight.dtype
        self.lanes = VECTOR_BYTES // self.dtype.itemsize
        most = (max(buffer.num_channels for buffer in plan.buffers) // self.lanes + 1) * self.lanes
        most = max(most, PANELS[0] * self.lanes)  # attention's scores are a whole panel's
        self.size = most  # an image's state begins with zeros
        self.weights, self.num_weights = [torch.zeros(most, dtype=self.dtype)], most  # and so do the weights
        self.fresh: list[tuple[int, Tensor]] = []  # what is not zero at first, and where
        self.attentions: dict[Attention, dict[str, int]] = {}
        self.rectified = {step.out for step in (*plan.row_steps, *plan.pixel_steps) if step.is_rectified}
        self.places = {buffer: self.place(buffer) for buffer in plan.buffers}

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
        if buffer in self.plan.contexts:  # all of it, as the context network gives it
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
                **{"heads": heads, "features": features, "columns": attention.table.shape[1]},
            }
            for channel, (key, value) in enumerate(attention.null.view(2, -1).T):  # the constant comes first
                head, d = divmod(channel, features)
                self.fresh.append((keys + head * size + d * wide, key))
                place = values + head * size + d // self.lanes * self.lanes * capacity + d % self.lanes
                self.fresh.append((place, value))
        return self.attentions[attention]

    def new_step(self, kind: int, out: Any = None, base: Any = None, x: Any = None, **values: Any) -> Any:
        """Return a step of a table. An operand is a buffer and a channel; None: the zeros that a state begins with."""
        step = np.zeros((), STEP)
        for name, operand in (("out", out), ("base", base), ("x", x)):
            step[name] = (0, 0, 1, 0) if operand is None else self.places[operand[0]]
            step[name]["at"] += 0 if operand is None else operand[1]
        for name, value in {"kind": kind, **values}.items():
            step[name] = value
        return step

    def laid_out(self, step: Step) -> list[Any]:
        """Return a step of the plan as steps of a table."""
        out, here, attention = step.out, step.out.channels_of(step.turn), step.attention
        values: dict[str, Any] = {"rows_up": step.rows_up, "is_late": out.is_late, "reach": min(out.reach, FAR)}
        values |= {"is_for_draws_alone": out.is_for_draws_alone, "every": step.stride}
        values["columns"] = -(-self.config.image_shape[2] // step.stride)
        if step.kind == "sum":
            return self.products(step, values)
        if attention is None:
            x = (step.source, 2 * here.start)
            return [self.new_step(kernels.GATE, (out, here.start), None, x, num_out=here.stop - here.start, **values)]
        values |= self.attend(attention)
        if step.kind == "keys":
            return [self.new_step(kernels.KEYS, None, None, (out, 0), **values)]
        features = attention.key_features
        for name in ("keys", "values"):
            values[name] += here.start // features * values["capacity"] * kernels.rounded_up(features, self.lanes)
        values["heads"] = (here.stop - here.start) // features
        return [self.new_step(kernels.ATTEND, (out, here.start), None, (step.source, here.start), **values)]

    def products(self, step: Step, values: dict[str, Any]) -> list[Any]:
        """Return a sum as steps of a table: one for each panel of its matrix, and for each part of its inputs."""
        source, here, steps = step.source, step.out.channels_of(step.turn), []
        is_by_row, num_out = step.turn is None, here.stop - here.start
        matrix = torch.zeros(0, num_out) if step.matrix is None else step.matrix
        values = values | {"is_of_context": source is not None and source in self.plan.contexts}
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
                steps[-1]["x"]["column"] *= step.stride
                base, place, bias = to, place + len(part), {"bias": 0, "of_label": 0, "of_place": 0}
            steps[-1]["is_rectified"] = step.is_rectified
            values |= {"bias": values["bias"] + width} if "bias" in values else {}
            first += width
        return steps


def build_engine(model: AutoregressiveModel) -> Engine:
    """Lay a model's weights, float32 or float64, out for compiled sampling."""
    plan, config, output = Plan(model), model.config, model.output
    layout, num_colours = _Layout(plan, model), config.image_shape[0]
    row_steps = [row for step in plan.row_steps for row in layout.laid_out(step)]
    pixel_steps: list[Any] = []
    for c in range(num_colours + 1):
        pixel_steps += [row for step in plan.pixel_steps if step.turn == c for row in layout.laid_out(step)]
        if c < (1 if config.num_mixtures else num_colours):
            drawn = {"num_out": output.num_per_draw, "colour": c, "reach": FAR}  # the network sees known levels, too
            parameters = (plan.logits, c * output.num_per_draw)
            pixel_steps.append(layout.new_step(kernels.DRAW, (plan.image, c), None, parameters, **drawn))
    weights = torch.cat([*layout.weights, torch.zeros(layout.lanes, dtype=layout.dtype)]).numpy()
    fresh, (rows, pixels) = np.zeros(layout.size, weights.dtype), (np.array(x, STEP) for x in (row_steps, pixel_steps))
    for place, value in layout.fresh:
        fresh[place] = float(value)
    contexts = np.array([0 if buffer is None else layout.places[buffer][0] for buffer in plan.contexts], np.int64)
    return Engine(weights, rows, pixels, fresh, contexts, config.num_levels, config.num_mixtures)
