"""The networks' building blocks: masked convolutions, PixelCNN's residual block, Gated PixelCNN's layer.

Sources: arXiv:1601.06759 (masks, residual block) and arXiv:1606.05328 (two stacks, gate). Departures: kernels are
stored cropped (see masks.py), and a label enters PixelCNN's residual blocks as a bias, as it enters the gates of
Gated PixelCNN (the first paper has no labels). So does the map of a drawing (section 2.3 of the second paper).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelcnn.masks import centre_mask, colour_groups, raster_mask, row_mask


class MaskedConv2d(nn.Module):
    """A convolution whose kernel is multiplied by a mask and only ever reaches up and left.

    Args:
        mask: (out, in, kh, kw) as masks.py makes them; the centre is in the last row, `right` taps from the right end.
        right: columns to the right of the centre that the kernel covers (in rows above the centre).
    """

    mask: Tensor

    def __init__(self, mask: Tensor, right: int) -> None:
        super().__init__()
        out_maps, _, height, width = mask.shape
        self.padding = (width - 1 - right, right, height - 1, 0)  # left, right, top, bottom
        self.weight = nn.Parameter(torch.empty_like(mask))
        self.bias = nn.Parameter(torch.zeros(out_maps))
        self.register_buffer("mask", mask, persistent=False)
        # Unit variance is kept, counting only the taps that the mask lets through.
        fan_in = max(mask.sum(dim=(1, 2, 3)).mean().item(), 1.0)
        nn.init.normal_(self.weight, std=fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, H, W)
        return F.conv2d(F.pad(x, self.padding), self.weight * self.mask, self.bias)


def masked_1x1(mask_type: str, in_groups: Tensor, out_groups: Tensor) -> MaskedConv2d:
    """Return a 1x1 convolution masked by colour."""
    return MaskedConv2d(centre_mask(mask_type, in_groups, out_groups)[:, :, None, None], right=0)


class LabelBias(nn.Module):
    """A learned bias per class; label -1 means no label and adds nothing."""

    def __init__(self, num_labels: int, num_maps: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.1 * torch.randn(num_labels, num_maps))

    def forward(self, label: Tensor) -> Tensor:  # (B,) int64 -> (B, maps, 1, 1)
        bias = self.table[label.clamp(min=0)] * (label >= 0)[:, None]
        return bias[:, :, None, None]


class ContextNetwork(nn.Module):
    """Makes a map of a drawing, every part of which can see all of it: residual 3x3 convolutions without a mask.

    Their dilation doubles from layer to layer until they reach across the image.

    Args:
        num_colours: C of the drawing.
        width: maps of the hidden layers.
        num_features: maps of the result.
        side: the longer side of the image, in pixels.
    """

    def __init__(self, num_colours: int, width: int, num_features: int, side: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(num_colours + 1, width, 3, padding=1)
        self.layers = nn.ModuleList()
        reach, dilation = 1, 1
        while reach < side - 1 or not self.layers:
            self.layers.append(nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation))
            reach, dilation = reach + dilation, 2 * dilation
        self.last = nn.Conv2d(width, num_features, 1)

    def forward(self, scaled: Tensor, observed: Tensor) -> Tensor:
        """Return (B, num_features, H, W), zero for an image of which nothing is observed.

        Args:
            scaled: (B, C, H, W), the drawing in [-1, 1]; any finite values where it is not observed.
            observed: (B, 1, H, W) bool.
        """
        known = observed.to(scaled.dtype)
        x = torch.cat([scaled * known, known], dim=1).contiguous(memory_format=torch.channels_last)
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(F.relu(x))
        return self.last(F.relu(x)) * known.amax(dim=(2, 3), keepdim=True)


def context_projection(context_features: int, num_maps: int) -> nn.Conv2d | None:
    """Return how the context map enters a layer: at first not at all, and never where the map is zero."""
    if not context_features:
        return None
    projection = nn.Conv2d(context_features, num_maps, 1, bias=False)
    nn.init.zeros_(projection.weight)
    return projection


class ResidualBlock(nn.Module):
    """PixelCNN's residual block: 1x1 (2h to h), k x k mask B, 1x1 (h to 2h), each after a ReLU, plus the input.

    Also gives the skip connection's contribution to the head.
    """

    def __init__(
        self,
        num_features: int,
        head_features: int,
        kernel_size: int,
        num_colours: int,
        num_labels: int,
        context_features: int = 0,
    ):
        super().__init__()
        outer = colour_groups(2 * num_features, num_colours)
        inner = colour_groups(num_features, num_colours)
        head = colour_groups(head_features, num_colours)
        self.reduce = masked_1x1("B", outer, inner)
        self.conv = MaskedConv2d(raster_mask("B", kernel_size, inner, inner), right=kernel_size // 2)
        self.expand = masked_1x1("B", inner, outer)
        self.skip = masked_1x1("B", inner, head)
        self.label_bias = LabelBias(num_labels, num_features) if num_labels else None
        self.context = context_projection(context_features, num_features)

    def forward(self, x: Tensor, label: Tensor | None, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.conv(F.relu(self.reduce(F.relu(x))))  # (B, h, H, W)
        if self.label_bias is not None and label is not None:
            y = y + self.label_bias(label)
        if self.context is not None and context is not None:
            y = y + self.context(context)
        y = F.relu(y)
        return x + self.expand(y), self.skip(y)  # (B, 2h, H, W), (B, head, H, W)


def gate(x: Tensor) -> Tensor:
    """Return tanh of the first half of the maps times sigmoid of the second: (B, 2p, H, W) -> (B, p, H, W)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


def shift_down(x: Tensor) -> Tensor:
    """Move every row down by one; the first row becomes zero, the last one falls out."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


class GatedLayer(nn.Module):
    """One layer of Gated PixelCNN: a vertical and a horizontal stack, linked from vertical to horizontal.

    Vertical features at row r encode input rows up to and including r, at full width; the link to the horizontal
    stack is shifted down by one row, so the horizontal stack sees rows above only. That is what closes the blind
    spot without a leak.
    """

    def __init__(
        self,
        mask_type: str,
        in_maps: int,
        num_features: int,
        kernel_size: int,
        num_colours: int,
        num_labels: int,
        context_features: int = 0,
    ):
        super().__init__()
        half = kernel_size // 2
        inputs = colour_groups(in_maps, num_colours)
        features = colour_groups(num_features, num_colours)
        gates = features.repeat(2)  # tanh and sigmoid halves, each in colour groups
        # The link's shift already hides the current row, so the vertical stack needs no colour mask.
        self.v_conv = MaskedConv2d(torch.ones(2 * num_features, in_maps, half + 1, kernel_size), right=half)
        self.h_conv = MaskedConv2d(row_mask(mask_type, kernel_size, inputs, gates), right=0)
        self.link = nn.Conv2d(2 * num_features, 2 * num_features, 1)
        self.h_out = masked_1x1("B", features, features)
        self.has_residual = mask_type == "B"  # the first layer's input is the image
        self.v_label_bias = LabelBias(num_labels, 2 * num_features) if num_labels else None
        self.h_label_bias = LabelBias(num_labels, 2 * num_features) if num_labels else None
        self.v_context = context_projection(context_features, 2 * num_features)
        self.h_context = context_projection(context_features, 2 * num_features)

    def forward(
        self, v: Tensor, h: Tensor, label: Tensor | None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        v_gates = self.v_conv(v)  # (B, 2p, H, W)
        h_gates = self.h_conv(h) + self.link(shift_down(v_gates))  # (B, 2p, H, W)
        if self.v_label_bias is not None and self.h_label_bias is not None and label is not None:
            v_gates = v_gates + self.v_label_bias(label)
            h_gates = h_gates + self.h_label_bias(label)
        if self.v_context is not None and self.h_context is not None and context is not None:
            v_gates = v_gates + self.v_context(context)
            h_gates = h_gates + self.h_context(context)
        h_new = self.h_out(gate(h_gates))  # (B, p, H, W)
        return gate(v_gates), h + h_new if self.has_residual else h_new
