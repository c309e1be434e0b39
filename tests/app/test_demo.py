"""`python -m app.demo` with stand-ins for the programs that it starts: what Ctrl-C leaves behind at any moment."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.canvas.views.demo import status_text
from app.demo import HOST, address_in_network, beside, main, note_progress, own_steps, port_of
from benchmarks.interrupts import marked_processes
from pixelcnn.training.trainer import StepReport, format_progress
from tests.local import free_port

ROOT = Path(__file__).parents[2]
# A step that ends only when it is killed, as does the process that it starts in a session of its own.
STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if "child" not in sys.argv:
    subprocess.Popen([sys.executable, __file__, "child"], start_new_session=True)
    open(os.environ["TMPDIR"] + "/../working", "w").write(str(os.nice(0)))
while True:
    time.sleep(1)
"""
# What answers at /readyz or /_stcore/health; its command ends with the port.
SERVER = """
import http.server, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
socketserver.TCPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""
PROGRAMS = ["make", "dvc", "python", "bentoml", "streamlit"]


class Demo:
    """The program, on a PATH that has nothing but stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.ports = {"SERVICE_PORT": free_port(), "CANVAS_PORT": free_port()}
        self.environment: dict[str, str] = {}
        self.hangup = signal.SIG_DFL  # also where the tests run under nohup
        self.process: subprocess.Popen[str] | None = None

    def stand_in(self, program: str, text: str) -> None:
        path = self.folder / program
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)

    def start(self, *words: str, **wishes: str) -> subprocess.Popen[str]:
        ports = {name: str(port) for name, port in self.ports.items()}
        environment = {
            "PATH": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "MARK": self.mark,
            **ports,
            **self.environment,
            **wishes,
        }
        command = [sys.executable, "-m", "app.demo", *words]
        self.process = subprocess.Popen(
            command,
            cwd=self.folder,
            env={**environment, "TMPDIR": str(self.folder)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, self.hangup),
        )
        return self.process

    def await_working(self) -> int:
        """Wait until a stubborn step works; return its niceness."""
        path = self.folder / "working"
        deadline = time.monotonic() + 60  # a loaded machine is no failure
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return int(path.read_text())

    def await_line(self, text: str) -> str:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return line
        pytest.fail(f"the demo ended without saying {text!r}")


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path)
    for program in PROGRAMS:
        demo.stand_in(program, SERVER if program in ("bentoml", "streamlit") else "")
    yield demo
    for pid in marked_processes(demo.mark):
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            os.kill(pid, signal.SIGKILL)
    if demo.process:
        demo.process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("program", "sent"),
    [
        *((program, signal.SIGINT) for program in [*PROGRAMS, ""]),
        *((program, sent) for program in ("dvc", "") for sent in (signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_interrupted_in_any_step_it_leaves_nothing(demo: Demo, program: str, sent: signal.Signals) -> None:
    if program:
        demo.stand_in(program, STUBBORN)
    process = demo.start()
    is_beside = program in ("python", "dvc")  # begun once the canvas is there, which keeps its processors
    if is_beside or not program:
        demo.await_line("Ready: draw at http://127.0.0.1:")
    if program:
        assert demo.await_working() == (19 if is_beside else os.nice(0))
    start = time.monotonic()
    os.killpg(process.pid, sent)  # as a terminal does
    said, _ = process.communicate(timeout=10)
    assert time.monotonic() - start < 5
    assert marked_processes(demo.mark) == {}
    # On a busy machine the canvas can be ready before the signal comes.
    lines = [line for line in said.splitlines() if line and not line.startswith("Ready: draw at ")]
    assert lines == ["Stopped. The next `make demo` goes on from here."]
    assert process.returncode == 0
    assert [path.name for path in demo.folder.iterdir() if path.name.startswith("demo-")] == []


def test_under_nohup_a_closed_terminal_ends_nothing(demo: Demo) -> None:
    demo.stand_in("dvc", "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.02)\nraise SystemExit(1)")
    demo.hangup = signal.SIG_IGN
    process = demo.start()
    demo.await_line("Ready")
    os.killpg(process.pid, signal.SIGHUP)
    (demo.folder / "go").touch()
    demo.await_line("The canvas stays, without the quick start: `dvc repro` failed")


def test_own_pictures_are_learned_before_they_are_served(demo: Demo) -> None:
    for program in ("python", "dvc"):
        demo.stand_in(program, f"import sys; open('ran', 'a').write(' '.join(['{program}', *sys.argv[1:]]) + chr(10))")
    demo.stand_in("streamlit", f"import os; open('told', 'w').write(os.environ['PIXELCNN_DEMO_STATUS'])\n{SERVER}")
    log = demo.folder / ".logs" / "quick-start.log"
    log.parent.mkdir()
    log.write_text("why it failed")
    process = demo.start("own", IMAGES="my pictures", NAME="glyphs", SIDE="48x32", LEVELS="", MINUTES="2")
    demo.await_line(f"Ready: draw at http://127.0.0.1:{demo.ports['CANVAS_PORT']}/?dataset=glyphs (")
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    again = "make own IMAGES='my pictures' NAME=glyphs SIDE=48x32 MINUTES=2"
    assert said.strip() == f"Stopped. The next `{again}` goes on from here."
    assert (demo.folder / "ran").read_text().splitlines() == [
        "python -m pipelines.steps add glyphs --images my pictures --keep --side 48x32 --minutes 2",
        "dvc repro own/dvc.yaml:evaluate@gated_pixelcnn-glyphs",
        "python -m pipelines.steps promote glyphs",
    ]
    assert (demo.folder / "told").read_text() == "", "the page looks for a quick start all the time"
    assert log.read_text() == "why it failed"
    name, steps = own_steps({"NAME": ""})
    assert name == "letters"
    assert [words[3] for words in steps if words[0] == "python"] == ["letters", "add", "promote"]


def test_pictures_of_which_no_champion_came_end_it_at_once(demo: Demo) -> None:
    """As where `promote` finds the model no better than the uniform distribution: it moves nothing, and says so."""
    refusing = """
        wanted = __import__("os").environ["PIXELCNN_DATASETS"]
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b'{"error": "no champion of %s is served."}' % wanted.encode())
"""
    ready = "\n        self.send_response(200)\n        self.end_headers()\n"
    demo.stand_in("bentoml", SERVER.replace(ready, refusing))
    said, _ = demo.start("own", NAME="glyphs").communicate(timeout=60)
    assert said == "error: there is nothing to draw with: no champion of glyphs is served.\n"
    assert marked_processes(demo.mark) == {}


@pytest.mark.parametrize("program", ["make", "bentoml", "streamlit"])
def test_a_part_that_fails_ends_all(demo: Demo, program: str) -> None:
    demo.stand_in(program, "raise SystemExit('no space left')")
    demo.stand_in("dvc", STUBBORN)
    process = demo.start()
    said, _ = process.communicate(timeout=20)
    *_, reason, sentence, end = said.split("\n")
    assert (reason, end) == ("no space left", "")
    assert sentence.startswith("error: ")
    assert sentence.endswith("; its message stands above.")
    assert process.returncode == 1
    assert marked_processes(demo.mark) == {}


def test_the_nats_of_labels_are_not_told_as_those_of_images(tmp_path: Path) -> None:
    """While the label network learned, the page said `validation 0.60 nats` of digits that cost 90."""
    data: Any = SimpleNamespace(image_shape=(1, 28, 28), num_levels=2)
    speed = {"learning_rate": 0.005, "images_per_s": 690.0, "train_nll_nats": 0.7}
    report = StepReport(step=90, epoch=1.5, remaining_s=40.0, validation_nll_nats=0.6, **speed)
    said = {"doing": "train", "what": "gated_pixelcnn-mnist5k", "validation": "90.70 nats", "left": "0:01"}
    line = f"02:05:28 {format_progress(report, data, of_labels=True)}"
    assert note_progress(line, said, tmp_path / "status.json") == {**said, "left": "0:40"}


@pytest.mark.timeout(400)  # a loaded machine is no failure
def test_a_quick_start_that_fails_leaves_the_canvas(demo: Demo) -> None:
    data: Any = SimpleNamespace(image_shape=(1, 28, 28), num_levels=2)
    speed = {"learning_rate": 0.005, "images_per_s": 690.0, "train_nll_nats": 95.4}
    reports = [
        StepReport(step=900, epoch=3.6, remaining_s=40.0, validation_nll_nats=94.7, **speed),
        StepReport(step=950, epoch=3.8, remaining_s=32.0, validation_nll_nats=None, **speed),
    ]
    lines = ["Running stage 'train@pixelcnn-mnist5k':", "02:05:28 Epoch unknown"]
    lines += [f"02:05:28 {format_progress(report, data)}" for report in reports]
    demo.stand_in(
        "dvc",
        f"""
import os, shutil, time
print({chr(10).join(lines)!r})
while not os.path.exists("go"):
    time.sleep(0.02)
shutil.copy(os.environ["PIXELCNN_DEMO_STATUS"], "seen")
raise SystemExit(1)
""",
    )
    process = demo.start()
    demo.await_line("Ready")
    demo.await_line("beside: Running stage 'train@pixelcnn-mnist5k':")
    demo.await_line("0:32 left")
    (demo.folder / "go").touch()
    demo.await_line("The canvas stays, without the quick start: `dvc repro` failed: .logs/quick-start.log says why.")
    said = json.loads((demo.folder / "seen").read_text())
    assert said == {"doing": "train", "what": "pixelcnn-mnist5k", "validation": "94.70 nats", "left": "0:32"}
    assert status_text(said) == "Beside this page: train pixelcnn-mnist5k · validation 94.70 nats · 0:32 left"
    [status] = demo.folder.glob("demo-*/status.json")
    assert "goes on without it" in status_text(json.loads(status.read_text()))
    assert "Epoch unknown" in (demo.folder / ".logs" / "quick-start.log").read_text()
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 0


def test_a_quick_start_that_is_done_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], environment: dict[str, str], **options: Any) -> Any:
        options["stdout"].write(b"Running stage 'train@pixelcnn-mnist5k':\n")
        return SimpleNamespace(pid=0, args=command, returncode=0, poll=lambda: 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("app.demo.start", run)
    status = tmp_path / "status.json"
    steps = beside({}, status, [["dvc", "repro"]])
    next(steps)
    assert not status.exists()
    assert next(steps, "ended") == "ended"
    assert json.loads(status.read_text()) == {"doing": "done"}


def test_a_line_that_comes_in_two_parts_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    say = "import os, time; print(os.nice(0), 'Running stage \\'train@a', end='', flush=True); time.sleep(0.5)"
    status, niceness = tmp_path / "status.json", os.nice(0)
    steps = beside(dict(os.environ), status, [[sys.executable, "-c", f"{say}; print('b\\':'); time.sleep(0.5)"]])
    said = []
    for _ in steps:
        time.sleep(0.02)
        said += [json.loads(status.read_text())] if status.exists() else []
    assert said[0] == {"doing": "train", "what": "ab"}
    assert Path(".logs/quick-start.log").read_text() == f"{min(niceness + 19, 19)} Running stage 'train@ab':\n"


def test_steps_without_a_stage_are_no_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status = tmp_path / "status.json"
    for _ in beside(dict(os.environ), status, [[sys.executable, "-c", "print('nothing to do')"]]):
        time.sleep(0.02)
    assert not status.exists()


def test_of_a_new_stage_nothing_is_told_that_was_of_the_one_before(tmp_path: Path) -> None:
    before = {"doing": "train", "what": "a", "validation": "90.70 nats", "left": "0:01"}
    assert note_progress("Running stage 'evaluate@a':", before, tmp_path / "status.json") == {
        "doing": "evaluate",
        "what": "a",
    }


def test_the_released_weights_are_served_before_they_are_registered(demo: Demo) -> None:
    demo.stand_in("python", "raise SystemExit(1)")
    note = "import os, sys\nopen(sys.argv[0] + '.env', 'w').write(os.environ['PIXELCNN_RELEASED'])\n"
    demo.stand_in("bentoml", note + SERVER)
    demo.start()
    demo.await_line("Ready")
    assert (demo.folder / "bentoml.env").read_text() == "1"
    demo.await_line(
        "without the quick start: `python -m pipelines.steps release` failed: .logs/quick-start.log says why."
    )


@pytest.mark.parametrize(("variable", "what"), [("SERVICE_PORT", "service"), ("CANVAS_PORT", "canvas")])
def test_a_port_in_use_is_said_before_anything_starts(demo: Demo, variable: str, what: str) -> None:
    port = demo.ports[variable]
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        said, _ = demo.start().communicate(timeout=20)
    assert said == (
        f"error: port {port}, for the {what}, is in use on 127.0.0.1. "
        f"Stop the program that holds it, or choose another port by {variable}={port + 1000}.\n"
    )


def test_the_port_that_is_proposed_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CANVAS_PORT", raising=False)
    with socket.socket() as other:
        for port in range(65535, 64535, -1):
            with contextlib.suppress(OSError):
                other.bind(("127.0.0.1", port))
                break
        other.listen()
        with pytest.raises(SystemExit, match=f"by CANVAS_PORT={port - 1000}"):
            port_of("CANVAS_PORT", port, "canvas")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this machine")
def test_a_port_is_looked_at_on_the_address_that_will_be_served() -> None:
    with socket.create_server(("127.0.0.2", 0)) as other:
        port = other.getsockname()[1]
        assert port_of("UNSET_PORT", port, "canvas") == port
        with pytest.raises(SystemExit, match=r"in use on 0\.0\.0\.0"):
            port_of("UNSET_PORT", port, "canvas", "0.0.0.0")


def test_a_connection_that_is_closing_down_keeps_no_port() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection((HOST, port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
    assert port_of("UNSET_PORT", port, "canvas") == port


@pytest.mark.parametrize(("share", "address"), [(None, ""), ("", ""), ("0", ""), ("192.0.2.7", "192.0.2.7")])
def test_nobody_reaches_it_unless_asked_for(monkeypatch: pytest.MonkeyPatch, share: str | None, address: str) -> None:
    monkeypatch.delenv("SHARE", raising=False)
    if share is not None:
        monkeypatch.setenv("SHARE", share)
    assert address_in_network() == address


def test_ones_own_pictures_have_a_name_of_their_own() -> None:
    assert [own_steps(wishes)[0] for wishes in ({}, {"IMAGES": "x"}, {"NAME": "n"})] == ["letters", "glyphs", "n"]


@pytest.mark.parametrize("text", ["0", "65536", "x", "-1"])
def test_what_is_no_port_is_said(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CANVAS_PORT", text)
    with pytest.raises(SystemExit, match="CANVAS_PORT must be a port number from 1 to 65535, got"):
        port_of("CANVAS_PORT", 8501, "canvas")


@pytest.mark.parametrize("shared", ["", "127.0.0.1"])
def test_it_is_shared_by_a_link_with_a_token_alone(demo: Demo, shared: str) -> None:
    note = """
import json, os, sys
with open(sys.argv[0] + ".json", "w") as file:
    json.dump([sys.argv[1:], os.environ["PIXELCNN_DEMO_SHARE"]], file)
"""
    for program in ("bentoml", "streamlit"):
        demo.stand_in(program, note + SERVER)
    segno = "import sys\ndef make_qr(text):\n    sys.exit(print('code of', text, flush=True))"
    (demo.folder / "segno.py").write_text(segno)
    python = "import sys\nif sys.argv[1] == '-c' and 'http' not in str(sys.argv):\n    exec(sys.argv[2])"
    demo.stand_in("python", python)
    demo.environment["SHARE"] = shared
    demo.start()
    canvas_port = demo.ports["CANVAS_PORT"]
    ready = demo.await_line(f"Ready: draw at http://127.0.0.1:{canvas_port}")
    service, _ = json.loads((demo.folder / "bentoml.json").read_text())
    assert service[service.index("--host") + 1] == "127.0.0.1"  # in both cases
    canvas, link = json.loads((demo.folder / "streamlit.json").read_text())
    address = canvas[canvas.index("--server.address") + 1]
    names = [word.partition("=")[2] for word in canvas if word.startswith("--server.allowedHosts=")]
    assert names == ["127.0.0.1", "localhost", *([shared] if shared else [])]
    assert not any("xsrf" in word.lower() or "cors" in word.lower() for word in canvas)
    if not shared:
        assert (address, link) == ("127.0.0.1", "")
        assert "token" not in ready
        return
    assert (address, canvas[canvas.index("--browser.serverAddress") + 1]) == ("0.0.0.0", shared)
    assert re.fullmatch(rf"http://{shared}:{canvas_port}/\?token=[\w-]{{22}}", link)
    assert link.partition("?")[2] in ready
    demo.await_line(f"Others in this network draw at {link}")
    demo.await_line(f"code of {link}")


def test_a_word_that_it_does_not_know_starts_nothing() -> None:
    with pytest.raises(SystemExit, match="'--help' is unknown: run `make demo` or `make own`"):
        main(["--help"])
