"""Files that several processes share: locks that die with their holder, writing whole or not at all, kept states."""

import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# The name of a run of our `dvc`: a training that is done keeps its state, marked with it, until that run has recorded
# it. If the run was killed, the next `dvc repro` finds the training done instead of doing it twice.
KEEPER_VARIABLE = "PIXELCNN_STATES_KEEPER"
_DONE_FILE = "done"


def begin_state(work: Path) -> None:
    """Make the folder of a training's state, or take up the one that is there."""
    work.mkdir(parents=True, exist_ok=True)
    (work / _DONE_FILE).unlink(missing_ok=True)


def end_state(work: Path) -> None:
    """Remove the state of a training that is done, or mark it for whoever removes it."""
    keeper = os.environ.get(KEEPER_VARIABLE)
    if keeper:
        write_whole(work / _DONE_FILE, keeper)
    else:
        shutil.rmtree(work, ignore_errors=True)


def remove_ended_states(folder: Path, keeper: str) -> None:
    """Remove the states that are marked with this keeper's name, beside the checkpoints of a folder."""
    for mark in folder.glob(f".*.run-*/{_DONE_FILE}"):
        if mark.read_text() == keeper:
            shutil.rmtree(mark.parent, ignore_errors=True)


@contextmanager
def alone(path: Path, what: str, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold a lock, and wait for it first where another process holds it; the kernel frees it however a holder dies.

    Args:
        path: of the lock's file, which is there only while somebody holds it or waits.
        what: is done under the lock, for those who wait.
        say: is told once, in one sentence, what is waited for.

    Yields:
        Whether it had to wait: then somebody else has just done something under this lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        with open(path, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    file.seek(0)
                    holder = file.read() or "another process"
                    say(f"{what} waits for {holder}, which does the same; stop that one to go on at once.")
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            # The one before removed its file at its end: a lock on that keeps nobody out.
            try:
                current = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                current = False
            if not current:
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield waited
            finally:
                path.unlink(missing_ok=True)
            return


def write_whole(path: Path, text: str) -> None:
    """Write a file by way of a temporary one: whoever is killed meanwhile leaves the old text or the new."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)
