"""Attentive PixelCNN: Gated PixelCNN whose horizontal stack can also look at all that lies above, by attention.

Sources: the two gated stacks of van den Oord et al. 2016, arXiv:1606.05328 (gated_pixelcnn.py); causal attention with
few key dimensions beside convolutions from PixelSNAIL, Chen et al. 2018, arXiv:1712.09763. Departures from the latter:
keys and values come from 2x2 blocks of the vertical stack, of rows wholly above the pixel, so that a sampler makes
them once per pair of rows; each query belongs to a colour; what is found enters the next gate.
"""

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor, nn

from pixelcnn.config import check_int
from pixelcnn.models.attention import BlockAttention
from pixelcnn.models.gated_pixelcnn import GatedLayer, GatedPixelCNN, GatedPixelCNNConfig
from pixelcnn.models.layers import masked_1x1
from pixelcnn.models.masks import colour_groups
from pixelcnn.models.registry import register


@dataclass(frozen=True, kw_only=True)
class AttentivePixelCNNConfig(GatedPixelCNNConfig):
    """Attentive PixelCNN: `num_layers` gated layers, of which every `attention_every`-th looks at what lies above.

    Args:
        attention_every: 2 for every other layer, the first of them the third.
        num_heads: attention heads per colour.
        key_features: maps of a head's queries, keys and values.
    """

    attention_every: int = 2
    num_heads: int = 1
    key_features: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("attention_every", self.attention_every, 1)
        check_int("num_heads", self.num_heads, 1)
        check_int("key_features", self.key_features, 1)

    def of_added(self) -> Self:
        """Return the config of the network that is added to the completer; it does not attend, since that one does."""
        return replace(super().of_added(), attention_every=self.num_layers)


class AttentiveLayer(GatedLayer):
    """A gated layer whose horizontal gate also hears what attention found; at first it does not."""

    def __init__(self, config: AttentivePixelCNNConfig, context_features: int, number: int) -> None:
        super().__init__(config, context_features, number)
        p, num_groups = config.num_features, config.num_groups
        self.attention = BlockAttention(p, num_groups, config.num_heads, config.key_features, *config.image_shape[1:])
        found = colour_groups(num_groups * config.num_heads * config.key_features, num_groups)
        self.enter = masked_1x1("B", found, colour_groups(p, num_groups).repeat(2))
        nn.init.zeros_(self.enter.weight)

    def gates(self, v: Tensor, h: Tensor, v_gates: Tensor) -> Tensor:
        return super().gates(v, h, v_gates) + self.enter(self.attention(v, h))


@register("attentive_pixelcnn", AttentivePixelCNNConfig)
class AttentivePixelCNN(GatedPixelCNN):
    """Gated PixelCNN with attention to the rows above in some of its layers."""

    config: AttentivePixelCNNConfig

    def make_layer(self, number: int) -> GatedLayer:
        if number and number % self.config.attention_every == 0:
            return AttentiveLayer(self.config, self.layer_config.context_features, number)
        return super().make_layer(number)
