"""The flow `train-pair`: train, evaluate and register one pair, in one run that Prefect watches and retries.

It calls the functions that DVC's stages call (`pipelines/stages/`), and writes into folders of its own.
"""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from pipelines.files import file_lock
from pipelines.flows.shown import DEPLOYMENTS_FOLDER, remove_cancelled, show_training, tag_run
from pipelines.params import load_params
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.stages import evaluate, register, train
from pixelcnn.checkpoint import CARD_FILE, save_checkpoint

MAX_ATTEMPTS = 3  # of a deployment's run that crashes: its checkpoint brings nothing if the cause is still there

# Nothing is cached or stored by Prefect, so nothing is ever pickled.
_NOT_STORED: dict[str, Any] = {"persist_result": False, "cache_policy": NO_CACHE}
# The tracking store may be busy, or out of reach for half a minute; training again would help nothing.
_RETRIED: dict[str, Any] = {**_NOT_STORED, "retries": 3, "retry_delay_seconds": [2, 10, 30]}


@task(name="train", **_NOT_STORED)
def train_task(pair: str, trained: Path, state: Path | None, half: bool) -> None:
    """Train the pair's network."""
    train.train(pair, trained, state, half, get_run_logger().info)


@task(name="evaluate", **_NOT_STORED)
def evaluate_task(pair: str, trained: Path, out: Path, report: Path) -> None:
    """Score what was trained; write the checkpoint and its reports."""
    evaluate.evaluate(pair, trained, out, report, get_run_logger().info)


@task(name="register", **_RETRIED)
def register_task(out: Path, report: Path) -> dict[str, str]:
    """Complete the MLflow run, and make its model a version."""
    return register.register(out, report, log=get_run_logger().info)


@task(name="find", **_RETRIED)
def find_task(inputs: str, dataset: str, out: Path, report: Path) -> dict[str, str] | None:
    """Write the checkpoint and the reports of a version from the same inputs; return None if there is none."""
    done = tracking.runs_of_inputs(dataset, inputs)
    version = next((one for one in reversed(registry.versions(dataset)) if one.run_id in done), None)
    if version is None:
        return None
    model, scores = registry.load(version)
    with tempfile.TemporaryDirectory() as folder:
        tracking.download_files(version.run_id, Path(folder))
        card = (Path(folder) / CARD_FILE).read_text()
        report.mkdir(parents=True, exist_ok=True)
        for file in (path for name in register.REPORT_FILES if (path := Path(folder) / name).exists()):
            shutil.copyfile(file, report / file.name)
    save_checkpoint(out, model, scores, getattr(torch, scores["weights_dtype"]), card)
    get_run_logger().info(
        "not trained again: %s version %s, run %s, followed from the same data, settings and code",
        *(version.name, version.version, version.run_id),
    )
    return {"run_id": version.run_id, "version": version.version, "out": str(out)}


def check_attempts() -> None:
    """Raise RuntimeError if Prefect has started this flow run too often: it would crash and be retried for ever."""
    attempt = flow_run.get_run_count()
    if attempt > MAX_ATTEMPTS:
        raise RuntimeError(
            f"this run has crashed {attempt - 1} times: see its log, mend the cause, and start a new one."
        )


_finished: list[Path] = []  # what was trained, on the way to a checkpoint


def _remove_trained(flow: Any, flow_run: Any, state: Any) -> None:
    """Remove what only a run that is not done needs: the state, and the weights without scores."""
    while _finished:
        trained = _finished.pop()
        shutil.rmtree(trained, ignore_errors=True)
        train.remove_finished_states(trained)
        with suppress(OSError):  # another run's are still in it
            trained.parent.rmdir()


# Only when Prefect knows of the end: if its server is away then, the next attempt finds the training done.
@flow(name="train-pair", persist_result=False, on_completion=[_remove_trained], on_cancellation=[remove_cancelled])
def train_pair(
    pair: str,
    out: str | None = None,
    report: str | None = None,
    state: str | None = None,
    half: bool = False,
    reuse: bool = False,
) -> dict[str, str]:
    """Train, evaluate, record and register one pair; return `run_id` and `version` in MLflow, and `out`.

    Two trainings that would write the same folder do not run at once: the second says whom it waits for, and then
    takes the first one's result if it followed from the same inputs.

    Args:
        pair: its name in params.yaml.
        out: folder of the checkpoint, which may be replaced if it is one; None for a fresh one in models/deployments/.
        report: folder of metrics, curve and sample sheet; None for one beside `out`.
        state: folder of the training's state; None for a hidden one beside `out`. See `stages.train.train`.
        half: store the weights in half precision, where they score alike.
        reuse: take a registered version of the same data, settings and code instead of training again.

    Raises:
        ValueError: params.yaml, the pair or the data are not as they should be; `out` holds something else.
        FloatingPointError: the training diverged.
        RuntimeError: Prefect has started this run too often.
    """
    check_attempts()
    params = load_params()
    dataset = params.pair(pair).dataset
    tag_run(pair, dataset)
    out_folder = Path(out) if out else DEPLOYMENTS_FOLDER / str(flow_run.get_id()) / pair
    report_folder = Path(report) if report else out_folder.with_name(f"{out_folder.name}-report")
    train.check_folders(out_folder, Path(state) if state else None)
    # A state that is carried over has a history of its own.
    inputs = None if state else train.inputs_of(pair, params, train.load(dataset), half)
    lock = out_folder.with_name(f".{out_folder.name}.lock")
    with file_lock(lock, f"the training of {pair}", get_run_logger().warning) as waited:
        trained = out_folder.parent / ".trained" / out_folder.name
        found = find_task(inputs, dataset, out_folder, report_folder) if inputs and (reuse or waited) else None
        if found is None:
            train_task(pair, trained, Path(state) if state else None, half)
            evaluate_task(pair, trained, out_folder, report_folder)
            found = register_task(out_folder, report_folder)
        _finished.append(trained)  # a run that was cut off may have left it, whoever did the work
        show_training(pair, out_folder, report_folder, found["version"])
    return found
