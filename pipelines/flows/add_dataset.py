"""The Prefect flow that makes a dataset of pictures on the machine of its worker."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from pipelines.datasets.own import Colour, Fit, Wishes, add, side_of
from pipelines.flows.shown import tag_run


@flow(name="add-dataset", persist_result=False, log_prints=True)
def add_dataset(
    name: str,
    images: str,
    side: str | None = None,
    colour: Colour | None = None,
    levels: Annotated[int | None, Field(ge=2, le=256)] = None,
    fit: Fit | None = None,
    minutes: Annotated[float, Field(ge=0.01)] = 4.0,
    labels: bool = True,
    flips: bool = False,
    skip_broken: bool = False,
) -> list[str]:
    """Add a dataset and the pair `gated_pixelcnn-NAME`, which `train-pair` then trains; return what was chosen.

    Args:
        images: where the pictures are, on the worker's machine.
        side: `28`, or `48x32` for width x height; what is None is chosen after a look at the pictures.
        minutes: of training.
        labels: whether sub-folders are labels.
        flips: whether a mirrored picture is one of the same kind.
        skip_broken: leave out pictures that cannot be read.

    Raises:
        ValueError: the name is taken or no name, or the pictures cannot be learned from.
    """
    tag_run(name)
    chosen = Wishes(
        side=side_of(side),
        colour=colour,
        levels=levels,
        fit=fit,
        flips=flips,
        labels=labels,
        skip_broken=skip_broken,
        minutes=minutes,
    )
    lines = add(name, Path(images), chosen)
    for line in lines:
        print(line)
    return lines
