"""What a network's last layer says: how probable each level of each sub-pixel is. A choice of the config.

`categorical`: a logit for each level, for each colour in turn. `logistic_mixture`: a mixture of logistic distributions
over whole pixels, discretised to the levels, in which the means of later colours depend linearly on earlier ones
(PixelCNN++, Salimans et al. 2017, arXiv:1701.05517, section 2.1); one evaluation of the network serves all colours.

With components i of weights pi_i, p(x_1, .., x_C) is the sum over i of pi_i P_i1(x_1) .. P_iC(x_C | x_1, ..), and each
colour's conditional is a mixture, too, whose weights are those of the components given the colours before it. Levels
0 and K - 1 take the tails, so that the K probabilities of a component sum to one. The parameters are float32 or better.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from pixelcnn.config import ModelConfig

MIN_LOG_SCALE = -7.0  # of a logistic distribution of levels in [-1, 1]


class Categorical:
    """A softmax over the K levels of each colour; the parameters are logits, (B, K, C, ...)."""

    def __init__(self, config: ModelConfig) -> None:
        self.num_levels = config.num_levels
        self.num_parameters = config.image_shape[0] * config.num_levels  # maps of the last layer
        self.num_per_draw = config.num_levels  # of them, those that a colour is drawn from

    def shaped(self, maps: Tensor) -> Tensor:
        """Return the last layer's maps, (B, num_parameters, ...), as a network returns them: the parameters."""
        return maps.unflatten(1, (-1, self.num_levels)).transpose(1, 2)

    def log_prob(self, parameters: Tensor, levels: Tensor) -> Tensor:
        """Return log p(x_i | x_1, ..., x_{i-1}) of (B, C, H, W) int64 levels: (B, C, H, W) nats, float32 or better."""
        # Levels last, the order in which the network leaves them: for 256 levels of colour images this makes a whole
        # training step a sixth faster than the softmax over dim 1.
        logits = parameters.permute(0, 3, 4, 2, 1)  # (B, H, W, C, K)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = levels.permute(0, 2, 3, 1)  # (B, H, W, C)
        nats = F.cross_entropy(logits.flatten(0, 3), targets.flatten(), reduction="none")
        return -nats.view(targets.shape).permute(0, 3, 1, 2)

    def level_logits(self, parameters: Tensor, colour: int, earlier: Tensor) -> Tensor:
        """Return the log-probability of each level of a colour, up to a constant: (B, K, ...).

        Of all pixels or of some; `earlier` are their levels of the colours before this one, (B, colour or more, ...).
        """
        return parameters[:, :, colour]

    def distribution(self, parameters: Tensor, colour: int, earlier: Tensor) -> Tensor:
        """Return what the levels' probabilities follow from, (B, any, ...): if it stays the same, so do they."""
        return self.level_logits(parameters, colour, earlier).softmax(dim=1)


class LogisticMixture:
    """`num_mixtures` (M) discretised logistic distributions over whole pixels; the parameters are (B, P, ...).

    They are, in this order: M logits of the weights; for each colour M means and M log-scales of levels in [-1, 1]; for
    each pair of an earlier and a later colour M coefficients, before a tanh. What is asked of an output: `Categorical`.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.num_colours, self.num_levels = config.image_shape[0], config.num_levels
        self.num_mixtures = config.num_mixtures
        pairs = self.num_colours * (self.num_colours - 1) // 2
        self.num_parameters = self.num_per_draw = self.num_mixtures * (1 + 2 * self.num_colours + pairs)

    def shaped(self, maps: Tensor) -> Tensor:
        return maps.to(torch.promote_types(maps.dtype, torch.float32))  # rounded, the levels' edges would not meet

    def scaled(self, levels: Tensor, like: Tensor) -> Tensor:
        return levels.to(like.dtype) * (2 / (self.num_levels - 1)) - 1

    def components(self, parameters: Tensor, colour: int, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and inverse scales of a colour's components: each (B, M, ...)."""
        maps = parameters.unflatten(1, (-1, self.num_mixtures))  # (B, 1 + 2C + pairs, M, ...)
        means = maps[:, 1 + colour]
        first = 1 + 2 * self.num_colours + colour * (colour - 1) // 2
        for before in range(colour):
            means = means + torch.tanh(maps[:, first + before]) * self.scaled(earlier[:, before, None], means)
        return means, torch.exp(-maps[:, 1 + self.num_colours + colour].clamp(min=MIN_LOG_SCALE))

    def component_log_probs(self, means: Tensor, inverse: Tensor, levels: Tensor) -> Tensor:
        """Return log P_i of each component i for levels that broadcast with (B, M, ...)."""
        half = inverse / (self.num_levels - 1)  # half a level's width, in scales
        centre = (self.scaled(levels, means) - means) * inverse
        upper, lower = centre + half, centre - half
        # The log of a difference of sigmoids s, without a difference: s(a) - s(b) = s(a) s(-b) (1 - exp(b - a)), and
        # 1 - exp(-2 h) = 2 t / (1 + t) with t = tanh h. By expm1, which compilers for a CPU make exp less 1, nothing
        # would be left of wide components.
        tanh = torch.tanh(half)
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(2 * tanh / (1 + tanh))
        inside = torch.where(levels == 0, F.logsigmoid(upper), inside)
        return torch.where(levels == self.num_levels - 1, F.logsigmoid(-lower), inside)

    def log_prob(self, parameters: Tensor, levels: Tensor) -> Tensor:
        # Each component's log-probability of the colours so far; what a colour adds to their sum is its own.
        total = parameters[:, : self.num_mixtures].log_softmax(dim=1)
        before, found = total.logsumexp(dim=1), []
        for colour in range(self.num_colours):
            components = self.components(parameters, colour, levels)
            total = total + self.component_log_probs(*components, levels[:, colour, None])
            after = total.logsumexp(dim=1)
            found.append(after - before)
            before = after
        return torch.stack(found, dim=1)

    def weights(self, parameters: Tensor, colour: int, earlier: Tensor) -> Tensor:
        """Return the logits of a colour's components, given the colours before it: (B, M, ...)."""
        weights = parameters[:, : self.num_mixtures]
        for before in range(colour):
            components = self.components(parameters, before, earlier)
            weights = weights + self.component_log_probs(*components, earlier[:, before, None])
        return weights

    def level_logits(self, parameters: Tensor, colour: int, earlier: Tensor) -> Tensor:
        weights = self.weights(parameters, colour, earlier)
        levels = torch.arange(self.num_levels, device=parameters.device).view(1, -1, 1, *[1] * (parameters.dim() - 2))
        # The levels' axis before that of the components.
        means, inverse = (x[:, None] for x in self.components(parameters, colour, earlier))
        return (weights[:, None] + self.component_log_probs(means, inverse, levels)).logsumexp(dim=2)

    def distribution(self, parameters: Tensor, colour: int, earlier: Tensor) -> Tensor:
        means, inverse = self.components(parameters, colour, earlier)
        return torch.cat([self.weights(parameters, colour, earlier).softmax(dim=1), means, inverse.log()], dim=1)


def draw_level(logits: Tensor, u: Tensor, temperature: float) -> Tensor:
    """Return the smallest level whose cumulative probability exceeds `u`: (..., K), (...) in [0, 1) -> (...) int64.

    `temperature` divides the logits; 0 takes the most likely level (the lowest one of a tie).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # float64, so that the same logits give the same level whatever the dtype of the network.
    logits = logits.double()
    # The largest logit becomes 0: divided by a tiny temperature it stays finite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    # Rounding can leave the last entry just below 1: the last level is what remains.
    return (cumulative[..., :-1] <= u.double()[..., None]).sum(dim=-1)
