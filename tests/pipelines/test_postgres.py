"""MLflow and Prefect on PostgreSQL, one URL each: a server of the test's own, in a temporary folder."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.promotion.move import run_rollback
from pixelcnn.data import save_dataset
from tests.local import free_port, run, stop
from tests.pipelines.projects import PAIR, copy_project, tiny_dataset
from tests.pipelines.sites import Site
from tests.pipelines.toys import INK, Toy
from tools.faults.check import check

pytest.importorskip("psycopg", reason="MLflow's driver is missing: pip install -e '.[cluster]'")


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Start PostgreSQL as Debian packages it; yields USER@HOST:PORT of databases `mlflow` and `prefect`."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is missing: apt-get install postgresql")
    programs = found[-1].parent
    # It refuses to run as root; the package brings a user for it.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if user:
        shutil.chown(folder, "postgres")
    port = free_port()
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"

    def call(*words: str) -> None:
        command = [*user, str(programs / words[0]), *words[1:]]
        done = run(command, cwd="/")
        assert done.returncode == 0, done.stderr

    call("initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "postgres", "--no-sync")
    call("pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-o", settings, "-w", "start")
    try:
        for name in ("mlflow", "prefect"):
            call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", name)
        yield f"postgres@127.0.0.1:{port}"
    finally:
        call("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


def test_versions_promotions_and_lineage(postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg://{postgres}/mlflow")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.chdir(tmp_path)
    toy = Toy("mnist5k", tmp_path)
    assert toy.train(0.3) == "1"
    toy.promote()
    assert toy.train(INK) == "2"
    assert toy.aliases == {"champion": "1", "challenger": "2"}
    assert toy.promote()["decision"] == "promoted"
    check("mnist5k", num_versions=2, num_runs=2)
    run_rollback("mnist5k")
    assert toy.aliases == {"champion": "1", "previous": "2"}
    check("mnist5k", num_versions=2, num_runs=2)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_with_both(postgres: str, tmp_path: Path) -> None:
    copy_project(tmp_path)
    save_dataset(tmp_path / "data/mnist5k.safetensors", tiny_dataset())
    site = Site(tmp_path)
    site.environment |= {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{postgres}/prefect",
        "MLFLOW_TRACKING_URI": f"postgresql+psycopg://{postgres}/mlflow",
        "COLUMNS": "200",  # of the table that is read below
    }
    try:
        site.start("server", "start", "--host", "127.0.0.1", "--port", str(site.port))
        site.wait_until_healthy()
        command = [sys.executable, "-m", "pipelines.steps", "train-pair", PAIR, "--out", "out", "--report", "report"]
        done = run(command, 300, cwd=tmp_path, env=site.environment)
        assert done.returncode == 0, done.stderr
        runs = site.prefect("flow-run", "ls").stdout
        assert "train-pair" in runs
        assert "COMPLETED" in runs
    finally:
        for process in site.processes:
            stop(process)
    assert not list(tmp_path.rglob("*.db")), "nothing was left to SQLite"
