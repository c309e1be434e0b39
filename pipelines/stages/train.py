"""The train stage: prepared data and a pair's settings -> weights, and the record of how they came about.

While a training is under way its state lies in a hidden folder beside its output, where DVC does not look: a run that
was stopped goes on where it was. The folder's name holds a hash of all that the weights follow from; the state of other
settings is left beside it. A training that is carried over days names a folder for its state instead, which stays.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.files import atomic_write, file_lock
from pipelines.judging.judge import JUDGES, judge_file
from pipelines.params import PairParams, Params, load_params, repro_command
from pipelines.registry.provenance import core_sha256, git_state, prepared_file, recorded_hash
from pipelines.registry.runs import Training
from pipelines.reports import curve as training_report
from pipelines.reports.curve import CURVE_FILES, Curve
from pipelines.stages.live_run import RUN_ID_FILE, RUN_KEY_FILE, LiveRun
from pixelcnn.checkpoint import check_replaceable, load_checkpoint, load_with_hash, save_checkpoint, sha256_of
from pixelcnn.data import Dataset, load_dataset
from pixelcnn.evaluation import per_image_nll
from pixelcnn.likelihood import bits_per_dim
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.registry import build_model, code_beside, config_to_dict
from pixelcnn.sampling.fast import warm_up
from pixelcnn.training import ContextPredictor, Network, StepReport, TrainConfig, fit, read_state, tell_progress
from pixelcnn.training.config import check_compiler

TRAINED_FOLDER = Path("trained")
# The part of the package pixelcnn that decides the weights; dvc.yaml lists the same.
DECIDES = ("config.py", "data.py", "evaluation.py", "likelihood.py", "observed.py", "models", "training")
HALF_TOLERANCE = 0.0002  # bits/dim that the validation score may change when weights are stored in half precision
HALF_BITS = (5, 10)  # of the mantissa that may do, in this order: with five of its ten bits a packed file is smaller
HALF_IMAGES = 1000  # of the validation split: the change hardly varies between images
_FOLLOWERS = {"completer": ("halves", "added"), "halves": ("added",)}  # the parts that go on from a part's weights
_DONE_FILE = "done"  # in the folder of a state: the result was written
_NUM_THREADS = torch.get_num_threads()

Log = Callable[[str], object]
logger = logging.getLogger(__name__)


def load(dataset: str) -> Dataset:
    """Read the prepared file of a dataset; ValueError if it is missing, damaged, or not the one that DVC recorded."""
    path = prepared_file(dataset)
    if not path.exists():
        raise ValueError(f"{path} does not exist. Make it: {repro_command('prepare', dataset)}")
    data = load_dataset(path)
    recorded = recorded_hash(dataset)
    if recorded is not None and recorded != data.data_hash:
        raise ValueError(
            f"{path} was changed since it was prepared: its MD5 is {data.data_hash}, DVC recorded {recorded}. "
            f"Make it again: {repro_command('prepare', dataset)}"
        )
    return data


def check_folders(out: Path, state: Path | None) -> None:
    """Raise ValueError unless a training may replace the folder `out`, and its state, which is kept, lies elsewhere."""
    check_replaceable(out)
    if state is not None and state.resolve() == out.resolve():
        raise ValueError(f"state and out are the same folder, {out}: name another for the state.")


def set_torch_threads(pair: PairParams) -> None:
    torch.set_num_threads(pair.num_threads or _NUM_THREADS)


def train(
    name: str, out: Path | None = None, state: Path | None = None, half: bool = False, log: Log = logger.info
) -> None:
    """Train a pair; its MLflow run shows curve and samples as it goes.

    Two trainings that would write the same folder do not run at once: the second waits, and finds the work done.

    Args:
        out: folder for a checkpoint, with the record of the training as its scores; None for `trained/PAIR`.
        state: folder of the training's state, which is kept: a larger budget in params.yaml goes on from it. None for
            a hidden one beside `out`.
        half: store the weights in half precision, where the validation score changes by 0.0002 bits/dim at most.

    Raises:
        ValueError: params.yaml, the pair or the data are not as they should be; `out` holds something else.
        FloatingPointError: the training diverged.
    """
    params = load_params()
    pair = params.pair(name)
    out = out or TRAINED_FOLDER / name
    check_folders(out, state)
    data = load(pair.dataset)
    num = {split: len(images) for split, images in data.images.items()}
    log(f"{data.name}: {num} images, data hash {data.data_hash}")
    set_torch_threads(pair)
    # Now: what is edited while it waits or trains is not what trains. A carried-over state has a history of its own.
    inputs = None if state else inputs_of(name, params, data, half)
    with ExitStack() as held:
        for folder in (out, *([state] if state else [])):
            held.enter_context(file_lock(folder.with_name(f".{folder.name}.lock"), f"the training of {name}", log))
        work = state or _work_folder(out, name, params, data, log)
        work.mkdir(parents=True, exist_ok=True)
        model, record = _fit_all(name, params, data, work, log)
        dtype = torch.float16 if half and _round_to_half(model, data, log) else torch.float32
        if inputs:
            record["inputs_sha256"] = inputs
        save_checkpoint(out, model, {**record, "weights_dtype": str(dtype).removeprefix("torch.")}, dtype)
        for file in (CURVE_FILES[part] for part in _trainings(pair)):  # a state that is carried over may have had more
            if (work / file).exists():
                shutil.copyfile(work / file, out / file)
        if state is None:
            (work / _DONE_FILE).touch()
        else:  # this run is complete: a larger budget is another one
            for file in (RUN_ID_FILE, RUN_KEY_FILE):
                (work / file).unlink(missing_ok=True)


def _fit_all(
    name: str, params: Params, data: Dataset, work: Path, log: Log
) -> tuple[AutoregressiveModel, dict[str, Any]]:
    """Train the joint model, the completer, which begins with the same weights, and the label network, each by itself.

    The completer's context network may have learned before it, and the completer go on with halves; what is added to
    its logits learns after that. States in the folder `work` are taken up, and their run gone on with. Return the
    model, and the record of all that, JSON-ready.
    """
    pair = params.pair(name)
    trainings = _trainings(pair)
    if any(config.compiled for config in trainings.values()):
        check_compiler()  # now: not hours later, where that part begins
    began = load_checkpoint(pair.added_begins_with)[0].completer if pair.added_begins_with else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(pair.train.seed)
    joint = pair.network.of_joint()
    model = build_model(joint).to(device)
    whole = model if joint == pair.network else build_model(pair.network).to(device)
    predictor = ContextPredictor(whole.completer).to(device) if pair.context and whole.completer else None
    warm_up(model)
    settings = {key: str(value) for key, value in _settings(name, params).items()}
    code = git_state()  # now: what is committed while it trains is not what trains
    identity = {"pair": name, "dataset": data.name, "data_hash": data.data_hash}
    sheets = work / "samples"
    sheets.mkdir(exist_ok=True)
    live = LiveRun(work, Training(**identity, params=settings, tags={**code, "protocol": data.protocol}), log)
    record: dict[str, Any] = {}

    def draw(step: int) -> None:
        training_report.draw_samples(sheets / f"step-{step:07d}.png", model, params.sample)

    def fit_part(part: str, network: Network) -> None:
        """Train one of the networks; add to the record how that went."""
        is_joint, config, curve_file = part == "train", trainings[part], work / CURVE_FILES[part]
        state_file = work / f"{'state' if is_joint else part}.safetensors"
        origin_file = state_file.with_suffix(".json")  # of a state that is taken up it says what began it
        origin = {"git_commit": code["git_commit"], "hardware": _hardware(device)}
        before = read_state(state_file)[0].step if state_file.exists() else 0
        if not before:
            curve_file.unlink(missing_ok=True)  # of a training that was begun before, whose state is gone
            atomic_write(origin_file, json.dumps(origin))
        curve = Curve(curve_file)
        origin = json.loads(origin_file.read_text()) if origin_file.exists() else {**origin, "git_commit": "unknown"}
        learner: Any = getattr(network, "added", None) or network
        num_parameters = sum(p.numel() for p in learner.parameters())
        log(f"training {num_parameters} parameters on {device}")
        tell = tell_progress(log, data, part == "labels")

        def on_step(report: StepReport) -> None:
            curve.add(report)
            if report.validation_nll_nats is not None:
                live.show(curve.rows, sheets / f"step-{report.step:07d}.png" if is_joint else None)
            tell(report)

        fit(network, data, config, on_step, state_file, draw if is_joint else None)
        done, _ = read_state(state_file)
        if done.step > before:  # what went on from other weights begins anew
            for follower in _FOLLOWERS.get(part, ()):
                (work / f"{follower}.safetensors").unlink(missing_ok=True)
        prefix = "" if is_joint else f"{part}_"
        record[f"{prefix}train_minutes"] = done.elapsed_s / 60
        record[f"num_{prefix}parameters"] = num_parameters
        record[f"{prefix}hardware"], record[f"{part}_git_commit"] = origin["hardware"], origin["git_commit"]
        # Those of steps that were taken: a finished run that is taken up with others has used none of them. What
        # params.yaml says is in `settings`, and in MLflow's parameters.
        record[f"{prefix}train_settings"] = _settings_taken(config, done.phases)

    try:
        fit_part("train", model)
        if whole is not model:
            whole.load_state_dict(model.state_dict(), strict=False)
            whole.begin_completer()
        completer, added = whole.completer, None
        if completer is not None:
            added, completer.added = completer.added, None  # until its turn comes
        networks: dict[str, Any] = {"context": predictor, "completer": completer, "halves": completer}
        networks |= {"added": completer, "labels": whole.label_network}
        for part, network in networks.items():
            if part not in trainings:  # the others' networks are there: params.yaml is checked for that
                continue
            if part == "added":
                network.added = added
                network.begin_added(began)
            fit_part(part, network)
        model = whole.eval()
    except BaseException as error:
        live.end(error)
        raise
    live.end()
    if live.run_id:
        record["run_id"] = live.run_id
    record |= {**identity, **code, "protocol": data.protocol, "label_names": data.label_names, "settings": settings}
    return model, record


def _settings(name: str, params: Params) -> dict[str, Any]:
    """Return all settings that a pair's weights follow from, by their paths."""
    pair = params.pair(name)
    sections = {"network": config_to_dict(pair.network)}
    sections |= {part: asdict(config) for part, config in _trainings(pair).items()}
    sections["data"] = params.data.model_dump()
    found = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    return {**found, **({"added_begins_with": pair.added_begins_with} if pair.added_begins_with else {})}


def _trainings(pair: PairParams) -> dict[str, TrainConfig]:
    """Return the settings of each network's training, by part: `train`, the joint model's, and what else there is."""
    return {part: config for part in CURVE_FILES if (config := getattr(pair, part))}


def _settings_taken(config: TrainConfig, phases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the steps that were taken; of one that changed on the way, how it went."""
    found = {name: phases[-1].get(name, value) for name, value in asdict(config).items()}
    for name in found:
        values = [(phase["from_step"], phase[name]) for phase in phases if name in phase]
        changes = [(step, value) for (_, before), (step, value) in pairwise([(0, None), *values]) if value != before]
        if len(changes) > 1 or (changes and changes[0][0] > 0):
            found[name] = ", then ".join(f"{value} from step {step}" for step, value in changes)
    return found


def _rounded(weight: Tensor, num_bits: int) -> Tensor:
    """Return a weight's nearest half-precision numbers with so many bits of mantissa, in float16."""
    cut = 10 - num_bits
    bits = weight.half().view(torch.int16).int()  # next to each other in the order of their size
    return ((bits + (1 << cut >> 1)) >> cut << cut).to(torch.int16).view(torch.float16)


def _round_to_half(model: AutoregressiveModel, data: Dataset, log: Log) -> bool:
    """Round the weights to half precision, as far as the validation score does not suffer; say if that is at all."""

    def validate() -> float:
        nll = per_image_nll(model, data, "validation", num_images=HALF_IMAGES)
        return float(bits_per_dim(nll.mean().item(), data.image_shape))

    before = validate()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    for num_bits in HALF_BITS:
        model.load_state_dict({name: _rounded(weight, num_bits) for name, weight in weights.items()})
        change = validate() - before
        enough = abs(change) <= HALF_TOLERANCE
        log(
            f"half precision, {num_bits} bits of mantissa, changes validation by {change:.6f} bits/dim: "
            f"{'kept' if enough else 'not kept'}"
        )
        if enough:
            return True
    model.load_state_dict(weights)
    return False


def _hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    num = torch.get_num_threads()
    return f"{num} CPU thread{'s' if num > 1 else ''} ({torch.backends.cpu.get_cpu_capability()})"


def _work_folder(out: Path, name: str, params: Params, data: Dataset, log: Log) -> Path:
    """Return the folder of this training's state; say which states of other settings, data or code are beside it."""
    work = out.with_name(f".{out.name}.run-{weights_key(name, params, data)[:12]}")
    for other in sorted(out.parent.glob(f".{out.name}.run-*")):
        if other != work and not (other / _DONE_FILE).exists():
            log(
                f"{other} holds an unfinished training of {name} with other settings, data or code: it goes on when "
                "they are as they were. Delete it if you do not want it."
            )
    return work


def remove_finished_states(out: Path) -> None:
    """Remove the states of trainings into `out` that are done; those that were stopped stay."""
    for mark in out.parent.glob(f".{out.name}.run-*/{_DONE_FILE}"):
        shutil.rmtree(mark.parent, ignore_errors=True)


def weights_key(name: str, params: Params, data: Dataset) -> str:
    """Return the SHA-256 of all that a pair's weights follow from: settings, data, and the code that decides them."""
    pair = params.pair(name)
    code = [core_sha256(*DECIDES), *code_beside(pair.model)]
    began = [load_with_hash(pair.added_begins_with)[2]] if pair.added_begins_with else []
    every = [name, pair.num_threads, _settings(name, params), data.data_hash, *code, *began]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()


def inputs_of(name: str, params: Params, data: Dataset, half: bool) -> str:
    """Return the SHA-256 of all that a registered version follows from: its weights, and how they are scored.

    Of the code that is what stands in `pixelcnn/`; and the judges' weights count as settings do.
    """
    settings = params.evaluate.model_dump()
    settings |= {key: settings[key].get(data.name) for key in ("completion_images", "judges")}
    files = [judge_file(settings["judges"], which) for which in JUDGES] if settings["judges"] else []
    judges = [sha256_of(file) for file in files if file.exists()]
    every = [weights_key(name, params, data), half, settings, judges, params.sample.model_dump(), core_sha256()]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()
