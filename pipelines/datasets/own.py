"""Datasets of one's own: look at pictures, choose how to learn them, write an entry into own/params.yaml; undo it."""

import io
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from pipelines.datasets.checks import DATA_FOLDER, REPORTS_FOLDER, forget
from pipelines.datasets.entry import MAX_SIDE, NAME, NAMES, OFFICIAL, DatasetParams, Source
from pipelines.datasets.pictures import FORMATS, MIN_PICTURE, Left, fixed_levels, load_pictures, read_pictures
from pipelines.datasets.prepare import write
from pipelines.files import atomic_write, file_lock, read_lock
from pipelines.params import EXPERIMENTS, OWN_FILE, PARAMS_FILE, load_params, repro_command
from pixelcnn.data import BYTES_PROTOCOL, SPLITS, Dataset
from pixelcnn.images import to_sheet

LOCK_FILE = Path("own/dvc.lock")
CHANGES_LOCK = Path("own/.changes.lock")  # of who adds or removes a dataset: each reads and writes the same files
MODEL = "gated_pixelcnn"  # of the pair that comes with a dataset
MIN_PICTURES, MIN_OF_LABEL = 20, 3
MAX_LABEL = 60  # characters
LARGE_SIDE = {"binary": 28, "grey": 32, "rgb": 32}  # of pictures that are too large to be learned as they are
MAX_FEW = 32  # as many different values are levels of their own
MANY = 16  # levels of colours and greys that are more than a few
MAX_LOST = 0.05  # share of pictures: for so few that are blank on white, those on paper get no black bars
MIXTURE_LEVELS = 64  # more of them are neighbours on a scale: a mixture of logistics learns them faster

logger = logging.getLogger(__name__)

Colour = Literal["binary", "grey", "rgb"]
Fit = Literal["crop", "pad", "stretch"]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a person wants of a dataset; None is chosen after a look at the pictures."""

    side: tuple[int, int] | None = None  # (height, width)
    colour: Colour | None = None
    levels: int | None = None
    fit: Fit | None = None
    flips: bool = False
    labels: bool = True
    skip_broken: bool = False
    minutes: float = 4.0  # of training


@dataclass
class Look:
    """What there is to see in pictures, whatever their size, laid on a ground where they are transparent."""

    ground: str
    left: Left
    sizes: Counter[tuple[int, int]]  # (height, width)
    labels: Counter[str]
    values: set[int] = field(default_factory=set)  # grey values
    num_values: int = 0  # of each picture, summed: how much is seen
    num_coloured: int = 0
    num_two_valued: int = 0  # nearly black and nearly white alone
    num_light: int = 0  # with a light border
    num_blank: int = 0  # hardly anything to be seen
    lost: float = 0.0  # share of the pictures that are blank on white alone

    @property
    def num(self) -> int:
        return self.sizes.total()

    def add(self, image: Image.Image) -> None:
        """Take note of a picture that is grey or RGB."""
        grey = np.asarray(image.convert("L"))
        if image.mode == "RGB":
            pixels = np.asarray(image).astype(np.int16)
            self.num_coloured += bool((np.ptp(pixels, axis=2) > 24).mean() > 0.01)
        values = np.unique(grey).tolist()
        self.values.update(values)
        self.num_values += len(values)
        self.num_two_valued += bool(((grey < 48) | (grey > 207)).mean() > 0.85)
        border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
        self.num_light += bool(border.mean() > 127)
        self.num_blank += bool(np.ptp(grey) < 48)


def look_at(source: Source, wishes: Wishes) -> Look:
    """Look at every picture of a source once, on the ground where more is seen: black ink is seen on white alone.

    ValueError if there is too little to learn from, a picture is broken and not to be left out, or labels are odd.
    """
    left, sizes, labels = Left(), Counter[tuple[int, int]](), Counter[str]()
    grounds = ("black", "white") if source.kind == "folder" else ("black",)  # files alone have transparency
    looks = [Look(ground, left, sizes, labels) for ground in grounds]
    for picture in read_pictures(source, wishes.labels, left):
        sizes[picture.image.height, picture.image.width] += 1
        if wishes.labels and picture.label is not None:
            labels[picture.label] += 1
        picture.image.thumbnail((2 * MAX_SIDE, 2 * MAX_SIDE), Image.Resampling.NEAREST)
        for look in looks:
            look.add(picture.on(look.ground))
    look = max(looks, key=lambda look: look.num_values)
    if not wishes.skip_broken:
        left.check()
    if look.num < MIN_PICTURES:
        others = f" ({left.num_others} files of other kinds)" if left.num_others else ""
        raise ValueError(
            f"{source.path} holds {look.num or 'no'} picture{'s' if look.num != 1 else ''}{others}: at least "
            f"{MIN_PICTURES} are needed, PNG, JPEG, WebP or BMP; some hundreds make sense."
        )
    look.lost = (looks[-1].num_blank - look.num_blank) / look.num
    if labels and (unlabelled := look.num - labels.total()):  # IDX files, of which one part has them
        raise ValueError(f"{source.path}: {unlabelled} pictures have no label. Add theirs, or say --no-labels.")
    folded: dict[str, str] = {}
    for label, num in sorted(labels.items()):
        # Folders: one file system keeps both, another mixes them. Arrays name theirs on purpose: letters A and a.
        if source.kind == "folder" and folded.setdefault(label.casefold(), label) != label:
            raise ValueError(f"labels {folded[label.casefold()]!r} and {label!r} differ by case alone: rename one.")
        if not (label.isprintable() and 0 < len(label) <= MAX_LABEL):
            raise ValueError(f"label {label[:MAX_LABEL]!a} must be 1 to {MAX_LABEL} printable characters: rename it.")
        if num < MIN_OF_LABEL:
            raise ValueError(
                f"label {label!r} has {num} picture{'s' if num > 1 else ''}: a label needs {MIN_OF_LABEL}. Give it "
                "more, merge it, or leave labels out: --no-labels."
            )
    return look


def choose(source: Source, look: Look, wishes: Wishes) -> DatasetParams:
    """Choose how to learn pictures. How many are set aside is not known before they are compared: 1 for now."""
    colour = wishes.colour
    if colour is None:
        is_binary = look.num_two_valued > 0.9 * look.num and wishes.levels in (None, 2)
        few_greys = len(look.values) in range(3, 9)  # sprites of four greys are no ink
        colour = "rgb" if look.num_coloured > 0.02 * look.num else "binary" if is_binary and not few_greys else "grey"
    ((size, most),) = look.sizes.most_common(1)
    side = wishes.side
    if side is None:
        whole = max(size) <= MAX_SIDE and most >= 0.5 * look.num
        side = size if whole else (LARGE_SIDE[colour],) * 2
    levels = 2 if colour == "binary" else wishes.levels or (_few_levels(look.values) if colour == "grey" else MANY)
    if colour == "binary" and wishes.levels not in (None, 2):
        raise ValueError(f"binary pictures have 2 levels, got {wishes.levels}. Omit --levels, or say --colour grey.")
    light = look.num_light > 0.5 * look.num
    protocol = "threshold" if levels == 2 else BYTES_PROTOCOL if levels == 256 else "quantized"
    entry = {
        "source": source.model_dump(),
        "image_shape": [3 if colour == "rgb" else 1, *side],
        "num_levels": levels,
        "protocol": protocol,
        "label_names": sorted(look.labels),
        "num_validation": 1,
        "fit": wishes.fit or "pad",
        "ground": "white" if light and look.lost < MAX_LOST else look.ground,
        "invert": levels == 2 and colour != "rgb" and light,
        "flips": wishes.flips,
        "skip_broken": wishes.skip_broken,
    }
    return DatasetParams.model_validate(entry)


def _few_levels(values: set[int]) -> int:
    """Return the least number of evenly spaced levels that keeps all grey values apart, or `MANY`."""
    apart = (k for k in range(3, MAX_FEW + 1) if len({round(v * (k - 1) / 255) for v in values}) == len(values))
    return next(apart, MANY)


def side_of(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) of `28`, or of `48x32`, which is width x height; None for none. ValueError for another."""
    if not text:
        return None
    numbers = text.lower().split("x")
    if len(numbers) > 2 or not all(n.isdecimal() and MIN_PICTURE <= int(n) <= MAX_SIDE for n in numbers):
        raise ValueError(f"a side is {MIN_PICTURE} to {MAX_SIDE} pixels, such as 28, or 48x32, got {text!r}.")
    return int(numbers[-1]), int(numbers[0])


def pair_for(name: str, spec: DatasetParams, minutes: float) -> dict[str, Any]:
    """Return the pair that suits a dataset: a network of its size, trained for some minutes."""
    small = max(spec.image_shape[1:]) <= 16
    network: dict[str, Any] = {"num_features": 24 if spec.num_levels == 2 else 36, "num_layers": 6}
    network |= {"kernel_size": 3 if small else 5, "context_features": 16}  # endings see the whole drawing
    if spec.num_levels == 2 and not small:  # 28 x 28 letters, 100 s each: 45.63 nats instead of 46.28
        network["max_dilation"] = 4
    if spec.num_levels > MIXTURE_LEVELS:
        network |= {"output": "logistic_mixture", "num_mixtures": 5}
    # 32 x 32 icons in colour, three minutes each: 0.98 bits/dim by batches of 16, 0.73 by batches of 4. Of small images
    # so few take as long as more.
    batch_size = 16 if small or spec.num_levels == 2 else 4
    train = {
        **{"batch_size": batch_size, "optimizer": "muon", "learning_rate": 0.003},
        **{"max_epochs": 200, "max_minutes": minutes, "decay_fraction": 0.5},
        **{"horizontal_flips": spec.flips, "precision": "auto", "ema_decay": 0.98},
        # A slow machine makes some hundred steps: an average over more, or a longer warm-up, would be most of the run.
        **{"warmup_steps": 20, "context_share": 0.7, "num_validations": 8, "num_validation_images": 300},
    }
    return {"model": MODEL, "dataset": name, "num_threads": 1, "network": network, "train": train}


def source_of(images: Path) -> Source:
    """Return the source that a path is; ValueError if it does not exist, or is of no known kind."""
    try:
        path, here = images.expanduser().resolve(), Path.cwd().resolve()
    except RuntimeError as error:  # a ~user whom nobody knows, a link to itself
        raise ValueError(f"{images} names no folder ({error}).") from None
    if not path.exists():
        raise ValueError(f"{images} does not exist. Name a folder of pictures, or a .npy or .npz file.")
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise ValueError(f"{images} may not be read: change its permissions.")
    if path == here or path in here.parents:
        raise ValueError(f"{images} holds the project itself. Put the pictures into a folder of their own.")
    if path.is_file() and path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{images} is no folder, and no .npy or .npz file.")
    kind = "arrays" if path.is_file() else "folder"
    if any(path.glob("train-images-idx3-ubyte*")):
        kind = "idx"
    elif any(path.glob("*.bin")) and not any(file.suffix.lower() in FORMATS for file in path.rglob("*")):
        kind = "cifar"  # beside pictures a .bin may be anything
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return Source.model_validate({"kind": kind, "path": str(shown)})


def add(name: str, images: Path, wishes: Wishes, keep: bool = False) -> list[str]:
    """Add a dataset and a pair that suits it, and prepare it; return what was found and chosen, in lines of text.

    With `keep` one that has this name and the same pictures is left as it is. Whatever fails, nothing stays behind.
    ValueError if the name is taken or no name, or the pictures cannot be learned from.
    """
    with file_lock(CHANGES_LOCK, f"adding {name}", logger.warning):
        params = load_params()
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a dataset: {NAMES}.")
        if name in EXPERIMENTS:
            raise ValueError(f"{name!r} is an experiment of MLflow's that holds no trainings: choose another name.")
        source = source_of(images)
        if keep and name in params.datasets and params.datasets[name].source == source:
            return [f"{name} is there already, with its entry in {OWN_FILE}; remove it to choose anew"]
        if name in params.datasets:
            how = "choose another name" if name in OFFICIAL else "remove it first, or choose another name"
            raise ValueError(f"there is a dataset {name!r} already: {how}.")
        look = look_at(source, wishes)
        spec = choose(source, look, wishes)
        found, twice = load_pictures(spec)
        num = len(found["train"][0]) if "train" in found else 0
        height, width = spec.image_shape[1:]
        if num and found["train"][0].min() == found["train"][0].max():
            darkest, brightest = min(look.values), max(look.values)
            why = f"for strengths are from {darkest} to {brightest} of 255. Scale them, or save arrays as bool or as "
            why += "floats from 0 to 1"
            if len(fixed_levels(torch.tensor([darkest, brightest], dtype=torch.uint8), spec).unique()) > 1:
                why = f"once it is {width} x {height}: its lines are too thin. Say a larger --side, or more --levels"
            raise ValueError(f"{images}: with {spec.num_levels} levels every picture is blank, {why}.")
        if num < MIN_PICTURES:
            alike = f" {twice} others are like them once they are {width} x {height} with {spec.num_levels} levels."
            raise ValueError(
                f"{images} holds {num} different pictures to learn from: at least {MIN_PICTURES} are needed."
                f"{alike if twice else ''}"
            )
        spec = spec.model_copy(update={"num_validation": min(max(num // 10, 2), 5000)})
        pair, sheet, own = f"{MODEL}-{name}", REPORTS_FOLDER / f"{name}.png", Path(OWN_FILE)
        before = own.read_text() if own.exists() else None
        try:
            entry = spec.model_dump(mode="json", exclude_defaults=True)  # without what is as everywhere
            _edit({"datasets": {name: entry}, "pairs": {pair: pair_for(name, spec, wishes.minutes)}})
            forget(name)  # of an earlier one of this name
            out = DATA_FOLDER / f"{name}.safetensors"
            data = write(name, load_params().dataset(name), found, out, params.data, params.checks)
            sheet.parent.mkdir(parents=True, exist_ok=True)
            to_sheet(data.levels("train", slice(0, 64)), data.num_levels, 8).save(sheet)
            _record(name)
        except BaseException:
            forget(name)
            if before is None:
                own.unlink(missing_ok=True)
            else:
                atomic_write(own, before)
            raise
        return [*summary(look, spec, data, twice), f"as it is learned: {sheet}", f"entry: {OWN_FILE}, also of {pair}"]


def own_pairs(name: str) -> list[str]:
    """Return a dataset's pairs in own/params.yaml.

    ValueError if it is none of the datasets that somebody added, or params.yaml names it, too.
    """
    params, own = load_params(), _own()
    if name not in (own.get("datasets") or {}):
        params.dataset(name)
        raise ValueError(f"{name!r} stands in {PARAMS_FILE}, not in {OWN_FILE}: it belongs to the project.")
    pairs = params.pairs_of(name)
    used = [f"pairs.{pair}" for pair in pairs if pair not in (own.get("pairs") or {})]
    used += ["evaluate"] if name in params.evaluate.datasets else []
    if used:
        raise ValueError(f"{PARAMS_FILE} still names {name!r}, in {' and '.join(used)}: take that out first.")
    return pairs


def remove(name: str) -> list[str]:
    """Take a dataset and its pairs out again, with what was prepared; return what was removed, and what stays.

    ValueError, and all stays, as `own_pairs` says, or if own/dvc.lock cannot be read.
    """
    with file_lock(CHANGES_LOCK, f"removing {name}", logger.warning):
        pairs = own_pairs(name)
        lock = read_lock(LOCK_FILE)
        _edit({"datasets": {name: None}, "pairs": dict.fromkeys(pairs)})
        if lock:  # or data of another dataset of this name would not be those that DVC recorded
            gone = {f"prepare@{name}", *(f"{stage}@{pair}" for stage in ("train", "evaluate") for pair in pairs)}
            lock["stages"] = {stage: told for stage, told in lock.get("stages", {}).items() if stage not in gone}
            _write_yaml(LOCK_FILE, lock)
        forget(name)
    kept = [folder for pair in pairs for folder in (Path("trained", pair), Path("models", pair)) if folder.exists()]
    stays = f"what was trained stays: {', '.join(map(str, kept))}" if kept else "nothing was trained on it"
    return [f"removed {name} and {', '.join(pairs) or 'no pair'} from {OWN_FILE}; its pictures are untouched, {stays}"]


def _own() -> CommentedMap:
    """Read own/params.yaml to be edited; ValueError where a key is there twice: `load_params` takes the last."""
    tool, path = YAML(), Path(OWN_FILE)
    tool.preserve_quotes = True
    try:
        return (tool.load(path.read_text()) if path.exists() else None) or CommentedMap()
    except MarkedYAMLError as error:
        what = str(error.problem).partition(" with value")[0]  # of a key: not both of its values
        raise ValueError(f"{path} cannot be edited, line {error.problem_mark.line + 1}: {what}.") from None


def _edit(changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Set entries of own/params.yaml, or take out those that are None; comments and order stay."""
    values = _own()
    for section, entries in _styled(changes).items():
        if values.get(section) is None:
            values[section] = CommentedMap()
        values[section].fa.set_block_style()
        for name, told in entries.items():
            if told is None:
                del values[section][name]
            else:
                values[section][name] = told
    _write_yaml(Path(OWN_FILE), values)


def _write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write YAML 1.2, as DVC reads it: 1.1 would take `1e5` for a text, and leave it without quotes."""
    tool, buffer = YAML(), io.StringIO()
    tool.width = 120
    tool.dump(values, buffer)
    atomic_write(path, buffer.getvalue())


def _styled(told: Any) -> Any:
    """Return what is written in one line where it is short, and so that `load_params` reads the same."""
    if isinstance(told, str):  # which may be another, or none, in its YAML 1.1: `no`, `on`, `1:30`
        is_plain = yaml.safe_dump([told], default_flow_style=True, allow_unicode=True) == f"[{told}]\n"
        return told if is_plain else DoubleQuotedScalarString(told)
    styled: CommentedMap | CommentedSeq
    if isinstance(told, Mapping):
        styled = CommentedMap((_styled(key), _styled(value)) for key, value in told.items())
    elif isinstance(told, list):
        styled = CommentedSeq(map(_styled, told))
    else:
        return told
    if len(str(told)) < 90:
        styled.fa.set_flow_style()
    return styled


def _record(name: str) -> None:
    """Let DVC know that the dataset is prepared from the pictures of now, where DVC is used."""
    if not Path(".dvc").is_dir():
        return
    stage, environment, here = repro_command("prepare", name).split()[-1], dict(os.environ), Path.cwd()
    words = [sys.executable, "-m", "dvc", "commit", "--force", stage]  # --quiet would hide the reason of a failure
    with tempfile.TemporaryDirectory() as folder:
        gits = [place / ".git" for place in (here, *here.parents)]
        if not any(git.is_file() or (git / "HEAD").exists() for git in gits):  # in a container, say
            Path(folder, "config").write_text("[core]\n    no_scm = true\n")
            environment["DVC_SYSTEM_CONFIG_DIR"] = folder
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
        raise ValueError(f"DVC could not record {stage}: {(errors or said[-1:])[0]}")


def summary(look: Look, spec: DatasetParams, data: Dataset, twice: int) -> list[str]:
    """Return what was found, and what was chosen, in lines of text."""
    channels, height, width = spec.image_shape
    commonest = look.sizes.most_common(4)
    sizes = ", ".join(f"{num} of {w} x {h}" for (h, w), num in commonest)
    others = look.num - sum(num for _, num in commonest)
    labels = ", ".join(f"{label} ({num})" for label, num in sorted(look.labels.items())[:12])
    colour = "RGB" if channels == 3 else "binary" if spec.num_levels == 2 else "grey"
    counts = ", ".join(f"{len(data.images[split])} {split}" for split in SPLITS)
    return [
        f"found: {look.num} pictures, {look.left.num_others} other files",
        f"sizes: {sizes}" + (f", {others} of others" if others else ""),
        f"labels: {len(look.labels) or 'none'}" + (f": {labels}{', ...' * (len(look.labels) > 12)}" * bool(labels)),
        f"exact duplicates: {twice}, each taken once; near ones: at least {num_near(data)}, kept",
        *([f"left out, broken: {len(look.left.broken)}, e.g. {look.left.broken[0]}"] if look.left.broken else []),
        f"learned as: {width} x {height}, {colour}, {spec.num_levels} levels ({spec.protocol}), fitted by {spec.fit} "
        f"on {spec.ground}{', inverted: ink is dark' if spec.invert else ''}; {counts}",
    ]


def num_near(data: Dataset) -> int:
    """Count the training images that look like an earlier one: the same means of 8 x 8 fields, roughly."""
    images = data.images["train"]
    most = max(float(images.max()), 1.0)
    means = torch.cat([F.adaptive_avg_pool2d(some.float() / most, 8) for some in images.split(1024)])
    fields = (means * 8).round().to(torch.uint8).flatten(1)
    return len(fields) - len(np.unique(fields.numpy(), axis=0))
