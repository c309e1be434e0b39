"""What is lost comes back: registry, model store or both are removed for good, and one command each restores them."""

import errno
import gc
import io
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy

from pipelines import steps
from pipelines.flows.promote import promote
from pipelines.promotion import register
from pipelines.promotion.move import run_rollback
from pipelines.registry import lineage, store
from pipelines.registry import runs as tracking
from pipelines.registry import versions as registry
from pipelines.registry.backup import restore
from tests.pipelines.toys import INK, Toy
from tools.faults.check import in_process

NAME = "pixelcnn-mnist5k"


def alone(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in a folder, with the registry and the store that lie there."""
    patch.chdir(folder)
    for variable in ("MLFLOW_TRACKING_URI", "BENTOML_HOME"):
        patch.setenv(variable, "")


@pytest.fixture(scope="module")
def made(tmp_path_factory, new_database):
    """Make a clone with two champions, of which the second is served; and a copy of all that."""
    folder = tmp_path_factory.mktemp("recovery") / "clone"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder)
        shutil.copy(new_database, "mlflow.db")
        shutil.copy(Path(steps.__file__).parents[1] / "params.yaml", ".")
        toy = Toy("mnist5k", folder)
        for ink in (0.3, INK):
            toy.register(ink)
            toy.promote()
    shutil.copytree(folder, folder.with_name("copy"))
    return toy


@pytest.fixture
def toy(made, monkeypatch):
    """That clone as it was made, in its place."""
    remove(*set(made.folder.parent.iterdir()) - {made.folder.with_name("copy")})  # what a test has left
    shutil.copytree(made.folder.with_name("copy"), made.folder)
    alone(monkeypatch, made.folder)
    forget_connections()
    return made


def forget_connections(close: bool = True) -> None:
    """Let no connection to a database outlive it: another one lies in its place now.

    Args:
        close: the process's own ones; those that a forked process shares are only let go.
    """
    for engine in [one for one in gc.get_objects() if issubclass(type(one), sqlalchemy.engine.Engine)]:
        engine.dispose(close=close)


def afresh(work: Callable[[], None]) -> None:
    """Do work as a process of its own would: without connections to a database that was replaced."""

    def start() -> None:
        os.environ["MLFLOW_TRACKING_URI"] = ""  # which MLflow sets
        forget_connections(close=False)
        work()

    assert in_process(start) == 0, "see above"


def run(*words: str) -> None:
    def work() -> None:
        assert steps.main(words) == 0

    afresh(work)


def check(served: dict, num_versions: int) -> None:
    """Everything that is registered is as it was registered, and the same weights are served."""

    def work() -> None:
        versions = registry.versions("mnist5k")
        assert len(versions) == num_versions
        for version in versions:
            assert lineage.main(["--version", f"{NAME}/{version.version}", "--verify"]) == 0
        now = store.metadata_of(str(store.latest(NAME)))
        assert now["weights_sha256"] == served["weights_sha256"]
        answer = Path("answer.json")
        answer.write_text(json.dumps({key: now[key] for key in versions[0].lineage()}))
        assert lineage.main(["--version", str(answer)]) == 0, "from what is served back to its run"
        assert registry.aliases("mnist5k")["champion"] == now["version"]
        assert not list(Path().glob(".*.*")) + list(Path(".bentoml").glob(".promote-*")), "left behind"

    afresh(work)


def remove(*names: str | Path) -> None:
    for name in names:
        shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


REGISTRY = ("mlflow.db", "mlruns")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "command", "num_versions"),
    [
        ((), ["restore", "../backup", "--replace"], 2),
        (REGISTRY, ["restore", "../backup"], 2),
        (["mlruns"], ["restore", "../backup", "--replace"], 2),
        ((*REGISTRY, ".bentoml"), ["restore", "../backup"], 2),
        ([".bentoml"], ["repair"], 2),
        (REGISTRY, ["repair"], 1),  # without any backup: what is served is all that is known
        (REGISTRY, ["release"], 1),  # the same, before anything else becomes the first champion
    ],
    ids=["nothing", "registry", "artifacts", "both", "store", "no-backup", "released"],
)
def test_one_command_after_each_loss(toy, lost, command, num_versions):
    served = toy.served()
    assert steps.main(["backup", "../backup"]) == 0
    remove(*lost)
    if command == ["release"]:
        shutil.copytree("models/1", "weights/gated_pixelcnn-mnist5k")  # a worse one
        num_versions += 1
    run(*command)
    if command == ["release"]:
        assert store.metadata_of(str(store.latest(NAME)))["weights_sha256"] == served["weights_sha256"]
    check(served, num_versions)
    aside = [path.name.partition(".before-")[0] for path in Path().glob("*.before-*")]
    assert sorted(aside) == sorted(set(REGISTRY) - {*lost} if command[0] == "restore" else [])


def test_a_promotion_in_a_registry_begun_anew_goes_on_with_what_is_served(toy, without_prefect, new_database):
    served = toy.served()
    remove(*REGISTRY)
    shutil.copy(new_database, "mlflow.db")
    shutil.copytree("models/1", "models/gated_pixelcnn-mnist5k")  # a worse one

    def work() -> None:
        assert promote.fn("mnist5k")["decision"] == "kept"

    afresh(work)
    check(served, 2)


@pytest.mark.slow
def test_a_backup_is_restored_in_another_place(toy, tmp_path, monkeypatch):
    served = toy.served()
    assert steps.main(["backup", str(tmp_path / "backup")]) == 0
    other = tmp_path / "another clone"
    other.mkdir()
    shutil.copytree("data", other / "data")
    shutil.copy("params.yaml", other)
    remove(*REGISTRY, ".bentoml")
    monkeypatch.chdir(other)
    run("restore", str(tmp_path / "backup"))
    check(served, 2)
    run("rollback", "mnist5k")
    assert toy.served()["version"] == "1"


@pytest.mark.slow
def test_a_registry_that_was_moved_finds_its_artifacts_again(toy, monkeypatch, capsys):
    served, moved = toy.served(), toy.folder.with_name("moved")
    toy.folder.rename(moved)
    alone(monkeypatch, moved)
    for words in (["backup", "../backup"], ["rollback", "mnist5k"]):
        assert steps.main(words) == 1
    assert f"artifacts lie in {toy.folder}/mlruns, not in {moved}/mlruns: nothing is" in capsys.readouterr().err
    run("repair", "--take-over")
    check(served, 2)
    run("rollback", "mnist5k")
    assert toy.served()["version"] == "1"
    tracking.client().create_experiment("notes", "mlflow-artifacts:/77")  # somebody's own
    run("backup", "../backup")


def test_the_database_alone_is_not_the_registry(toy, tmp_path, monkeypatch, capsys):
    shutil.move("mlflow.db", tmp_path)
    alone(monkeypatch, tmp_path)
    for words in (["backup", "backup"], ["repair", "--take-over"], ["backup", "backup"]):
        steps.main(words)
    assert capsys.readouterr().err.count(f"lie in {toy.folder}/mlruns, not in {tmp_path}/mlruns: nothing is") == 2
    assert not Path("backup").exists()


def test_what_cannot_be_repaired_does_not_keep_out_the_others(toy, capsys):
    other = Toy("other", toy.folder)
    other.register(INK)
    other.promote()
    champion = registry.versions("mnist5k")[-1]
    (artifact,) = Path("mlruns").rglob(f"{champion.run_id}/**/model.safetensors")
    artifact.write_bytes(b"damaged")
    (store.folder_of(str(store.latest(NAME))) / "model.yaml").write_text("{")
    strange = store.folder_of("pixelcnn-strange")
    (strange / "1").mkdir(parents=True)
    (strange / "1/model.yaml").write_text("metadata: {}")
    (strange / "latest").write_text("1")
    served = other.served()
    remove(store.folder_of("pixelcnn-other"))
    assert steps.main(["repair"]) == 1
    assert other.served()["weights_sha256"] == served["weights_sha256"]
    error = capsys.readouterr().err
    assert error.startswith("repair: other: the model store serves pixelcnn-other:v1-")
    assert " These datasets could not be repaired: mnist5k (pixelcnn-mnist5k version 2 does not hold" in error
    assert "; strange (pixelcnn-strange:1 in " in error


def test_a_bug_is_no_mistake_of_the_operator(toy, monkeypatch):
    monkeypatch.setattr(register, "repair", lambda *_: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        register.repair_all()


@pytest.mark.slow
def test_a_backup_while_others_write(toy, monkeypatch):
    """Each of some backups, taken at any moment of promotions and rollbacks, is whole."""
    tmp_path = toy.folder.parent
    stop, begun = tmp_path / "stop", tmp_path / "begun"

    def write() -> None:
        for step in itertools.count(1):
            for work in (
                lambda: run_rollback("mnist5k", 1),
                lambda: run_rollback("mnist5k", 2),
                lambda: toy.register(0.3),
            ):
                with open(begun, "a") as file:
                    file.write("x")
                work()
                if stop.exists() or step > 99:
                    return

    writer = os.fork()
    if writer == 0:
        try:
            afresh(write)
            os._exit(0)
        finally:
            os._exit(1)
    try:
        for number in range(2):
            while not begun.exists() or begun.stat().st_size < 2 + 4 * number:
                assert os.waitpid(writer, os.WNOHANG) == (0, 0), "it has ended"
                time.sleep(0.01)
            assert steps.main(["backup", f"../{number}"]) == 0
    finally:
        stop.touch()
        assert os.waitpid(writer, 0)[1] == 0
    sizes = []
    for number in range(2):
        folder = tmp_path / f"restored-{number}"
        folder.mkdir()
        shutil.copytree("data", folder / "data")
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            run("restore", str(tmp_path / str(number)), "--replace")
            with sqlite3.connect("mlflow.db") as database:
                sizes.append(database.execute("SELECT count(*) FROM model_versions").fetchone()[0])
                (champion,) = database.execute(
                    "SELECT version FROM registered_model_aliases WHERE alias = 'champion'"
                ).fetchone()
            found = store.metadata_of(str(store.latest(NAME)))
            assert str(champion) == found["version"]
            check(found, sizes[-1])
    assert sizes == sorted(sizes)
    assert sizes[-1] > 2, "somebody wrote meanwhile"


def archive(path: Path, *members: tarfile.TarInfo, content: bytes = b"x") -> None:
    with tarfile.open(path, "w:gz") as found:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            found.addfile(member, io.BytesIO(content))


def test_what_is_no_backup_changes_nothing(toy, capsys):
    assert steps.main(["backup", "../backup"]) == 0
    assert "holds " in capsys.readouterr().out
    tmp_path = toy.folder.parent
    whole = (tmp_path / "backup").read_bytes()
    for there in ("../backup", "mlflow.db"):
        assert steps.main(["backup", there]) == 1
        assert f"{there} is there already. Name another one" in capsys.readouterr().err
    assert steps.main(["backup", "no/folder"]) == 1
    assert "no is no folder that you may write to" in capsys.readouterr().err
    assert steps.main(["restore", "../backup"]) == 1
    assert "mlflow.db is not empty: nothing is restored. Set MLFLOW_TRACKING_URI" in capsys.readouterr().err
    outside, link = tarfile.TarInfo("../outside"), tarfile.TarInfo("mlruns/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    archive(tmp_path / "outside.tar", outside)
    archive(tmp_path / "list.tar", tarfile.TarInfo("backup.json"), content=b"[]")
    archive(tmp_path / "link.tar", link)
    with tarfile.open(tmp_path / "backup") as found:
        found.extractall(tmp_path / "whole", filter="data")
    inside, deep = tarfile.TarInfo("mlruns/inside"), b"[" * 100_000
    inside.type, inside.linkname = tarfile.SYMTYPE, "../mlflow.db"
    for name, odd, content in (
        ("inside", inside, b""),
        ("file", tarfile.TarInfo("store"), b"a file"),
        ("deep", tarfile.TarInfo("backup.json"), deep),
    ):
        with tarfile.open(tmp_path / f"{name}.tar", "w:gz") as made:
            odd.size = len(content)
            for part in (tmp_path / "whole").iterdir():
                if part.name != odd.name:
                    made.add(part, part.name)
            made.addfile(odd, io.BytesIO(content))
    archive(tmp_path / "empty.tar")
    half = len(whole) // 2
    (tmp_path / "cut.tar").write_bytes(whole[:half])
    (tmp_path / "end.tar").write_bytes(whole[:-1])
    # Four bytes: one bit may make a repetition begin elsewhere, at the same content, and nothing is damaged then.
    changed = bytes(byte ^ 255 for byte in whole[half : half + 4])
    (tmp_path / "changed.tar").write_bytes(whole[:half] + changed + whole[half + 4 :])
    (tmp_path / "text.tar").write_text("a text")
    before = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("outside", "link", "inside", "file", "deep", "list", "empty", "cut", "end", "changed", "text", "none"):
        assert steps.main(["restore", f"../{name}.tar", *(["--replace"] if name != "none" else [])]) == 1, name
        error = capsys.readouterr().err
        assert ("no whole backup" if name != "none" else "No such file") in error, error
        assert len(error.splitlines()) == 1
    assert {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_backup_does_not_feed_the_store_of_another_registry(toy, tmp_path, new_database, monkeypatch, capsys):
    assert steps.main(["backup", "../backup"]) == 0
    home = store.home()
    monkeypatch.setenv("BENTOML_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/new/mlflow.db")
    assert steps.main(["restore", "../backup"]) == 1, "a backup is a copy"
    assert "/clone/mlflow.db on " in (error := capsys.readouterr().err)
    assert ", not from here: nothing is restored." in error
    (home / "pixelcnn-registry.json").write_text(json.dumps({"registry": "x", "at": "y", "host": "z"}))
    assert steps.main(["restore", "../backup"]) == 1
    assert "is fed by another registry than that of ../backup: nothing is restored." in capsys.readouterr().err
    assert not list((tmp_path / "new").iterdir())


def test_a_store_whose_disk_is_full_leaves_the_registry_as_it_was(toy, monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", ".bentoml")

    assert steps.main(["backup", "../backup"]) == 0
    before = Path("mlflow.db").stat().st_ino
    monkeypatch.setattr(store, "put_back", full)
    assert steps.main(["restore", "../backup", "--replace"]) == 1
    assert capsys.readouterr().err == "restore: .bentoml: No space left on device.\n"
    assert (Path("mlflow.db").stat().st_ino, list(Path().glob("*.before-*"))) == (before, [])


def test_a_journal_of_the_old_registry_does_not_come_to_the_restored_one(toy):
    """SQLite would put pages of the one back into the other."""
    assert steps.main(["backup", "../backup"]) == 0
    beside = [Path(f"mlflow.db{end}") for end in ("-journal", "-wal", "-shm")]
    for path in beside:
        path.write_text("of the old one")
    restore(Path("../backup"), replace=True)
    assert not any(path.exists() for path in beside)
    for path in beside:
        (kept,) = Path().glob(f"{path}.before-*")
        assert kept.read_text() == "of the old one"


def test_a_backup_holds_what_is_behind_links(toy):
    """As where a disk was full, and artifacts were moved to another one."""
    served, others = toy.served(), toy.folder.parent
    first, second = Path("mlruns").rglob("model.safetensors")
    for name, path in (("file", first), ("folder", second.parent)):
        shutil.move(path, others / name)
        path.symlink_to(others / name)
    assert steps.main(["backup", "../backup"]) == 0
    run("restore", "../backup", "--replace")
    remove(others / "file", others / "folder")
    check(served, 2)
    Path("mlruns/away").symlink_to(others / "file")
    assert steps.main(["backup", "../without"]) == 1, "what is behind a link is away"
    assert not Path("../without").exists()


def test_artifacts_on_a_disk_that_is_away_are_restored_in_the_place_of_their_link(toy):
    served = toy.served()
    assert steps.main(["backup", "../backup"]) == 0
    remove("mlruns")
    Path("mlruns").symlink_to("../away")
    run("restore", "../backup", "--replace")
    check(served, 2)
    (link,) = Path().glob("mlruns.before-*")
    assert link.is_symlink()


def test_a_folder_that_cannot_be_read_is_not_left_out(toy, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/checkpoint"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert steps.main(["backup", "../backup"]) == 1
    assert capsys.readouterr().err.endswith("/checkpoint: Permission denied.\n")
    assert not Path("../backup").exists()


def test_artifacts_of_a_name_that_begins_alike_stay_where_they_are(toy, tmp_path, monkeypatch):
    theirs = (toy.folder / "mlruns-of-others").as_uri()
    tracking.client().create_experiment("theirs", theirs)
    backup = toy.folder.parent / "backup"
    assert steps.main(["backup", str(backup)]) == 0
    alone(monkeypatch, tmp_path)
    restore(backup)
    with closing(sqlite3.connect("mlflow.db")) as database:
        found = {
            place for (place,) in database.execute("SELECT artifact_location FROM experiments WHERE name != 'Default'")
        }
    assert found == {theirs, (tmp_path / "mlruns").as_uri()}


def test_restores_within_a_second_keep_what_each_found(toy):
    assert steps.main(["backup", "../backup"]) == 0
    for _ in range(3):
        restore(Path("../backup"), replace=True)
    for name in REGISTRY:
        assert len(list(Path().glob(f"{name}.before-*"))) == 3


def test_a_registry_on_a_server_is_backed_up_there(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://me:secret@host:5432/mlflow")
    for words in (["backup", "x"], ["restore", "x"]):
        assert steps.main(words) == 1
        error = capsys.readouterr().err
        assert "the registry host:5432/mlflow is no SQLite file: back up its database" in error
        assert "pg_dump" in error
        assert "secret" not in error


def test_a_registry_of_an_earlier_mlflow_is_backed_up(toy, capfd):
    """Before `mlflow db upgrade`, as MLflow then asks for."""
    with closing(sqlite3.connect("mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'cc1f77228345'")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
    words = [sys.executable, "-m", "pipelines.steps", "backup", "../backup"]
    assert subprocess.run(words, env=environment, check=False).returncode == 0, capfd.readouterr().err
    restore(Path("../backup"), replace=True)


def test_artifacts_that_are_gone_are_not_left_out(toy, capsys):
    """As of a disk that is not mounted: a backup of each night would take the place of the last whole one."""
    remove("mlruns")
    assert steps.main(["backup", "../backup"]) == 1
    assert "mlruns, the artifacts of " in capsys.readouterr().err
    assert not Path("../backup").exists()


def test_artifacts_of_a_server_are_not_left_out(toy, capsys):
    """What was trained by way of `mlflow server` lies where that keeps it, beside what was trained without."""
    with closing(sqlite3.connect("mlflow.db")) as connection, connection:
        there = "mlflow-artifacts:/1/models/m-1/artifacts"
        connection.execute("UPDATE model_versions SET storage_location = ? WHERE version = 2", (there,))
    assert steps.main(["backup", "../backup"]) == 1
    assert "pixelcnn-mnist5k version 2 in" in capsys.readouterr().err
    assert not Path("../backup").exists()
    tracking.client().delete_model_version(NAME, "2")
    assert steps.main(["backup", "../backup"]) == 0


def test_nothing_to_back_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)
    assert steps.main(["backup", "x"]) == 1
    assert "there is no registry" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_nothing_is_repaired_where_there_is_no_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert steps.main(["repair"]) == 1
    assert "params.yaml does not exist here" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
