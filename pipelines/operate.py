"""Keep the pipeline running on this machine: Prefect's server, the deployments, and a worker; until Ctrl-C.

    python -m pipelines.operate        # or: make operate

A server or worker that is there already is used as it is. A worker that dies is started again. A run whose process died
is shown as crashed after a minute and a half, and a training is then started again from its checkpoint.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings

from pipelines.steps import run

DEFAULT_URL = "http://127.0.0.1:4200/api"
POOL = "pixelcnn"
PREFECT = str(Path(sys.executable).with_name("prefect"))
START_S = 120
STOP_S = 8
POLL_S = 1.0
HEARTBEAT_S = 30  # the least that Prefect allows; its default, 180, would show a crash after nine minutes
SILENT_S = 3 * HEARTBEAT_S  # two heartbeats may come late on a busy machine: a run that lives is not declared dead
_RUN: Any = {"prefect.resource.id": "prefect.flow-run.*"}
_ENDS = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
_TRAININGS: Any = {"prefect.resource.role": "flow", "prefect.resource.name": ["train-pair", "train-all"]}
_BEAT = "prefect.flow-run.heartbeat"

AUTOMATIONS = [
    Automation(
        name="a silent run has crashed",
        description="The process of a run that gives no sign of life is dead, or its machine is.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match=_RUN,
            for_each={"prefect.resource.id"},
            after={_BEAT},
            expect={_BEAT, *_ENDS},
            threshold=1,
            within=timedelta(seconds=SILENT_S),
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message="no sign of life", force=True)],
    ),
    Automation(
        name="a crashed training is started again",
        description="It goes on from its checkpoint; after some attempts it fails by itself.",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            match=_RUN,
            match_related=_TRAININGS,
            expect={"prefect.flow-run.Crashed"},
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            ChangeFlowRunState(name=None, state=StateType.SCHEDULED, message="again, from its checkpoint", force=False)
        ],
    ),
]


def is_healthy(url: str) -> bool:
    """Say whether a Prefect server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False


def await_server(server: subprocess.Popen[bytes], url: str) -> None:
    """Return once a Prefect server answers. Raises OSError if it ends before, or takes too long."""
    deadline = time.monotonic() + START_S
    while not is_healthy(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"the Prefect server did not start at {url}; its message stands above.")
        time.sleep(POLL_S)


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Run a Prefect server with a database of its own in a folder; yield its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        command,
        env={**os.environ, "PREFECT_HOME": str(folder / "server")},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}/api"
    try:
        await_server(server, url)
        yield url
    finally:
        stop([server])


def has_worker() -> bool:
    """Say whether the pool has a worker that is alive."""
    with get_client(sync_client=True) as client:
        try:
            return any(worker.status == "ONLINE" for worker in client.read_workers_for_work_pool(POOL))
        except ObjectNotFound:
            return False


def automate() -> None:
    """Create the automations that this server does not have."""
    for automation in AUTOMATIONS:
        try:
            cast(Any, Automation).read(name=automation.name)
        except ValueError:
            cast(Any, automation).create()  # awaited in a coroutine, done at once here


def operate(url: str) -> None:
    """Start what is missing, and keep it running until this process is stopped.

    Raises:
        OSError: the server does not start, or the deployments cannot be made.
    """
    environment = {**os.environ, "PREFECT_API_URL": url, "PWD": os.getcwd()}
    environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(HEARTBEAT_S)
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C reaches this process alone, which then ends the others in order.
        started.append(subprocess.Popen([PREFECT, *words], env=environment, start_new_session=True))
        return started[-1]

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        if not is_healthy(url):
            address = urlsplit(url)
            host, port = address.hostname or "127.0.0.1", str(address.port or 4200)
            await_server(start("server", "start", "--host", host, "--port", port), url)
        for words in (
            ("work-pool", "create", POOL, "--type", "process", "--overwrite"),
            ("deploy", "--all"),
        ):
            if subprocess.run([PREFECT, "--no-prompt", *words], env=environment, check=False).returncode != 0:
                raise OSError(f"`prefect {' '.join(words)}` failed; its message stands above.")
        with temporary_settings({PREFECT_API_URL: url}):
            automate()
            has_one = has_worker()
        if has_one:
            print(f"Ready: the pool {POOL} of {url} has a worker already.", flush=True)
            worker = None
        else:
            worker = start("worker", "start", "--pool", POOL)
            print(f"Ready: server at {url}, worker of the pool {POOL}. Ctrl-C ends what was started here.", flush=True)
        while started:
            time.sleep(POLL_S)
            if worker is not None and worker.poll() is not None:
                print(f"the worker ended ({worker.returncode}): another one is started", flush=True)
                worker = start("worker", "start", "--pool", POOL)
    except KeyboardInterrupt:
        print("ending ...", flush=True)
    finally:
        stop(started)


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes, the last first; a worker that is told once waits for its runs, told twice it ends them."""
    for process in reversed(processes):
        for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                break
            os.killpg(process.pid, sent)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                continue


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.operate", description="Keep the pipeline running here.")
    parser.add_argument("--url", default=os.environ.get("PREFECT_API_URL") or DEFAULT_URL, help="of Prefect's API")
    arguments = parser.parse_args(argv)
    return run("operate", lambda: operate(arguments.url))


if __name__ == "__main__":
    sys.exit(main())
