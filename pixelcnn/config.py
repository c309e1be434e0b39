"""Settings of any architecture: frozen, keyword-only, checked when they are made."""

import math
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Self

MAX_SIDE = 256  # of an image: attention's mask grows with the fourth power of it


def check_int(name: str, value: Any, least: int, most: float = math.inf) -> None:
    """Raise ValueError, which calls the value by `name`, unless it is a whole number between `least` and `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What all architectures share.

    Args:
        image_shape: (C, H, W) of the images, each at most 256.
        num_levels: K, the values 0..K-1 that each sub-pixel can take.
        num_features: width of the network; a multiple of C, so that the maps split evenly into colour groups.
        num_labels: number of classes that the network can be told; 0 for a network without labels.
        context_features: maps that the context network makes of a drawing; 0 for a network without one.
        context_width: width of the context network's own layers; 0 means `context_features`.
        context_scales: resolutions of its U-Net, each half the last, of twice the maps; 0 for dilated kernels at one.
        head_features: width of the head's 1x1 layer; 0 means twice `num_features`.
        output: the distribution of a sub-pixel, `categorical` or `logistic_mixture` (models/outputs.py).
        num_mixtures: components of a logistic mixture; 0 for other outputs.
        completer_features: width of a network of its own that drawings go to, otherwise of this architecture and with
            the context network; 0 for none. The joint model then has no part in completing, and loses nothing to it.
        added_features: width of a network whose logits are added to the completer's, otherwise of this architecture,
            and with a context network of its own, by dilated kernels; 0 for none.
        added_context_width: width of that context network's own layers; 0 means `context_features`.
        label_features: width of the network that says which labels a drawing may have; 0 for none. With it an ending
            without label is drawn with one, from p(label | drawing), so that all of its pixels agree on what it is.

    Raises:
        ValueError: a value is impossible.
    """

    image_shape: tuple[int, int, int]
    num_levels: int
    num_features: int
    num_labels: int = 0
    context_features: int = 0
    head_features: int = 0
    context_width: int = 0
    completer_features: int = 0
    added_features: int = 0
    added_context_width: int = 0
    label_features: int = 0
    output: str = "categorical"
    num_mixtures: int = 0
    context_scales: int = 0

    def __post_init__(self) -> None:
        shape = self.image_shape
        if not isinstance(shape, (tuple, list)) or len(shape) != 3:
            raise ValueError(f"image_shape must be three whole numbers (C, H, W), got {shape!r}.")
        for name, size in zip("CHW", shape, strict=True):
            check_int(f"{name} in image_shape", size, 1, MAX_SIDE)
        object.__setattr__(self, "image_shape", tuple(shape))
        check_int("num_levels", self.num_levels, 2)
        check_int("num_features", self.num_features, 1)
        seeing = ("context_width", "context_scales", "completer_features", "label_features")
        added = ("added_features", "added_context_width")
        for name in ("num_labels", "head_features", "context_features", *seeing, *added):
            check_int(name, getattr(self, name), 0)
        needed = [(name, "context_features") for name in seeing] + [("label_features", "num_labels")]
        needed += [("added_features", "completer_features"), ("added_context_width", "added_features")]
        for name, other in needed:
            if getattr(self, name) and not getattr(self, other):
                raise ValueError(f"{name} must be 0 where {other} is 0, got {getattr(self, name)}.")
        check_int("context_scales", self.context_scales, 0, MAX_SIDE.bit_length())  # beyond, nothing is left to halve
        if self.context_width == 0:
            object.__setattr__(self, "context_width", self.context_features)
        if self.head_features == 0:
            object.__setattr__(self, "head_features", 2 * self.num_features)
        if self.output not in ("categorical", "logistic_mixture"):
            raise ValueError(f"output must be categorical or logistic_mixture, got {self.output!r}.")
        check_int("num_mixtures", self.num_mixtures, 1 if self.output == "logistic_mixture" else 0)
        if self.num_mixtures and self.output != "logistic_mixture":
            raise ValueError(f"num_mixtures must be 0 where output is {self.output}, got {self.num_mixtures}.")
        for name in ("num_features", "head_features", "completer_features", "added_features"):
            if getattr(self, name) % self.num_groups:
                raise ValueError(
                    f"{name} must be a multiple of the {self.num_groups} colour channels, got {getattr(self, name)}."
                )

    @property
    def num_groups(self) -> int:
        """Return how many groups the maps of all layers divide into: one for each colour with logits of its own."""
        return self.image_shape[0] if self.output == "categorical" else 1

    def for_same_images(self, other: "ModelConfig") -> bool:
        """Say whether both are for the same images, and for the same labels if both know some."""
        same = (self.image_shape, self.num_levels) == (other.image_shape, other.num_levels)
        return same and len({self.num_labels, other.num_labels} - {0}) < 2

    def without_context(self) -> Self:
        """Return the same network without context network, completer and label network."""
        return replace(self.by_itself(), context_features=0, context_width=0, context_scales=0)

    def of_joint(self) -> Self:
        """Return the config of the joint model, a network by itself: with a completer it sees no drawings."""
        return self.without_context() if self.completer_features else self.by_itself()

    def by_itself(self) -> Self:
        """Return the same network without others beside it."""
        return replace(self, completer_features=0, added_features=0, added_context_width=0, label_features=0)

    def of_completer(self) -> Self:
        """Return the config of the completer, a network by itself."""
        width = self.completer_features
        head = self.head_features if width == self.num_features else 0  # it then begins with the joint model's weights
        return replace(self.by_itself(), num_features=width, head_features=head)

    def of_added(self) -> Self:
        """Return the config of the network whose logits are added to the completer's, a network by itself."""
        plain = replace(self.by_itself(), num_features=self.added_features, head_features=0)
        return replace(plain, context_width=self.added_context_width, context_scales=0)


def check_odd(name: str, value: Any) -> None:
    """Raise ValueError unless a kernel's size is odd, so that it has a centre, and at least 3."""
    check_int(name, value, 3)
    if value % 2 == 0:
        raise ValueError(f"{name} must be odd, so that it has a centre, got {value}.")


def checked_config(config_class: type, values: dict[str, Any], where: str) -> Any:
    """Make a dataclass from a mapping; ValueError, begun with `where`, for a wrong or missing key, or a wrong value."""
    known = {f.name: f.default is f.default_factory is MISSING for f in fields(config_class)}  # which must be given
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. Known: {', '.join(sorted(known))}.")
    if missing := [name for name, is_needed in known.items() if is_needed and name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} must be given, too.")
    try:
        return config_class(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
