"""Processes killed at their worst moments, and full disks: seconds each."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib.figure  # noqa: F401 -- once here, not in every fork
import mlflow
import torch
from prefect.logging import disable_run_logger

from pipelines.flows import train as training_flow
from pipelines.promotion import decide
from pipelines.promotion import move as promotion_flow
from pipelines.promotion.move import run_rollback
from pipelines.registry import decisions, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.reports import curve as training_report
from pipelines.stages import evaluate as evaluate_stage
from pipelines.stages import live_run
from pipelines.stages import train as train_stage
from pixelcnn.data import save_dataset
from pixelcnn.training import trainer
from tests.pipelines.projects import PAIR, tiny_dataset, tiny_params, write_params
from tests.pipelines.toys import INK, Toy
from tools.faults.check import DATASET, check, fine, in_process, killed

torch.set_num_threads(1)  # forked processes have no other threads


@dataclass(frozen=True)
class Fault:
    """A process is killed at a call."""

    name: str  # for the table
    target: tuple[object, str]  # the function, as its owner and name
    nth: int = 1  # of its calls
    after: bool = True  # as soon as it has returned; else just before it begins


PROMOTION = [
    Fault("before it decides", (decide.Decision, "__init__"), after=False),
    Fault("in the middle of the export", (Path, "rename"), after=False),
    Fault("after the export", (promotion_flow, "export")),
    Fault("while the decision is recorded", (decisions, "record_decision")),
    Fault("after the record", (decisions, "begin_moves")),
    Fault("after the alias previous", (registry, "set_alias")),
    Fault("after the alias champion", (registry, "set_alias"), nth=2),
    Fault("after the alias challenger", (registry, "remove_alias")),
    Fault("after it is served", (store, "serve")),
]
ROLLBACK = [
    Fault("after the record", (decisions, "begin_moves")),
    Fault("after the mark on the old one", (registry, "mark_rolled_back")),
    Fault("after it is served", (store, "serve")),
    Fault("after the alias previous", (registry, "set_alias")),
    Fault("after the alias champion", (registry, "set_alias"), nth=2),
    Fault("before its end is recorded", (decisions, "end_decision"), after=False),
]
TRAINER = [
    Fault("before the ID of its run is known", (tracking, "start_training_run")),
    Fault("in the middle of the training", (trainer, "format_progress")),
    Fault("after the training", (train_stage, "fit")),
    Fault("before the checkpoint is written", (evaluate_stage, "save_checkpoint"), after=False),
    Fault("while the reports are written", (training_report, "draw_extremes")),
    Fault("while the run is logged", (mlflow.MlflowClient, "log_inputs")),
    Fault("in the middle of the model's upload", (mlflow.MlflowClient, "log_model_artifacts"), after=False),
    Fault("after the run is logged", (tracking, "log_training_run")),
    Fault("before the alias challenger", (mlflow, "register_model")),
    Fault("after it is registered", (tracking, "register")),
]


def arm(fault: Fault) -> None:
    """Let this process be killed (signal 9, nothing runs afterwards) where the fault says."""
    owner, name = fault.target
    real, calls = getattr(owner, name), 0

    def deadly(*args: object, **words: object) -> object:
        nonlocal calls
        calls += 1
        if calls < fault.nth:
            return real(*args, **words)
        if fault.after:
            real(*args, **words)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    setattr(owner, name, deadly)


def promotion_case(fault: Fault) -> None:
    """Kill a promotion, run another, and check that the better model is champion."""
    toy = Toy(DATASET, Path.cwd())

    def begin() -> None:
        toy.register(0.3)
        toy.promote()
        registry.set_alias(toy.name, tracking.CHALLENGER, toy.register(INK))
        arm(fault)
        toy.promote()

    def again() -> None:
        toy.promote()
        check(toy.name, num_versions=2, num_runs=2)
        assert toy.aliases == {"champion": "2", "previous": "1"}, toy.aliases
        moved = [
            line["candidate"]["version"] for line in decisions.decisions(toy.name) if line["decision"] == "promoted"
        ]
        assert moved == ["1", "2"], f"the history tells of {moved}"

    killed(begin)
    fine(again)


def rollback_case(fault: Fault) -> None:
    """Kill a rollback, ask for it again, and check that it was done once, not undone."""
    toy = Toy(DATASET, Path.cwd())

    def begin() -> None:
        for ink in (0.3, INK):
            toy.register(ink)
            toy.promote()
        arm(fault)
        run_rollback(toy.name)

    def again() -> None:
        run_rollback(toy.name)
        check(toy.name, num_versions=2, num_runs=2)
        assert toy.aliases == {"champion": "1", "previous": "2"}, toy.aliases
        assert [version.rolled_back for version in registry.versions(toy.name)] == [False, True]

    killed(begin)
    fine(again)


def train() -> None:
    """Run the training flow in this process, without Prefect's engine."""
    flow: Any = training_flow  # whose names are replaced, in this process alone
    for name in ("train_task", "evaluate_task", "register_task", "find_task"):
        setattr(flow, name, getattr(flow, name).fn)
    for name in ("tag_run", "show_training"):
        setattr(flow, name, lambda *_: None)
    # Sheets of samples are not what is tried here, and compiling a sampler takes seconds.
    stage: Any = train_stage
    stage.warm_up = lambda model: 0.0
    for name in ("draw_samples", "draw_completions"):
        setattr(training_report, name, lambda path, *args, **words: path.write_bytes(b"a picture"))
    live_run.TRACKER_PAUSE_S = 0.0
    with disable_run_logger():
        training_flow.train_pair.fn(PAIR, f"models/{PAIR}", f"reports/{PAIR}")
        for hook in training_flow.train_pair.on_completion_hooks or []:  # as Prefect does, once it has heard of the end
            hook(cast(Any, None), cast(Any, None), cast(Any, None))


def small_project() -> None:
    """Make a project with a tiny pair in the current folder."""
    params = tiny_params()
    params["pairs"][PAIR]["train"]["save_minutes"] = 0  # every step is saved
    write_params(Path(), params)
    save_dataset(Path("data") / f"{DATASET}.safetensors", tiny_dataset())


def trainer_case(fault: Fault) -> None:
    """Kill a training, run it again, and check that there is one run and one version."""
    small_project()

    def begin() -> None:
        arm(fault)
        train()

    killed(begin)
    fine(_train_again)


def _train_again() -> None:
    train()
    check(DATASET, num_versions=1, num_runs=1)
    (run,) = tracking.client().search_runs([tracking.experiment_id(DATASET)])
    assert run.info.status == "FINISHED", run.info.status


def disk_full_case(folder: str) -> None:
    """Let a disk be full while a training is logged, make room, run it again, and check."""
    small_project()
    target = Path(folder)
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(target)], check=True)
    try:
        status = in_process(train)
    finally:
        subprocess.run(["umount", str(target)], check=True)
    assert os.waitstatus_to_exitcode(status) == 1, "the full disk went unnoticed"
    fine(_train_again)


def _may_mount() -> bool:
    """Say whether a small disk can be mounted here: root in a container often may not."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", folder]
        if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def cases() -> dict[str, Callable[[], None]]:
    """Return the cases that take seconds, by name."""
    found: dict[str, Callable[[], None]] = {}
    for kind, case, faults in (
        ("promotion", promotion_case, PROMOTION),
        ("rollback", rollback_case, ROLLBACK),
        ("trainer", trainer_case, TRAINER),
    ):
        for fault in faults:
            found[f"{kind} killed {fault.name}"] = partial(case, fault)
    if _may_mount():
        found["disk of the artifacts full while logging"] = partial(disk_full_case, "mlruns")
        found["disk of the reports full while they are written"] = partial(disk_full_case, "reports")
    return found
