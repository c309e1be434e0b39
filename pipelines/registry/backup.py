"""Backup and restore: a registry in SQLite with its artifacts, and the model store, as one file.

A backup is taken while others write. It holds what they would find after a crash at the moment of the database's
snapshot, from which every promotion and rollback goes on by itself.
"""

import gzip
import json
import os
import sqlite3
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Any
from urllib.parse import unquote, urlsplit

from pipelines.errors import reason
from pipelines.params import DECISIONS_EXPERIMENT
from pipelines.registry import decisions, store
from pipelines.registry.runs import location, registered_name, sqlite_file
from pixelcnn.packing.pictures import check_absent

_MANIFEST, _DATABASE, _ARTIFACTS, _STORE = "backup.json", "mlflow.db", "mlruns", "store"
# Where MLflow writes down the artifacts' full path.
_PATHS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def _database() -> Path:
    database = sqlite_file()
    if database is None:
        raise ValueError(
            f"the registry {location()} is no SQLite file: back up its database and artifacts where its server runs "
            "(PostgreSQL: pg_dump, pg_restore, as docs/operations.md says); the model store is exported from it again: "
            "python -m pipelines.steps repair."
        )
    return database


def _ask(database: Path, query: str, *values: str) -> list[tuple[Any, ...]]:
    """Return the rows that a database answers with, without MLflow."""
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(query, values).fetchall()


def backup(file: Path) -> str:
    """Write registry and model store into a new file, whole or not at all; return what was done, in one sentence.

    Raises:
        ValueError: the registry is no SQLite file, or its artifacts do not lie beside it; or the file is there already.
        LookupError: there is no registry.
    """
    database = _database()
    if not database.exists():
        raise LookupError(f"there is no registry {database} to back up. Set MLFLOW_TRACKING_URI to the one you mean.")
    check_absent(file)
    artifacts, roots = database.with_name(_ARTIFACTS), _roots(database)
    if elsewhere := [root for root in roots if root != artifacts]:
        raise ValueError(
            f"{database} says that its artifacts lie in {elsewhere[0]}, not in {artifacts}: nothing is backed up. If "
            "they were moved, put them there, and then: python -m pipelines.steps repair --take-over."
        )
    if (version := _of_server(database)) is not None:
        raise ValueError(
            f"{version} in {database} has its files with an MLflow server, which alone knows where: nothing is backed "
            "up. Copy the database and the server's artifacts where it runs."
        )
    if roots and not os.path.lexists(artifacts) and not _is_empty(database):
        raise ValueError(
            f"{artifacts}, the artifacts of {database}, is not there: nothing is backed up. Put it back, or restore an "
            "earlier backup: python -m pipelines.steps restore FILE --replace."
        )
    with tempfile.TemporaryDirectory(dir=file.absolute().parent, prefix=f".{file.name}.") as temporary:
        manifest, snapshot, new = (Path(temporary) / name for name in (_MANIFEST, _DATABASE, "new"))
        manifest.write_text(json.dumps({"registry": _registry_id(database), "artifacts": str(artifacts)}))
        with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(snapshot)) as target:
            source.backup(target)
        with tarfile.open(new, "w:gz", compresslevel=1, dereference=True) as archive:  # a restore takes no links
            archive.add(manifest, _MANIFEST)
            archive.add(snapshot, _DATABASE)
            # After the snapshot: all that it names is there, and what came since does no harm.
            for top, name in ((artifacts, _ARTIFACTS), (store.home() / "models", _STORE)):
                for path in _files(top):
                    with suppress(FileNotFoundError):  # a temporary file of somebody's
                        archive.add(path, f"{name}/{path.relative_to(top)}")
        new.replace(file)
    return f"{file} holds {database}, its artifacts, and the model store {store.home()}."


def _of_server(database: Path) -> str | None:
    """Return a version of ours that was registered by way of a server, which has its files; None without one."""
    query = (
        "SELECT name, version FROM model_versions WHERE name LIKE ? AND current_stage != 'Deleted_Internal' AND "
        "COALESCE(storage_location, source) LIKE 'mlflow-artifacts:%'"
    )
    found = _ask(database, query, registered_name("%"))
    return "{} version {}".format(*found[0]) if found else None


def _registry_id(database: Path) -> str:
    """Return a registry's identity, of an earlier MLflow's database, too, which this one does not open."""
    query = "SELECT value FROM experiment_tags JOIN experiments USING (experiment_id) WHERE name = ? AND key = ?"
    found = _ask(database, query, DECISIONS_EXPERIMENT, decisions.REGISTRY_TAG)
    return str(found[0][0]) if found else decisions.registry_id()


def _files(top: Path) -> Iterator[Path]:
    """Yield the files below a folder, those behind links, too; OSError for a folder that cannot be read."""

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a temporary folder of somebody's
            raise error

    def check(path: Path) -> None:
        if path.is_symlink() and not path.exists():  # as of a disk that is away
            raise OSError(f"{path} is a link to what is not there: nothing is backed up.")

    check(top)
    for folder, _, names in os.walk(top, onerror=failed, followlinks=True):
        for path in (Path(folder, name) for name in names):  # a link to nothing is no folder: it is here, too
            check(path)
            if path.is_file():
                yield path


def restore(file: Path, replace: bool = False) -> str:
    """Put a backup into the place of registry and store, to be served once `repair` has run; say what was done.

    `replace` allows for a registry with runs in it, which is kept aside, and for a store that another one feeds.
    ValueError, and all is as it was, if the file is no whole backup, the registry is not empty, or the store another's.
    """
    database = _database()
    file.open("rb").close()  # one that is not there is told first
    if not replace and not _is_empty(database):
        raise ValueError(
            f"{database} is not empty: nothing is restored. Set MLFLOW_TRACKING_URI to another place, or let it be "
            "replaced, and kept aside, by --replace."
        )
    database.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=database.parent, prefix=".restore-") as temporary:
        folder = Path(temporary)
        told = _unpack(file, folder)
        fed, by = store.feeder() or {}, ""
        if fed.get("registry") != told["registry"]:
            by = f"another registry than that of {file}"
        elif (fed["at"], fed["host"]) != (location(), gethostname()):
            by = f"{fed['at']} on {fed['host']}, not from here"
        if by and store.served() and not replace:
            raise ValueError(
                f"the model store {store.home()} is fed by {by}: nothing is restored. Set BENTOML_HOME to another "
                "place, or let the backup feed it from now on by --replace."
            )
        artifacts = database.with_name(_ARTIFACTS)
        _relocate(folder / _DATABASE, Path(told["artifacts"]), artifacts)
        store.put_back(folder / _STORE)  # first: its disk may be full
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        old = [artifacts, *(database.with_name(database.name + end) for end in ("", "-journal", "-wal", "-shm"))]
        there = filter(os.path.lexists, old)  # or a link to a disk that is away
        kept = [path.rename(path.with_name(f"{path.name}.before-{stamp}")).name for path in there]
        (folder / _ARTIFACTS).rename(artifacts)
        (folder / _DATABASE).rename(database)
    aside = f" What was there is kept: {', '.join(kept)}." if kept else ""
    return f"{database}, its artifacts and the models of {store.home()} are those of {file}.{aside}"


def _is_empty(database: Path) -> bool:
    """Say whether a registry has no runs; one that cannot be read may have some."""
    try:
        return not database.exists() or not _ask(database, "SELECT 1 FROM runs LIMIT 1")
    except sqlite3.DatabaseError:
        return False


def _plain(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo:
    """Return what a member is unpacked as; a backup holds no links, not even such as stay inside."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, path)


def _unpack(file: Path, folder: Path) -> dict[str, str]:
    """Unpack a backup that is whole into an empty folder; return its manifest."""
    with gzip.open(file) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                archive.extractall(folder, filter=_plain)
            while stream.read(1 << 20):  # to the end, where the checksum is
                pass
            told = {key: str(value) for key, value in json.loads((folder / _MANIFEST).read_text()).items()}
            if not (folder / _DATABASE).is_file() or not {"registry", "artifacts"} <= told.keys():
                raise ValueError("it lacks the registry")
            for name in (_ARTIFACTS, _STORE):
                (folder / name).mkdir(exist_ok=True)
        except (
            *(tarfile.TarError, EOFError, zlib.error, ValueError, gzip.BadGzipFile, FileNotFoundError, FileExistsError),
            *(AttributeError, RecursionError),  # of a manifest that is no object, or nested without end
        ) as error:
            why = reason(error)
            raise ValueError(f"{file} is no whole backup ({why}): nothing is restored. Take another one.") from None
    return told


def follow_artifacts() -> list[str]:
    """Let a database, which holds full paths, follow artifacts that were moved with it; return what was done."""
    database = sqlite_file()
    if database is None or not database.exists():
        return []
    artifacts = database.with_name(_ARTIFACTS)
    moved = [root for root in _roots(database) if root != artifacts and artifacts.is_dir()]
    for root in moved:
        _relocate(database, root, artifacts)
    return [f"the registry's artifacts are those in {artifacts} now, not those in {root}." for root in moved]


def _roots(database: Path) -> list[Path]:
    """Return the folders where a database says that our artifacts lie; other experiments' have other names."""
    found = _ask(database, "SELECT DISTINCT artifact_location FROM experiments")
    roots = [Path(unquote(urlsplit(location).path)) for (location,) in found]
    return [root for root in roots if root.name == _ARTIFACTS]


def _relocate(database: Path, old: Path, new: Path) -> None:
    """Let a database name artifacts where they are now."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for table, column in _PATHS:
            for before, after in ((str(old), str(new)), (old.as_uri(), new.as_uri())):
                is_below = f"substr({column} || '/', 1, ?) = ?"
                moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {is_below}"
                connection.execute(moved, (after, len(before) + 1, len(before) + 1, f"{before}/"))
