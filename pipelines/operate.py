"""Keep the pipeline running on this machine: Prefect's server, the deployments, and a worker; until Ctrl-C.

    python -m pipelines.operate        # or: make operate

A server or worker that is there already is used as it is. One that was started here and dies is started again, at most
three times in an hour. A run whose process died is shown as crashed after a minute and a half, and a training is then
started again from its checkpoint.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import yaml
from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.settings import PREFECT_API_URL, temporary_settings
from typer import Option, Typer

from pipelines.errors import reason, run_typer
from pipelines.settings import Settings, in_prefect

DEFAULT_URL = "http://127.0.0.1:4200/api"
POOL = "pixelcnn"
PREFECT = str(Path(sys.executable).with_name("prefect"))
SERVER = (sys.executable, "-m", "pipelines.prefect_server")
START_S = 120
STOP_S = 8
POLL_S = 1.0
MAX_RESTARTS = 3  # within RESTARTS_S: what ends more often than that does not run here
RESTARTS_S = 3600
HEARTBEAT_S = 30  # the least that Prefect allows; its default, 180, would show a crash after nine minutes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, or the terminal closed
SIGN_OF_LIFE_S = 45  # a worker gives one every 30 s by Prefect's default, or a third more
AUTOMATIONS_FILE = Path(__file__).with_name("automations.yaml")

app = Typer(add_completion=False, rich_markup_mode=None)


def is_healthy(url: str) -> bool:
    """Say whether a Prefect server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except (OSError, HTTPException):  # nobody, or another program
        return False


def await_server(server: subprocess.Popen[bytes], url: str) -> None:
    """Return once a Prefect server answers. Raises OSError if it ends before, or takes too long."""
    deadline = time.monotonic() + START_S
    while not is_healthy(url):
        if server.poll() is not None or time.monotonic() > deadline:
            raise OSError(f"the Prefect server did not start at {url}; its message stands above.")
        time.sleep(POLL_S)


def has_worker() -> bool:
    """Say whether a worker of the environment's pool gives a new sign of life.

    One that was stopped does not say so: it stays ONLINE for a minute and a half.
    """

    def signs() -> set[tuple[str, Any]]:
        with get_client(sync_client=True) as client:
            workers = client.read_workers_for_work_pool(in_prefect(POOL))
        return {(worker.name, worker.last_heartbeat_time) for worker in workers if worker.status == "ONLINE"}

    known, deadline = signs(), time.monotonic() + SIGN_OF_LIFE_S
    while known and time.monotonic() < deadline:
        time.sleep(POLL_S)
        if signs() - known:
            return True
    return False


def read_server() -> tuple[set[str], dict[str, dict[str, Any]]]:
    """Return this environment's work pool if there is one, and what somebody may have set of its deployments, by name.

    Of that pool alone: others may have deployments of the same names, and more than one answer of the server holds.
    """
    ours = WorkPoolFilter(name=WorkPoolFilterName(any_=[in_prefect(POOL)]))
    with get_client(sync_client=True) as client:
        pools = client.read_work_pools(work_pool_filter=ours)
        deployments = client.read_deployments(work_pool_filter=ours)
    known: dict[str, dict[str, Any]] = {}
    for one in deployments:
        limit: Any = one.global_concurrency_limit and one.global_concurrency_limit.limit
        if limit and one.concurrency_options:
            limit = {"limit": limit, **one.concurrency_options.model_dump(mode="json", exclude_none=True)}
        active = {getattr(each.schedule, "cron", ""): each.active for each in one.schedules}  # in no order of ours
        folder = next((step.get("directory") for steps in one.pull_steps or () for step in steps.values()), None)
        known[one.name] = {"paused": one.paused, "concurrency_limit": limit, "active": active, "folder": folder}
    return {pool.name for pool in pools}, known


def deploy(environment: Mapping[str, str]) -> None:
    """Make the work pool and the deployments of prefect.yaml, under this environment's own names, or raise OSError.

    A pool that is there stays as it is; a deployment stays paused, limited, and with its schedules on or off, as
    somebody has set it.
    """
    pool, (pools, known) = in_prefect(POOL), read_server()
    for place in sorted({one.pop("folder", None) for one in known.values()} - {None, environment.get("PWD")}):
        if Path(place).is_dir():  # a clone with the same server, or the same user, who has one database of Prefect
            text = "and work in this folder from now on. Give each clone its own PREFECT_HOME, and port (--url)."
            print(f"The deployments worked in {place}, {text}", flush=True)
    try:
        settings = _settings(pool, known)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"prefect.yaml cannot be deployed ({reason(error)}). Mend what was changed in it.") from None
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings, file)
        file.flush()
        make_pool = [] if pool in pools else [("work-pool", "create", pool, "--type", "process")]
        for words in (*make_pool, ("deploy", "--all", "--prefect-file", file.name)):
            if subprocess.run([PREFECT, "--no-prompt", *words], env=dict(environment), check=False).returncode != 0:
                raise OSError(f"`prefect {' '.join(words)}` failed; its message stands above.")


def _settings(pool: str, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return prefect.yaml with this environment's names, and what somebody has set of `known` deployments."""
    settings: dict[str, Any] = yaml.safe_load(Path("prefect.yaml").read_text())
    # Whichever worker takes a run: it acts on the registry and the store of this environment.
    variables = {"env": {"PIXELCNN_ENVIRONMENT": Settings().environment}}
    for deployment in settings["deployments"]:
        deployment["name"] = in_prefect(deployment["name"])
        deployment["work_pool"] |= {"name": pool, "job_variables": variables}
        there = known.get(deployment["name"], {})
        active = there.pop("active", {})
        for schedule in deployment.get("schedules", ()):
            alone = next(iter(active.values())) if len(active) == 1 else schedule.get("active", True)  # of another time
            schedule["active"] = active.get(schedule.get("cron", ""), alone)  # another has an interval, say
        # One of an earlier release has no limit that anybody has set: it gets the file's.
        deployment |= {key: value for key, value in there.items() if value is not None}
    return settings


def automate() -> None:
    """Put the automations into the server as the file has them; what notifies, where there is somebody to be notified.

    One that somebody has switched off stays off. What notifies is this environment's own, as is its webhook.
    """
    known: Any = Automation  # its methods are awaited in a coroutine, done at once here
    text, on_call = AUTOMATIONS_FILE.read_text(), None
    if url := Settings().notify_url:
        webhook: Any = CustomWebhookNotificationBlock
        told = {"text": "{{subject}}\n{{body}}"}
        block = webhook(name="on-call", url="{{url}}", secrets={"url": url}, json_data=told)  # whoever has it may post
        name = re.sub("[^a-z0-9]+", "-", in_prefect("on-call").lower())  # all that Prefect takes
        on_call = str(block.save(name, overwrite=True))
    ours = {"prefect.resource.role": "work-pool", "prefect.resource.name": in_prefect(POOL)}
    for values in yaml.safe_load(text.replace("block_document_id: on-call", f"block_document_id: {on_call}")):
        if any(action["type"] == "send-notification" for action in values["actions"]):
            if on_call is None:
                continue
            values["name"] = in_prefect(values["name"])
            values["trigger"]["match_related"] = [values["trigger"]["match_related"], ours]
        try:
            there = known.read(name=values["name"])
        except ValueError:
            known.model_validate(values).create()
        else:
            known.model_validate({**values, "id": there.id, "enabled": there.enabled}).update()


@app.command()
def operate(url: Annotated[str | None, Option(help="of Prefect's API; PREFECT_API_URL if left out")] = None) -> None:
    """Keep the pipeline running here."""
    url = (url or Settings().prefect_url or DEFAULT_URL).rstrip("/")
    if not re.fullmatch(r"https?://([^/\s]*@)?(\[[^]/\s]+]|[^]/\s:@[]+)(:\d+)?/.*", url):
        raise ValueError(f"the address of Prefect's API must be like {DEFAULT_URL}, got {url!a}.")
    environment = {**os.environ, "PREFECT_API_URL": url, "PWD": os.getcwd()}
    environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(HEARTBEAT_S)
    address, pool = urlsplit(url), in_prefect(POOL)
    listen = ("--host", address.hostname or "127.0.0.1", "--port", str(address.port or 4200))
    commands = {"server": (*SERVER, *listen), "worker": (PREFECT, "worker", "start", "--pool", pool)}
    processes: dict[str, subprocess.Popen[bytes]] = {}  # what is started here

    def start(name: str) -> None:
        # In a session of its own: Ctrl-C reaches this process alone, which then stops the others in order.
        processes[name] = subprocess.Popen(commands[name], env=environment, start_new_session=True)
        if name == "server":
            await_server(processes[name], url)

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` asks for
            signal.signal(number, interrupt)
    try:
        if not is_healthy(url):
            start("server")
        with temporary_settings({PREFECT_API_URL: url}):
            deploy(environment)
            automate()
            if not processes and has_worker():
                print(f"Ready: the pool {pool} of {url} has a worker already.", flush=True)
                return
        start("worker")
        print(f"Ready: server at {url}, worker of the pool {pool}. Ctrl-C ends what was started here.", flush=True)
        restarts: deque[float] = deque(maxlen=MAX_RESTARTS + 1)
        while True:
            time.sleep(POLL_S)
            for name, process in processes.items():
                code = process.poll()
                if code is None:
                    continue
                restarts.append(time.monotonic())
                if len(restarts) > MAX_RESTARTS and restarts[-1] - restarts[0] < RESTARTS_S:
                    raise OSError(f"the {name} ended again and again, at last with exit code {code}; see above.")
                print(f"the {name} ended ({code}): another one is started", flush=True)
                start(name)
    except KeyboardInterrupt:
        print("ending ...", flush=True)
    finally:
        ignore_signals()
        stop(list(processes.values()))


def ignore_signals() -> None:
    """What ends the processes must not be interrupted itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, once."""
    ignore_signals()
    raise KeyboardInterrupt


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop in reverse order: SIGTERM (drain), SIGTERM (cancel runs), SIGKILL."""
    for process in reversed(processes):
        for sent in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if process.poll() is not None:
                break
            os.killpg(process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)


def main(argv: Sequence[str] | None = None) -> int:
    return run_typer(app, "operate", "python -m pipelines.operate", argv)


if __name__ == "__main__":
    sys.exit(main())
