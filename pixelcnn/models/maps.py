"""Symbolic maps: a network's forward pass, written down instead of computed.

A network called with a `Map` in place of a tensor gives a `Map` that says what it is made of, block by block, and when
a sampler can know it. From that follow the samplers (sampling/plan.py), and whether the network is causal at all.

A map is known either a *row* at a time, once the image is known down to some row, or a *pixel* at a time, in raster
order; then each of its channels has a *turn*: it is known once so many colours of the pixel are. Turns follow from the
masks alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER_WAITS = -math.inf  # the lead of what is known from the start


@dataclass(eq=False, repr=False)
class Map:
    """A map of features (channels, H, W) that is not computed, only described."""

    op: str  # `image`, `context`, `constant`, `labels`, `label`, `conv`, `add`, `shift`, `relu`, `gate` or `attend`
    inputs: tuple["Map", ...]  # that it is made of
    block: Any  # the module that makes it, if one does; of `context` the network that looks at the drawing
    num_channels: int
    lead: float  # a row of it is known once the image is, down to so many rows below that row (0: its own row)
    # (channels,) int64 if it is known a pixel at a time: how many colours of the pixel must be known first. None if it
    # is known a row at a time.
    turns: Tensor | None = None

    def __post_init__(self) -> None:
        if self.turns is None and self.lead > 0:
            raise ValueError(f"a {self.op} looks at rows below its own: no sampler can know it in time.")

    def __add__(self, other: "Map") -> "Map":
        if not isinstance(other, Map) or other.num_channels != self.num_channels:
            found = f"one of {other.num_channels}" if isinstance(other, Map) else type(other).__name__
            raise ValueError(f"a map of {self.num_channels} channels can only be added to another one, got {found}.")
        return combined("add", (self, other))

    def _refuse(self, *_: object) -> Any:
        raise refusal("other arithmetic than +, in place or with numbers, or a comparison")

    # In place another name of the same map would change with it.
    __iadd__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = __getitem__ = _refuse
    __rtruediv__ = __floordiv__ = __mod__ = __pow__ = __matmul__ = __abs__ = __and__ = __or__ = __setitem__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __float__ = __int__ = _refuse
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise refusal(f"'.{name}'")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), named: Any = None
    ) -> "Map":
        changed = [name for name, value in (named or {}).items() if value is not False]  # inplace=True, alpha=2
        if function in (F.relu, torch.relu) and not changed:
            return combined("relu", (arguments[0],))
        if function in (torch.add, Tensor.add, Tensor.__add__) and not changed and isinstance(arguments[0], Map):
            return arguments[0] + arguments[1]
        raise refusal(" with ".join([getattr(function, "__name__", str(function)), *changed]))


def made_of(x: Map) -> list[Map]:
    """Return all the maps that one is made of, each once and after its own, and itself at the end."""
    found, left = dict[Map, None](), [x]
    while left:
        if missing := [y for y in left[-1].inputs if y not in found]:
            left += missing
        else:
            found[left.pop()] = None
    return list(found)


def is_of(op: str, x: Map) -> bool:
    """Return whether a map is made of `context` alone, so that without a drawing there is none; or of `label`."""
    if x.lead != NEVER_WAITS:  # it is of the image, too
        return False
    return all(map_.inputs or map_.op == op for map_ in made_of(x))


def is_same_without(op: str, x: Map, other: Map) -> bool:
    """Return whether a network's map, less what `context` or `label` add, is the other, which it makes without them."""
    keys, numbers = dict[Map, int | None](), dict[Any, int]()  # None: without them it is not there, or zero
    for map_ in (*made_of(x), *made_of(other)):
        inputs = [keys[y] for y in map_.inputs]
        there = [key for key in inputs if key is not None]
        if map_.op == op or (inputs and not there and getattr(map_.block, "bias", None) is None):
            keys[map_] = None
        elif map_.op == "add" and len(there) == 1:
            keys[map_] = there[0]
        else:
            keys[map_] = numbers.setdefault((map_.op, map_.block, *inputs), len(numbers))
    return keys[x] == keys[other]


def check_cells(x: Map) -> None:
    """Refuse to tell apart the cells of what a label gives: it has but one."""
    if is_of("label", x):
        raise ValueError("no sampler follows from a window, a shift or attention on a label's bias: add it to a map.")


def check_window(x: Map) -> None:
    """Refuse windows of several columns on the map of a drawing: samplers keep it without zeros beside it."""
    while x.op == "shift":
        x = x.inputs[0]
    if x.op == "context":
        raise ValueError("no sampler follows from a kernel of several columns on the map of a drawing.")


def refusal(what: str) -> ValueError:
    """Return the error of a network that does with its maps what no sampler can follow."""
    return ValueError(
        f"no sampler follows from {what} of a feature map: build networks from the blocks of pixelcnn.models.layers, "
        "+ and relu (docs/architectures.md)."
    )


def combined(op: str, inputs: tuple[Map, ...]) -> Map:
    """Return the map that an operation makes of its inputs channel by channel."""
    by_pixel = [x.turns for x in inputs if x.turns is not None]
    needs_row = any(x.turns is None and x.lead > -1 for x in inputs)  # as a whole
    turns = torch.stack(by_pixel).amax(dim=0) if by_pixel and not needs_row else None
    return Map(op, inputs, None, inputs[0].num_channels, max(x.lead for x in inputs), turns)


def row_matrix(kernel: Tensor) -> Tensor:
    """Return what a window, column by column, contributes: (out, in, columns) -> (columns * in, out)."""
    return kernel.permute(2, 1, 0).flatten(0, 1)
