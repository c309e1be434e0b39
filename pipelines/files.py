"""Files that several processes share: locks that die with their holder, writing whole or not at all, dvc.lock."""

import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


@contextmanager
def file_lock(path: Path, what: str, log: Callable[[str], object]) -> Iterator[bool]:
    """Hold a lock between processes; yield whether another one held it before, and so has just done something.

    The lock is the kernel's (`flock`): however its holder dies, it is free at once. Its file names the holder. If it
    has to wait, `log` is told in one sentence, which begins with `what` is done under it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited, holder = FileLock(path), False, ""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with suppress(FileNotFoundError):  # it has ended since
            holder = path.read_text()
        log(f"{what} waits for {holder or 'another process'}, which does the same; stop that one to go on at once.")
        lock.acquire()
        waited = True
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield waited
    finally:
        path.unlink(missing_ok=True)  # while it is held: filelock never takes a lock on a file that was removed
        lock.release()


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one step: a process that is killed meanwhile leaves the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # two may write at once
    try:
        new.write_bytes(content if isinstance(content, bytes) else content.encode())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def read_lock(path: Path, *keys: str | int) -> Any:
    """Return what a `dvc.lock` says under a key of a key, or all; None if nothing. ValueError if it cannot be read."""
    try:
        return reduce(getitem, keys, YAML(typ="safe").load(path.read_text()))  # of YAML 1.2, as DVC writes it
    except (FileNotFoundError, KeyError):
        return None
    except (YAMLError, TypeError, IndexError):
        raise ValueError(f"{path} cannot be read: resolve its git conflict, or wait until dvc has ended.") from None
