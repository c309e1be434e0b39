"""PixelCNN, van den Oord et al. 2016, arXiv:1601.06759: a stack of masked convolutions in residual blocks.

Departures: see base.py and layers.py; the blocks' kernels may be dilated. Not implemented: the multi-scale PixelCNN,
the recurrent networks.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from pixelcnn.config import MAX_SIDE, ModelConfig, check_int, check_odd
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.layers import LabelBias, MaskedConv2d, context_projection, dilation_of, masked_1x1
from pixelcnn.models.masks import colour_groups, raster_mask
from pixelcnn.models.registry import register


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig(ModelConfig):
    """PixelCNN (arXiv:1601.06759): residual blocks of `num_features` (the paper's h) inner maps.

    Args:
        num_blocks: residual blocks after the first layer.
        first_kernel_size: the first layer's kernel (mask A), odd.
        kernel_size: the residual blocks' kernel (mask B), odd.
        max_dilation: the largest of those kernels, which differ from block to block (`layers.dilation_of`).
    """

    num_blocks: int
    first_kernel_size: int = 7
    kernel_size: int = 3
    max_dilation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_blocks", self.num_blocks, 1)
        check_odd("first_kernel_size", self.first_kernel_size)
        check_odd("kernel_size", self.kernel_size)
        check_int("max_dilation", self.max_dilation, 1, MAX_SIDE)


class ResidualBlock(nn.Module):
    """PixelCNN's residual block: 1x1 (2h to h), k x k mask B, 1x1 (h to 2h), each after a ReLU, plus the input.

    Also gives the skip connection's contribution to the head.
    """

    def __init__(self, config: PixelCNNConfig, context_features: int, number: int) -> None:
        super().__init__()
        h, num_groups = config.num_features, config.num_groups
        outer, inner = colour_groups(2 * h, num_groups), colour_groups(h, num_groups)
        head = colour_groups(config.head_features, num_groups)
        self.reduce = masked_1x1("B", outer, inner)
        mask = raster_mask("B", config.kernel_size, inner, inner)
        self.conv = MaskedConv2d(mask, config.kernel_size // 2, dilation_of(number, config.max_dilation))
        self.expand = masked_1x1("B", inner, outer)
        self.skip = masked_1x1("B", inner, head)
        self.label_bias = LabelBias(config.num_labels, h) if config.num_labels else None
        self.context = context_projection(context_features, h)

    def forward(self, x: Tensor, label: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the residual stream x after the block, (B, 2h, H, W), and what it adds to the head, (B, head, H, W).

        Label and context are those of `features`.
        """
        y = self.conv(F.relu(self.reduce(F.relu(x))))  # (B, h, H, W)
        if self.label_bias is not None and label is not None:
            y = y + self.label_bias(label)
        if self.context is not None and context is not None:
            y = y + self.context(context)
        y = F.relu(y)
        return x + self.expand(y), self.skip(y)  # (B, 2h, H, W), (B, head, H, W)


@register("pixelcnn", PixelCNNConfig)
class PixelCNN(AutoregressiveModel):
    """PixelCNN: a mask-A convolution, residual blocks with mask B, skip connections from each to the head.

    It has the *blind spot* of its paper: a wedge to the upper right of each pixel is never seen.
    """

    config: PixelCNNConfig

    def __init__(self, config: PixelCNNConfig) -> None:
        super().__init__(config, in_maps=config.head_features)
        num_groups = config.num_groups
        outer = colour_groups(2 * config.num_features, num_groups)
        first_mask = raster_mask("A", config.first_kernel_size, colour_groups(config.image_shape[0], num_groups), outer)
        self.first = MaskedConv2d(first_mask, right=config.first_kernel_size // 2)
        self.first_skip = masked_1x1("B", outer, colour_groups(config.head_features, num_groups))
        context_features = self.layer_config.context_features
        self.blocks = nn.ModuleList(ResidualBlock(config, context_features, i) for i in range(config.num_blocks))

    def features(self, x: Tensor, label: Tensor | None, context: Tensor | None) -> Tensor:
        x = self.first(x)  # (B, 2h, H, W)
        skips = self.first_skip(x)  # (B, head, H, W)
        for block in self.blocks:
            x, skip = block(x, label, context)
            skips = skips + skip
        return skips
