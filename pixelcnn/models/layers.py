"""Building blocks of the networks: masked and 1x1 convolutions, label bias, context and label networks, gate, shift.

Sources: arXiv:1601.06759 (masks, residual block) and arXiv:1606.05328 (two stacks, gate). Departures: kernels are
stored cropped (see masks.py), and a label enters PixelCNN's residual blocks as a bias, as it enters the gates of
Gated PixelCNN (the first paper has no labels). So does the map of a drawing (section 2.3 of the second paper).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelcnn.config import MAX_SIDE, ModelConfig, check_int
from pixelcnn.models.maps import NEVER_WAITS, Map, check_cells, check_window, is_of
from pixelcnn.models.masks import centre_mask


def scaled(levels: Tensor, num_levels: int, dtype: torch.dtype) -> Tensor:
    """Return levels as networks see them, in [-1, 1]."""
    # Centred, so that the zero padding is no level of a binary image.
    # Channels last, down to the strides of a single channel: the layout in which convolutions are fastest.
    return levels.to(dtype, memory_format=torch.channels_last) * (2 / (num_levels - 1)) - 1


class Block(nn.Module):
    """A layer that samplers know how to compute bit by bit: called with symbolic maps it describes what it does."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        forward, described = (
            next(i for i, base in enumerate(cls.__mro__) if name in vars(base)) for name in ("forward", "described")
        )
        if forward < described:  # what it inherits describes another computation
            cls.described = Block.described  # type: ignore[method-assign]

    def __call__(self, *inputs: Any) -> Any:
        if not any(isinstance(x, Map) for x in inputs):
            if inputs and all(x is None for x in inputs):
                raise ValueError(f"{type(self).__name__} got None: leave it out where there is no label or no drawing.")
            return super().__call__(*inputs)
        if self._forward_hooks or self._forward_pre_hooks or "forward" in vars(self):
            raise ValueError(f"no sampler follows from {type(self).__name__}: its forward has hooks, or is replaced.")
        return self.described(*inputs)

    def described(self, *inputs: Any) -> Map:
        """Return what the block makes of symbolic maps."""
        raise ValueError(f"no sampler follows from {type(self).__name__}: it does not say what it computes.")


class Convolution(Block):
    """A convolution whose kernel has its centre in its last row, `right` columns from the right end."""

    right = 0
    spacing = 1  # rows and columns from one of its taps to the next
    weight: Tensor
    bias: Tensor | None

    def masked_weight(self) -> Tensor:  # (out, in, kh, kw)
        return self.weight

    def taps(self) -> Tensor:
        """Return where the kernel can be anything but zero: (out, in, kh, kw) bool."""
        return torch.ones_like(self.weight, dtype=torch.bool)

    def described(self, x: Map) -> Map:
        taps = self.taps()
        if x.num_channels != taps.shape[1]:
            raise ValueError(f"{type(self).__name__} of {taps.shape[1]} channels got a map of {x.num_channels}.")
        if taps.shape[2:].numel() > 1:
            check_cells(x)
        if taps.shape[3] > 1:
            check_window(x)
        if not taps.is_meta and bool((self.masked_weight()[~taps] != 0).any()):
            raise ValueError(f"no sampler follows from {type(self).__name__}: its masked_weight exceeds its taps.")
        if self.bias is not None and is_of("context", x):
            raise ValueError("no sampler follows from a bias on the map of a drawing: use context_projection.")
        num_rows, centre = taps.shape[2], taps.shape[3] - 1 - self.right
        used = taps.any(dim=1).any(dim=0)  # (kh, kw)
        offsets = [row - num_rows + 1 for row in range(num_rows) if bool(used[row].any())]
        lead = max((x.lead + offset * self.spacing for offset in offsets), default=NEVER_WAITS)
        turns = None
        if x.turns is not None and offsets and offsets[-1] == 0 and not bool(used[-1, centre + 1 :].any()):
            turns = torch.where(taps[:, :, -1, centre], x.turns, 0).amax(dim=1)
        return Map("conv", (x,), self, taps.shape[0], lead, turns)


class MaskedConv2d(Convolution):
    """A convolution whose kernel is multiplied by a mask, (out, in, kh, kw), and only ever reaches up and left.

    The centre is in the last row, `right` taps from the right end, which rows above it may cover: see masks.py. From a
    tap to the next it is `dilation` rows or columns.
    """

    mask: Tensor
    described = Convolution.described

    def __init__(self, mask: Tensor, right: int, dilation: int = 1) -> None:
        super().__init__()
        check_int("dilation", dilation, 1, MAX_SIDE)
        out_maps, _, height, width = mask.shape
        if not 0 <= right < width:
            raise ValueError(f"right must be from 0 to {width - 1}, for the mask has {width} columns, got {right}.")
        self.right, self.spacing = right, dilation
        sides = (width - 1 - right, right, height - 1, 0)  # left, right, top, bottom
        self.padding = tuple(dilation * taps for taps in sides)
        self.weight = nn.Parameter(torch.empty(mask.shape))
        self.bias = nn.Parameter(torch.zeros(out_maps))
        mask = mask.to(self.weight.dtype)
        self.register_buffer("mask", mask, persistent=False)
        # Unit variance is kept, counting only the taps that the mask lets through; on the meta device there are none.
        fan_in = 1.0 if mask.is_meta else max(mask.sum(dim=(1, 2, 3)).mean().item(), 1.0)
        nn.init.normal_(self.weight, std=fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the masked convolution, of the same height and width: (B, in, H, W) -> (B, out, H, W)."""
        return F.conv2d(F.pad(x, self.padding), self.masked_weight(), self.bias, dilation=self.spacing)

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def taps(self) -> Tensor:
        return self.mask != 0


class Pointwise(Convolution, nn.Conv2d):
    """A 1x1 convolution without a mask."""

    def __init__(self, in_maps: int, out_maps: int, bias: bool = True) -> None:
        super().__init__(in_maps, out_maps, 1, bias=bias)


def masked_1x1(mask_type: str, in_groups: Tensor, out_groups: Tensor) -> MaskedConv2d:
    """Return a 1x1 convolution masked by colour."""
    return MaskedConv2d(centre_mask(mask_type, in_groups, out_groups)[:, :, None, None], right=0)


class LabelBias(Block):
    """A learned bias per class; label -1 means no label and adds nothing."""

    def __init__(self, num_labels: int, num_maps: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_labels, num_maps))
        nn.init.normal_(self.table, std=0.1)

    def forward(self, label: Tensor) -> Tensor:
        """Return the labels' biases, zero for -1: (B,) int64 in [-1, num_labels) -> (B, maps, 1, 1)."""
        bias = self.table[label.clamp(min=0)] * (label >= 0)[:, None]
        if torch.is_autocast_enabled(bias.device.type):  # or it would make float32 of what it is added to
            bias = bias.to(torch.get_autocast_dtype(bias.device.type))
        return bias[:, :, None, None]

    def described(self, label: Any) -> Map:
        return Map("label", (), self, self.table.shape[1], NEVER_WAITS)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions without a mask, added to their input: at first nothing, so that depth does no harm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the input and what the convolutions make of it: (B, width, H, W) -> the same."""
        changed: Tensor = self.second(F.relu(self.first(F.relu(x))))
        return x + changed


class UNet(nn.Module):
    """Residual blocks at several resolutions, each half of the one before: down, and up again with what was on the way.

    Scale s has s blocks on each way, of 2^(s - 1) times the width of the first. Three scales reach 45 pixels far.
    Source: U-Net, Ronneberger et al. 2015, arXiv:1505.04597.
    """

    def __init__(self, width: int, num_scales: int, scale: int = 1) -> None:
        super().__init__()
        self.before = nn.Sequential(*(ResidualBlock(width) for _ in range(scale)))
        self.inner: UNet | None = None
        if scale < num_scales:
            self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.inner = UNet(2 * width, num_scales, scale + 1)
            self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
            self.after = nn.Sequential(*(ResidualBlock(width) for _ in range(scale)))

    def forward(self, x: Tensor) -> Tensor:
        """Return features that have seen all scales: (B, width, H, W) -> the same; below, odd sides are rounded up."""
        x = self.before(x)
        if self.inner is None:
            return x
        coarse = self.up(F.relu(self.inner(self.down(F.relu(x)))))
        finished: Tensor = self.after(x + coarse[..., : x.shape[-2], : x.shape[-1]])
        return finished


class ContextNetwork(nn.Module):
    """Makes a map of a drawing, every part of which can see all of it, by convolutions without a mask.

    By a U-Net of `num_scales`; for 0 by residual 3x3 convolutions whose dilation doubles from layer to layer until they
    reach across the image. Hidden layers have `width` maps.
    """

    def __init__(self, config: ModelConfig, width: int, num_features: int, num_scales: int = 0) -> None:
        super().__init__()
        self.num_levels = config.num_levels
        self.first = nn.Conv2d(config.image_shape[0] + 1, width, 3, padding=1)
        self.unet = UNet(width, num_scales) if num_scales else nn.Identity()
        self.layers = nn.ModuleList()
        reach, dilation = 1, 1
        while not num_scales and (reach < max(config.image_shape[1:]) - 1 or not self.layers):
            self.layers.append(nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation))
            reach, dilation = reach + dilation, 2 * dilation
        self.last = Pointwise(width, num_features)

    def forward(self, drawing: Tensor, observed: Tensor) -> Tensor:
        """Return (B, num_features, H, W), zero for an image of which nothing is observed, (B, 1, H, W) bool.

        `drawing` is (B, C, H, W) int64 levels in [0, K) where observed, ignored elsewhere.
        """
        x = scaled(drawing, self.num_levels, self.first.weight.dtype)
        known = observed.to(x.dtype)
        x = self.unet(self.first(torch.cat([x * known, known], dim=1).contiguous(memory_format=torch.channels_last)))
        for layer in self.layers:
            x = x + layer(F.relu(x))
        return self.last(F.relu(x)) * known.amax(dim=(2, 3), keepdim=True)

    def described(self) -> Map:
        """Return its map of a drawing, which is known from the start, as a symbolic one."""
        return Map("context", (), self, self.last.out_channels, NEVER_WAITS)


class LabelNetwork(nn.Module):
    """Says which labels a drawing may have, by mean and maximum over the image of a context network's features."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, width = config, config.label_features
        self.context = ContextNetwork(config, width, width)
        self.last = nn.Linear(2 * width, config.num_labels)

    def forward(self, drawing: Tensor, observed: Tensor) -> Tensor:
        """Return (B, num_labels) logits; the arguments are those of `ContextNetwork.forward`."""
        x = F.relu(self.context(drawing, observed))
        logits: Tensor = self.last(torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1))
        return logits


def context_projection(context_features: int, num_maps: int) -> Pointwise | None:
    """Return a zero-initialised, bias-free 1x1 projection: a new context changes nothing, a zero map adds nothing."""
    if not context_features:
        return None
    projection = Pointwise(context_features, num_maps, bias=False)
    nn.init.zeros_(projection.weight)
    return projection


def gate(x: Any) -> Any:
    """Return tanh of the first half of the maps times sigmoid of the second: (B, 2p, H, W) -> (B, p, H, W)."""
    if isinstance(x, Map):
        turns = None if x.turns is None else x.turns.chunk(2)
        if x.num_channels % 2:
            raise ValueError(f"a gate's maps must have two halves, got {x.num_channels}.")
        if turns and not torch.equal(*turns):
            raise ValueError("the halves of a gate's maps must be known at the same turns of their pixel.")
        return Map("gate", (x,), None, x.num_channels // 2, x.lead, turns[0] if turns else None)
    # Copied first: torch has slow loops for halves of each pixel's maps, above all in bfloat16.
    a, b = (half.contiguous(memory_format=torch.channels_last) for half in x.chunk(2, dim=1))
    return torch.tanh(a) * torch.sigmoid(b)


def dilation_of(layer: int, most: int) -> int:
    """Return the dilation of a layer, the first being number 0: 1, 2, 4, ..., at most `most`, and then from 1 again.

    So few layers see a whole image: WaveNet, van den Oord et al. 2016, arXiv:1609.03499.
    """
    return 2 ** (layer % most.bit_length())


def shift_down(x: Any) -> Any:
    """Move every row down by one; the first row becomes zero, the last one falls out."""
    if isinstance(x, Map):
        check_cells(x)
        return Map("shift", (x,), None, x.num_channels, x.lead - 1)
    return F.pad(x, (0, 0, 1, -1))  # one call keeps the layout of memory, in the gradient too; slices would not
