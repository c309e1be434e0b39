"""Architectures by name: each registers its config and its module, in the file that defines them.

Importing that file is enough, wherever it lies: `build_model`, checkpoints and the command line know it from then on.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pixelcnn.config import ModelConfig, checked_config
from pixelcnn.models.layers import LabelNetwork
from pixelcnn.models.maps import made_of

if TYPE_CHECKING:
    from pixelcnn.models.base import AutoregressiveModel

M = TypeVar("M", bound="AutoregressiveModel")
# Name: the config class, and what makes the module of such a config.
_ARCHITECTURES: dict[str, tuple[type[ModelConfig], Callable[[Any], "AutoregressiveModel"]]] = {}
# It becomes a command, and a part of file names.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two classes are of one definition, run twice: a notebook's cell, a reload, a file run as main."""
    if one is other or one.__qualname__ != other.__qualname__:
        return one is other
    try:
        return one.__module__ == other.__module__ or inspect.getfile(one) == inspect.getfile(other)
    except (OSError, TypeError):  # a notebook's has no file
        return False


def register(name: str, config_class: type[ModelConfig]) -> Callable[[type[M]], type[M]]:
    """Register the decorated module class under a name, to be built from configs of `config_class`.

    The same definition may be run again: the new classes take the old ones' place. Raises ValueError if the name is
    none; or if it, or the config class, is already another architecture's.
    """

    def add(model_class: type[M]) -> type[M]:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of an architecture: use letters, digits, _ and -, a letter first.")
        if name in _ARCHITECTURES and not _is_same(_ARCHITECTURES[name][1], model_class):
            raise ValueError(f"an architecture named {name!r} exists already: choose another name.")
        if any(config_class is known for other, (known, _) in _ARCHITECTURES.items() if other != name):
            raise ValueError(f"{config_class.__name__} already belongs to an architecture: give {name!r} its own.")
        _ARCHITECTURES[name] = (config_class, model_class)
        return model_class

    return add


def architectures() -> dict[str, type[ModelConfig]]:
    """Return the config class of each registered architecture, by name."""
    return {name: config_class for name, (config_class, _) in _ARCHITECTURES.items()}


def model_name(config: ModelConfig) -> str:
    """Return the name that a config's architecture is registered under. Raises ValueError if there is none."""
    for name, (config_class, _) in _ARCHITECTURES.items():
        if _is_same(type(config), config_class):
            return name
    known = ", ".join(sorted(config_class.__name__ for config_class, _ in _ARCHITECTURES.values()))
    raise ValueError(f"config must be one of {known}, got {type(config).__name__}.")


def unknown_model(name: Any) -> str:
    """Return what to say of a name that no architecture is registered under."""
    known, own = ", ".join(sorted(_ARCHITECTURES)), "import its file, or name it in PIXELCNN_ARCHITECTURES"
    return f"unknown model {name!r}. Known: {known}. One of your own: {own} (docs/architectures.md)."


def files_beside(name: str) -> list[Path]:
    """Return the files outside of this package that define an architecture; none for one of ours."""
    classes: tuple[Any, ...] = _ARCHITECTURES[name]
    files = {Path(inspect.getfile(one)).resolve() for one in classes}
    return sorted(file for file in files if not file.is_relative_to(Path(__file__).resolve().parents[1]))


def code_beside(name: str) -> list[str]:
    """Return the SHA-256 of each of an architecture's `files_beside`."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files_beside(name)]


def build_model(config: ModelConfig) -> "AutoregressiveModel":
    """Build the architecture that a config describes, with fresh weights.

    Raises ValueError if the config is of no registered architecture, no sampler follows from its network, or that
    keeps a block where torch does not find it.
    """
    model = _assembled(config)
    for network in filter(None, (model, model.completer)):
        parts = set(network.modules())
        for map_ in made_of(network.described()):
            if isinstance(map_.block, nn.Module) and map_.block not in parts:
                raise ValueError(
                    f"{type(network).__name__} uses a {type(map_.block).__name__} that is no part of it, and would be "
                    "neither trained nor saved: keep it as an attribute or in an nn.ModuleList, not in a list."
                )
    return model


def _assembled(config: ModelConfig) -> "AutoregressiveModel":
    model = _ARCHITECTURES[model_name(config)][1](config)
    if config.completer_features:  # the last of the parameters, so that the joint model's are drawn as without it
        model.completer = _assembled(config.of_completer())
    if config.added_features and model.completer is not None:
        model.completer.added = _assembled(config.of_added())
    if config.label_features:
        model.label_network = LabelNetwork(config)
    return model


class _Uninitialised(TorchFunctionMode):
    """Weights are not drawn: where they have no memory it would import torch's compiler, for more than a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_drawn = getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in kwargs
        return kwargs["tensor"] if is_drawn else func(*args, **kwargs)


def count_weights(config: ModelConfig) -> int:
    """Return how many weights `build_model` makes, without their memory; 0 where a constructor looks at numbers."""
    try:
        with torch.device("meta"), _Uninitialised():
            return sum(weight.numel() for weight in _assembled(config).state_dict().values())
    except (RuntimeError, TypeError) as error:
        if "meta" not in str(error).lower():  # sizes that no tensor can have
            raise
        return 0


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the config as JSON gives it back, tuples as lists, with the architecture's name under `model`."""
    values: dict[str, Any] = json.loads(json.dumps({"model": model_name(config), **asdict(config)}))
    return values


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Build a config from `config_to_dict`'s values.

    Raises ValueError if the model, or a setting of it, is unknown, missing or impossible.
    """
    values = dict(values)
    name = values.pop("model", None)
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ValueError(unknown_model(name))
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}  # JSON's lists
    config: ModelConfig = checked_config(_ARCHITECTURES[name][0], values, where=name)
    return config
