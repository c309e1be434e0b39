"""The record of decisions: who became champion, when and why. Runs of MLflow's experiment `promotions`.

None is ever changed or removed. A decision is recorded before anything moves, so that whoever comes after a process
that was killed can carry it out.
"""

import getpass
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlflow
from mlflow.entities import Metric, RunTag
from mlflow.exceptions import MlflowException

from pipelines.params import DECISIONS_EXPERIMENT
from pipelines.registry import runs as tracking
from pipelines.registry.versions import utc

PROMOTED, KEPT, FAILED, ROLLED_BACK, RELEASED = "promoted", "kept", "failed", "rolled back", "released"
_MOVES_TAG = "moves"  # of a decision's run: begun, then ended, the latter after the run itself
_COMPARED_TAG = "compared"  # the versions, with commas between them
REGISTRY_TAG = "registry"  # of the experiment

Report = dict[str, Any]


def registry_id() -> str:
    """Return the identity of this registry, which stays its own wherever it is moved."""
    client, experiment = tracking.client(), tracking.experiment_id(DECISIONS_EXPERIMENT)
    if REGISTRY_TAG not in client.get_experiment(experiment).tags:
        client.set_experiment_tag(experiment, REGISTRY_TAG, uuid.uuid4().hex)
    return str(client.get_experiment(experiment).tags[REGISTRY_TAG])


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


@contextmanager
def decision_run(dataset: str, kind: str, why: str | None = None) -> Iterator[str]:
    """Open the run that records a decision; it is marked FAILED by an exception, and ends by `end_decision` alone.

    `kind` is promotion, rollback or release; `why` somebody asked for it is recorded beside who did.
    """
    tags = {"dataset": dataset, "kind": kind, "who": _who(), **({"why": why} if why else {})}
    # Their order is that of their times: a clock that was put back must not change it.
    last_ms = max((run.info.start_time for run in _decision_runs(dataset)), default=0)
    start_ms = max(int(time.time() * 1000), last_ms + 1)
    run_id = tracking.create_run(DECISIONS_EXPERIMENT, f"{kind}-{dataset}", tags, start_ms)
    try:
        yield run_id
    except BaseException:
        with suppress(Exception):  # a registry that is away may be what the exception is about
            tracking.client().set_terminated(run_id, "FAILED")
        raise


def begin_moves(run_id: str, report: Report) -> None:
    record_decision(run_id, report)
    tracking.client().set_tag(run_id, _MOVES_TAG, "begun")


def end_decision(run_id: str, status: str = "FINISHED") -> None:
    """Record that a decision was carried out; or, FAILED, that it never will be."""
    client = tracking.client()
    client.set_terminated(run_id, status)
    client.set_tag(run_id, _MOVES_TAG, "ended")


def unfinished_decisions(dataset: str) -> list[tuple[str, Report | None]]:
    """Return the run ID and report of each decision about a dataset that a killed process left, the oldest first.

    The report is None if it was not yet decided.
    """
    unfinished = filter(_is_unfinished, _decision_runs(dataset))
    return [(run.info.run_id, _report(run) if run.data.tags.get(_MOVES_TAG) else None) for run in unfinished]


def _is_unfinished(run: mlflow.entities.Run) -> bool:
    """Say whether a decision is under way, was killed on its way, or failed after it was recorded."""
    was_begun = run.data.tags.get(_MOVES_TAG) == "begun"
    return bool(run.info.status == "RUNNING" or (run.info.status == "FAILED" and was_begun))


def record_decision(run_id: str, report: Report) -> None:
    """Write a decision into its run: numbers as metrics, words as tags, the whole report as an artifact."""
    tags = {key: str(report[key]) for key in ("decision", "reason", "data_hash") if report.get(key)}
    if report.get("compared"):
        tags[_COMPARED_TAG] = ",".join(report["compared"])
    parts = {name: part for name, part in report.items() if isinstance(part, dict)}
    tags |= {f"{role}_version": parts[role]["version"] for role in ("champion", "candidate") if role in parts}
    now_ms = int(time.time() * 1000)
    metrics = [
        Metric(f"{name}/{key}", value, now_ms, 0)
        for name, part in parts.items()
        for key, value in part.items()
        if isinstance(value, float)
    ]
    client = tracking.client()
    client.log_batch(run_id, metrics=metrics, tags=[RunTag(name, value) for name, value in tags.items()])
    client.log_dict(run_id, report, "report.json")
    old, decision = report.get("old"), report["decision"]
    if decision == KEPT:
        outcome = f"version {old} kept" if old else "no champion"
    else:
        outcome = f"version {report['new']} {'back' if decision == ROLLED_BACK else decision}"
        outcome += f" instead of {old}" if old else ""
    client.update_run(run_id, name=f"{report['dataset']}: {outcome}")


def versions_compared(dataset: str, data_hash: str) -> set[str]:
    """Return the versions that decisions so far have compared on the validation images of these data."""
    tags = [run.data.tags for run in _decision_runs(dataset) if run.data.tags.get("data_hash") == data_hash]
    return {version for one in tags if _COMPARED_TAG in one for version in one[_COMPARED_TAG].split(",")}


def decisions(dataset: str) -> list[Report]:
    """Return the reports of all decisions about a dataset, the oldest first.

    Each has `decision`, `kind` (promotion, rollback or release), `when` (UTC), `who`, `why` and `decision_run_id`; a
    decision that could not be carried out, or is still under way, has nothing else but a `reason`.
    """
    found = []
    for run in _decision_runs(dataset):
        report: Report = {"decision": FAILED, "reason": "it failed, was cut off, or was overtaken"}
        if _is_unfinished(run):
            report = {"decision": "unfinished", "reason": "it is under way, or was cut off"}
        elif run.info.status == "FINISHED":
            report = _report(run) or _of_tags(run)
        report |= {key: run.data.tags.get(key) for key in ("kind", "who", "why")}
        found.append({**report, "when": utc(run.info.start_time), "decision_run_id": run.info.run_id})
    return found


def champions(found: list[Report]) -> list[str]:
    """Return the chain of champions that decisions have made, the present one last: each rollback shortens it."""
    chain: list[str] = []
    for report in found:
        new = report.get("new")
        if new and report["decision"] == ROLLED_BACK and new in chain:
            del chain[len(chain) - chain[::-1].index(new) :]
        elif new:
            chain.append(new)
    return chain


def _report(run: mlflow.entities.Run) -> Report | None:
    """Return the report of a decision; None if it was lost, or is damaged."""
    try:
        return dict(mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/report.json"))
    except MlflowException as error:  # a store that is away fails here, too
        is_damaged = isinstance(error.__cause__, ValueError)  # no JSON: a power cut leaves files empty
        files = tracking.client().list_artifacts(run.info.run_id)
        if not is_damaged and any(file.path == "report.json" for file in files):
            raise
        return None


def _of_tags(run: mlflow.entities.Run) -> Report:
    """Return what a decision's tags still say: who became champion, and why, without weights or scores."""
    tags = run.data.tags
    roles = ("champion", "candidate")
    report: Report = {role: {"version": tags[f"{role}_version"]} for role in roles if f"{role}_version" in tags}
    report |= {"decision": tags["decision"], "reason": tags.get("reason", ""), "rolled_back": {"version": "(lost)"}}
    new = {PROMOTED: "candidate", RELEASED: "candidate", ROLLED_BACK: "champion"}.get(tags["decision"], "")
    return report | {"new": report.get(new, {}).get("version")}


def _decision_runs(dataset: str) -> list[mlflow.entities.Run]:
    experiment = tracking.client().get_experiment_by_name(DECISIONS_EXPERIMENT)
    if experiment is None:
        return []
    about, order = f"tags.dataset = '{dataset}'", ["attributes.start_time ASC"]
    return mlflow.search_runs([experiment.experiment_id], about, order_by=order, output_format="list")  # page by page


def history(dataset: str) -> list[str]:
    """Say who replaced whom in a dataset, when, and by how much: a line for each decision, the oldest first.

    LookupError if nothing was decided yet.
    """
    found = decisions(dataset)
    if not found:
        raise LookupError(f"nothing was decided for {dataset} yet: run python -m pipelines.steps promote {dataset}.")
    return [history_line(report) for report in found]


def history_line(report: Report) -> str:
    """Say a decision, as `decisions` returns it, in one line."""
    what = report.get("reason", "")
    if report["decision"] in (PROMOTED, RELEASED):
        champion = report.get("champion")
        replaced = f"replaced {_named(champion)}" if champion else "is the first champion"
        what = f"{_named(report['candidate'])} {replaced}"
        if champion and (difference := report.get("total_difference")):
            what += (
                f", {difference['mean']:+.3f} nats ({100 * report['confidence']:.5g} % interval "
                f"{difference['low']:+.3f} to {difference['high']:+.3f})"
            )
    elif report["decision"] == ROLLED_BACK:
        what = f"{_named(report['champion'])} replaced {_named(report['rolled_back'])}, asked for"
    asked = f"; {report['who']}: {report['why']}" if report.get("why") else ""
    return f"{report['when']}  {report['decision']:<11}  {what}{asked}"


def _named(scored: Report) -> str:
    return f"version {scored['version']}" + (f" ({scored['pair']})" if "pair" in scored else "")
