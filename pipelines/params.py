"""params.yaml as checked dataclasses: the only place of values, and the table of what is known of each dataset."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from pixelcnn.config import CONFIG_CLASSES, ModelConfig, checked_config
from pixelcnn.data import BYTES_PROTOCOL, DYNAMIC_PROTOCOL
from pixelcnn.training import TrainConfig

PARAMS_FILE = "params.yaml"


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What is known of a dataset before its file is read.

    Args:
        image_shape: (C, H, W).
        num_levels: K.
        protocol: what one pixel of validation and test is.
        label_names: one per class, in order.
        num_validation: images set aside from the official training set for validation.
    """

    image_shape: tuple[int, int, int]
    num_levels: int
    protocol: str
    label_names: tuple[str, ...]
    num_validation: int


_DIGITS = tuple("0123456789")
_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DATASETS = {
    "mnist5k": DatasetSpec(
        image_shape=(1, 28, 28), num_levels=2, protocol=DYNAMIC_PROTOCOL, label_names=_DIGITS, num_validation=500
    ),
    "mnist": DatasetSpec(
        image_shape=(1, 28, 28), num_levels=2, protocol=DYNAMIC_PROTOCOL, label_names=_DIGITS, num_validation=5000
    ),
    "fashion_mnist": DatasetSpec(
        image_shape=(1, 28, 28), num_levels=256, protocol=BYTES_PROTOCOL, label_names=_CLOTHES, num_validation=5000
    ),
    "cifar10": DatasetSpec(
        image_shape=(3, 32, 32), num_levels=256, protocol=BYTES_PROTOCOL, label_names=_OBJECTS, num_validation=5000
    ),
}


def check_dataset(name: str) -> DatasetSpec:
    """Return what is known of a dataset.

    Raises:
        ValueError: no dataset has this name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}. Known: {', '.join(DATASETS)}.")
    return DATASETS[name]


def _check_number(name: str, value: Any, kind: type, least: float, most: float) -> None:
    kinds = (int,) if kind is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
        word = "whole number" if kind is int else "number"
        raise ValueError(f"{name} must be a {word} from {least} to {most}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class DataParams:
    """How datasets are split and binarised.

    Args:
        split_seed: of the permutation that sets validation images aside.
        binarization_seed: of the fixed Bernoulli sample of validation and test images.
    """

    split_seed: int
    binarization_seed: int

    def __post_init__(self) -> None:
        for name in ("split_seed", "binarization_seed"):
            _check_number(name, getattr(self, name), int, 0, 2**32 - 1)


@dataclass(frozen=True, kw_only=True)
class PairParams:
    """One model/dataset pair.

    Args:
        model, dataset: their names.
        num_threads: CPU threads of training and evaluation; 0 for torch's own choice. Small networks are faster with
            one, above all on a busy machine, and the number changes rounding.
        network: with what the dataset fixes filled in.
        train: how to train it, without its completer.
        completer: how to train the completer, if `network` has one.
        completion_images: test images whose completion is scored, six masks each; 0 for all.
    """

    model: str
    dataset: str
    num_threads: int
    network: ModelConfig
    train: TrainConfig
    completer: TrainConfig | None = None
    completion_images: int = 0


@dataclass(frozen=True, kw_only=True)
class EvaluateParams:
    """How models are scored.

    Args:
        batch_size: images per forward pass; it does not change the scores.
        num_images: the first so many images of each split; 0 for all.
    """

    batch_size: int
    num_images: int

    def __post_init__(self) -> None:
        _check_number("batch_size", self.batch_size, int, 1, 100_000)
        _check_number("num_images", self.num_images, int, 0, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class SampleParams:
    """The sheet of samples that each training run draws.

    Args:
        num_images: samples on the sheet.
        num_columns: samples per row.
        num_completions: completions of each test image on the sheet of completions.
        seed: of the noise.
        temperature: divides the logits.
    """

    num_images: int
    num_columns: int
    num_completions: int
    seed: int
    temperature: float

    def __post_init__(self) -> None:
        _check_number("num_images", self.num_images, int, 1, 1000)
        _check_number("num_columns", self.num_columns, int, 1, 100)
        _check_number("num_completions", self.num_completions, int, 1, 100)
        _check_number("seed", self.seed, int, 0, 2**63 - 1)
        _check_number("temperature", self.temperature, float, 0, 100)


@dataclass(frozen=True, kw_only=True)
class PromoteParams:
    """When a challenger takes the champion's place.

    Args:
        confidence: of the interval of the paired per-image difference in validation NLL, which must lie below zero.
        batch_size: images per forward pass; it does not change the decision.
        max_sample_s: seconds that a challenger may take to sample one image.
    """

    confidence: float
    batch_size: int
    max_sample_s: float

    def __post_init__(self) -> None:
        _check_number("confidence", self.confidence, float, 0.5, 0.9999)
        _check_number("batch_size", self.batch_size, int, 1, 100_000)
        _check_number("max_sample_s", self.max_sample_s, float, 0, 86_400)


@dataclass(frozen=True, kw_only=True)
class Params:
    """Everything in params.yaml.

    Args:
        default_targets: the stages that `dvc repro` runs when it is given none.
        data, evaluate, sample, promote: see their classes.
        pairs: by name, `MODEL-DATASET`.
        candidates: by dataset, the one or two pairs whose training `dvc repro promote@DATASET` waits for.
    """

    default_targets: list[str]
    data: DataParams
    pairs: dict[str, PairParams]
    candidates: dict[str, list[str]]
    evaluate: EvaluateParams
    sample: SampleParams
    promote: PromoteParams

    def pair(self, name: str) -> PairParams:
        """Return a pair by its name.

        Raises:
            ValueError: params.yaml has no such pair.
        """
        if name not in self.pairs:
            raise ValueError(f"unknown pair {name!r}. Known pairs in {PARAMS_FILE}: {', '.join(self.pairs)}.")
        return self.pairs[name]


def _section(config_class: type, values: Any, prefix: str, fixed: Mapping[str, Any] | None = None) -> Any:
    """Make a dataclass from a section of params.yaml, naming each key by its full path.

    Args:
        prefix: path of the section, such as `pairs.pixelcnn-mnist.train`; empty for the whole file.
        fixed: fields that come from elsewhere and must not stand in the file.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{PARAMS_FILE}: {prefix or 'the file'} must be a mapping of names to values, got {values!r}.")
    fixed = fixed or {}
    dot = f"{prefix}." if prefix else ""
    known = {f.name: f for f in fields(config_class) if f.name not in fixed}
    for key in values:
        if key not in known:
            raise ValueError(f"{PARAMS_FILE}: unknown key '{dot}{key}'. Known: {', '.join(sorted(known))}.")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{PARAMS_FILE}: key '{dot}{name}' is missing.")
    return checked_config(config_class, {**values, **fixed}, where=f"{PARAMS_FILE}: {prefix}".removesuffix(": "))


def _pair(name: str, values: Any) -> PairParams:
    prefix = f"pairs.{name}"
    pair = _section(PairParams, values, prefix)
    for key, known in (("model", CONFIG_CLASSES), ("dataset", DATASETS)):
        value = getattr(pair, key)
        if value not in known:
            raise ValueError(f"{PARAMS_FILE}: unknown {key} {value!r} in '{prefix}.{key}'. Known: {', '.join(known)}.")
    if name != f"{pair.model}-{pair.dataset}":
        raise ValueError(
            f"{PARAMS_FILE}: pair {name!r} must be named MODEL-DATASET, '{pair.model}-{pair.dataset}' for its values."
        )
    _check_number(f"{PARAMS_FILE}: {prefix}.num_threads", pair.num_threads, int, 0, 1024)
    spec = DATASETS[pair.dataset]
    fixed = {
        "image_shape": spec.image_shape,
        "num_levels": spec.num_levels,
        "num_labels": len(spec.label_names),
    }
    network = _section(CONFIG_CLASSES[pair.model], pair.network, f"{prefix}.network", fixed)
    train = _section(TrainConfig, pair.train, f"{prefix}.train")
    completer = None
    if network.completer_features:
        completer = _section(TrainConfig, pair.completer or {}, f"{prefix}.completer")
    elif pair.completer is not None:
        raise ValueError(f"{PARAMS_FILE}: '{prefix}.completer' trains nothing: set completer_features in its network.")
    _check_number(f"{PARAMS_FILE}: {prefix}.completion_images", pair.completion_images, int, 0, 1_000_000)
    return replace(pair, network=network, train=train, completer=completer)


def _check_candidates(candidates: Any, pairs: Mapping[str, PairParams]) -> None:
    if not isinstance(candidates, dict):
        raise ValueError(f"{PARAMS_FILE}: candidates must name pairs for each dataset, got {candidates!r}.")
    for dataset, names in candidates.items():
        if dataset not in DATASETS:
            raise ValueError(f"{PARAMS_FILE}: unknown dataset 'candidates.{dataset}'. Known: {', '.join(DATASETS)}.")
        if not isinstance(names, list) or not 1 <= len(names) <= 2:
            raise ValueError(f"{PARAMS_FILE}: candidates.{dataset} must be a list of one or two pairs, got {names!r}.")
        for name in names:
            if name not in pairs or pairs[name].dataset != dataset:
                of_dataset = [known for known, pair in pairs.items() if pair.dataset == dataset]
                raise ValueError(
                    f"{PARAMS_FILE}: candidates.{dataset} names {name!r}, which is no pair of that dataset. "
                    f"Known: {', '.join(of_dataset)}."
                )


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml.

    Raises:
        ValueError: the file is missing or no YAML; a key is unknown or missing, or a value is impossible.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist here ({Path.cwd()}). Run this in the project's folder.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from None
    raw = _section(Params, values, "")
    targets = raw.default_targets
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{PARAMS_FILE}: default_targets must be a list of stage names, got {targets!r}.")
    if not isinstance(raw.pairs, dict) or not raw.pairs:
        raise ValueError(f"{PARAMS_FILE}: pairs must hold at least one pair, got {raw.pairs!r}.")
    pairs = {name: _pair(name, pair) for name, pair in raw.pairs.items()}
    _check_candidates(raw.candidates, pairs)
    return Params(
        default_targets=targets,
        data=_section(DataParams, raw.data, "data"),
        pairs=pairs,
        candidates=raw.candidates,
        evaluate=_section(EvaluateParams, raw.evaluate, "evaluate"),
        sample=_section(SampleParams, raw.sample, "sample"),
        promote=_section(PromoteParams, raw.promote, "promote"),
    )
