"""What a context network learns before its completer does."""

from torch import Tensor, nn

from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.layers import Pointwise


class ContextPredictor(nn.Module):
    """Predicts each missing sub-pixel by itself, whatever the others are, from the map of a context network.

    A step costs a fifth of one of the completer, which then begins with a map that tells something of the drawing.
    Source: masked prediction, as of words in BERT, arXiv:1810.04805.

    Args:
        completer: whose context network learns, in place.

    Raises:
        ValueError: it has none.
    """

    def __init__(self, completer: AutoregressiveModel) -> None:
        super().__init__()
        if completer.context_network is None:
            raise ValueError("a context network is needed: set context_features.")
        self.config, self.context = completer.config, completer.context_network
        self.last = Pointwise(self.config.context_features, self.config.image_shape[0] * self.config.num_levels)

    def forward(self, drawing: Tensor, observed: Tensor) -> Tensor:
        """Return (B, K, C, H, W) logits.

        Args:
            drawing: (B, C, H, W) int64 levels in [0, K) where observed; ignored elsewhere.
            observed: (B, 1, H, W) bool.
        """
        logits: Tensor = self.last(self.context(drawing, observed)).unflatten(1, (self.config.num_levels, -1))
        return logits
