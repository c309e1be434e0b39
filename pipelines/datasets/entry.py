"""What params.yaml says of a dataset: one entry each, the official ones included."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pixelcnn.data import BYTES_PROTOCOL, DYNAMIC_PROTOCOL

THRESHOLD_PROTOCOL = "threshold"  # ink is what is at least half white
QUANTIZED_PROTOCOL = "quantized"  # the nearest of K evenly spaced levels
OFFICIAL = ("mnist5k", "mnist", "fashion_mnist", "cifar10")
MAX_SIDE = 64
# It becomes a part of file names, of MODEL-DATASET, of registered names, and of BentoML's, which do not end in _.
NAME = re.compile(r"[a-z](?:[a-z0-9_]{0,38}[a-z0-9])?")
NAMES = "use small letters, digits and _, a letter first, no _ at the end, 40 at most"

_LEVELS = {DYNAMIC_PROTOCOL: 2, THRESHOLD_PROTOCOL: 2, BYTES_PROTOCOL: 256}  # of others it is free


class Frozen(BaseModel):
    """A section of params.yaml: nothing unknown, nothing converted, nothing changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Source(Frozen):
    """Where images come from; `pictures.py` says what each kind looks like."""

    kind: Literal["official", "folder", "arrays", "idx", "cifar"]
    path: str = Field(min_length=1)  # official: its name; else a file or folder, absolute or from the project's folder


class DatasetParams(Frozen):
    """One dataset. Without a Python default is what decides the bytes of an official one."""

    source: Source
    image_shape: Annotated[tuple[int, int, int], Field(strict=False)]  # (C, H, W); C: 1 for grey or binary, 3 for RGB
    num_levels: int = Field(ge=2, le=256)  # K
    protocol: Literal["dynamic", "threshold", "quantized", "8-bit"]  # what one pixel of validation and test is
    label_names: Annotated[tuple[str, ...], Field(strict=False)]  # one per class, in order; none: no labels
    num_validation: int = Field(ge=1, le=1_000_000)  # set aside for validation; as many for test, where none is given
    # How pictures of other sizes are brought to image_shape: cut to its shape, set on a ground, or drawn out.
    fit: Literal["crop", "pad", "stretch"] = "pad"
    ground: Literal["black", "white"] = "black"  # below what is transparent, and around what is padded
    invert: bool = False  # black becomes white: for dark ink on a light ground
    flips: bool = False  # a mirrored image is one of the same kind
    skip_broken: bool = False  # leave out pictures that cannot be read, in place of an error

    @model_validator(mode="after")
    def _check(self) -> "DatasetParams":
        channels, height, width = self.image_shape
        if channels not in (1, 3) or not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            shape = list(self.image_shape)
            raise ValueError(f"image_shape must be [1 or 3, height, width], sides up to {MAX_SIDE}, got {shape}.")
        if self.num_levels != (num_levels := _LEVELS.get(self.protocol, self.num_levels)):
            raise ValueError(f"protocol {self.protocol!r} has {num_levels} levels, got num_levels {self.num_levels}.")
        if len(set(self.label_names)) < len(self.label_names):
            raise ValueError("label_names holds one twice.")
        if self.source.kind == "official":
            if self.source.path not in OFFICIAL:
                raise ValueError(f"source.path must be one of {', '.join(OFFICIAL)}, got {self.source.path!r}.")
            if unused := self.model_fields_set & {"fit", "ground", "invert", "skip_broken"}:
                raise ValueError(f"{min(unused)} must not be set: official images are taken as they are.")
        return self
