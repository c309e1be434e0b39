"""Interrupt `make demo` at many moments, as Ctrl-C does, and count what is left of it.

    python -m benchmarks.interrupts                    # twenty moments from 1 s to 240 s; installs first
    python -m benchmarks.interrupts --venv .venv       # with an environment that is installed already
    python -m benchmarks.interrupts --moments 2 --moments 40 --moments 90

All in one clone of this repository's last commit, with a model store of its own: each start goes on from where the one
before was interrupted, and the last one must come to *Ready*. Processes are found by their environment.
"""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import psutil
from typer import Option, run

from tests.local import free_port

ROOT = Path(__file__).parents[1]
MOMENTS = [1 + i * 239 / 19 for i in range(20)]
WAIT_S = 3600  # for a start to be ready
GIVE_UP_S = 60  # what is left then does not end by itself


def marked_processes(mark: str) -> dict[int, str]:
    """Return the processes that inherited a mark in their environment, with their command lines."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended, or is somebody else's
            if mark in process.environ().values():
                found[process.pid] = " ".join(process.cmdline())
    return found


def step_of(processes: dict[int, str]) -> str:
    """Say what a demo was doing, by the command lines of its processes."""
    lines = " ".join(processes.values())
    steps = {"promote": "promote", "steps train": "train", "steps evaluate": "evaluate", "steps prepare": "prepare"}
    steps |= {"dvc": "dvc", "release": "release", "bentoml": "service", "install": "install"}
    return next((step for word, step in steps.items() if word in lines), "start")


def clone(folder: Path, venv: Path | None) -> None:
    """Clone this repository's last commit, with the packages of an environment that is installed already, if any."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, folder], check=True)
    if venv:
        (folder / ".venv").mkdir()
        for path in venv.resolve().iterdir():
            (folder / ".venv" / path.name).symlink_to(path)
        (folder / ".venv" / "installed").unlink(missing_ok=True)
        (folder / ".venv" / "installed").touch()


def start(folder: Path, log: Path, *words: str) -> tuple[subprocess.Popen[bytes], str]:
    """Start `make demo`, or `make` with other words, as a terminal does, in a process group of its own.

    Returned are the process, and the mark of all that it starts.
    """
    mark = uuid.uuid4().hex
    stores = {name: str(folder.parent / name) for name in ("BENTOML_HOME", "PREFECT_HOME")}
    ports = [f"SERVICE_PORT={free_port()}", f"CANVAS_PORT={free_port()}"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            ["make", *(words or ["demo"]), *ports],
            cwd=folder,
            env={**os.environ, **stores, "DEMO_MARK": mark, "PYTHONPATH": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, mark


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return the canvas's address once it is said; empty if the process ends before, or an hour has passed."""
    deadline = time.monotonic() + WAIT_S
    while not (found := re.search(r"Ready: draw at (\S+)", log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            return ""
        time.sleep(0.05)
    return found[1]


def interrupt(process: subprocess.Popen[bytes], mark: str, log: Path) -> str:
    """Send what Ctrl-C sends; return a line of the table."""
    before, num_lines = marked_processes(mark), len(log.read_text().splitlines())
    begun = time.monotonic()
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.killpg(process.pid, signal.SIGINT)
    while marked_processes(mark) and time.monotonic() - begun < GIVE_UP_S:
        time.sleep(0.05)
    seconds = time.monotonic() - begun
    left = marked_processes(mark)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    said = [line for line in log.read_text().splitlines()[num_lines:] if line.strip()]
    return f"| {step_of(before)} | {len(before)} | {seconds:.1f} | {len(left)} | {' / '.join(said)[:200]} |"


@contextlib.contextmanager
def ready(venv: Path | None, *words: str) -> Iterator[tuple[str, float, str]]:
    """Run `make demo`, or `make` with other words, in a fresh clone; interrupt it in the end.

    Once it is ready, which is printed, yield the canvas's address, when all was installed, and the log so far.
    """
    with tempfile.TemporaryDirectory(prefix="clone-") as top:
        folder, log = Path(top) / "clone", Path(top) / "log.txt"
        clone(folder, venv)
        begun = time.time()
        process, mark = start(folder, log, *words)
        try:
            address, said = wait_until_ready(process, log), log.read_text()
            if not address:
                raise SystemExit(f"error: it did not come to the canvas:\n{said}")
            installed = max((folder / ".venv" / "installed").stat().st_mtime, begun)
            print(f"installed after {installed - begun:.0f} s; ready {time.time() - installed:.1f} s later", flush=True)
            yield address, installed, said
        finally:
            interrupt(process, mark, log)


def main(
    venv: Annotated[Path | None, Option(help="an environment that `make install` has made")] = None,
    moments: Annotated[list[float], Option(help="seconds from a start")] = MOMENTS,
) -> None:
    """Print a table of all interruptions, and whether the last start came to its end."""
    with tempfile.TemporaryDirectory(prefix="interrupts-") as top:
        folder, log = Path(top) / "clone", Path(top) / "log.txt"
        clone(folder, venv)
        print("| after s | in | processes | ended after s | left | it said |\n| --- | --- | --- | --- | --- | --- |")
        for moment in moments:
            process, mark = start(folder, log)
            try:
                time.sleep(moment)
            finally:
                print(f"| {moment:.0f} {interrupt(process, mark, log)}", flush=True)
        process, mark = start(folder, log)
        try:
            is_ready = bool(wait_until_ready(process, log))
            print(f"The last start {'was ready' if is_ready else 'FAILED: ' + log.read_text()[-1000:]}")
        finally:
            print(f"| at last {interrupt(process, mark, log)}", flush=True)
    if not is_ready:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
