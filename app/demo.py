"""`make demo`: install, serve the released weights and show them at once; train the quick start beside, until Ctrl-C.

Each step is a command that a person could type. It runs in a session of its own, so that Ctrl-C reaches this program
alone, which then kills every process below itself. All of them bear that: results are written aside and renamed,
trainings go on from their saved state, and DVC and MLflow record only what is finished.

Run by the system's Python before anything is installed: the standard library alone.
"""

# An older Python must come as far as `make install`, which refuses it in one sentence.
from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

HOST = "127.0.0.1"
SERVICE = ["bentoml", "serve", "app.service:PixelCNNService", "--host", HOST, "--port"]
CANVAS = ["streamlit", "run", "app/canvas/main.py"]
# The link, with its token, is not among the words: those every user of this machine can read.
QR_CODE = ["python", "-c", "import os, segno; segno.make_qr(os.environ['PIXELCNN_DEMO_SHARE']).terminal(compact=True)"]
ANYWHERE = "0.0.0.0"
INSTALL = ["make", "--silent", "install"]
STEPS = ["python", "-m", "pipelines.steps"]
BESIDE = [[*STEPS, "release"], ["dvc", "repro"], [*STEPS, "promote", "mnist5k"]]
WISHES = ("IMAGES", "NAME", "SIDE", "COLOUR", "LEVELS", "MINUTES")  # of pictures of one's own
LOG = Path(".logs/quick-start.log")
STAGE = re.compile(r"Running stage '(\w+)@([\w-]+)'")  # as DVC says it
PROGRESS = re.compile(r": train .*?(?:, validation ([\d.]+ [^ ,]+).*)?, (\d+:\d+) left")  # as `format_progress` says it
START_S = 180  # until the canvas has something to show
KILL_S = 4
POLL_S = 0.1
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, or the terminal closed


def address_in_network() -> str:
    """Return the address by which others in the local network reach this machine: SHARE's, or with SHARE=1 the one that
    it sends from. Empty where SHARE is not set: nobody is to reach it."""
    wanted = os.environ.get("SHARE", "")
    if wanted != "1":
        return "" if wanted == "0" else wanted
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("10.255.255.255", 1))  # nothing is sent
        return str(probe.getsockname()[0])
    raise SystemExit("error: this machine is in no network now. Connect it, or name its address by SHARE=ADDRESS.")


def port_of(variable: str, default: int, what: str, host: str = HOST) -> int:
    """Return the port that an environment variable sets, or the default; exit with one sentence if it is taken."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise SystemExit(f"error: {variable} must be a port number from 1 to 65535, got {text!r}.")
    port = int(text)
    with socket.socket() as probe:
        # As servers do it: a connection that is only closing down does not keep the port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            other = port + 1000 if port <= 64535 else port - 1000
            raise SystemExit(
                f"error: port {port}, for the {what}, is in use on {host}. "
                f"Stop the program that holds it, or choose another port by {variable}={other}."
            ) from None
    return port


def asked(port: int, path: str) -> tuple[int, bytes]:
    """Return the status with which a server of this machine answers a path, and what it says; 0 where none answers."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=1)) as connection:
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            return 0, b""


def descendants() -> set[int]:
    """Return the IDs of all processes below this one, whatever session they are in."""
    parents = {}
    if sys.platform == "linux":  # where a small container has no `ps`
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            except OSError:
                continue  # it has just ended
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    else:
        lister = subprocess.Popen(["ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True)
        lines = [line.split() for line in lister.communicate()[0].splitlines()]
        parents = {int(pid): int(parent) for pid, parent in lines if int(pid) != lister.pid}
    found: set[int] = set()
    level = {os.getpid()}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found |= level
    return found


def kill_descendants() -> None:
    """Kill all processes below this one, also those that they start meanwhile."""
    deadline = time.monotonic() + KILL_S
    while (pids := descendants()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, once: what ends the demo must not be interrupted itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def start(command: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, which Ctrl-C does not reach."""
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **options)


def beside(environment: dict[str, str], status: Path, steps: list[list[str]]) -> Iterator[None]:
    """Do what goes on beside the canvas: each `next` tells of what has come, and begins a step if one has ended.

    All that they say goes into `LOG`. The file `status` tells the canvas, as JSON: `doing` and `what`, of a training
    `left` and the last `validation`, too; at the end of a quick start `doing` is "done" or "failed".
    """
    LOG.parent.mkdir(exist_ok=True)
    said: dict[str, str] = {}
    unbuffered = {**environment, "PYTHONUNBUFFERED": "1"}
    line = b""
    with LOG.open("wb", buffering=0) as output, LOG.open("rb") as log:
        for step in steps:
            # Nice from the first moment on, and so for all that it starts.
            process = start(step, unbuffered, stdout=output, stderr=subprocess.STDOUT, preexec_fn=lambda: os.nice(19))
            # Where Linux shares processors between sessions first. The process does not do it itself before it begins:
            # this program would wait for it as long as others are busy.
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/autogroup").write_text("19")
            is_running = True
            while is_running:
                yield
                is_running = process.poll() is None  # asked first: its last lines count
                for part in log:
                    line += part
                    if line.endswith(b"\n"):
                        said = note_progress(line.decode(errors="replace").strip(), said, status)
                        line = b""
            if process.returncode != 0:
                write_status(status, {"doing": "failed"})
                failed = f"`{' '.join(step)}` failed: {LOG} says why."
                print(f"The canvas stays, without the quick start: {failed}", flush=True)
                return
    if said:
        write_status(status, {"doing": "done"})


def note_progress(line: str, said: dict[str, str], status: Path) -> dict[str, str]:
    """Return what is known after a line of the log; one of a stage or a training is printed, and goes into `status`."""
    if found := STAGE.search(line):
        said = {"doing": found[1], "what": found[2]}
    elif found := PROGRESS.search(line):
        said = {**said, **({"validation": found[1]} if found[1] else {}), "left": found[2]}
    else:
        return said
    print(f"beside: {line}", flush=True)
    write_status(status, said)
    return said


def write_status(status: Path, said: dict[str, str]) -> None:
    """Replace the file that the canvas reads, in one step: it never sees half of one."""
    written = status.with_suffix(".new")
    written.write_text(json.dumps(said))
    written.replace(status)


def own_steps(wishes: dict[str, str]) -> tuple[str, list[list[str]]]:
    """Return the name of a dataset of one's own, without IMAGES letters, and what comes before it can be drawn."""
    name = wishes.get("NAME") or ("glyphs" if wishes.get("IMAGES") else "letters")
    images = wishes.get("IMAGES") or "data/raw/letters.npz"
    options = [("--" + key.lower(), wishes[key]) for key in WISHES[2:] if wishes.get(key)]
    add = [*STEPS, "add", name, "--images", images, "--keep", *(word for option in options for word in option)]
    letters = [] if wishes.get("IMAGES") else [[*STEPS, "letters", images]]
    pair = f"own/dvc.yaml:evaluate@gated_pixelcnn-{name}"
    return name, [*letters, add, ["dvc", "repro", pair], [*STEPS, "promote", name]]


def main(words: list[str]) -> None:
    """Run the demo until Ctrl-C, or until a part of it fails.

    With the word `own` pictures of one's own are learned first (`make own`), and served without the quick start.
    """
    if words not in ([], ["own"]):
        raise SystemExit(f"error: {' '.join(words)!r} is unknown: run `make demo` or `make own`; `make` lists more.")
    name, before = own_steps(dict(os.environ)) if words == ["own"] else ("", [])
    service_port, shared = port_of("SERVICE_PORT", 3000, "service"), address_in_network()
    canvas_port = port_of("CANVAS_PORT", 8501, "canvas", ANYWHERE if shared else HOST)
    service_url, canvas_url = f"http://{HOST}:{service_port}", f"http://{HOST}:{canvas_port}"
    query = {**({"dataset": name} if name else {}), **({"token": secrets.token_urlsafe(16)} if shared else {})}
    path = f"/?{urlencode(query)}" if query else ""
    link = f"http://{shared}:{canvas_port}{path}" if shared else ""
    temporary = tempfile.mkdtemp(prefix="demo-")  # what is killed leaves its temporary files there
    status = Path(temporary) / "status.json"
    for_canvas = {"PIXELCNN_DEMO_STATUS": "" if name else str(status), "PIXELCNN_DEMO_SHARE": link}
    environment = {**os.environ, "PIXELCNN_SERVICE_URL": service_url, "TMPDIR": temporary, **for_canvas}
    # Pages of other origins stay refused: the address by which it is reached is named.
    address = [ANYWHERE, "--browser.serverAddress", shared] if shared else [HOST]
    names = [f"--server.allowedHosts={name}" for name in (HOST, "localhost", shared) if name]
    canvas = [*CANVAS, "--server.address", *address, *names, "--server.port", str(canvas_port)]
    if sys.platform == "linux":  # a process whose parent ends becomes a child of this one: none is lost
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as `nohup` asks for
                signal.signal(number, interrupt)
        for command in [INSTALL, *before]:
            if start(command, environment).wait() != 0:
                raise SystemExit(f"error: `{' '.join(command)}` failed; its message stands above.")
        # The released weights at once, as they lie in the clone; `release` registers them.
        shown = {"PIXELCNN_DATASETS": name} if name else {"PIXELCNN_RELEASED": "1", "PIXELCNN_DATASETS": "mnist"}
        servers = {
            "service": start([*SERVICE, str(service_port)], {**environment, **shown}),
            "canvas": start(canvas, environment),
        }
        quick_start = iter(()) if name else beside(environment, status, BESIDE)
        is_ready, deadline = False, time.monotonic() + START_S
        while True:
            for what, process in servers.items():
                if process.poll() is not None:
                    raise SystemExit(f"error: the {what} ended by itself; its message stands above.")
            if is_ready:  # not before: what is shown first comes first
                next(quick_start, None)
            elif (readiness := asked(service_port, "/readyz"))[0] == 503:  # what there is was loaded before it answers
                raise SystemExit(f"error: there is nothing to draw with: {json.loads(readiness[1])['error']}")
            elif readiness[0] == 200 and asked(canvas_port, "/_stcore/health")[0] == 200:
                is_ready = True
                print(f"\nReady: draw at {canvas_url}{path} (service: {service_url}). Ctrl-C ends all.\n", flush=True)
                if shared:
                    print(f"Others in this network draw at {link}\n", flush=True)
                    start(QR_CODE, environment).wait()
            elif time.monotonic() > deadline:
                raise SystemExit(f"error: nothing could be shown within {START_S} s.")
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        pass  # it is what ends the demo
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        kill_descendants()
        shutil.rmtree(temporary, ignore_errors=True)
    wished = [f"{key}={shlex.quote(os.environ[key])}" for key in WISHES if os.environ.get(key)]
    again = " ".join(["own", *wished]) if name else "demo"
    print(f"\nStopped. The next `make {again}` goes on from here.", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
