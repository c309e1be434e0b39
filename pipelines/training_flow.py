"""The training flow: load, train, evaluate, log, register. DVC stages and Prefect deployments run this same function.

The caller says which folder to write: DVC its out, a deployment a fresh one. While a training is under way its state
lies in a hidden folder beside that, so that a run that was stopped goes on where it was; it is removed at the end. A
training that is carried over days names a folder for its state instead, which stays.
"""

import csv
import hashlib
import json
import math
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from pipelines import tracking
from pipelines.params import PairParams, Params, SampleParams, load_params
from pixelcnn.checkpoint import CONFIG_FILE, load_checkpoint, save_checkpoint
from pixelcnn.completion import complete
from pixelcnn.config import config_to_dict
from pixelcnn.data import DYNAMIC_PROTOCOL, Dataset, load_dataset
from pixelcnn.fast_sampling import sample
from pixelcnn.images import to_sheet
from pixelcnn.model import AutoregressiveModel, build_model
from pixelcnn.training import StepReport, evaluate, fit, format_nll, format_progress, per_image_nll, trained_minutes

DEPLOYMENTS_FOLDER = Path("models/deployments")
_NUM_THREADS = torch.get_num_threads()
PROGRESS_S = 5.0  # between lines of the log
CHECKED_IMAGES = 200  # the first of the validation split: a score that is quick to measure again
CHECKED_SCORE = f"validation/nll_nats_first_{CHECKED_IMAGES}"
CURVE_COLUMNS = ("step", "epoch", "train_nll_nats", "validation_nll_nats", "learning_rate")

# Tasks hand each other models and data in memory: nothing is cached or stored, so nothing is ever pickled.
_IN_MEMORY: dict[str, Any] = {"persist_result": False, "cache_policy": NO_CACHE}
# The tracking store may be busy or out of reach for a moment; training again would help nothing.
_RETRIED: dict[str, Any] = {**_IN_MEMORY, "retries": 2, "retry_delay_seconds": [2, 10]}


@dataclass(frozen=True)
class _Training:
    """What the train task hands on."""

    model: AutoregressiveModel
    curve: list[dict[str, float]]
    minutes: float


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
def train(pair: PairParams, data: Dataset, work: Path) -> _Training:
    """Train a pair's network.

    Args:
        work: folder of the state; a state that is there is taken up.
    """
    logger = get_run_logger()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(pair.train.seed)
    model = build_model(pair.network).to(device)
    logger.info("training %d parameters on %s", sum(p.numel() for p in model.parameters()), device)
    curve = _Curve(work / "curve.csv")
    last_line = 0.0

    def on_step(report: StepReport) -> None:
        nonlocal last_line
        curve.add(report)
        now = time.monotonic()
        if report.validation_nll_nats is not None or now - last_line > PROGRESS_S:
            logger.info(format_progress(report, data))
            last_line = now

    state_file = work / "state.safetensors"
    fit(model, data, pair.train, on_step, state_file)
    return _Training(model, curve.rows, trained_minutes(state_file))


class _Curve:
    """The training curve: a row per validation, kept in a file beside the state so that a resumed run has it whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._nats: list[float] = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
            self.rows = [{**row, "step": int(row["step"])} for row in rows]

    def add(self, report: StepReport) -> None:
        self._nats.append(report.train_nll_nats)
        if report.validation_nll_nats is None:
            return
        # Rows from this step on are of work that was lost when the run was stopped, and done again.
        self.rows = [row for row in self.rows if row["step"] < report.step]
        mean = math.fsum(self._nats) / len(self._nats)
        values = (report.step, report.epoch, mean, report.validation_nll_nats, report.learning_rate)
        self.rows.append(dict(zip(CURVE_COLUMNS, values, strict=True)))
        self._nats = []
        write_curve(self.path, self.rows)


def write_curve(path: Path, rows: list[dict[str, float]]) -> None:
    """Write rows of a training curve as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


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
def evaluate_model(params: Params, data: Dataset, training: _Training, out: Path, report: Path) -> dict[str, Any]:
    """Score the model; write the checkpoint folder `out` and the folder of reports.

    Returns:
        What the checkpoint's `scores.json` holds.
    """
    logger = get_run_logger()
    model = training.model
    num_images = params.evaluate.num_images or None
    scores: dict[str, Any] = evaluate(model, data, num_images=num_images, batch_size=params.evaluate.batch_size)
    scores.update(baseline_scores(data))
    checked = per_image_nll(model, data, "validation", num_images=CHECKED_IMAGES)
    scores[CHECKED_SCORE] = checked.mean().item()
    numbers = {
        **scores,
        "train_minutes": training.minutes,
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }
    scores = {
        **numbers,
        "dataset": data.name,
        "protocol": data.protocol,
        "label_names": data.label_names,
        "data_hash": data.data_hash,
        "git_commit": git_state()["git_commit"],
    }
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
    save_checkpoint(out, model, scores)
    report.mkdir(parents=True, exist_ok=True)
    (report / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    write_curve(report / "curve.csv", training.curve)
    _draw_curve(report / "curve.png", training.curve, scores, f"{data.name}, {data.protocol}")
    model.cpu()  # where sampling is fast
    u = torch.rand(
        (params.sample.num_images, *data.image_shape), generator=torch.Generator().manual_seed(params.sample.seed)
    )
    drawn = sample(model, u, temperature=params.sample.temperature)
    to_sheet(drawn, data.num_levels, params.sample.num_columns).save(report / "samples.png")
    _draw_completions(report / "completions.png", model, data, params.sample)
    return scores


def _draw_completions(path: Path, model: AutoregressiveModel, data: Dataset, params: SampleParams) -> None:
    """Draw test images whose lower half was taken away, their completions, and the originals, in rows.

    One column for each class: its first test image. What is missing is mid-grey in the first row.
    """
    labels = data.labels["test"].tolist()
    index = torch.tensor([labels.index(label) for label in sorted(set(labels))])
    originals = data.levels("test", index)  # (N, C, H, W)
    observed = torch.zeros(len(index), 1, *data.image_shape[1:], dtype=torch.bool)
    observed[:, :, : data.image_shape[1] // 2] = True
    num = params.num_completions
    u = torch.rand((num * len(index), *data.image_shape), generator=torch.Generator().manual_seed(params.seed))
    completions = complete(model, originals.repeat(num, 1, 1, 1), observed.repeat(num, 1, 1, 1), u)
    # Twice the levels, and one between: that is mid-grey for binary images, too.
    given = torch.where(observed, 2 * originals, data.num_levels - 1)
    rows = torch.cat([given, 2 * completions, 2 * originals])
    to_sheet(rows, 2 * data.num_levels - 1, num_columns=len(index)).save(path)


def _draw_curve(path: Path, curve: list[dict[str, float]], scores: dict[str, Any], title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in curve]
    axes.plot(steps, [row["train_nll_nats"] for row in curve], label="train")
    axes.plot(steps, [row["validation_nll_nats"] for row in curve], label="validation", marker=".")
    axes.axhline(scores["test/nll_nats"], label="test, best weights", color="grey", linestyle=":")
    axes.set(xlabel="step", ylabel="NLL, nats per image", title=title)
    axes.legend()
    figure.savefig(path, dpi=100)


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
def log(name: str, params: Params, scores: dict[str, Any], training: _Training, out: Path, report: Path) -> str:
    """Record the training as an MLflow run; return its ID."""
    pair = params.pair(name)
    weights_sha256 = json.loads((out / CONFIG_FILE).read_text())["weights_sha256"]
    return tracking.log_training_run(
        pair=name,
        dataset=pair.dataset,
        data_hash=scores["data_hash"],
        folder=out,
        params={
            **{f"network.{key}": value for key, value in config_to_dict(pair.network).items()},
            **{f"train.{key}": value for key, value in asdict(pair.train).items()},
            **{f"data.{key}": value for key, value in asdict(params.data).items()},
        },
        scores=scores,
        curve=training.curve,
        pictures=[report / name for name in ("samples.png", "completions.png", "curve.png")],
        tags={**git_state(), "protocol": scores["protocol"], "weights_sha256": weights_sha256},
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
    settings = json.dumps([config_to_dict(pair.network), asdict(pair.train), data.data_hash])
    key = hashlib.sha256(settings.encode())
    work = out.with_name(f".{out.name}.run-{key.hexdigest()[:12]}")
    for other in out.parent.glob(f".{out.name}.run-*"):
        if other != work:
            shutil.rmtree(other)
    return work


@flow(name="train-pair", persist_result=False)
def train_pair(
    pair: str, out: str | None = None, report: str | None = None, state: str | None = None
) -> dict[str, str]:
    """Train, evaluate, record and register one pair.

    Args:
        pair: its name in params.yaml.
        out: folder of the checkpoint; None for a fresh one in models/deployments/.
        report: folder of metrics, curve and sample sheet; None for `report` beside a fresh `out`.
        state: folder of the training's state, taken up if it is there and kept at the end: a larger budget in
            params.yaml goes on from it. None for a hidden one beside `out`, removed at the end.

    Returns:
        `run_id` and `version` in MLflow, and `out`.

    Raises:
        ValueError: params.yaml, the pair or the data are not as they should be.
        FloatingPointError: the training diverged.
    """
    params = load_params()
    settings = params.pair(pair)
    out_folder = Path(out) if out else DEPLOYMENTS_FOLDER / str(flow_run.get_id()) / pair
    report_folder = Path(report) if report else out_folder.with_name(f"{out_folder.name}-report")
    torch.set_num_threads(settings.num_threads or _NUM_THREADS)
    data = load(settings.dataset)
    work = Path(state) if state else _work_folder(out_folder, settings, data)
    work.mkdir(parents=True, exist_ok=True)
    training = train(settings, data, work)
    scores = evaluate_model(params, data, training, out_folder, report_folder)
    run_id = log(pair, params, scores, training, out_folder, report_folder)
    version = register(run_id, pair, settings.dataset, out_folder)
    if not state:
        # Only now: if a store was out of reach, the next attempt finds the training done.
        shutil.rmtree(work)
    return {"run_id": run_id, "version": version, "out": str(out_folder)}


@flow(name="train-all", persist_result=False)
def train_all(pairs: list[str] | None = None) -> dict[str, str]:
    """Train several pairs, one after another; one that fails does not stop the others.

    Args:
        pairs: their names; None for the candidates of the quick start's dataset.

    Returns:
        The MLflow version of each.

    Raises:
        RuntimeError: at the end, naming the pairs that failed.
    """
    versions, failures = {}, []
    for pair in load_params().candidates["mnist5k"] if pairs is None else pairs:
        state = train_pair(pair, return_state=True)
        if state.is_completed():
            versions[pair] = state.result()["version"]
        else:
            failures.append(f"{pair} ({state.message})")
    if failures:
        raise RuntimeError(f"these pairs failed: {'; '.join(failures)}. Trained: {', '.join(versions) or 'none'}.")
    return versions
