"""The training flow: load, train, evaluate, log, register. DVC stages and Prefect deployments run this same function.

The caller says which folder to write: DVC its out, a deployment a fresh one. While a training is under way its state
lies in a hidden folder beside that, so that a run that was stopped goes on where it was; it is removed at the end. A
training that is carried over days names a folder for its state instead, which stays.
"""

import hashlib
import json
import math
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from safetensors.torch import save_file

import pixelcnn
from pipelines import registry, tracking, training_report
from pipelines.files import alone, begin_state, end_state, write_whole
from pipelines.model_card import model_card
from pipelines.params import PairParams, Params, load_params
from pipelines.training_report import COMPLETER_COLUMNS, CURVE_COLUMNS, Curve, write_curve
from pixelcnn.checkpoint import CARD_FILE, CONFIG_FILE, SCORES_FILE, load_checkpoint, save_checkpoint
from pixelcnn.config import config_to_dict
from pixelcnn.data import DYNAMIC_PROTOCOL, Dataset, load_dataset
from pixelcnn.evaluation import evaluate, evaluate_completion, format_nll, per_image_marginal_nll, per_image_nll
from pixelcnn.fast_sampling import warm_up
from pixelcnn.likelihood import bits_per_dim
from pixelcnn.model import AutoregressiveModel, build_model, joint_parameters
from pixelcnn.training import StepReport, TrainConfig, fit, format_progress, training_history

DEPLOYMENTS_FOLDER = Path("models/deployments")
_NUM_THREADS = torch.get_num_threads()
MAX_ATTEMPTS = 3  # of a deployment's run that crashes: its checkpoint brings nothing if the cause is still there
PROGRESS_S = 5.0  # between lines of the log
CHECKED_IMAGES = 200  # the first of the test split: a score that is quick to measure again
CHECKED_SCORE = f"test/nll_nats_first_{CHECKED_IMAGES}"
PER_IMAGE_FILE = "per_image_nll.safetensors"  # (N,) float64 per split: validation/nll_nats, test/nll_nats
HALF_TOLERANCE = 0.001  # bits/dim that the validation score may change when weights are stored in half precision
HALF_IMAGES = 1000  # of the validation split: the change hardly varies between images
RUN_ID_FILE, RUN_KEY_FILE = "run_id", "run_key"  # beside a training's state: its MLflow run
TRACKER_PAUSE_S = 300.0  # after the tracking store failed, until the training tries it again

# Tasks hand each other models and data in memory: nothing is cached or stored, so nothing is ever pickled.
_IN_MEMORY: dict[str, Any] = {"persist_result": False, "cache_policy": NO_CACHE}
# The tracking store may be busy, or out of reach for half a minute; training again would help nothing.
_RETRIED: dict[str, Any] = {**_IN_MEMORY, "retries": 3, "retry_delay_seconds": [2, 10, 30]}


@dataclass(frozen=True)
class _Part:
    """How the training of a network went: the joint model's, or the completer's."""

    curve: list[dict[str, float]]
    minutes: float
    phases: list[dict[str, Any]]


@dataclass(frozen=True)
class _Training:
    """What the train task hands on."""

    model: AutoregressiveModel
    joint: _Part
    completer: _Part | None
    code: dict[str, str]
    run_id: str | None

    def curves(self) -> list[list[dict[str, float]]]:
        return [part.curve for part in (self.joint, self.completer) if part is not None]


@task(name="load", **_IN_MEMORY)
def load(dataset: str) -> Dataset:
    """Read the prepared file of a dataset, and check that it is the one that DVC recorded.

    Raises:
        ValueError: it is missing, damaged, or was changed since it was prepared.
    """
    path = Path("data") / f"{dataset}.safetensors"
    data = load_dataset(path)
    recorded = recorded_hash(dataset)
    if recorded is not None and recorded != data.data_hash:
        raise ValueError(
            f"{path} was changed since it was prepared: its MD5 is {data.data_hash}, dvc.lock records {recorded}. "
            f"Make it again: dvc repro prepare@{dataset}"
        )
    num = {split: len(images) for split, images in data.images.items()}
    get_run_logger().info("%s: %s images, data hash %s", dataset, num, data.data_hash)
    return data


def recorded_hash(dataset: str) -> str | None:
    """Return the MD5 of a prepared file as `dvc.lock` records it; None if it records none."""
    try:
        stages = yaml.safe_load(Path("dvc.lock").read_text())["stages"]
        return stages[f"prepare@{dataset}"]["outs"][0]["md5"]
    except (FileNotFoundError, KeyError):
        return None


@task(name="train", **_IN_MEMORY)
def train(name: str, params: Params, data: Dataset, work: Path) -> _Training:
    """Train a pair's network; its MLflow run begins with it, and shows the curve and a sheet of samples as it goes.

    A completer is trained after the joint model, as a network of its own that begins with the joint model's weights.

    Args:
        work: folder of the states; a state that is there is taken up, and its run gone on with.
    """
    logger = get_run_logger()
    pair = params.pair(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(pair.train.seed)
    network = pair.network.without_context() if pair.network.completer_features else pair.network
    model = build_model(network).to(device)
    whole = build_model(pair.network).to(device)
    warm_up(model)
    code = git_state()  # now: what is committed while it trains is not what trains
    live = _LiveRun(work / RUN_ID_FILE, name, params, data, code)
    sheets = work / "samples"
    sheets.mkdir(exist_ok=True)

    def draw(step: int) -> None:
        training_report.draw_samples(sheets / f"step-{step:07d}.png", model, params.sample)

    def fit_part(network: AutoregressiveModel, config: TrainConfig, curve: Curve, state_file: Path) -> _Part:
        logger.info("training %d parameters on %s", sum(p.numel() for p in network.parameters()), device)
        last_line = 0.0

        def on_step(report: StepReport) -> None:
            nonlocal last_line
            curve.add(report)
            now = time.monotonic()
            if report.validation_nll_nats is not None:
                live.show(curve.rows, sheets / f"step-{report.step:07d}.png" if network is model else None)
            if report.validation_nll_nats is not None or now - last_line > PROGRESS_S:
                logger.info(format_progress(report, data))
                last_line = now

        try:
            fit(network, data, config, on_step, state_file, draw if network is model else None)
        except BaseException:
            live.fail()
            raise
        return _Part(curve.rows, *training_history(state_file))

    joint = fit_part(
        model,
        pair.train,
        Curve(work / "curve.csv", CURVE_COLUMNS),
        work / "state.safetensors",
    )
    if whole.completer is None or pair.completer is None:
        return _Training(model, joint, None, code, live.run_id)
    whole.load_state_dict(model.state_dict(), strict=False)
    whole.begin_completer()
    curve = Curve(work / "completer.csv", COMPLETER_COLUMNS)
    completer = fit_part(whole.completer, pair.completer, curve, work / "completer.safetensors")
    return _Training(whole.eval(), joint, completer, code, live.run_id)


class _LiveRun:
    """The MLflow run of a training that is under way.

    A store that fails costs the training nothing but a warning: what it missed is logged later, at the end at the
    latest. The run's ID lies beside the state, so that a training that was stopped goes on with its run.
    """

    def __init__(self, path: Path, name: str, params: Params, data: Dataset, code: dict[str, str]) -> None:
        self.path, self.name, self.params, self.data, self.code = path, name, params, data, code
        self.run_id = path.read_text() if path.exists() else None
        key = path.with_name(RUN_KEY_FILE)
        if not key.exists():
            write_whole(key, uuid.uuid4().hex)
        self.key = key.read_text()
        self.started = False
        self.silent_until = 0.0
        self._try(self._start)

    def _start(self) -> None:
        pair = self.params.pair(self.name)
        self.run_id = tracking.start_training_run(
            pair=self.name,
            dataset=pair.dataset,
            data_hash=self.data.data_hash,
            params=_logged_params(self.name, self.params),
            tags={**self.code, "protocol": self.data.protocol},
            key=self.key,
            run_id=self.run_id,
        )
        write_whole(self.path, self.run_id)
        self.started = True

    def show(self, rows: list[dict[str, float]], sheet: Path | None) -> None:
        """Log the curve so far, and the newest sheet of samples if there is one."""

        def log_both() -> None:
            if not self.started:
                self._start()
            assert self.run_id is not None
            tracking.log_curve(self.run_id, rows)
            if sheet is not None:
                tracking.log_picture(self.run_id, sheet, "samples")

        self._try(log_both)

    def fail(self) -> None:
        """Show that the training has stopped before its end."""
        if self.started and self.run_id is not None:
            run_id = self.run_id
            self._try(lambda: tracking.fail_run(run_id))

    def _try(self, work: Callable[[], None]) -> None:
        if time.monotonic() < self.silent_until:
            return
        try:
            work()
        except Exception as error:
            self.silent_until = time.monotonic() + TRACKER_PAUSE_S
            get_run_logger().warning(
                "MLflow failed (%s). The training goes on; its run shows it later.", str(error).partition("\n")[0]
            )


def _logged_params(name: str, params: Params) -> dict[str, Any]:
    """Return the settings that an MLflow run of a pair names."""
    pair = params.pair(name)
    return {
        **{f"network.{key}": value for key, value in config_to_dict(pair.network).items()},
        **{f"train.{key}": value for key, value in asdict(pair.train).items()},
        **{f"completer.{key}": value for key, value in (asdict(pair.completer) if pair.completer else {}).items()},
        **{f"data.{key}": value for key, value in asdict(params.data).items()},
    }


def baseline_scores(data: Dataset) -> dict[str, float]:
    """Score two models without a network on the test split: what any network must beat by far.

    Returns:
        `test/nll_nats_uniform`: every level equally likely; `test/nll_nats_independent`: each sub-pixel's own
        distribution of levels, counted on the training split with one added to each count.
    """
    num_dims, num_levels = math.prod(data.image_shape), data.num_levels
    images = data.images["train"].flatten(1)  # (N, C*H*W) uint8
    if data.protocol == DYNAMIC_PROTOCOL:
        ink = images.double().sum(dim=0) / 255  # the expected count of ones
        counts = torch.stack([len(images) - ink, ink])  # (2, C*H*W)
    else:
        counts = torch.stack([(images == level).sum(dim=0) for level in range(num_levels)]).double()  # (K, C*H*W)
    log_probs = ((counts + 1) / (len(images) + num_levels)).log()
    test = data.images["test"].flatten(1).long()
    nll = -log_probs.gather(0, test).sum(dim=1)
    return {
        "test/nll_nats_uniform": num_dims * math.log(num_levels),
        "test/nll_nats_independent": nll.mean().item(),
    }


@task(name="evaluate", **_IN_MEMORY)
def evaluate_model(
    name: str, params: Params, data: Dataset, training: _Training, out: Path, report: Path, half: bool
) -> dict[str, Any]:
    """Score the model; write the checkpoint folder `out` and the folder of reports.

    Args:
        half: store the weights in half precision, and score them so, where validation changes little.

    Returns:
        What the checkpoint's `scores.json` holds.
    """
    logger = get_run_logger()
    model = training.model
    num_images, batch_size = params.evaluate.num_images or None, params.evaluate.batch_size
    stored_half = half and _half_is_enough(model, data, num_images or HALF_IMAGES, batch_size)
    dtype = torch.float16 if stored_half else torch.float32
    per_image: dict[str, torch.Tensor] = {}
    scores: dict[str, Any] = evaluate(model, data, num_images=num_images, batch_size=batch_size, per_image=per_image)
    scores["test/nll_nats_max"] = per_image["test"].max().item()
    if model.config.context_features:
        num_completed = min((n for n in (params.pair(name).completion_images, num_images) if n), default=None)
        scores.update(evaluate_completion(model, data, num_images=num_completed, batch_size=batch_size))
    scores.update(baseline_scores(data))
    checked = per_image["test"]
    if len(checked) < min(CHECKED_IMAGES, len(data.images["test"])):  # fewer were scored than are to be checked
        checked = per_image_nll(model, data, "test", num_images=CHECKED_IMAGES, batch_size=batch_size)
    scores[CHECKED_SCORE] = checked[:CHECKED_IMAGES].mean().item()
    if model.config.num_labels:
        given = per_image_nll(model, data, "test", True, CHECKED_IMAGES, batch_size)
        marginal = per_image_marginal_nll(model, data, "test", CHECKED_IMAGES, batch_size)
        scores[f"{CHECKED_SCORE}_given_label"] = given.mean().item()
        scores[f"{CHECKED_SCORE}_label_summed_out"] = marginal.mean().item()
    numbers = {
        **scores,
        "train_minutes": training.joint.minutes,
        "num_parameters": sum(p.numel() for p in joint_parameters(model)),
    }
    if training.completer is not None:
        assert model.completer is not None
        numbers["completer_train_minutes"] = training.completer.minutes
        numbers["num_completer_parameters"] = sum(p.numel() for p in model.completer.parameters())
    scores = {
        **numbers,
        "dataset": data.name,
        "protocol": data.protocol,
        "label_names": data.label_names,
        "data_hash": data.data_hash,
        "git_commit": training.code["git_commit"],
        "pair": name,
        "hardware": _hardware(model),
        "weights_dtype": str(dtype).removeprefix("torch."),
        "train_settings": {**asdict(params.pair(name).train), **_shifted(training.joint.phases)},
    }
    settings = params.pair(name).completer
    if training.completer is not None and settings is not None:
        scores["completer_train_settings"] = {**asdict(settings), **_shifted(training.completer.phases)}
    for split in ("validation", "test"):
        logger.info(
            "%s: %s (%s %s)",
            split,
            format_nll(scores[f"{split}/nll_nats"], data.image_shape, data.num_levels),
            data.name,
            data.protocol,
        )
    logger.info(
        "for comparison, test: uniform %s, independent pixels %s",
        format_nll(scores["test/nll_nats_uniform"], data.image_shape, data.num_levels),
        format_nll(scores["test/nll_nats_independent"], data.image_shape, data.num_levels),
    )
    save_checkpoint(out, model, scores, dtype, model_card(config_to_dict(model.config), scores))
    report.mkdir(parents=True, exist_ok=True)
    write_whole(report / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    write_curve(report / "curve.csv", training.joint.curve)
    training_report.draw_curve(report / "curve.png", training.curves(), scores, f"{data.name}, {data.protocol}")
    save_file({f"{split}/nll_nats": nll for split, nll in per_image.items()}, report / PER_IMAGE_FILE)
    training_report.draw_extremes(report / "extremes.png", data, per_image["test"])
    model.cpu()  # where sampling is fast
    training_report.draw_samples(report / "samples.png", model, params.sample)
    if model.config.num_labels:
        training_report.draw_samples(report / "class_samples.png", model, params.sample, per_class=True)
    training_report.draw_completions(report / "completions.png", model, data, params.sample)
    return scores


def _shifted(phases: list[dict[str, Any]]) -> dict[str, str]:
    """Return how the settings went that changed on the way, by name."""
    found = {}
    for name in dict.fromkeys(name for phase in phases for name in phase):
        values = [(phase["from_step"], phase[name]) for phase in phases if name in phase]
        changes = [one for before, one in zip([(0, None), *values], values, strict=False) if one[1] != before[1]]
        if name != "from_step" and (len(changes) > 1 or changes[0][0] > 0):
            found[name] = ", then ".join(f"{value} from step {step}" for step, value in changes)
    return found


def _half_is_enough(model: AutoregressiveModel, data: Dataset, num_images: int, batch_size: int) -> bool:
    """Round the weights to half precision; take that back if the validation score suffers."""

    def validate() -> float:
        nll = per_image_nll(model, data, "validation", num_images=num_images, batch_size=batch_size)
        return float(bits_per_dim(nll.mean().item(), data.image_shape))

    before = validate()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.load_state_dict({name: weight.half() for name, weight in weights.items()})
    change = validate() - before
    enough = abs(change) <= HALF_TOLERANCE
    if not enough:
        model.load_state_dict(weights)
    verdict = "kept" if enough else "not kept"
    get_run_logger().info("half precision changes validation by %.6f bits/dim: %s", change, verdict)
    return enough


def _hardware(model: AutoregressiveModel) -> str:
    """Return what the model was trained on."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num = torch.get_num_threads()
    return f"{num} CPU thread{'s' if num > 1 else ''} ({torch.backends.cpu.get_cpu_capability()})"


def git_state() -> dict[str, str]:
    """Return the commit and whether tracked files differ from it, `dvc.lock` (which DVC is writing) aside."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock")
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": "unknown", "git_dirty": "unknown"}
    return {"git_commit": commit, "git_dirty": str(bool(changes)).lower()}


@task(name="log", **_RETRIED)
def log(
    name: str, params: Params, scores: dict[str, Any], training: _Training, out: Path, report: Path, inputs: str | None
) -> str:
    """Record the training as an MLflow run; return its ID.

    Args:
        inputs: see `inputs_of`; None where the result follows from more than that.
    """
    pair = params.pair(name)
    weights_sha256 = json.loads((out / CONFIG_FILE).read_text())["weights_sha256"]
    return tracking.log_training_run(
        pair=name,
        dataset=pair.dataset,
        data_hash=scores["data_hash"],
        folder=out,
        params=_logged_params(name, params),
        scores=scores,
        curves=training.curves(),
        pictures=[path for path in sorted(report.iterdir()) if path.is_file()] + [out / CARD_FILE],
        tags={
            **training.code,
            "protocol": scores["protocol"],
            "weights_sha256": weights_sha256,
            **({tracking.INPUTS_TAG: inputs} if inputs else {}),
        },
        run_id=training.run_id,
    )


@task(name="register", **_RETRIED)
def register(run_id: str, name: str, dataset: str, out: Path) -> str:
    """Make the run's model a version, and the challenger; return the version."""
    load_checkpoint(out)  # raises if the files are not those that were measured
    version = tracking.register(run_id, out, name, dataset)
    get_run_logger().info("%s version %s, run %s", tracking.registered_name(dataset), version, run_id)
    return version


def _work_folder(out: Path, pair: PairParams, data: Dataset) -> Path:
    """Return the folder of this training's state: another one as soon as settings or data differ."""
    key = hashlib.sha256(json.dumps([*_learning(pair), data.data_hash]).encode())
    work = out.with_name(f".{out.name}.run-{key.hexdigest()[:12]}")
    for other in out.parent.glob(f".{out.name}.run-*"):
        if other != work:
            shutil.rmtree(other)
    return work


def _learning(pair: PairParams) -> list[dict[str, Any]]:
    """Return all settings that a pair's weights follow from."""
    return [config_to_dict(pair.network), asdict(pair.train), asdict(pair.completer) if pair.completer else {}]


def check_attempts() -> None:
    """Raise RuntimeError if Prefect has started this flow run too often: it would crash and be retried for ever."""
    attempt = flow_run.get_run_count()
    if attempt > MAX_ATTEMPTS:
        raise RuntimeError(
            f"this run has crashed {attempt - 1} times: see its log, mend the cause, and start a new one."
        )


def inputs_of(name: str, params: Params, data: Dataset, half: bool) -> str:
    """Return the SHA-256 of all that a training's result follows from: settings, data, and the code of the core."""
    code = hashlib.sha256()
    for path in sorted(Path(pixelcnn.__file__).parent.glob("*.py")):
        code.update(path.name.encode() + b"\0" + path.read_bytes())
    pair = params.pair(name)
    settings = [*_learning(pair), asdict(params.evaluate), pair.completion_images, asdict(params.sample)]
    every = [name, pair.num_threads, settings, half, data.data_hash, code.hexdigest()]
    return hashlib.sha256(json.dumps(every).encode()).hexdigest()


@task(name="find", **_RETRIED)
def find_trained(inputs: str, dataset: str, out: Path, report: Path) -> dict[str, str] | None:
    """Take what was trained and registered from the same inputs; write its checkpoint and its reports.

    Returns:
        What the flow returns; None if there is no such training.
    """
    number = tracking.version_of_inputs(dataset, inputs)
    if number is None:
        return None
    version = next(one for one in registry.versions(dataset) if one.version == number)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = registry.download(version, Path(folder))
        tracking.download_files(version.run_id, report)
        shutil.move(report / CARD_FILE, checkpoint / CARD_FILE)
        (report / SCORES_FILE).unlink()
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(checkpoint, out)
    get_run_logger().info(
        "not trained again: %s version %s, run %s, followed from the same data, settings and code",
        *(version.name, version.version, version.run_id),
    )
    return {"run_id": version.run_id, "version": version.version, "out": str(out)}


_finished: list[Path] = []  # folders of states that are no longer needed


def _remove_states(flow: Any, flow_run: Any, state: Any) -> None:
    while _finished:
        end_state(_finished.pop())


# The state goes when Prefect knows of the end, no sooner: if its server is away then, the command fails, and the next
# attempt finds the training done.
@flow(name="train-pair", persist_result=False, on_completion=[_remove_states])
def train_pair(
    pair: str,
    out: str | None = None,
    report: str | None = None,
    state: str | None = None,
    half: bool = False,
    reuse: bool = False,
) -> dict[str, str]:
    """Train, evaluate, record and register one pair.

    Two trainings that would write the same folder do not run at once: the second says whom it waits for, and then
    takes the first one's result if it followed from the same inputs.

    Args:
        pair: its name in params.yaml.
        out: folder of the checkpoint; None for a fresh one in models/deployments/.
        report: folder of metrics, curve and sample sheet; None for `report` beside a fresh `out`.
        state: folder of the training's state, taken up if it is there and kept at the end: a larger budget in
            params.yaml goes on from it. None for a hidden one beside `out`, removed at the end.
        half: store the weights in half precision, where the validation score changes by 0.001 bits/dim at most.
        reuse: take a registered version of the same data, settings and code instead of training again. DVC does not
            need that, it knows itself what is out of date.

    Returns:
        `run_id` and `version` in MLflow, and `out`.

    Raises:
        ValueError: params.yaml, the pair or the data are not as they should be.
        FloatingPointError: the training diverged.
        RuntimeError: Prefect has started this run too often.
    """
    check_attempts()
    params = load_params()
    settings = params.pair(pair)
    out_folder = Path(out) if out else DEPLOYMENTS_FOLDER / str(flow_run.get_id()) / pair
    report_folder = Path(report) if report else out_folder.with_name(f"{out_folder.name}-report")
    torch.set_num_threads(settings.num_threads or _NUM_THREADS)
    data = load(settings.dataset)
    # A state that is carried over has a history of its own.
    inputs = None if state else inputs_of(pair, params, data, half)
    locks = [out_folder.with_name(f".{out_folder.name}.lock"), *([Path(state) / ".lock"] if state else [])]
    with ExitStack() as held:
        waited = [
            held.enter_context(alone(lock, f"the training of {pair}", get_run_logger().warning)) for lock in locks
        ]
        if inputs and (reuse or any(waited)):
            found = find_trained(inputs, settings.dataset, out_folder, report_folder)
            if found is not None:
                return found
        work = Path(state) if state else _work_folder(out_folder, settings, data)
        begin_state(work)
        training = train(pair, params, data, work)
        scores = evaluate_model(pair, params, data, training, out_folder, report_folder, half)
        run_id = log(pair, params, scores, training, out_folder, report_folder, inputs)
        version = register(run_id, pair, settings.dataset, out_folder)
        # Only now: if a store was out of reach, the next attempt finds the training done.
        if state:
            for name in (RUN_ID_FILE, RUN_KEY_FILE):  # this run is complete: a larger budget is another one
                (work / name).unlink(missing_ok=True)
        else:
            _finished.append(work)
    return {"run_id": run_id, "version": version, "out": str(out_folder)}
