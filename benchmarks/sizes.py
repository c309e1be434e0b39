"""Short trainings compared at equal time: `python -m benchmarks.sizes` measures docs/sizes.yaml, writes docs/sizes.md.

A setting is worth its place in params.yaml if it scores best on validation after the same minutes on the same machine.
Short runs favour small networks and small batches: what they say holds for the minutes that there are. Context networks
are left out unless a row names one: they share the training with what is compared here, whole images' likelihood.
"""

import argparse
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from pipelines.errors import run
from pipelines.files import atomic_write
from pipelines.params import PairParams, load_params
from pixelcnn.config import checked_config
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.evaluation import format_nll
from pixelcnn.models.registry import build_model
from pixelcnn.sampling.fast import warm_up
from pixelcnn.training import StepReport, TrainConfig, fit

VARIANTS_FILE = Path("docs/sizes.yaml")
TABLE_FILE = Path("docs/sizes.md")


def load_variants(path: Path) -> dict[str, Any]:
    """Read what to compare: `minutes` and `num_images` of each run, and by pair a list of changed settings.

    Raises:
        ValueError: the file is missing or no such mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
        minutes, num_images, pairs = float(values["minutes"]), int(values["num_images"]), dict(values["pairs"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must hold minutes, num_images and pairs ({error}).") from None
    return {"minutes": minutes, "num_images": num_images, "pairs": pairs}


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
    torch.set_num_threads(settings.num_threads or torch.get_num_threads())
    torch.manual_seed(train.seed)
    model = build_model(checked_config(type(settings.network), network, where=pair))
    # The average looks back over a tenth of the run at most: these runs are short.
    train = replace(train, ema_decay=min(train.ema_decay, 0.99))
    warm_up(model)
    last: deque[StepReport] = deque(maxlen=1)
    nll = fit(model, data, train, last.append)
    num = sum(p.numel() for p in model.parameters())
    words = [f"{key} {value}" for part in changes.values() for key, value in part.items()]
    score = format_nll(nll, data.image_shape, data.num_levels)
    seen = last[0].step * train.batch_size
    return f"| {', '.join(words) or 'as in params.yaml'} | {num:,} | {last[0].images_per_s:.0f} | {seen:,} | {score} |"


def compare(path: Path = VARIANTS_FILE, out: Path = TABLE_FILE, pairs: Sequence[str] = ()) -> None:
    """Measure every variant, one after another, and write the tables; a row is printed as soon as it is known.

    Those of other pairs than `pairs`, if some are named, stay as they are.
    """
    variants = load_variants(path)
    before = out.read_text() if out.exists() else ""
    measured = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", before, re.MULTILINE | re.DOTALL))
    lines = [
        "# Sizes and settings, compared at equal time",
        "",
        f"Each row is one training of {variants['minutes']:g} minutes, from the settings of `params.yaml` with the "
        "changes named; but `ema_decay` is 0.99 at most, and `head_features`, context, completer and label networks "
        f"are left out unless named. Scored on the first {variants['num_images']} validation images. Measured by "
        f"`python -m benchmarks.sizes` from `{path}`, one run after another.",
        "",
    ]
    if "\n".join(lines) not in before:
        measured = {}  # in another way
    for pair, changed in variants["pairs"].items():
        if pairs and pair not in pairs:
            lines += [f"## {pair}\n{measured[pair]}".rstrip(), ""] if pair in measured else []
            continue
        lines += [f"## {pair}", "", "| changed | parameters | images/s | images seen | validation NLL |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        settings = load_params().pair(pair)
        data = load_dataset(Path("data") / f"{settings.dataset}.safetensors")
        for changes in changed:
            lines.append(measure(pair, settings, data, changes or {}, variants["minutes"], variants["num_images"]))
            print(pair, lines[-1], flush=True)
        lines.append("")
    atomic_write(out, "\n".join(lines))
    print(f"wrote {out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; a mistake is one sentence and exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=compare.__doc__)
    parser.add_argument("pairs", nargs="*", help="those of docs/sizes.yaml if left out")
    parser.add_argument("--variants", type=Path, default=VARIANTS_FILE)
    parser.add_argument("--out", type=Path, default=TABLE_FILE)
    arguments = parser.parse_args(argv)
    return run("sizes", lambda: compare(arguments.variants, arguments.out, arguments.pairs))


if __name__ == "__main__":
    sys.exit(main())
