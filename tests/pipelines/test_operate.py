"""`python -m pipelines.operate` with a stand-in for Prefect's command: what ends, and how often it is started again."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import TERMINAL_STATES

from pipelines import operate
from pipelines.flows import drift
from tests.local import free_port
from tests.pipelines.projects import ROOT
from tools.faults.check import in_process

# A server lives for SERVER_S seconds; a worker lives as long as a server answers. With DEAF both ignore SIGTERM.
PREFECT = """
import http.server, os, signal, sys, threading, time, urllib.request
from pathlib import Path

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass

if "DEAF" in os.environ:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
words = [word for word in sys.argv[1:] if not word.startswith("--no-")]
with open("log", "a") as log:
    print(" ".join(words[:2]), os.getpid(), file=log)
if words[0] == "deploy":
    Path("deployed.yaml").write_text(Path(words[-1]).read_text())
if words[:2] == ["work-pool", "create"]:
    Path("pools").open("a").write(words[2] + " ")
if words[:2] == ["server", "start"]:
    Path("listens").write_text(" ".join(words[2:]))
    threading.Timer(float(os.environ["SERVER_S"]), lambda: os._exit(7)).start()
    http.server.HTTPServer(("127.0.0.1", int(words[-1])), Handler).serve_forever()
if words[:2] == ["worker", "start"]:
    Path("heartbeat").write_text(os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    while True:
        urllib.request.urlopen(os.environ["PREFECT_API_URL"] + "/health", timeout=1)
        time.sleep(0.1)
"""


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Prefect server that is not there yet; everything that starts one is a stand-in."""
    stand_in = tmp_path / "prefect"
    stand_in.write_text(f"#!{sys.executable}\n{PREFECT}")
    stand_in.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "prefect.yaml", tmp_path)
    monkeypatch.setattr(operate, "PREFECT", str(stand_in))
    monkeypatch.setattr(operate, "SERVER", (str(stand_in), "server", "start"))
    monkeypatch.setattr(operate, "POLL_S", 0.1)
    monkeypatch.setattr(operate, "automate", lambda: None)
    monkeypatch.setattr(operate, "has_worker", lambda: False)
    monkeypatch.setattr(operate, "read_server", lambda: (set(), {}))
    handlers = {number: signal.getsignal(number) for number in operate.SIGNALS}
    yield f"http://127.0.0.1:{free_port()}/api"
    for number, handler in handlers.items():
        signal.signal(number, handler)


def started() -> dict[str, list[int]]:
    """Return the process IDs of all that was started, by what it was."""
    found: dict[str, list[int]] = {}
    for line in Path("log").read_text().splitlines():
        what, _, pid = line.rpartition(" ")
        found.setdefault(what, []).append(int(pid))
    return found


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_server_that_dies_again_and_again_ends_it_with_one_sentence(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SERVER_S", "1.5")
    assert operate.main(["--url", url]) == 1
    said = capsys.readouterr()
    (sentence,) = said.err.splitlines()
    assert sentence.startswith("operate: the ")
    assert "ended again and again, at last with exit code" in sentence
    pids = started()
    assert 2 <= len(pids["server start"]) <= 1 + operate.MAX_RESTARTS
    assert len(pids["server start"]) + len(pids["worker start"]) == 2 + operate.MAX_RESTARTS
    port = url.rpartition(":")[2].removesuffix("/api")
    assert Path("listens").read_text() == f"--host 127.0.0.1 --port {port}", "it asks nobody for a password"
    assert Path("heartbeat").read_text() == str(operate.HEARTBEAT_S)
    assert not any(is_alive(pid) for group in pids.values() for pid in group)


def test_a_worker_whose_server_was_not_started_here_and_is_gone_ends_it_too(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operate, "is_healthy", lambda _: True)  # it was when it was asked
    assert operate.main(["--url", url]) == 1
    assert "the worker ended again and again, at last with exit code 1" in capsys.readouterr().err
    assert len(started()["worker start"]) == 1 + operate.MAX_RESTARTS


@pytest.mark.parametrize("sent", [(signal.SIGINT, signal.SIGINT), (signal.SIGHUP,)], ids=["twice", "terminal closed"])
def test_whatever_ends_it_ends_all_that_was_started(
    url: str, monkeypatch: pytest.MonkeyPatch, sent: tuple[signal.Signals, ...]
) -> None:
    monkeypatch.setenv("SERVER_S", "60")
    monkeypatch.setenv("DEAF", "1")
    monkeypatch.setattr(operate, "STOP_S", 0.5)
    monkeypatch.setattr(operate, "has_worker", lambda: pytest.fail("the server was not there: nobody works for it"))

    def send() -> None:
        while "worker start" not in Path("log").read_text():
            time.sleep(0.1)
        for number in sent:
            time.sleep(0.3)
            os.kill(os.getpid(), number)

    def work() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
        threading.Thread(target=send, daemon=True).start()
        assert operate.main(["--url", url]) == 0

    Path("log").touch()
    status = in_process(work)
    alive = [pid for what in ("server start", "worker start") for pid in started()[what] if is_alive(pid)]
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert (status, alive) == (0, [])


def test_under_nohup_a_closed_terminal_ends_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    monkeypatch.setattr(operate, "is_healthy", lambda _: True)
    monkeypatch.setattr(operate, "has_worker", lambda: True)
    monkeypatch.setattr(operate, "deploy", lambda _: found.append(signal.getsignal(signal.SIGHUP)))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert operate.main(["--url", url]) == 0
    assert found == [signal.SIG_IGN]


def test_what_ends_now_and_then_is_started_again_each_time(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []

    def ended(*words: object, **_: object) -> SimpleNamespace:
        started.append(words)
        if len(started) > 2 + operate.MAX_RESTARTS:
            raise KeyboardInterrupt
        return SimpleNamespace(poll=lambda: 1)

    monkeypatch.setattr(operate, "is_healthy", lambda _: True)
    monkeypatch.setattr(operate, "deploy", lambda _: None)
    monkeypatch.setattr(operate, "RESTARTS_S", 0)  # as if more time than that had passed
    monkeypatch.setattr(subprocess, "Popen", ended)
    assert operate.main(["--url", url]) == 0
    assert len(started) == 3 + operate.MAX_RESTARTS


def test_another_program_is_no_prefect_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-other\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert not operate.is_healthy(f"http://127.0.0.1:{listening.getsockname()[1]}/api")
        thread.join()


def test_a_worker_ends_before_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which it tells what became of its runs. Who hears nothing is killed."""
    sent: list[tuple[str, signal.Signals]] = []

    class Deaf:
        def __init__(self, pid: str) -> None:
            self.pid = pid

        def poll(self) -> int | None:
            return 1 if (self.pid, signal.SIGKILL) in sent else None

        def wait(self, seconds: float) -> int:
            raise subprocess.TimeoutExpired(self.pid, seconds)

    monkeypatch.setattr(os, "killpg", lambda pid, number: sent.append((pid, number)))
    operate.stop([Deaf("server"), Deaf("worker")])
    each = (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL)
    assert sent == [(name, number) for name in ("worker", "server") for number in each]


def test_a_worker_that_was_stopped_is_none(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To Prefect it is ONLINE for a minute and a half more."""
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    monkeypatch.setattr(operate, "POLL_S", 0.1)
    monkeypatch.setattr(operate, "SIGN_OF_LIFE_S", 2)
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=operate.POOL, type="process"))
        assert not operate.has_worker()

        def live() -> None:
            client.send_worker_heartbeat(operate.POOL, "a worker", 30)

        live()
        assert not operate.has_worker()
        monkeypatch.setattr(operate, "SIGN_OF_LIFE_S", 20)
        beats = [threading.Timer(seconds, live) for seconds in (0.5, 2, 4, 8)]  # a slow server tells of the first late
        for beat in beats:
            beat.start()
        assert operate.has_worker()
        for beat in beats:
            beat.cancel()
            beat.join()


def test_a_run_that_has_ended_is_not_a_silent_one() -> None:
    automations = yaml.safe_load(operate.AUTOMATIONS_FILE.read_text())
    (silent,) = [one["trigger"] for one in automations if one["name"] == "a silent run has crashed"]
    ended = {state.value.title() for state in TERMINAL_STATES} | {"TimedOut"}  # a state FAILED of another name
    assert {f"prefect.flow-run.{name}" for name in ended} <= set(silent["expect"])
    assert silent["within"] >= 3 * operate.HEARTBEAT_S, "else one that lives is declared dead"
    flows = [one["name"] for one in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]]
    assert silent["match_related"]["prefect.resource.name"] == sorted(flows), "nor are those of other projects"
    variable = f"export PREFECT_FLOWS_HEARTBEAT_FREQUENCY={operate.HEARTBEAT_S}\n"
    assert variable in (ROOT / "docs/operations.md").read_text(), "so do workers of other machines"


def test_a_run_that_is_started_by_hand_is_not_a_silent_one() -> None:
    """It is of no worker's, and was shown as crashed while it went on."""
    code = "import pipelines.flows, prefect; print(prefect.settings.PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value())"
    environment = {name: value for name, value in os.environ.items() if "HEARTBEAT" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == operate.HEARTBEAT_S


def test_environments_share_a_server_and_nothing_on_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the runs of one would act on the registry and the model store of the other."""
    Path("environments.yaml").write_text("staging: {registry: a, store: b}\nproduction: {registry: c, store: d}\n")
    for variable in ("MLFLOW_TRACKING_URI", "BENTOML_HOME", "PIXELCNN_SERVICE_URL"):
        monkeypatch.delenv(variable, raising=False)
    asked: list[str] = []
    monkeypatch.setattr(drift, "run_deployment", lambda name, **_: asked.append(name))
    monkeypatch.setattr(drift, "get_run_logger", lambda: logging.getLogger())
    monkeypatch.setattr(drift.registry, "versions", lambda _: [SimpleNamespace(version="1", tags={"pair": "x"})])
    names: list[str] = []
    for environment in ("", "staging", "production"):
        monkeypatch.setenv("PIXELCNN_ENVIRONMENT", environment)
        operate.deploy(os.environ)
        pool = Path("pools").read_text().split()[-1]
        deployments = yaml.safe_load(Path("deployed.yaml").read_text())["deployments"]
        names += [pool, *(deployment["name"] for deployment in deployments)]
        for deployment in deployments:
            assert deployment["work_pool"]["name"] == pool
            variables = deployment["work_pool"]["job_variables"]
            assert variables == {"env": {"PIXELCNN_ENVIRONMENT": environment or "development"}}
        drift._retrain("mnist5k", "1", "now")
        assert asked[-1].removeprefix("train-pair/") in names[-len(deployments) :], "by the environment's own name"
    assert {"pixelcnn", "promote", "pixelcnn-staging", "promote-staging", "promote-production"} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "damage",
    [
        ("name: train-pair", "nome: train-pair"),
        ("deployments:", "deployments: {"),
        ("schedules:", "schedules: 3 #"),
        ("work_pool: &pool {name: pixelcnn}", "work_pool: &pool pixelcnn"),
        ("deployments:", "deployments: x\nothers:"),
    ],
)
def test_a_mistake_in_prefect_yaml_is_one_sentence(
    url: str, monkeypatch: pytest.MonkeyPatch, damage: tuple[str, str]
) -> None:
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    path = Path("prefect.yaml")
    text = path.read_text()
    assert damage[0] in text
    path.unlink()  # it may be a link
    path.write_text(text.replace(*damage, 1))
    with pytest.raises(ValueError, match=r"^prefect\.yaml cannot be deployed \(.*\)\. Mend what was changed in it\.$"):
        operate.deploy(os.environ)


def test_deployments_that_could_not_be_made_are_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    monkeypatch.setattr(operate, "PREFECT", "false")  # the command, which fails
    with pytest.raises(OSError, match="`prefect work-pool create pixelcnn --type process` failed"):
        operate.deploy(os.environ)


def test_what_somebody_has_set_in_prefect_stays(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    for there in ({}, {"watch-drift": [True], "evaluate-champions": [False]}):
        known: dict = {"watch-drift": {"active": {"*/15 * * * *": True}}}
        known["evaluate-champions"] = {"active": {"0 12 * * *": True, "0 3 * * *": False}}  # the newest first
        known = {name: {**known[name], "paused": True, "concurrency_limit": 1} for name in there}
        monkeypatch.setattr(operate, "read_server", lambda known=known: ({operate.POOL} if known else set(), known))
        operate.deploy(os.environ)
        deployments = yaml.safe_load(Path("deployed.yaml").read_text())["deployments"]
        made = {one["name"]: [each.get("active", True) for each in one.get("schedules", ())] for one in deployments}
        assert made["watch-drift"] == there.get("watch-drift", [False])
        assert made["evaluate-champions"] == there.get("evaluate-champions", [True])
        kept = {one["name"]: one["concurrency_limit"] for one in deployments if one.get("paused")}
        assert kept == dict.fromkeys(there, 1)
    assert Path("pools").read_text().split() == [operate.POOL], "one that is there keeps its limit and its pause"


@pytest.mark.parametrize("known", [{}, {"active": {}, "paused": False, "concurrency_limit": None}], ids=["new", "old"])
def test_of_the_scheduled_runs_that_were_missed_one_starts(
    url: str, monkeypatch: pytest.MonkeyPatch, known: dict
) -> None:
    """Also of deployments that an earlier release made, without a limit."""
    there = {"evaluate-champions": known, "watch-drift": {**known}} if known else {}
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    monkeypatch.setattr(operate, "read_server", lambda: ({operate.POOL} if known else set(), there))
    operate.deploy(os.environ)
    deployments = yaml.safe_load(Path("deployed.yaml").read_text())["deployments"]
    limits = {one["name"]: one.get("concurrency_limit") for one in deployments if one.get("schedules")}
    one_alone = {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert limits == {"evaluate-champions": one_alone, "watch-drift": one_alone}


def test_a_schedule_may_be_an_interval(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As prefect.yaml may say anywhere else."""
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    text = Path("prefect.yaml").read_text()
    Path("prefect.yaml").write_text(text.replace('cron: "0 3 * * *", timezone: UTC', "interval: 3600"))
    for active in (True, False):
        known = {"evaluate-champions": {"active": {"": active}}}
        monkeypatch.setattr(operate, "read_server", lambda known=known: ({operate.POOL}, known))
        operate.deploy(os.environ)
        deployments = yaml.safe_load(Path("deployed.yaml").read_text())["deployments"]
        (schedule,) = next(one["schedules"] for one in deployments if one["name"] == "evaluate-champions")
        assert schedule == {"interval": 3600, "active": active}


def test_an_unknown_environment_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIXELCNN_ENVIRONMENT", "typo")
    assert operate.main([]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("operate: ")
    assert "environments.yaml" in sentence


def test_an_address_that_is_none_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("127.0.0.1:4200", "http://127.0.0.1:4200x/api", "http:///api", "ftp://127.0.0.1/api"):
        assert operate.main(["--url", wrong]) == 1
        said = f"the address of Prefect's API must be like {operate.DEFAULT_URL}, got {wrong!r}."
        assert capsys.readouterr().err == f"operate: {said}\n"
    assert not Path("log").exists()


def test_another_clone_is_told_of_deployments_that_move(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, is_said in ((tmp_path, False), (tmp_path / "gone", False), (tmp_path.parent, True)):
        known = {"promote": {"active": {}, "folder": str(folder)}}
        monkeypatch.setattr(operate, "read_server", lambda known=known: ({operate.POOL}, known))
        operate.deploy({**os.environ, "PWD": str(tmp_path)})
        assert (f"The deployments worked in {folder}, and work" in capsys.readouterr().out) == is_said
