"""The plan of a cached sampler: what is computed when, and for how long it is kept; derived from a network's blocks.

A network's symbolic maps (models/maps.py) say when each can be known:

- What depends on rows above alone is *row work*: when a row begins, it is computed for the whole row at once. So is the
  part of each convolution that reaches into rows above.
- The rest is *pixel work*: it is added at each pixel, and with several colours at each one's turn, for the channels
  that have that turn alone. Earlier ones are there; so are the pixels to the left.

Both engines follow the same plan: cached.py in torch, compiled.py in compiled code. Neither knows any architecture.

Values lie in memory as (row, column, channel), the channels in the order of their turns. So the taps of a kernel's row
are one run of numbers (of a dilated kernel each by itself), and so are what lies left of a pixel and those channels at
its centre that are known by then.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pixelcnn.models.attention import BLOCK, Attention
from pixelcnn.models.base import AutoregressiveModel, joint_parameters
from pixelcnn.models.maps import Map, made_of, row_matrix


@dataclass(eq=False, kw_only=True)
class Buffer:
    """Where a map's values are kept."""

    order: Tensor  # (channels,) int64, which channel of the map lies at each place; sorted by turn
    turns: Tensor | None = None  # (channels,) int64 in that order; None of a map that is known row by row
    in_turn: list[Any] = field(default_factory=lambda: [None])  # the turns that there are; None for row work
    is_part: bool = False  # of a sum that pixel work goes on with: what is known by row
    is_late: bool = False  # its row is computed when the row below it begins, not when it does itself
    num_rows: int = 1  # that are kept; the others are overwritten
    left: int = 0  # columns of zeros beside each row
    right: int = 0
    is_local: bool = True  # read at the pixel that it is computed at alone, so that one cell is enough
    # Its row y is needed where a pixel is missing in row y + reach or above it; from 1 on if none of its own is, too.
    reach: float = 0
    is_for_draws_alone: bool = True  # it leads to the logits of its own pixel and to nothing else
    # What reads it, how many rows above its own, and whether in other columns.
    readers: list[tuple["Buffer", float, bool]] = field(default_factory=list)

    @property
    def num_channels(self) -> int:
        return len(self.order)

    def channels_of(self, turn: int | None) -> slice:
        """Return the places of the channels that become known at a turn; all of a row work's, whose turn is None."""
        if turn is None:
            return slice(0, self.num_channels)
        return slice(self.num_known(turn - 1), self.num_known(turn))

    def num_known(self, turn: int) -> int:
        """Return how many channels are known at a pixel after a turn."""
        assert self.turns is not None
        return int((self.turns <= turn).sum())


@dataclass(eq=False, kw_only=True)
class Step:
    """A step of work on `out`: on a row of all its channels, or at a pixel on those that have a turn."""

    # `sum`: of base, bias, and the product of a window of the source; `gate` of the source; `attend`, the source being
    # the queries; `keys`: those in the source are from now on attended to.
    kind: str
    turn: int | None  # None for row work: on the row in turn, or the one above it if `out` is late
    out: Buffer
    base: Buffer | None = None  # the same channels of it are added: `out` itself, or another buffer of the same order
    bias: Tensor | None = None  # (1, outputs), or a row for each label, none first, or for each cell of the image
    bias_of: str = ""  # "label" or "place" if there is one for each
    source: Buffer | None = None  # what is read
    rows_up: int = 0  # how far above the row of `out`
    first_column: int = 0  # of the window, relative to the cell
    stride: int = 1  # it is taken after so many rows, at so many columns in one
    matrix: Tensor | None = None  # (inputs, outputs); a window's inputs are one run of numbers. None for no product
    is_of_positive: bool = False  # the source's negative numbers count as zeros
    is_rectified: bool = False  # negative results become zero
    attention: Attention | None = None  # of `attend` and `keys`


@dataclass
class _Product:
    """What a sum adds of a stored map: a convolution of it, or the map itself, by a kernel that copies."""

    source: Buffer
    rows_up: int  # of the source above the row of the sum
    weight: Tensor  # (out, in, rows, columns), the centre in the last row, `right` columns from the right end
    taps: Tensor  # (rows, columns) bool, where anything of it can be other than zero
    right: int = 0
    spacing: int = 1  # rows and columns from one of its taps to the next
    is_copy: bool = False
    is_of_positive: bool = False

    def can_be_base(self, out: Buffer) -> bool:
        """Return whether it is a map that another can be added to as it is."""
        a, b = ((x.order.tolist(), None if x.turns is None else x.turns.tolist()) for x in (self.source, out))
        return self.is_copy and not self.rows_up and a == b

    def steps(self, out: Buffer, turn: int | None) -> Iterator[Step]:
        """Yield the steps that add it to channels of `out`: for each row of the kernel, or tap of a dilated one."""
        weight = self.weight[out.order[out.channels_of(turn)]][:, self.source.order]
        num_rows, num_columns = self.taps.shape
        centre = num_columns - 1 - self.right
        for row in range(num_rows):
            rows_up = self.rows_up + (num_rows - 1 - row) * self.spacing
            is_by_pixel = self.source.turns is not None and rows_up == 0
            if is_by_pixel if out.is_part else turn is not None and not is_by_pixel:
                continue
            used = [i for i in range(num_columns) if self.taps[row, i] and (turn is None or i <= centre)]
            for run in [used] if used and self.spacing == 1 else [[i] for i in used]:
                first, last = run[0], run[-1]
                matrix = row_matrix(weight[:, :, row, first : last + 1])
                if turn is not None and last == centre:  # of the centre, what is known by now
                    matrix = matrix[: (centre - first) * self.source.num_channels + self.source.num_known(turn)]
                if len(matrix):
                    step = Step(kind="sum", turn=turn, out=out, source=self.source, rows_up=rows_up, matrix=matrix)
                    column = (first - centre) * self.spacing
                    yield replace(step, first_column=column, is_of_positive=self.is_of_positive)


class Plan:
    """All of it, in order: `row_steps` when a row begins, `pixel_steps` at each turn of a pixel, between `buffers`.

    Made by a walk through the maps of a model without its completer, from the image to the logits, with its present
    weights: `image` is where the levels lie, scaled as the network sees them; `contexts` where each context network's
    map of a drawing lies, None if no layer reads it; from `logits` those of the colour in turn are drawn. ValueError if
    no sampler follows from the network, or a weight is not a finite number.
    """

    def __init__(self, model: AutoregressiveModel) -> None:
        self.places: dict[Map, Buffer] = {}  # of maps, in the order in which they are computed
        self.row_steps: list[Step] = []
        self.pixel_steps: list[Step] = []
        # Maps say where things lie in tensors on the CPU, whatever the default device is: the weights come there, too.
        model = model if model.head.weight.device.type == "cpu" else copy.deepcopy(model).cpu()
        if not all(bool(p.isfinite().all()) for p in joint_parameters(model)):
            raise ValueError("the model's weights are not finite numbers: its training diverged. Use an earlier model.")
        is_default = torch.get_default_device().type == "cpu"
        try:
            with nullcontext() if is_default else torch.device("cpu"):  # which slows each call of torch
                result = model.described()
                self.uses = Counter(x for map_ in made_of(result) for x in map_.inputs)
                self.logits = self.stored(result)
        except RecursionError:
            raise ValueError("no sampler follows from so deep a network: use at most 200 blocks in a row.") from None
        self.pixel_steps.sort(key=lambda step: step.turn or 0)
        inputs = {map_.block: buffer for map_, buffer in self.places.items() if map_.op in ("image", "context")}
        self.image = inputs.pop(None)
        self.contexts = [inputs.get(network) for network in model.context_networks()]
        self.buffers = list(self.places.values())
        # From the draws back to the image: where and how far up each map is needed.
        for buffer in reversed(self.buffers):
            for reader, rows_up, is_sideways in buffer.readers:
                buffer.reach = max(buffer.reach, reader.reach + rows_up)
                buffer.is_for_draws_alone &= not (rows_up or is_sideways) and reader.is_for_draws_alone

    def add_buffer(self, map_: Map) -> Buffer:
        if map_.turns is None:
            buffer = Buffer(order=torch.arange(map_.num_channels), is_late=map_.lead == 0, is_local=False)
        else:
            turns, order = map_.turns.sort(stable=True)
            buffer = Buffer(order=order, turns=turns, in_turn=turns.unique().tolist())
        self.places[map_] = buffer
        return buffer

    def add_step(self, step: Step) -> None:
        """Add a step, and note what it reads: so many rows and columns of it have to be kept."""
        (self.row_steps if step.turn is None else self.pixel_steps).append(step)
        if step.source is not None:
            num_in = step.source.num_channels if step.matrix is None else len(step.matrix)
            last = step.first_column + math.ceil(num_in / step.source.num_channels) - 1
            self.read(step.source, step.out, step.rows_up, step.first_column, last)
        if step.base is not None and step.base is not step.out:
            self.read(step.base, step.out, 0, 0, 0)

    def read(self, source: Buffer, reader: Buffer, rows_up: int, first: int, last: int) -> None:
        """Note that `reader` reads the source so many rows above its own, in these columns relative to its own."""
        source.left, source.right = max(source.left, -first), max(source.right, last)
        source.readers.append((reader, rows_up, bool(first or last)))
        by_row = reader.turns is None
        if rows_up or first or last or by_row or source.turns is None:
            source.is_local = False
        # Relative to the row in turn: the last row that is written by then, and the one that is read.
        written = -1 if source.is_late or (source.turns is not None and by_row) else 0
        read = -rows_up - (by_row and reader.is_late)
        source.num_rows = max(source.num_rows, written - read + 1)

    def stored(self, map_: Map) -> Buffer:
        """Return where a map is kept; first plan how it gets there."""
        if map_ not in self.places:
            if map_.op in ("image", "context"):
                self.add_buffer(map_)
            elif map_.op == "gate":
                # A shifted map is copied: its own may have the channels in the order of turns, and no zeros above.
                source, buffer = self.stored(map_.inputs[0]), self.add_buffer(map_)
                for turn in buffer.in_turn:
                    self.add_step(Step(kind="gate", turn=turn, out=buffer, source=source))
            elif map_.op == "attend":
                self.plan_attention(map_)
            else:
                self.plan_sum(map_)
        return self.places[map_]

    def located(self, map_: Map) -> tuple[Buffer, int]:
        """Return where a map is kept, and how many rows above its own that buffer's row lies."""
        if map_.op == "shift":
            buffer, rows_up = self.located(map_.inputs[0])
            return buffer, rows_up + 1
        return self.stored(map_), 0

    def plan_attention(self, map_: Map) -> None:
        query, source = (self.stored(x) for x in map_.inputs)
        attention = map_.block.weights(query.order, source.order)
        keys = self.add_buffer(Map("keys", (), map_.block, attention.table.shape[2], 0))
        step = Step(kind="sum", turn=None, out=keys, source=source, stride=BLOCK, attention=attention)
        for row, matrix in enumerate(attention.matrices):
            first: Any = {"base": keys} if row else {"bias": attention.table.flatten(0, 1), "bias_of": "place"}
            self.add_step(replace(step, rows_up=BLOCK - 1 - row, matrix=matrix, **first))
        self.add_step(replace(step, kind="keys", source=keys))
        buffer = self.add_buffer(map_)
        keys.readers.append((buffer, math.inf, True))  # all later rows read them
        for turn in buffer.in_turn:
            self.add_step(Step(kind="attend", turn=turn, out=buffer, source=query, attention=attention))

    def summed(self, map_: Map, is_top: bool = False) -> list[Map]:
        """Return the maps that a sum adds up; what is used elsewhere, too, is stored once and added as it is."""
        if map_.op == "add" and (is_top or self.uses[map_] == 1):
            return [term for x in map_.inputs for term in self.summed(x)]
        return [map_]

    def product(self, map_: Map, is_top: bool) -> _Product:
        """Return how a map enters a sum: as a convolution, unless its result is used elsewhere, too; or as it is."""
        if map_.op != "conv" or not (is_top or self.uses[map_] == 1):
            weight = torch.eye(map_.num_channels)[:, :, None, None]
            return _Product(*self.located(map_), weight, weight[0, 0] == 1, is_copy=True)
        x, weight, taps = map_.inputs[0], map_.block.masked_weight(), map_.block.taps().any(dim=1).any(dim=0)
        # A rectifier beside a pixel's stored sum needs no map of its own: who reads one cell takes what is positive.
        is_inside = x.op == "relu" and map_.turns is not None and taps.numel() == 1 and self.uses[x.inputs[0]] > 1
        source = self.located(x.inputs[0] if is_inside else x)
        block, is_of_positive = map_.block, x.op == "relu"
        return _Product(*source, weight.detach(), taps, block.right, block.spacing, is_of_positive=is_of_positive)

    def plan_sum(self, map_: Map) -> None:
        """Plan a sum of convolutions, biases and stored maps, and perhaps a rectifier after it."""
        is_rectified = map_.op == "relu"
        terms = self.summed(map_.inputs[0]) if is_rectified else self.summed(map_, is_top=True)
        bias, bias_of, base, products = torch.zeros(1, map_.num_channels), "", None, []
        for term in terms:
            if term.op == "label" and bias_of != "place":
                bias, bias_of = bias + torch.nn.functional.pad(term.block.table, (0, 0, 1, 0)), "label"
            elif term.op == "constant" and bias_of != "label":
                bias, bias_of = bias + term.block().flatten(1).T, "place"
            else:  # also a bias of another kind than the first, which becomes a map of its own
                products.append(self.product(term, is_top=term is map_))
                if not products[-1].is_copy and term.block.bias is not None:
                    bias = bias + term.block.bias
        first: Any = (bias.detach(), bias_of)
        if map_.turns is not None:
            # What is known by row is summed by itself, in the order of the whole; pixel work goes on with that.
            row_sum = Buffer(order=map_.turns.sort(stable=True).indices, is_part=True)
            if bias_of or any(True for product in products for _ in product.steps(row_sum, None)):
                base = self.places[Map("row sum", (), None, map_.num_channels, -1)] = row_sum
                self.chain(row_sum, None, None, products, first)
                first = None
        buffer = self.add_buffer(map_)
        for turn in buffer.in_turn:
            self.chain(buffer, turn, base, products, first).is_rectified = is_rectified

    def chain(self, out: Buffer, turn: int | None, base: Buffer | None, products: list[_Product], first: Any) -> Step:
        """Plan steps one after the other, each on top of the one before, the first with a bias; return the last."""
        for product in products:
            if base is None and product.can_be_base(out):
                base = product.source
                products = [other for other in products if other is not product]
        steps = [step for product in products for step in product.steps(out, turn)]
        steps = steps or [Step(kind="sum", turn=turn, out=out)]
        if first is not None:
            steps[0].bias, steps[0].bias_of = first[0][:, out.order[out.channels_of(turn)]], first[1]
        for step in steps:
            step.base, base = base, out
            self.add_step(step)
        return steps[-1]
