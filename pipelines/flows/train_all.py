"""The flow `train-all`: train several pairs, each in a process of its own, and compare them.

A process, because a training that crashes, runs out of memory or is killed must not take the others along.
"""

import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from pipelines.flows.shown import DEPLOYMENTS_FOLDER, remove_cancelled, tag_run
from pipelines.flows.train import check_attempts
from pipelines.params import QUICK_START, load_params
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.reports.comparison import read_reports, write_comparison
from pipelines.stages.train import Log

POLL_S = 0.2
GRACE_S = 20.0  # for a training to end by itself when it is told to


@flow(name="train-all", persist_result=False, on_cancellation=[remove_cancelled])
def train_all(pairs: list[str] | None = None, at_once: int = 1, again: bool = False) -> dict[str, str]:
    """Train several pairs and compare them; return the MLflow version of each.

    One that fails neither stops nor hides the others.
    Everything lies in a fresh folder of models/deployments/; the comparison is reports/comparison.html and the table
    artifact `comparison`. Whoever cancels this stops the trainings that are under way, too.

    Args:
        pairs: their names; None for those of the quick start.
        at_once: how many train at a time.
        again: train even those of which a version was registered from the same data, settings and code.

    Raises:
        ValueError: at_once is no positive number, or a pair is unknown; nothing was trained.
        ChildProcessError: at the end, naming the pairs that failed.
    """
    check_attempts()
    if at_once < 1:
        raise ValueError(f"at_once must be 1 or more, got {at_once}.")
    params = load_params()
    pairs = params.pairs_of(QUICK_START) if pairs is None else pairs
    tag_run(*pairs, *[params.pair(pair).dataset for pair in pairs])
    logger, folder, commands = get_run_logger(), DEPLOYMENTS_FOLDER / str(flow_run.get_id()), {}
    for pair in pairs:
        words = ["--out", str(folder / pair), "--report", str(folder / "reports" / pair)]
        words += [] if again else ["--reuse"]
        commands[pair] = [sys.executable, "-m", "pipelines.steps", "train-pair", pair, *words]
    # Their runs belong to the server that this flow uses, even if it is one that was started for it alone.
    with get_client(sync_client=True) as client:
        environment = {**os.environ, "PREFECT_API_URL": str(client.api_url).rstrip("/")}
    failures = run_apart(commands, at_once, folder / "logs", environment, logger.info)
    versions = {}
    for pair in (name for name in commands if name not in failures):
        identity = tracking.identity(folder / pair)
        found = registry.versions(params.pair(pair).dataset)
        versions[pair] = next(version.version for version in found if version.identity == identity)
    reports = read_reports(folder / "reports", without=failures)
    rows = [report.row for report in reports] + [{"pair": pair, "test": why} for pair, why in failures.items()]
    create_table_artifact(rows, key="comparison", description="The pairs of this run; test scores by dataset.")
    logger.info("the comparison is %s", write_comparison(reports, failures))
    if failures:
        named = "; ".join(f"{pair} ({why.rstrip('.')})" for pair, why in failures.items())
        raise ChildProcessError(f"these pairs failed: {named}. Trained: {', '.join(versions) or 'none'}.")
    return versions


def run_apart(
    commands: Mapping[str, Sequence[str]], at_once: int, logs: Path, environment: Mapping[str, str], log: Log
) -> dict[str, str]:
    """Run commands in processes of their own, some at a time, in order; return why, for each that failed.

    Whatever ends this ends them, too. What they print goes into `logs/NAME.log`; `log` is told of each begin and end.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = dict(commands)
    running: dict[str, Popen[bytes]] = {}
    failures: dict[str, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = next(iter(waiting))
                log(f"{name}: begins, its log is {logs / name}.log")
                command = waiting.pop(name)
                with open(logs / f"{name}.log", "wb") as output:
                    running[name] = Popen(command, env=environment, stdin=DEVNULL, stdout=output, stderr=STDOUT)
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                code = running.pop(name).returncode
                if code != 0:
                    failures[name] = _why(logs / f"{name}.log", code)
                log(f"{name}: {'failed: ' + failures[name] if name in failures else 'done'}")
            if not ended:
                time.sleep(POLL_S)
    finally:
        _stop(running.values())
    return failures


def _stop(processes: Collection[Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except TimeoutExpired:
            process.kill()
            process.wait()


def _why(log: Path, code: int) -> str:
    """Return the sentence that a failed command ended with, or else how it ended."""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("train-pair: ")]
    if said:
        return said[-1].removeprefix("train-pair: ")
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}; see {log}"
