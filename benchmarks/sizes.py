"""Short trainings compared at equal time: `python -m benchmarks.sizes` measures docs/sizes.yaml, writes docs/sizes.md.

A setting is worth its place in params.yaml if it scores best on validation after the same minutes on the same machine.
Short runs favour small networks and small batches: what they say holds for the minutes that there are. Context networks
are left out unless a row names one: they share the training with what is compared here, whole images' likelihood.
"""

import re
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from typer import Argument

from benchmarks.command import command
from pipelines.files import atomic_write
from pipelines.params import PairParams, load_params
from pipelines.stages.train import load, set_torch_threads
from pixelcnn.config import checked_config
from pixelcnn.data import Dataset
from pixelcnn.evaluation import format_nll
from pixelcnn.models.registry import build_model
from pixelcnn.training import StepReport, TrainConfig, fit

VARIANTS_FILE = Path("docs/sizes.yaml")
TABLE_FILE = Path("docs/sizes.md")


def load_variants(path: Path) -> tuple[float, int, dict[str, Any]]:
    """Return what to compare: `minutes` and `num_images` of each run, and by pair a list of changed settings."""
    try:
        values = yaml.safe_load(path.read_text())
        return float(values["minutes"]), int(values["num_images"]), dict(values["pairs"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold minutes, num_images and pairs ({error}).") from None


def measure(
    pair: str, settings: PairParams, data: Dataset, changes: dict[str, Any], minutes: float, num_images: int
) -> str:
    """Train a pair with changed settings for some minutes; return its row of the table.

    Args:
        changes: of `network` and `train` in params.yaml; the minutes and the validations are set here.
        num_images: validation images that are scored, at the end.
    """
    unknown = set(changes) - {"network", "train"}
    if unknown:
        raise ValueError(f"{VARIANTS_FILE}: {pair}: unknown key {sorted(unknown)[0]!r}. Known: network, train.")
    network = {**vars(settings.network.without_context()), "head_features": 0, **changes.get("network", {})}
    fixed = {"max_minutes": minutes, "num_validations": 1, "num_validation_images": num_images}
    train = checked_config(TrainConfig, {**vars(settings.train), **changes.get("train", {}), **fixed}, where=pair)
    set_torch_threads(settings)
    torch.manual_seed(train.seed)
    model = build_model(checked_config(type(settings.network), network, where=pair))
    # The average looks back over a tenth of the run at most: these runs are short.
    train = replace(train, ema_decay=min(train.ema_decay, 0.99))
    last: deque[StepReport] = deque(maxlen=1)
    fit(model, data, train, last.append)
    nll = last[0].validation_nll_nats  # of whole images; what `fit` returns has missing parts in it, too
    assert nll is not None
    num = sum(p.numel() for p in model.parameters())
    words = [f"{key} {value}" for part in changes.values() for key, value in part.items()]
    score = format_nll(nll, data.image_shape, data.num_levels)
    seen = last[0].step * train.batch_size
    return f"| {', '.join(words) or 'as in params.yaml'} | {num:,} | {last[0].images_per_s:.0f} | {seen:,} | {score} |"


def compare(
    pairs: Annotated[list[str] | None, Argument()] = None, variants: Path = VARIANTS_FILE, out: Path = TABLE_FILE
) -> None:
    """Measure every variant, one after another, and write the tables; a row is printed as soon as it is known.

    Those of other pairs than PAIRS, if some are named, stay as they are.
    """
    minutes, num_images, compared = load_variants(variants)
    if unknown := set(pairs or []) - set(compared):
        raise ValueError(f"{variants} has no pair {min(unknown)!r}, only {', '.join(compared)}.")
    before = out.read_text() if out.exists() else ""
    measured = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", before, re.MULTILINE | re.DOTALL))
    lines = [
        "# Sizes and settings, compared at equal time",
        "",
        f"Each row is one training of {minutes:g} minutes, from the settings of `params.yaml` with the "
        "changes named; but `ema_decay` is 0.99 at most, and `head_features`, context, completer and label networks "
        f"are left out unless named. Scored on the first {num_images} validation images. Measured by "
        f"`python -m benchmarks.sizes` from `{variants}`, one run after another.",
        "",
    ]
    if "\n".join(lines) not in before:
        measured = {}  # in another way
    for pair, changed in compared.items():
        if pairs and pair not in pairs:
            lines += [f"## {pair}\n{measured[pair]}".rstrip(), ""] if pair in measured else []
            continue
        lines += [f"## {pair}", "", "| changed | parameters | images/s | images seen | validation NLL |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        settings = load_params().pair(pair)
        data = load(settings.dataset)
        for changes in changed:
            lines.append(measure(pair, settings, data, changes or {}, minutes, num_images))
            print(pair, lines[-1], flush=True)
        lines.append("")
    atomic_write(out, "\n".join(lines))
    print(f"wrote {out}")


if __name__ == "__main__":
    sys.exit(command(compare))
