"""params.yaml, and own/params.yaml beside it, as checked, frozen models: the only places of values."""

from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, InstanceOf, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails

from pipelines.datasets.checks import CheckParams
from pipelines.datasets.entry import NAME, NAMES, OFFICIAL, DatasetParams, Frozen
from pixelcnn.config import ModelConfig, checked_config
from pixelcnn.models.registry import architectures, unknown_model
from pixelcnn.training import TrainConfig

PARAMS_FILE = "params.yaml"
# MLflow's experiments that hold no trainings; those of a dataset lie in the one of its name.
EXPERIMENTS = DECISIONS_EXPERIMENT, EVALUATIONS_EXPERIMENT = "promotions", "evaluations"
OWN_FILE = "own/params.yaml"  # datasets and pairs that somebody added: `python -m pipelines.steps add`
QUICK_START = "mnist5k"  # its stages are in the root's dvc.yaml; full/ and own/ hold those of the other datasets

_Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
_BatchSize = Annotated[int, Field(ge=1, le=100_000)]
_NumImages = Annotated[int, Field(ge=0, le=1_000_000)]


def repro_command(stage: str, name: str) -> str:
    """Return what makes the outputs of a dataset or pair, e.g. `dvc repro full/dvc.yaml:train@pixelcnn-mnist`."""
    dataset, own = name.rpartition("-")[2], Path(OWN_FILE)
    is_own = dataset not in (QUICK_START, *OFFICIAL) or (own.exists() and name in (_read(own).get("pairs") or {}))
    file = "own/dvc.yaml:" if is_own else "" if dataset == QUICK_START else "full/dvc.yaml:"
    return f"dvc repro {file}{stage}@{name}"


class DataParams(Frozen):
    """How datasets are split and binarised."""

    split_seed: _Seed  # of the permutation that sets validation images aside
    binarization_seed: _Seed  # of the fixed Bernoulli sample of validation and test images


class PairParams(Frozen):
    """One model/dataset pair."""

    model: str
    dataset: str
    # CPU threads of training and evaluation; 0 for torch's own choice. Small networks are faster with one, above all on
    # a busy machine, and the number changes rounding.
    num_threads: int = Field(ge=0, le=1024)
    network: InstanceOf[ModelConfig]  # with what the dataset fixes filled in
    train: InstanceOf[TrainConfig]  # without its completer
    context: InstanceOf[TrainConfig] | None = None  # of the completer's context network, if it learns by itself first
    completer: InstanceOf[TrainConfig] | None = None  # if `network` has one
    halves: InstanceOf[TrainConfig] | None = None  # of the completer again, where it goes on with other shares
    added: InstanceOf[TrainConfig] | None = None  # of what is added to the completer's logits, if `network` has that
    added_begins_with: str = ""  # the name of released weights, whose completer it is at first; a new network if empty
    labels: InstanceOf[TrainConfig] | None = None  # of the label network, if `network` has one

    @model_validator(mode="before")
    @classmethod
    def _build_configs(cls, values: Any, info: ValidationInfo) -> Any:
        """Make the core's own configs, which check themselves, of the mappings in the file."""
        if not isinstance(values, dict) or not {"model", "dataset", "network", "train"} <= set(values):
            return values
        datasets: dict[str, DatasetParams] = (info.context or {}).get("datasets", {})
        model, dataset = values["model"], values["dataset"]
        if not isinstance(model, str) or model not in architectures():
            raise ValueError(f"model: {unknown_model(model)}")
        if not isinstance(dataset, str) or dataset not in datasets:
            raise ValueError(f"dataset: unknown dataset {dataset!r}. Known: {', '.join(datasets)}.")
        spec = datasets[dataset]
        fixed = {"image_shape": spec.image_shape, "num_levels": spec.num_levels, "num_labels": len(spec.label_names)}
        network = _config(architectures()[model], values["network"], "network", fixed)
        built = {**values, "network": network}
        if values.get("added_begins_with") and not network.added_features:
            raise ValueError("added_begins_with: nothing begins with it: set added_features in its network.")
        # Of each part, the size of what it trains, and whether that sees drawings by a context network of its own.
        parts = {"train": ("num_features", network.of_joint().context_features > 0)}
        parts |= {"context": ("completer_features", False), "completer": ("completer_features", True)}
        parts |= {"halves": ("completer_features", True), "added": ("added_features", True)}
        parts |= {"labels": ("label_features", False)}
        for part, (features, sees_drawings) in parts.items():
            if part in values and not getattr(network, features):
                raise ValueError(f"{part}: it trains nothing: set {features} in its network.")
            is_optional = part in ("context", "halves") or not getattr(network, features)
            if part not in values and is_optional:  # the others have defaults
                continue
            config = built[part] = _config(TrainConfig, values.get(part, {}), part)
            if config.horizontal_flips and not spec.flips:
                raise ValueError(f"{part}: horizontal_flips mirrors images whose dataset has no `flips: true`.")
            try:
                config.check_for(spec.protocol, sees_drawings)
            except ValueError as error:
                raise ValueError(f"{part}: {error}") from None
        return built


def _config(config_class: type, values: Any, where: str, fixed: dict[str, Any] | None = None) -> Any:
    """Make a config of the core; the dataset decides what is `fixed`, which must not stand in the file."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: it must be a mapping of names to values, got {values!r}.")
    for name in set(values) & set(fixed or {}):
        raise ValueError(f"{where}: {name} is not to be set here: the dataset decides it.")
    return checked_config(config_class, {**values, **(fixed or {})}, where)


class EvaluateParams(Frozen):
    """How models are scored."""

    batch_size: _BatchSize  # images per forward pass; it does not change the scores
    num_images: _NumImages  # the first so many images of each split; 0 for all
    # By dataset, test images whose completion is scored, six masks each; all where it says none.
    completion_images: dict[str, _NumImages] = Field(default_factory=dict)
    judged_images: _NumImages  # test images whose endings the judges look at, one for each known part; 0 for all
    # By dataset, the one whose judges know its images; the others' are not judged.
    judges: dict[str, str] = Field(default_factory=dict)

    @property
    def datasets(self) -> set[str]:
        return {*self.completion_images, *self.judges, *self.judges.values()}


class SampleParams(Frozen):
    """The sheet of samples that each training run draws."""

    num_images: int = Field(ge=1, le=1000)  # samples on the sheet
    num_columns: int = Field(ge=1, le=100)  # samples per row
    num_completions: int = Field(ge=1, le=100)  # of each test image on the sheet of completions
    seed: int = Field(ge=0, le=2**63 - 1)  # of the noise
    temperature: float = Field(ge=0, le=100)  # divides the logits


class PromoteParams(Frozen):
    """When a challenger takes the champion's place; the rule is in pipelines/promotion/rule.py."""

    confidence: float = Field(ge=0.5, le=0.9999)  # of all intervals of paired differences at once
    batch_size: _BatchSize  # images per forward pass; it does not change the decision
    max_sample_s: float = Field(ge=0, le=86_400)  # seconds that a challenger may take to sample one image


class Params(Frozen):
    """Everything in params.yaml."""

    data: DataParams
    datasets: dict[str, DatasetParams] = Field(min_length=1)
    checks: CheckParams
    pairs: dict[str, PairParams] = Field(min_length=1)  # by name, MODEL-DATASET
    evaluate: EvaluateParams
    sample: SampleParams
    promote: PromoteParams

    @field_validator("datasets")
    @classmethod
    def _tell_pairs(cls, datasets: dict[str, DatasetParams], info: ValidationInfo) -> dict[str, DatasetParams]:
        """Check the names, and let the pairs, which are read next, know their datasets."""
        for name in datasets:
            if not NAME.fullmatch(name.rstrip("_")):  # with a _ some were added, and are to be removed
                raise ValueError(f"{name!r} is no name of a dataset: {NAMES}.")
        if info.context is not None:
            info.context["datasets"] = datasets
        return datasets

    @model_validator(mode="after")
    def _check_names(self) -> "Params":
        for dataset in sorted(self.evaluate.datasets):
            self.dataset(dataset)
        return self

    def dataset(self, name: str) -> DatasetParams:
        """Return a dataset's entry; ValueError if no dataset has this name."""
        if name not in self.datasets:
            raise ValueError(f"unknown dataset {name!r}. Known: {', '.join(self.datasets)}.")
        return self.datasets[name]

    def pair(self, name: str) -> PairParams:
        """Return a pair by its name; ValueError if there is none."""
        if name not in self.pairs:
            raise ValueError(f"unknown pair {name!r}. Known pairs in {PARAMS_FILE}: {', '.join(self.pairs)}.")
        return self.pairs[name]

    def pairs_of(self, dataset: str) -> list[str]:
        return [name for name, pair in self.pairs.items() if pair.dataset == dataset]


def load_params(path: str | Path = PARAMS_FILE) -> Params:
    """Read and check params.yaml, and own/params.yaml if it is there.

    ValueError if the file is missing or no YAML, a key is unknown or missing, or a value is impossible.
    """
    values, own_path = _read(Path(path)), Path(path).parent / OWN_FILE
    own = _read(own_path) if own_path.exists() else {}
    # A section may be empty, as it is once its last entry was taken out.
    has_sections = isinstance(own, dict) and not set(own) - {"datasets", "pairs"}
    if not (has_sections and all(isinstance(added, dict | None) for added in own.values())):
        raise ValueError(f"{OWN_FILE} must hold entries by name under `datasets` and `pairs`, and nothing else.")
    for section, added in own.items():
        known = values.get(section) if isinstance(values, dict) else None
        if isinstance(known, dict) and added:
            if both := set(known) & set(added):
                raise ValueError(f"{min(both)!r} stands in {PARAMS_FILE} and in {OWN_FILE}: take it out of one.")
            values[section] = {**known, **added}
    of_own = [(section, name) for section, added in own.items() for name in added or ()]
    try:
        params = Params.model_validate(values, context={})
    except ValidationError as error:
        # Of a pair that lacks a key no config was made, which is none of its mistakes.
        first = min(error.errors(include_url=False), key=lambda one: one["type"] == "is_instance_of")
        raise ValueError(f"{OWN_FILE if first['loc'][:2] in of_own else PARAMS_FILE}: {_sentence(first)}") from None
    for name, pair in params.pairs.items():
        if name != (right := f"{pair.model}-{pair.dataset}"):
            file = OWN_FILE if ("pairs", name) in of_own else PARAMS_FILE
            raise ValueError(f"{file}: pair {name!r} must be named MODEL-DATASET, {right!r} for its values.")
    return params


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # C: in a fifth
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist here ({Path.cwd()}). Run this in the project's folder.") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}.") from None


def _sentence(error: ErrorDetails) -> str:
    """Return what is wrong, with its key, its value and what is known."""
    key, kind = ".".join(map(str, error["loc"])), error["type"]
    if kind == "extra_forbidden":
        return f"unknown key {key!r}. Known: {', '.join(sorted(_fields_at(error['loc'][:-1])))}."
    if kind == "missing":
        return f"key {key!r} is missing."
    if kind == "value_error":  # our own words, or the core's, which begin with the key where it has one
        return f"{key}{'.' if key else ''}{error['ctx']['error']}"
    if kind == "model_type":
        return f"{key or 'the file'} must be a mapping of names to values, got {error['input']!r}."
    what = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key} must be {what}, got {error['input']!r}."


def _fields_at(place: tuple[int | str, ...]) -> set[str]:
    """Return the keys that are known at a place of the file."""
    model: Any = Params
    for name in place:  # in a mapping, that of a dataset or a pair
        model = get_args(model)[1] if get_args(model) else model.model_fields[name].annotation
    return set(model.model_fields)
