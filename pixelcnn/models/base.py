"""What all architectures share: levels in, the parameters of each sub-pixel's distribution out.

p(x) is the product over rows, columns, then channels (raster order) of p(x_i | x_1, ..., x_{i-1}); each factor is a
distribution over K levels, whose parameters (outputs.py) one forward pass gives for all sub-pixels at once.

Sources, and what of them is not implemented: pixelcnn.py and gated_pixelcnn.py. Departures from both: labels in both
architectures, Adam or Muon and EMA in training (pixelcnn/training), a softmax of two levels instead of a Bernoulli unit
for binary images (the same distribution).

With a context network the model also is p(missing | observed) for any observed part of an image, the product over the
missing sub-pixels of p(x_i | x_1, ..., x_{i-1}, drawing): the network's map of the drawing enters every layer (section
2.3 of arXiv:1606.05328). With nothing observed the map is zero, and the same weights are p(x). A model may also have a
*completer*, a second network of the same kind, for all images of which something is observed; it alone sees drawings.
To the completer's logits those of another network may be added: a product of experts (Hinton 2002, Neural Computation
14), normalised sub-pixel by sub-pixel.
With a *label network* p(missing | observed) is a mixture: the sum over labels of p(label | observed) p(missing |
observed, label), of which a label is drawn first, and then all pixels given it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelcnn.config import ModelConfig
from pixelcnn.models.layers import ContextNetwork, LabelNetwork, masked_1x1, scaled
from pixelcnn.models.maps import NEVER_WAITS, Map, is_same_without, made_of
from pixelcnn.models.masks import colour_groups
from pixelcnn.models.outputs import Categorical, LogisticMixture

OTHER_NETWORKS = ("completer", "label_network")  # parts of a model beside its joint network

# Labels less probable than this are dropped before one is drawn; of more than ten the limit is 1 / (2 num_labels).
MIN_LABEL_PROB = 0.05
# Of a completer's logits, and of a trained network's that are added to them: fitted to validation digits.
ADDED_SHARES = (0.73, 0.25)


def check_tensor(name: str, value: Any) -> None:
    """Raise ValueError unless a value, called by `name`, is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}: torch.as_tensor makes one of an array.")


def check_levels(levels: Tensor, config: ModelConfig, name: str = "levels") -> None:
    """Raise ValueError unless `levels` is (B, C, H, W) int64 in [0, K) for this config."""
    check_tensor(name, levels)
    if levels.dim() != 4 or tuple(levels.shape[1:]) != config.image_shape:
        expected = ", ".join(map(str, config.image_shape))
        raise ValueError(f"{name} must have shape (B, {expected}), got {tuple(levels.shape)}.")
    if levels.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 levels 0..{config.num_levels - 1}, got dtype {levels.dtype}.")
    if levels.numel() and (levels.min() < 0 or levels.max() >= config.num_levels):
        found = f"{int(levels.min())}..{int(levels.max())}"
        raise ValueError(f"{name} must lie in 0..{config.num_levels - 1}, got {found}.")


def check_label(label: Tensor, batch_size: int, config: ModelConfig) -> None:
    """Raise ValueError unless `label` is (B,) int64 in [-1, num_labels)."""
    if not isinstance(label, Tensor) or label.shape != (batch_size,) or label.dtype != torch.int64:
        found = f"{tuple(label.shape)} and {label.dtype}" if isinstance(label, Tensor) else repr(label)
        raise ValueError(f"label must have shape ({batch_size},) and dtype int64, got {found}.")
    if label.numel() and (label.min() < -1 or label.max() >= config.num_labels):
        if config.num_labels == 0:
            raise ValueError("label must be None or -1: this model was built without labels.")
        found = f"{int(label.min())}..{int(label.max())}"
        raise ValueError(f"label must lie in -1..{config.num_labels - 1} (-1 for none), got {found}.")


def check_observed(image: Tensor, observed: Tensor, config: ModelConfig, name: str = "image") -> None:
    """Raise ValueError unless `observed` is (B, 1, H, W) bool and the observed pixels of `image` are levels."""
    check_tensor(name, image)
    check_tensor("observed", observed)
    expected = (len(image), 1, *config.image_shape[1:])
    if observed.dtype != torch.bool or tuple(observed.shape) != expected:
        raise ValueError(
            f"observed must be bool of shape {expected}, True where a pixel is known, "
            f"got {observed.dtype} of shape {tuple(observed.shape)}."
        )
    if tuple(image.shape[1:]) != config.image_shape:
        check_levels(image, config, name)
    check_levels(torch.where(observed, image, 0), config, f"{name} (where observed)")


class AutoregressiveModel(nn.Module):
    """What all architectures share: input checks and scaling, the context network, the two 1x1 layers of the head.

    `config` describes the whole model; `layer_config` the joint network alone, without completer and label network.
    """

    def __init__(self, config: ModelConfig, in_maps: int) -> None:
        super().__init__()
        if not config.head_features:
            raise ValueError(f"{type(config).__name__}.__post_init__ must begin with super().__post_init__().")
        self.config = config
        self.layer_config = config.of_joint()
        num_groups = config.num_groups
        self.output = LogisticMixture(config) if config.num_mixtures else Categorical(config)
        head = colour_groups(config.head_features, num_groups)
        logits = colour_groups(self.output.num_parameters, num_groups)
        self.head = masked_1x1("B", colour_groups(in_maps, num_groups), head)
        self.logits = masked_1x1("B", head, logits)
        self.context_network: ContextNetwork | None = None
        if features := self.layer_config.context_features:
            self.context_network = ContextNetwork(config, config.context_width, features, config.context_scales)
        self.completer: AutoregressiveModel | None = None  # `build_model` adds it, and what follows
        self.added: AutoregressiveModel | None = None  # of a completer: its logits are added
        self.label_network: LabelNetwork | None = None

    def begin_completer(self) -> None:
        """Let a completer of the joint model's width begin with its weights: it then is the same joint model."""
        if self.completer is not None and self.completer.config.num_features == self.config.num_features:
            self.completer.load_state_dict(self.state_dict(), strict=False)

    @torch.no_grad()
    def begin_added(self, trained: "AutoregressiveModel | None") -> None:
        """Let the network that is added to this one's logits begin with the weights of a trained one, or add nothing.

        A part of its logits is added to a part of this one's (`ADDED_SHARES`): a weighted geometric mean of both
        distributions. ValueError if the trained one is of other sizes or dilations.
        """
        if self.added is None:
            raise ValueError("this network has none whose logits are added: set added_features.")
        shares = (1.0, 0.0) if trained is None else ADDED_SHARES
        if trained is not None:
            sizes, expected = ({n: w.shape for n, w in x.state_dict().items()} for x in (trained, self.added))
            dilations, wanted = ([getattr(part, "spacing", 1) for part in x.modules()] for x in (trained, self.added))
            if sizes != expected or dilations != wanted:
                raise ValueError("the network to begin with is of other sizes or dilations than the one that is added.")
            self.added.load_state_dict(trained.state_dict())
        for network, share in zip((self, self.added), shares, strict=True):
            for weight in network.logits.parameters():
                weight.mul_(share)

    def networks(self, observed: Tensor) -> list[tuple["AutoregressiveModel", Tensor]]:
        """Return each network that these images need, with the indices (n,) of those that it is for.

        An image of which anything is `observed`, (B, 1, H, W) bool, is the completer's, if there is one.
        """
        drawn = observed.flatten(1).any(dim=1)
        if self.completer is None or not bool(drawn.any()):
            return [(self, torch.arange(len(observed), device=observed.device))]
        parts = [(self, ~drawn), (self.completer, drawn)]
        return [(network, which.nonzero()[:, 0]) for network, which in parts if bool(which.any())]

    def label_log_probs(self, drawing: Tensor, observed: Tensor, label: Tensor) -> Tensor:
        """Return with which labels endings are drawn, (B, 1 + num_labels) float64 log-probabilities of none, 0, 1, ...

        It is the label that is given; where none is, but a label network and something known, p(label | drawing),
        without the unlikely ones (`MIN_LABEL_PROB`). Each drawing is looked at by itself: its figures do not depend
        on those beside it. All three are given, as `forward` takes them.
        """
        num_labels = self.config.num_labels
        found = torch.full((len(label), 1 + num_labels), -math.inf, dtype=torch.float64, device=label.device)
        found.scatter_(1, label[:, None] + 1, 0.0)
        asked = (label < 0) & observed.flatten(1).any(dim=1)
        if self.label_network is None or not bool(asked.any()):
            return found
        seen = torch.cat([torch.where(observed, drawing, 0), observed], dim=1)[asked]
        different, which = seen.unique(dim=0, return_inverse=True)
        logits = [self.label_network(one[None, :-1], one[None, -1:].bool()) for one in different]
        log_probs = torch.cat(logits).double().log_softmax(dim=1)
        least = math.log(min(MIN_LABEL_PROB, 0.5 / num_labels))
        log_probs = log_probs.masked_fill(log_probs < least, -math.inf).log_softmax(dim=1)
        found[asked] = F.pad(log_probs, (1, 0), value=-math.inf)[which]
        return found

    def features(self, x: Tensor, label: Tensor | None, context: Tensor | None) -> Tensor:
        """Return the head's input, (B, maps, H, W), from scaled levels x.

        Args:
            label: (B,) int64, -1 for none; None for none at all.
            context: (B, context_features, H, W), the map of a drawing; None without one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define features.")

    def described(self) -> Map:
        """Return the logits as a symbolic map, (C * K channels), from which the samplers follow.

        Raises ValueError if the network is not causal, or a part of it cannot be computed pixel by pixel; it is named.
        """
        name, forward = type(self).__name__, getattr(self.forward, "__func__", None)
        if (forward, type(self).__call__) != (AutoregressiveModel.forward, nn.Module.__call__):
            raise ValueError(f"no sampler follows from the forward of {name}: change features instead.")
        if self._forward_hooks or self._forward_pre_hooks:
            raise ValueError(f"no sampler follows from the hooks of {name}: change features instead.")
        if type(self.output) not in (Categorical, LogisticMixture):
            raise ValueError(f"no sampler follows from the output of {name}: choose one of models/outputs.py.")
        num_colours = self.config.image_shape[0]
        image: Any = Map("image", (), None, num_colours, 0, torch.arange(num_colours) + 1)
        label: Any = Map("labels", (), None, 0, NEVER_WAITS) if self.config.num_labels else None
        contexts = [x and x.described() for x in self.context_networks()]
        logits = self._logits(image, label, contexts)
        due = colour_groups(logits.num_channels, self.config.num_groups)
        if logits.lead > -1 if logits.turns is None else bool((logits.turns > due).any()):
            raise ValueError(f"{name} is not causal: its logits see the pixel itself, or later ones.")
        maps, (_, *size) = made_of(logits), self.config.image_shape
        if all(x.op != "image" for x in maps):
            raise ValueError(f"{name} does not look at the image: its features see nothing of what they are given.")
        if any(x.op == "constant" and list(x.block().shape[1:]) != size for x in maps):
            raise ValueError(f"{name} has attention, or a bias by place, for images of another size than {size}.")
        if any(x.op == "label" and len(x.block.table) < self.config.num_labels for x in maps):
            raise ValueError(f"{name} has a LabelBias of fewer than its {self.config.num_labels} labels.")
        nothing: list[Any] = [None for _ in contexts]
        if self.config.context_features and not is_same_without("context", logits, self._logits(image, label, nothing)):
            raise ValueError(
                f"{name} is another network without a drawing than with a map of zeros: add what depends on the map to "
                "others, by context_projection or other layers without a bias, and change nothing else."
            )
        if label is not None and not is_same_without("label", logits, self._logits(image, None, contexts)):
            raise ValueError(
                f"{name} is another network without labels than with the label -1: add what depends on the label to "
                "others, by LabelBias or other layers without a bias, and change nothing else."
            )
        return logits

    def context_networks(self) -> list[ContextNetwork | None]:
        """Return this network's own context network, None without one, and that of the one whose logits are added."""
        return [self.context_network, *([] if self.added is None else self.added.context_networks())]

    def contexts(self, drawing: Tensor | None, observed: Tensor | None) -> list[Tensor | None]:
        """Return what each of `context_networks` makes of a drawing, to enter every layer; None without a drawing."""
        networks = self.context_networks()
        if drawing is None:
            return [None] * len(networks)
        return [None if network is None else network(drawing, observed) for network in networks]

    def _logits(self, x: Any, label: Any, contexts: list[Any]) -> Any:
        """Return the output's parameters as maps, (B, P, H, W), of tensors or of symbolic maps."""
        features: Any = self.features(x, label, contexts[0])
        if type(features) is not type(x):
            found, kind = type(features).__name__, type(x).__name__
            raise ValueError(f"features of {type(self).__name__} must return a {kind} for a {kind}, got {found}.")
        hidden = F.relu(self.head(F.relu(features)))
        if self.config.output == "categorical" or isinstance(hidden, Map):
            logits = self.logits(hidden)
        else:  # rounded to bfloat16, means and scales would cost tenths of a bit
            with torch.autocast(hidden.device.type, enabled=False):
                logits = self.logits(hidden.to(self.logits.weight.dtype))
        return logits if self.added is None else logits + self.added._logits(x, label, contexts[1:])

    def forward(
        self,
        levels: Tensor,
        label: Tensor | None = None,
        drawing: Tensor | None = None,
        observed: Tensor | None = None,
    ) -> Tensor:
        """Return the output's parameters for every sub-pixel given all earlier ones, and the drawing if there is one.

        They are (B, K, C, H, W) logits in the dtype of the weights; (B, P, H, W) for a mixture of logistics.

        Args:
            levels: (B, C, H, W) int64 in [0, K).
            label: (B,) int64 in [-1, num_labels), -1 for no label; None for no labels at all.
            drawing: (B, C, H, W) int64 levels, ignored where not observed; only for models with a context network.
            observed: (B, 1, H, W) bool, True where the pixel of `drawing` is known. Given together with `drawing`.

        Raises:
            ValueError: a shape, dtype or range differs from the above.
        """
        config = self.config
        check_levels(levels, config)
        if label is not None:
            check_label(label, len(levels), config)
        if not config.context_features and (drawing is not None or observed is not None):
            raise ValueError("drawing and observed must be None: this model has no context network.")
        if (drawing is None) != (observed is None):
            raise ValueError("drawing and observed must be given together: one says what is known, the other where.")
        if drawing is not None and observed is not None:
            if len(drawing) != len(levels):
                raise ValueError(f"drawing must have the batch size of levels, {len(levels)}, got {len(drawing)}.")
            check_observed(drawing, observed, config, "drawing")
            if self.completer is not None:
                return self._of_both(levels, label, drawing, observed)
        x = scaled(levels, config.num_levels, self.head.weight.dtype)
        return self.output.shaped(self._logits(x, label, self.contexts(drawing, observed)))

    def _of_both(self, levels: Tensor, label: Tensor | None, drawing: Tensor, observed: Tensor) -> Tensor:
        """Return the logits of each image from the network that it is for; there is a completer."""
        found, parts = [], self.networks(observed)
        for network, index in parts:
            seen = (None, None) if network is self else (drawing[index], observed[index])
            found.append(network(levels[index], None if label is None else label[index], *seen))
        return torch.cat(found)[torch.cat([index for _, index in parts]).argsort()]


def joint_parameters(model: AutoregressiveModel) -> list[nn.Parameter]:
    """Return the parameters of a model without those of its completer and its label network."""
    return [p for name, p in model.named_parameters() if name.partition(".")[0] not in OTHER_NETWORKS]
