"""What is chosen on the page to draw on, and what follows from it for a drawing. Arrays alone."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from app.canvas.drawing import Drawing, drawing_text, known_cells, levels_of, per_cell
from app.canvas.endings import Endings, Request
from app.client import ServedModel


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
    label: int | None
    temperature: float
    seed: int | None  # None where none is typed
    trouble: str  # what is wrong with the seed that was typed
    painting: bool  # images are in colour
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
            "label": str(-1 if self.label is None else self.label),
            "temperature": str(self.temperature),
            "n": str(self.num_samples),
        }


def sent_of(drawing: Drawing, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Return what of a drawing is sent: levels, 0 where unknown, and (H, W) known cells."""
    known = known_cells(drawing, settings.mode, settings.levels)
    image = levels_of(drawing, settings.levels)
    return image * per_cell(known, image), known


def request_of(image: np.ndarray, known: np.ndarray, settings: Settings, seed: int) -> Request:
    """Return the request for endings of what is sent of a drawing.

    Args:
        seed: for who has typed none.
    """
    return Request(
        dataset=settings.dataset,
        image=image.tolist(),
        observed=known.tolist(),
        num_samples=settings.num_samples,
        label=settings.label,
        temperature=settings.temperature,
        seed=seed if settings.seed is None else settings.seed,
    )


def made_of(drawing: Drawing, settings: Settings) -> Callable[[Endings], Endings]:
    """Return what makes endings know what their request was made of."""
    return functools.partial(replace, settings=settings.query, drawing=drawing_text(drawing))
