"""Gated PixelCNN, van den Oord et al. 2016, arXiv:1606.05328: two stacks without a blind spot, and gated units.

Departures: kernels are stored cropped (masks.py), and the vertical stack's may be dilated. Not implemented: the
autoencoder of the paper's section 2.4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixelcnn.config import MAX_SIDE, ModelConfig, check_int, check_odd
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.layers import (
    LabelBias,
    MaskedConv2d,
    Pointwise,
    context_projection,
    dilation_of,
    gate,
    masked_1x1,
    shift_down,
)
from pixelcnn.models.masks import colour_groups, row_mask
from pixelcnn.models.registry import register


@dataclass(frozen=True, kw_only=True)
class GatedPixelCNNConfig(ModelConfig):
    """Gated PixelCNN (arXiv:1606.05328): `num_layers` gated layers of `num_features` (the paper's p) maps.

    Args:
        num_layers: gated layers, the first (mask A) included.
        kernel_size: n of the paper's n x n vertical and 1 x n horizontal kernels, odd.
        max_dilation: the largest of the vertical kernels, which differ from layer to layer (`layers.dilation_of`).
    """

    num_layers: int
    kernel_size: int
    max_dilation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_layers", self.num_layers, 1)
        check_odd("kernel_size", self.kernel_size)
        check_int("max_dilation", self.max_dilation, 1, MAX_SIDE)


class GatedLayer(nn.Module):
    """One layer of Gated PixelCNN: a vertical and a horizontal stack, linked from vertical to horizontal.

    Vertical features at row r encode input rows up to and including r, at full width; the link to the horizontal
    stack is shifted down by one row, so the horizontal stack sees rows above only. That is what closes the blind
    spot without a leak.
    """

    def __init__(self, config: GatedPixelCNNConfig, context_features: int, number: int) -> None:
        super().__init__()
        p, num_groups, num_labels = config.num_features, config.num_groups, config.num_labels
        mask_type, in_maps = ("A", config.image_shape[0]) if number == 0 else ("B", p)
        features = colour_groups(p, num_groups)
        gates = features.repeat(2)  # tanh and sigmoid halves, each in colour groups
        # The link's shift already hides the current row, so the vertical stack needs no colour mask.
        half, dilation = config.kernel_size // 2, dilation_of(number, config.max_dilation)
        self.v_conv = MaskedConv2d(torch.ones(2 * p, in_maps, half + 1, config.kernel_size), half, dilation)
        mask = row_mask(mask_type, config.kernel_size, colour_groups(in_maps, num_groups), gates)
        self.h_conv = MaskedConv2d(mask, right=0)
        self.link = Pointwise(2 * p, 2 * p)
        self.h_out = masked_1x1("B", features, features)
        self.has_residual = number > 0  # the first one's input is the image
        self.v_label_bias = LabelBias(num_labels, 2 * p) if num_labels else None
        self.h_label_bias = LabelBias(num_labels, 2 * p) if num_labels else None
        self.v_context = context_projection(context_features, 2 * p)
        self.h_context = context_projection(context_features, 2 * p)

    def forward(self, v: Tensor, h: Tensor, label: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the vertical and the horizontal stack's features after the layer, each (B, p, H, W).

        `v` and `h` are those before it; the image itself in the first layer. Label and context are those of `features`.
        """
        v_gates = self.v_conv(v)  # (B, 2p, H, W)
        h_gates = self.gates(v, h, v_gates)  # (B, 2p, H, W)
        if self.v_label_bias is not None and self.h_label_bias is not None and label is not None:
            v_gates = v_gates + self.v_label_bias(label)
            h_gates = h_gates + self.h_label_bias(label)
        if self.v_context is not None and self.h_context is not None and context is not None:
            v_gates = v_gates + self.v_context(context)
            h_gates = h_gates + self.h_context(context)
        h_new = self.h_out(gate(h_gates))  # (B, p, H, W)
        return gate(v_gates), h + h_new if self.has_residual else h_new

    def gates(self, v: Tensor, h: Tensor, v_gates: Tensor) -> Tensor:
        """Return what enters the horizontal gate, (B, 2p, H, W), without biases: a subclass adds to it.

        `v_gates` are the vertical stack's, (B, 2p, H, W), before biases and gate.
        """
        return self.h_conv(h) + self.link(shift_down(v_gates))


@register("gated_pixelcnn", GatedPixelCNNConfig)
class GatedPixelCNN(AutoregressiveModel):
    """Gated PixelCNN: two stacks without a blind spot, gated units, a residual on the horizontal stack."""

    config: GatedPixelCNNConfig

    def __init__(self, config: GatedPixelCNNConfig) -> None:
        super().__init__(config, in_maps=config.num_features)
        self.layers = nn.ModuleList(self.make_layer(i) for i in range(config.num_layers))

    def make_layer(self, number: int) -> GatedLayer:
        """Return a layer with fresh weights; the first sees the image, through mask A."""
        return GatedLayer(self.config, self.layer_config.context_features, number)

    def features(self, x: Tensor, label: Tensor | None, context: Tensor | None) -> Tensor:
        v = h = x
        for layer in self.layers:
            v, h = layer(v, h, label, context)
        return h  # (B, p, H, W)
