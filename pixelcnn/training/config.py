"""How to train: the settings of a run, checked when they are made, and what `precision: auto` stands for."""

import os
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixelcnn.config import check_int
from pixelcnn.data import DYNAMIC_PROTOCOL
from pixelcnn.training.optimizers import OPTIMIZERS

PRECISIONS = ("float32", "bfloat16")
# What torch.compile calls, and the header that it includes.
CXX = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
PYTHON_HEADER = Path(sysconfig.get_path("include"), "Python.h")
BFLOAT16_CPUS = ("avx512_bf16", "amx_bf16")  # instructions without which bfloat16 is nine times slower than float32


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    With `max_minutes` 0 a run is a function of its seed, whatever the machine's speed. While the learning rate has not
    begun to fall, changing `max_epochs` or `decay_fraction` and resuming gives the weights of a run that had the new
    value all along.

    Args:
        batch_size: images per optimizer step.
        learning_rate: peak learning rate.
        joint_share: factor on the learning rate of a completer's weights that the joint model has, too, and of their
            like in a network that is added to it; 0 keeps them.
        context_network_share: the same for the weights of its context network, which may have learned before.
        optimizer: `adam`, or `muon` for the convolutions' kernels and Adam for the rest (optimizers.py).
        max_epochs: passes over the training split; the schedule ends here, or at `max_minutes`.
        max_minutes: minutes of training, for quick trials; 0 for no limit. The schedule is fitted to whichever ends
            first, so a limit makes the result depend on the machine's speed.
        warmup_steps: steps of linear warm-up.
        decay_fraction: last part of the run in which the learning rate falls linearly to zero.
        ema_decay: decay per step of the averaged weights, which are scored and kept; 0 for the weights themselves.
        clip_norm: largest norm of the gradient of the loss in nats per sub-pixel.
        label_dropout: share of the images whose label is withheld, so that one network serves with and without.
        context_share: share of the images that are shown in part, for models with a context network.
        halves_share: share of the images, but for those drawn anew, of which a half is shown, whatever else would be.
        redrawn_share: share of the images that are drawn anew, as people draw (redrawn.py); protocol dynamic alone.
        horizontal_flips: mirror half of the images (fair for CIFAR-10, not for digits or clothes).
        precision: `float32`, or `bfloat16` for autocast of the matrix work; `auto` for the one that is faster here.
        compiled: run the network by torch.compile: 1.2 times as fast on two CPU threads, a C++ compiler's minute later.
        accumulate: parts that a batch is split into, to save memory.
        num_validations: how often the validation split is scored, evenly over the run.
        num_validation_images: how many of its images are scored then; 0 for all.
        save_minutes: minutes between saves of the state file: what a training that is killed loses at most.
        seed: of the batches and everything else that is drawn.

    Raises:
        ValueError: a value is impossible.
    """

    batch_size: int
    learning_rate: float
    max_epochs: float
    joint_share: float = 1.0
    context_network_share: float = 1.0
    optimizer: str = "adam"
    max_minutes: float = 0
    warmup_steps: int = 100
    decay_fraction: float = 0.3
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    label_dropout: float = 0.5
    context_share: float = 0.75
    halves_share: float = 0.0
    redrawn_share: float = 0.0
    horizontal_flips: bool = False
    precision: str = "float32"
    compiled: bool = False
    accumulate: int = 1
    num_validations: int = 10
    num_validation_images: int = 0
    save_minutes: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "num_validations"):
            check_int(name, getattr(self, name), 1, 1_000_000)
        for name in ("warmup_steps", "num_validation_images", "seed"):
            check_int(name, getattr(self, name), 0, 2**63 - 1)
        shares = ("label_dropout", "context_share", "halves_share", "redrawn_share", "joint_share")
        for name in ("learning_rate", "decay_fraction", "ema_decay", "context_network_share", *shares):
            _check_number(name, getattr(self, name), 1)
        for name in ("max_epochs", "clip_norm", "max_minutes", "save_minutes"):
            _check_number(name, getattr(self, name), 1e9)
        for name in ("learning_rate", "max_epochs", "clip_norm"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}.")
        for name, choices in (("precision", (*PRECISIONS, "auto")), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}.")
        for name in ("horizontal_flips", "compiled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must be at most batch_size ({self.batch_size}), got {self.accumulate}.")

    def check_for(self, protocol: str, sees_drawings: bool) -> None:
        """Raise ValueError unless a network, which sees drawings or not, can learn so from images of this protocol."""
        if self.redrawn_share and protocol != DYNAMIC_PROTOCOL:
            raise ValueError(
                f"redrawn_share must be 0 with protocol {protocol!r}: only images kept as intensities (protocol "
                f"{DYNAMIC_PROTOCOL!r}) can be drawn anew."
            )
        for name in ("joint_share", "context_network_share"):
            if getattr(self, name) < 1 and not sees_drawings:
                raise ValueError(f"{name} must be 1: the network sees no drawings, so all of it is the joint model's.")


def _check_number(name: str, value: Any, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{name} must be a number from 0 to {most}, got {value!r}.")


def check_compiler() -> None:
    """Raise ValueError where torch.compile lacks what it calls; settings may ask for it on machines that only serve."""
    if not (shutil.which(CXX) and PYTHON_HEADER.exists()):
        raise ValueError(
            f"compiled must be false: it takes the C++ compiler {CXX} and {PYTHON_HEADER}; install both "
            "(Debian: g++, python3-dev)."
        )


def resolved_precision(precision: str, device: torch.device) -> str:
    """Return what `auto` stands for on a device; any other precision as it is."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Older versions of torch cannot tell.
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = any(capabilities.get(name, False) for name in BFLOAT16_CPUS)
    return "bfloat16" if fast else "float32"
