"""Faults on purpose: processes killed at their worst moments, full disks, servers away; then one rerun, and a check.

    python -m tests.pipelines.faults --times 10              # the cases that take seconds
    python -m tests.pipelines.faults --times 1 --slow        # and those with real servers

It prints a table: the fault, how often it was made, and after how many nothing was wrong. Wrong are: a version that is
registered twice or not whole, an alias on a version that is not there, a served model that is not the champion, a run
or decision that seems to be under way for ever, what lineage --verify finds, and files left behind.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib.figure  # noqa: F401 -- once here, not in every fork
import mlflow
import torch
from prefect.logging import disable_run_logger

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does, for the helpers beside this file

from projects import PAIR, tiny_dataset, tiny_params, write_params
from toys import INK, Toy

from pipelines import lineage, promotion_flow, registry, store, tracking, training_flow, training_report
from pipelines.promotion_flow import run_rollback
from pixelcnn.data import save_dataset

torch.set_num_threads(1)  # forked processes have no other threads

DATASET = "mnist5k"
Target = tuple[object, str]


@dataclass(frozen=True)
class Fault:
    """A process is killed at a call.

    Args:
        name: for the table.
        target: the function, as its owner and name.
        nth: which of its calls.
        after: killed as soon as it has returned; else just before it begins.
    """

    name: str
    target: Target
    nth: int = 1
    after: bool = True


PROMOTION = [
    Fault("before it decides", (promotion_flow._Decision, "decide"), after=False),
    Fault("in the middle of the export", (Path, "rename"), after=False),
    Fault("after the export", (promotion_flow, "export")),
    Fault("while the decision is recorded", (registry, "record_decision")),
    Fault("after the record", (registry, "begin_moves")),
    Fault("after the alias previous", (registry, "set_alias")),
    Fault("after the alias champion", (registry, "set_alias"), nth=2),
    Fault("after the alias challenger", (registry, "remove_alias")),
    Fault("after it is served", (store, "serve")),
]
ROLLBACK = [
    Fault("after the record", (registry, "begin_moves")),
    Fault("after the mark on the old one", (registry, "mark_rolled_back")),
    Fault("after it is served", (store, "serve")),
    Fault("after the alias previous", (registry, "set_alias")),
    Fault("after the alias champion", (registry, "set_alias"), nth=2),
    Fault("before its end is recorded", (registry, "end_moves"), after=False),
]
TRAINER = [
    Fault("before the ID of its run is known", (tracking, "start_training_run")),
    Fault("in the middle of the training", (training_flow, "format_progress")),
    Fault("after the training", (training_flow, "fit")),
    Fault("before the checkpoint is written", (training_flow, "save_checkpoint"), after=False),
    Fault("while the reports are written", (training_report, "draw_extremes")),
    Fault("while the run is logged", (mlflow, "log_params")),
    Fault("in the middle of the model's upload", (mlflow.MlflowClient, "log_model_artifacts"), after=False),
    Fault("after the run is logged", (tracking, "log_training_run")),
    Fault("before the alias challenger", (mlflow, "register_model")),
    Fault("after it is registered", (tracking, "register")),
]


def in_process(work: Callable[[], None]) -> int:
    """Do work in a forked process, whose connections and caches die with it; return its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


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


def check(dataset: str, num_versions: int, num_runs: int) -> None:
    """Raise AssertionError for whatever is lost, doubled or half done."""
    client = tracking.client()
    versions = registry.versions(dataset)
    found = {version.version: version for version in versions}
    assert len(versions) == num_versions, f"{len(versions)} versions, not {num_versions}"
    assert len({version.tags["weights_sha256"] for version in versions}) == num_versions, "a version twice"
    aliases = registry.aliases(dataset)
    assert set(aliases.values()) <= set(found), f"an alias without its version: {aliases}"
    champion = found.get(aliases.get(tracking.CHAMPION, ""))
    if champion is not None:
        served = store.latest(champion.name)
        assert served == store.tag_of(champion.lineage()), f"{served} is served, not the champion"
        assert aliases.get(tracking.PREVIOUS) != champion.version, "the champion is its own predecessor"
        assert aliases.get(tracking.CHALLENGER) != champion.version, "the champion challenges itself"
    for version in versions:
        _, failures = lineage.verify(version)
        assert not failures, failures
    experiment = tracking.experiment_id(dataset)
    runs = client.search_runs([experiment])
    assert len(runs) == num_runs, f"{len(runs)} runs, not {num_runs}"
    models = client.search_logged_models([experiment])
    assert all(model.status == "READY" for model in models), "a logged model that is not whole"
    unfinished = [report for report in registry.decisions(dataset) if report["decision"] == "unfinished"]
    assert not unfinished, "a decision seems to be under way"
    left = [*Path().rglob(".*.run-*"), *Path().rglob(".promote-*"), *Path().rglob(".*.lock"), *Path().rglob(".*.new")]
    assert not left, f"left behind: {left}"


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
            line["candidate"]["version"] for line in registry.decisions(toy.name) if line["decision"] == "promoted"
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
    for name in ("load", "train", "evaluate_model", "log", "register", "find_trained"):
        setattr(training_flow, name, getattr(training_flow, name).fn)
    # Sheets of samples are not what is tried here, and compiling a sampler takes seconds.
    training_flow.warm_up = lambda model: None
    for name in ("draw_samples", "draw_completions"):
        setattr(training_report, name, lambda path, *args, **words: path.write_bytes(b"a picture"))
    training_flow.TRACKER_PAUSE_S = 0.0
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

    def again() -> None:
        train()
        check(DATASET, num_versions=1, num_runs=1)
        (run,) = tracking.client().search_runs([tracking.experiment_id(DATASET)])
        assert run.info.status == "FINISHED", run.info.status

    killed(begin)
    fine(again)


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

    def again() -> None:
        train()
        check(DATASET, num_versions=1, num_runs=1)

    fine(again)


def killed(work: Callable[[], None]) -> None:
    status = in_process(work)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it was not killed: see above"


def fine(work: Callable[[], None]) -> None:
    assert in_process(work) == 0, "something was wrong afterwards: see above"


def quick_cases() -> dict[str, Callable[[], None]]:
    """Return the cases that take seconds, by name."""
    cases: dict[str, Callable[[], None]] = {}
    for kind, case, faults in (
        ("promotion", promotion_case, PROMOTION),
        ("rollback", rollback_case, ROLLBACK),
        ("trainer", trainer_case, TRAINER),
    ):
        for fault in faults:
            cases[f"{kind} killed {fault.name}"] = lambda case=case, fault=fault: case(fault)  # type: ignore[misc]
    if os.geteuid() == 0 and shutil.which("mount"):  # a small disk is mounted
        cases["disk of the artifacts full while logging"] = lambda: disk_full_case("mlruns")
        cases["disk of the reports full while they are written"] = lambda: disk_full_case("reports")
    return cases


@contextmanager
def fresh_folder(database: Path) -> Iterator[None]:
    """Work in an empty folder, with a new database and a new model store."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shutil.copy(database, Path(folder) / "mlflow.db")
        os.environ |= {"BENTOML_HOME": f"{folder}/bentoml", "MLFLOW_TRACKING_URI": ""}
        os.environ["GIT_CEILING_DIRECTORIES"] = str(Path(folder).parent)
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def new_database(folder: Path) -> Path:
    """Make an MLflow database once: its schema takes seconds. What is imported here need not be in every fork."""
    os.chdir(folder)
    os.environ |= {"BENTOML_HOME": f"{folder}/bentoml", "MLFLOW_TRACKING_URI": ""}
    tracking.client()
    shutil.copy("mlflow.db", "new.db")
    toy = Toy(DATASET, folder)
    toy.train(INK)
    toy.promote()
    check(toy.name, num_versions=1, num_runs=1)
    return folder / "new.db"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pipelines.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=1, help="how often each fault is made")
    parser.add_argument("--slow", action="store_true", help="also the cases with real servers, minutes each")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    cases = quick_cases()
    if arguments.slow:
        from slow_faults import slow_cases

        cases |= slow_cases()
    failed = 0
    print("| fault | times | nothing wrong after one rerun |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        database = new_database(Path(folder))
        for name, case in cases.items():
            if arguments.only not in name:
                continue
            right = 0
            for _ in range(arguments.times):
                with fresh_folder(database):
                    try:
                        case()
                        right += 1
                    except AssertionError as error:
                        print(f"{name}: {error}", file=sys.stderr)
            failed += arguments.times - right
            print(f"| {name} | {arguments.times} | {right} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
