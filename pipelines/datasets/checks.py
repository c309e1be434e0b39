"""A new version of a dataset beside the last one: what has changed too much stops the pipeline until confirmed."""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pipelines.datasets.entry import Frozen
from pipelines.files import atomic_write
from pixelcnn.data import DYNAMIC_PROTOCOL, SPLITS, Dataset, save_dataset

DATA_FOLDER, CHECKED_FOLDER, REPORTS_FOLDER = Path("data"), "checked", Path("reports/data")
_BINS = 16  # of the histogram of strengths


class CheckParams(Frozen):
    """How much a dataset may change from one version to the next."""

    images: float = Field(gt=0)  # how many more or fewer, as a share of what there was
    strengths: float = Field(gt=0, le=1)  # share of the sub-pixels that are elsewhere in the histogram of strengths
    labels: float = Field(gt=0, le=1)  # share of the images that are of another label
    mean_image: float = Field(gt=0, le=1)  # mean absolute difference, where black is 0 and white is 1


def summary_of(data: Dataset) -> dict[str, Any]:
    """Return what is compared of a dataset, JSON-ready: of the training images, but for the counts."""
    images, labels = data.images["train"], data.labels["train"]
    most = 255 if data.protocol == DYNAMIC_PROTOCOL else data.num_levels - 1
    # Images are read as bytes: to find the bin of each sub-pixel would copy them all, widened, several times, and
    # torch's mean would once.
    bins = (torch.arange(256) * (_BINS - 1) / most).round().long().clamp(max=_BINS - 1)
    histogram = torch.zeros(_BINS).long().index_add(0, bins, torch.bincount(images.flatten(), minlength=256))
    counts = torch.bincount(labels.clamp(min=0), minlength=len(data.label_names)).tolist()
    return {
        "images": {split: len(data.images[split]) for split in SPLITS},
        "image_shape": list(data.image_shape),
        "strengths": (histogram / histogram.sum()).tolist(),
        "labels": {name: counts[i] / len(labels) for i, name in enumerate(data.label_names)},
        "mean_image": (images.numpy().mean(axis=0, dtype=float) / most).flatten().tolist(),
    }


def changes(old: dict[str, Any], new: dict[str, Any], limits: CheckParams) -> list[tuple[str, str, bool]]:
    """Return what is compared, how it has changed, and whether that is beyond its limit."""
    before, now = (sum(summary["images"].values()) for summary in (old, new))
    found = [("images", f"{before} before, {now} now", abs(now - before) > limits.images * before)]
    if old["image_shape"] != new["image_shape"]:
        return [*found, ("image_shape", f"{old['image_shape']} before, {new['image_shape']} now", True)]

    def compare(what: str, difference: float, limit: float) -> None:
        found.append((what, f"differ by {difference:.3f}, the limit is {limit:g}", difference > limit))

    bins = zip(old["strengths"], new["strengths"], strict=True)
    compare("strengths", sum(abs(a - b) for a, b in bins) / 2, limits.strengths)
    names = old["labels"].keys() | new["labels"].keys()
    compare("labels", sum(abs(old["labels"].get(n, 0) - new["labels"].get(n, 0)) for n in names) / 2, limits.labels)
    pixels = list(zip(old["mean_image"], new["mean_image"], strict=True))
    compare("mean_image", sum(abs(a - b) for a, b in pixels) / len(pixels), limits.mean_image)
    return found


def save_checked(out: Path, data: Dataset, extra: dict[str, torch.Tensor], limits: CheckParams) -> None:
    """Write a prepared file, as `save_dataset` does; ValueError if it has changed beyond a limit since the last one."""
    last, new = _paths(out.parent, data.name)
    summary = summary_of(data)
    if last.exists():
        try:
            found = changes(json.loads(last.read_text()), summary, limits)
        except (ValueError, LookupError, TypeError):  # a power cut leaves files empty
            raise ValueError(
                f"{last}, with which {data.name} is compared, is damaged. Remove it to prepare without a comparison."
            ) from None
        rows = [f"| {what} | {text} | {'**beyond**' if beyond else 'within'} |" for what, text, beyond in found]
        head = f"# {data.name}: this version beside the last\n\n| what | change | limit |\n| --- | --- | --- |\n"
        atomic_write(REPORTS_FOLDER / f"{data.name}.md", head + "\n".join(rows) + "\n")
        if beyond := [f"{what} {text}" for what, text, is_beyond in found if is_beyond]:
            atomic_write(new, json.dumps(summary))
            raise ValueError(
                f"{data.name} has changed too much since it was prepared last: {'; '.join(beyond)} "
                f"({REPORTS_FOLDER / data.name}.md). If that is right: python -m pipelines.steps confirm {data.name}"
            )
    save_dataset(out, data, extra)
    atomic_write(last, json.dumps(summary))
    new.unlink(missing_ok=True)


def confirm(name: str) -> None:
    """Accept the version that was refused: it is what the next one is compared with. ValueError if none was."""
    last, new = _paths(DATA_FOLDER, name)
    if not new.exists():
        raise ValueError(f"no version of {name} waits to be confirmed.")
    new.replace(last)


def forget(name: str) -> None:
    """Remove what was prepared of a dataset, its sheet, and all that was kept for comparison."""
    reports = (REPORTS_FOLDER / f"{name}{suffix}" for suffix in (".md", ".png"))
    for path in (DATA_FOLDER / f"{name}.safetensors", *_paths(DATA_FOLDER, name), *reports):
        path.unlink(missing_ok=True)


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / CHECKED_FOLDER / f"{name}.json", folder / CHECKED_FOLDER / f"{name}.refused.json"
