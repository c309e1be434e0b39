"""What is chosen for a drawing's endings, the request for them, and the endings that answer it. Arrays alone."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import numpy as np

from app.canvas.drawing import Drawing, drawing_text, encode_drawing, known_cells, levels_of, parse_drawing, per_cell
from app.canvas.texts import say
from app.client import ServedModel

MAX_SEED = 2**63 - 1  # 19 digits


def shape_of(model: ServedModel) -> tuple[int, ...]:
    """Return the shape of an image on the wire: (H, W), or (H, W, 3) for colour."""
    channels, height, width = model.shape
    return (height, width) if channels == 1 else (height, width, channels)


@dataclass(frozen=True)
class Settings:
    """What is chosen below the endings, and what follows from it for the page."""

    dataset: str
    model: ServedModel | None  # None as long as nothing serves the dataset
    mode: str  # of `known_cells`
    num_samples: int
    label: int  # -1 for none
    temperature: float
    seed: int | None  # None where none is typed
    trouble: str  # what is wrong with the seed that was typed
    sees_all: bool  # the model takes into account what is known below a cell, too
    named: bool  # endings are to be named
    coloured: bool  # endings show by colour what the model added

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid."""
        return shape_of(self.model) if self.model else (28, 28)

    @property
    def levels(self) -> int:
        """K of the images."""
        return self.model.levels if self.model else 2

    @property
    def query(self) -> dict[str, str]:
        """What of them an address tells, beside the drawing and the seed of its endings."""
        return {
            "dataset": self.dataset,
            "known": self.mode,
            "label": str(self.label),
            "temperature": str(self.temperature),
            "n": str(self.num_samples),
        }


@dataclass(frozen=True)
class Request:
    """All that one press of Complete sends; equal requests need not be sent twice. `image` and `observed` as rows."""

    dataset: str
    image: list[list[Any]]
    observed: list[list[int]]
    num_samples: int
    label: int  # -1 for none
    temperature: float
    seed: int | None

    @property
    def given(self) -> np.ndarray:
        """What is known of the image, (H, W) or (H, W, 3) levels; -1 elsewhere."""
        known, image = np.array(self.observed), np.array(self.image)
        return np.where(per_cell(known, image) == 1, image, -1)


@dataclass(frozen=True)
class Endings:
    """The endings of one request, as they are shown: (N, H, W) or (N, H, W, 3) levels, -1 where not drawn yet.

    `settings` and `drawing`, the grid's text, are what the request was made of.
    """

    request: Request
    levels: int
    images: np.ndarray
    log_probs: list[float] | None = None
    seed: int | None = None
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    drawing: str = ""
    names: list[str] = field(default_factory=list)  # what each probably is; empty where nobody asked

    @property
    def link(self) -> str:
        """The query of the address that draws them again."""
        drawing = encode_drawing(parse_drawing(self.drawing, self.images.shape[1:]))
        return urlencode(self.settings | {"seed": str(self.seed)} | ({"d": drawing} if drawing else {}))

    @property
    def known(self) -> np.ndarray:
        """(H, W), 1 where the person drew it."""
        return np.array(self.request.observed)


def undrawn(request: Request, levels: int, settings: dict[str, str], drawing: str = "") -> Endings:
    """Return the endings of a request before anything of them is drawn; see `Endings`."""
    images = np.repeat(request.given[None], request.num_samples, axis=0)
    return Endings(request, levels, images, settings=settings, drawing=drawing)


def asked_of(drawing: Drawing, settings: Settings, seed: int | None) -> Endings:
    """Return the endings to ask for of a drawing, from this seed if none was typed; what is not known is sent as 0."""
    known, image = known_cells(drawing, settings.mode, settings.levels), levels_of(drawing, settings.levels)
    request = Request(
        dataset=settings.dataset,
        image=(image * per_cell(known, image)).tolist(),
        observed=known.tolist(),
        num_samples=settings.num_samples,
        label=settings.label,
        temperature=settings.temperature,
        seed=seed if settings.seed is None else settings.seed,
    )
    return undrawn(request, settings.levels, settings.query, drawing_text(drawing))


def parse_seed(text: str) -> tuple[int | None, str]:
    """Return the seed that a person typed, None for an empty field or what is no seed; and what is wrong with that."""
    text = text.strip()
    if not text:
        return None, ""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) > MAX_SEED:
        return None, say("seed_wrong", most=MAX_SEED, text=text)
    return int(text), ""


def record(ending: Endings) -> str:
    """Return the endings as JSON. Its `request`, sent to /complete, gives the same `result` from the same model."""
    values = {
        "request": vars(ending.request) | {"seed": ending.seed},
        "result": {"completions": ending.images.tolist(), "log_probs": ending.log_probs},
        "model": ending.model,
    }
    return json.dumps(values, indent=1)


def version_of(model: Mapping[str, Any]) -> str:
    """Name the model that an answer comes from, and its version."""
    return say("version", name=model.get("name"), version=model.get("version"))


def nats(value: float) -> str:
    """Write a log-probability for people, with a real minus sign."""
    return f"{value:.1f} nats".replace("-", "\N{MINUS SIGN}")


def bits_per_dim(log_prob: float, num: int) -> str:
    """Write a log-probability in nats as bits per each of `num` dimensions."""
    return f"{abs(log_prob) / (num * math.log(2)):.3f} bits/dim"


def nll_of(served: ServedModel, nats: str = "nats") -> str | None:
    """Write a model's NLL on the test split in the unit of its levels, `nats` for two of them; None without a score."""
    key, digits, unit = ("test/bits_per_dim", 4, "bits/dim") if served.levels > 2 else ("test/nll_nats", 2, nats)
    return f"{served.scores[key]:.{digits}f} {unit}" if key in served.scores else None


def order_of(ending: Endings, order: str) -> list[int]:
    """Return the endings' indices in the order to show: "likely" or "rare" first, or as "drawn"."""
    found = list(range(len(ending.images)))
    if ending.log_probs is None or order == "drawn":
        return found
    return sorted(found, key=ending.log_probs.__getitem__, reverse=order == "likely")
