"""The architectures' settings: frozen, keyword-only, checked when they are made."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What both architectures share.

    Args:
        image_shape: (C, H, W) of the images.
        num_levels: K, the values 0..K-1 that each sub-pixel can take.
        num_features: width of the network; a multiple of C, so that the maps split evenly into colour groups.
        num_labels: number of classes that the network can be told; 0 for a network without labels.
        context_features: maps that the context network makes of a drawing; 0 for a network without one.
        context_width: width of the context network's own layers; 0 means `context_features`.
        head_features: width of the head's 1x1 layer; 0 means twice `num_features`.
        completer_features: width of a network of its own that drawings go to, otherwise of this architecture and with
            the context network; 0 for none. The joint model then has no part in completing, and loses nothing to it.

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

    def __post_init__(self) -> None:
        shape = self.image_shape
        if not isinstance(shape, (tuple, list)) or len(shape) != 3:
            raise ValueError(f"image_shape must be three whole numbers (C, H, W), got {shape!r}.")
        for name, size in zip("CHW", shape, strict=True):
            _check_int(f"{name} in image_shape", size, 1)
        object.__setattr__(self, "image_shape", tuple(shape))
        _check_int("num_levels", self.num_levels, 2)
        _check_int("num_features", self.num_features, 1)
        _check_int("num_labels", self.num_labels, 0)
        _check_int("head_features", self.head_features, 0)
        _check_int("context_features", self.context_features, 0)
        _check_int("context_width", self.context_width, 0)
        if self.context_width and not self.context_features:
            raise ValueError(f"context_width must be 0 where context_features is 0, got {self.context_width}.")
        _check_int("completer_features", self.completer_features, 0)
        if self.completer_features and not self.context_features:
            raise ValueError(
                f"completer_features must be 0 where context_features is 0, got {self.completer_features}: "
                "it would see no drawing."
            )
        if self.context_width == 0:
            object.__setattr__(self, "context_width", self.context_features)
        if self.head_features == 0:
            object.__setattr__(self, "head_features", 2 * self.num_features)
        num_colours = shape[0]
        for name in ("num_features", "head_features", "completer_features"):
            if getattr(self, name) % num_colours:
                raise ValueError(
                    f"{name} must be a multiple of the {num_colours} colour channels, got {getattr(self, name)}."
                )

    def without_context(self) -> Self:
        """Return the same network without context network and completer."""
        return replace(self, context_features=0, context_width=0, completer_features=0)

    def of_completer(self) -> Self:
        """Return the config of the completer, a network by itself."""
        return replace(self, num_features=self.completer_features, head_features=0, completer_features=0)


def _check_odd(name: str, value: Any) -> None:
    _check_int(name, value, 3)
    if value % 2 == 0:
        raise ValueError(f"{name} must be odd, so that it has a centre, got {value}.")


@dataclass(frozen=True, kw_only=True)
class PixelCNNConfig(ModelConfig):
    """PixelCNN (arXiv:1601.06759): residual blocks of `num_features` (the paper's h) inner maps.

    Args:
        num_blocks: residual blocks after the first layer.
        first_kernel_size: the first layer's kernel (mask A), odd.
        kernel_size: the residual blocks' kernel (mask B), odd.
    """

    num_blocks: int
    first_kernel_size: int = 7
    kernel_size: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int("num_blocks", self.num_blocks, 1)
        _check_odd("first_kernel_size", self.first_kernel_size)
        _check_odd("kernel_size", self.kernel_size)


@dataclass(frozen=True, kw_only=True)
class GatedPixelCNNConfig(ModelConfig):
    """Gated PixelCNN (arXiv:1606.05328): `num_layers` gated layers of `num_features` (the paper's p) maps.

    Args:
        num_layers: gated layers, the first (mask A) included.
        kernel_size: n of the paper's n x n vertical and 1 x n horizontal kernels, odd.
    """

    num_layers: int
    kernel_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_int("num_layers", self.num_layers, 1)
        _check_odd("kernel_size", self.kernel_size)


CONFIG_CLASSES: dict[str, type[ModelConfig]] = {"pixelcnn": PixelCNNConfig, "gated_pixelcnn": GatedPixelCNNConfig}


def model_name(config: ModelConfig) -> str:
    """Return the name of an architecture: `pixelcnn` or `gated_pixelcnn`."""
    for name, config_class in CONFIG_CLASSES.items():
        if isinstance(config, config_class):
            return name
    raise ValueError(f"config must be one of {', '.join(CONFIG_CLASSES)}, got {type(config).__name__}.")


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the config as JSON-ready values, with the architecture's name under `model`."""
    return {"model": model_name(config), **asdict(config), "image_shape": list(config.image_shape)}


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Build a config from `config_to_dict`'s values.

    Raises:
        ValueError: the model, or a setting of it, is unknown, missing or impossible.
    """
    values = dict(values)
    name = values.pop("model", None)
    if name not in CONFIG_CLASSES:
        raise ValueError(f"unknown model {name!r}. Known: {', '.join(CONFIG_CLASSES)}.")
    return checked_config(CONFIG_CLASSES[name], values, where=name)


def checked_config(config_class: type, values: dict[str, Any], where: str) -> Any:
    """Make a config dataclass from a mapping, naming unknown and missing keys.

    Args:
        config_class: a dataclass whose `__post_init__` checks its values.
        values: its fields by name.
        where: what to call the mapping in an error message.

    Raises:
        ValueError: a key is unknown or missing, or a value is impossible.
    """
    known = {f.name for f in fields(config_class)}
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}. Known: {', '.join(sorted(known))}.")
    try:
        return config_class(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
