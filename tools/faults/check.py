"""What is wrong after a fault, and how a fault is made without harm to the process that makes it."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.registry import decisions, lineage, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry

DATASET = "mnist5k"


def in_process(work: Callable[[], None]) -> int:
    """Do work in a forked process, whose connections and caches die with it; return its wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the process that was forked are not there
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed(work: Callable[[], None]) -> None:
    status = in_process(work)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "it was not killed: see above"


def fine(work: Callable[[], None]) -> None:
    assert in_process(work) == 0, "something was wrong afterwards: see above"


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
    unfinished = [report for report in decisions.decisions(dataset) if report["decision"] == "unfinished"]
    assert not unfinished, "a decision seems to be under way"
    left = [*Path().rglob(".*.run-*"), *Path().rglob(".promote-*"), *Path().rglob(".*.lock"), *Path().rglob(".*.new")]
    assert not left, f"left behind: {left}"
