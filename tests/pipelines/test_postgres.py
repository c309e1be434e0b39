"""MLflow and Prefect on PostgreSQL, one URL each: a server of the test's own, in a temporary folder."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.promotion.move import run_rollback
from pixelcnn.data import save_dataset
from tests.local import free_port, run, slow_alone, stop
from tests.pipelines.projects import PAIR, ROOT, copy_project, tiny_dataset
from tests.pipelines.sites import Site
from tests.pipelines.toys import INK, Toy
from tools.faults.check import check, in_process

pytest.importorskip("psycopg", reason="MLflow's driver is missing: pip install -e '.[cluster]'")

NUM_MACHINES = int(os.environ.get("PIXELCNN_TEST_MACHINES", "1"))  # `make test-slow`: 2


@contextmanager
def running(auth: str, port: int, *inside: str) -> Iterator[tuple[Path, list[str]]]:
    """Start PostgreSQL as Debian packages it, by way of the command `inside`.

    Yields the folder of its socket, and the words that let a command run as its user.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL is missing: apt-get install postgresql")
    programs = found[-1].parent
    # It refuses to run as root; the package brings a user for it.
    user = [*inside, *(["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else [])]
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    settings = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"

    def call(*words: str) -> None:
        done = run([*user, str(programs / words[0]), *words[1:]], cwd="/")
        assert done.returncode == 0, done.stderr

    call("initdb", "-D", str(folder / "data"), *auth.split(), "-U", "postgres", "--no-sync")
    call("pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-o", settings, "-w", "start")
    try:
        yield folder, user
    finally:
        call("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Yield USER@HOST:PORT of databases `mlflow` and `prefect`."""
    port = free_port()
    with running("--auth=trust", port) as (folder, user):
        for name in ("mlflow", "prefect"):
            assert run([*user, "createdb", "-h", str(folder), "-p", str(port), name], cwd="/").returncode == 0
        yield f"postgres@127.0.0.1:{port}"


@pytest.mark.slow
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


@pytest.mark.repeated
@pytest.mark.skipif(NUM_MACHINES < 2, reason="takes as long as the one above: make test-slow")
@pytest.mark.timeout(600)
def test_a_lost_database_is_restored_as_the_page_says(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Database, artifacts and model store are gone; no process has a connection from before."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+psycopg://{postgres}/lost")
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.chdir(tmp_path)
    toy = Toy("mnist5k", tmp_path)
    address = postgres.partition("@")[2]
    environment = {**os.environ, "PGHOST": address.partition(":")[0], "PGPORT": address.partition(":")[2]}
    environment |= {"PGUSER": "postgres", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def type_(lines: str) -> None:
        for said, here in (
            ("pixelcnn@127.0.0.1:5432/mlflow", f"{postgres}/lost"),
            ("createdb --owner pixelcnn mlflow", "createdb --owner pixelcnn lost"),
            ("/srv/backups/", f"{tmp_path}/"),
            ("/shared mlartifacts", f"{tmp_path} mlruns"),
            ("/shared", str(tmp_path)),
        ):
            lines = lines.replace(said, here)
        done = run(["bash", "-ec", lines], env=environment)
        assert done.returncode == 0, done.stderr

    def fill() -> None:
        toy.train(0.3)
        toy.promote()

    backup, restore = [text for text in blocks(3) if "/srv/backups/mlflow.dump" in text]
    type_("createuser pixelcnn; createdb --owner pixelcnn mlflow")
    assert in_process(fill) == 0
    type_(backup)
    type_("dropdb --force lost")
    for name in ("mlruns", "bentoml"):
        shutil.rmtree(tmp_path / name)
    type_(restore)
    assert in_process(lambda: check("mnist5k", num_versions=1, num_runs=1)) == 0


@slow_alone
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


# Two machines: a network of its own for each, and a clone at the same path.

HOST, PASSWORD = "10.77.0.1", "p4ss"
GATED = "gated_pixelcnn-mnist5k"


def blocks(number: int) -> list[str]:
    """Return the commands of a section of the page, a text for each terminal, with what a person puts in."""
    page = (ROOT / "docs/operations.md").read_text()
    section = page.partition(f"\n## {number}. ")[2].partition("\n## ")[0]
    found = re.findall(r"^ *```bash\n(.*?)^ *```", section, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(text).replace("HOST", HOST).replace("SECRET", PASSWORD) for text in found]


class Machine:
    """One that has its own network and its own clone, which its terminals see at the same path as the other's.

    Args:
        folder: of the logs and the clone.
        place: where the clone is seen.
        name: of the network namespace, and the begin of its one interface's.
    """

    def __init__(self, folder: Path, place: Path, name: str, address: str) -> None:
        self.folder, self.place, self.name = folder, place, name
        self.inside = ("ip", "netns", "exec", name)
        self.clone = folder / "clone"
        self.clone.mkdir(parents=True)
        copy_project(self.clone)
        save_dataset(self.clone / "data/mnist5k.safetensors", tiny_dataset())
        for words in (f"addr add {address}/24 dev {name}", "link set lo up", f"link set {name} up"):
            assert run(["ip", "-n", name, *words.split()]).returncode == 0
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(place),
            "PREFECT_HOME": str(folder / "prefect"),
            "BENTOML_HOME": str(folder.parent / "shared/bentoml"),
            "GIT_CEILING_DIRECTORIES": str(place.parent),
            "OMP_NUM_THREADS": "1",
        }
        for variable in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
            self.environment.pop(variable, None)

    def _command(self, lines: str) -> list[str]:
        lines = lines.replace("/shared/", f"{self.folder.parent}/shared/")
        return [*self.inside, "bash", "-ec", f"mount --bind {self.clone} {self.place}; cd {self.place}\n{lines}"]

    def start(self, name: str, lines: str) -> tuple[subprocess.Popen, Path]:
        """Type lines into a terminal of their own, and leave them running; return its process and its log."""
        path = self.folder / f"{name}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                self._command(lines), env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return process, path

    def type(self, lines: str) -> str:
        done = run(self._command(lines), 300, env=self.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def namespaces(letters: str) -> Iterator[list[str]]:
    """Make network namespaces, one for each letter; yield their names."""
    names = [f"pixelcnn-{os.getpid() % 10000}-{one}" for one in letters]  # of at most 15, as interfaces have
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are missing: apt-get install iproute2")
    try:
        if any(run(["ip", "netns", "add", name]).returncode for name in names):
            pytest.skip("the right to make network namespaces is missing: root has it")
        yield names
    finally:
        for name in names:
            run(["ip", "netns", "del", name])


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two machines that see each other, and nothing else."""
    with namespaces("ab") as names:
        link = f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"
        assert run(link.split()).returncode == 0
        place = tmp_path / "project"
        place.mkdir()
        yield [Machine(tmp_path / name[-1], place, name, f"10.77.0.{i + 1}") for i, name in enumerate(names)]


@pytest.mark.repeated
@pytest.mark.skipif(NUM_MACHINES < 2, reason="two machines take minutes: make test-slow")
@pytest.mark.timeout(1200)
def test_two_machines_as_the_page_says(machines: list[Machine], tmp_path: Path) -> None:
    """Each block of the page's sections 4 and 5, line by line."""
    one, other = machines
    database, prefect, mlflow, addresses = blocks(4)
    operate, further = blocks(5)
    terminals: list[subprocess.Popen] = []

    def start(machine: Machine, name: str, lines: str, until: str) -> subprocess.Popen:
        process, log = machine.start(name, lines)
        terminals.append(process)
        deadline = time.monotonic() + 240
        while until not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        return process

    def submit(machine: Machine, words: str) -> None:
        machine.type(f"{addresses}\nprefect deployment run {words} --watch --watch-timeout 240")

    # The package's own settings: the user postgres by the socket, others by their password.
    with running("--auth-local=peer --auth-host=scram-sha-256", 5432, *one.inside) as (socket, user):
        done = run([*user, "env", f"PGHOST={socket}", "bash", "-ec", database], cwd="/")
        assert done.returncode == 0, done.stderr
        try:
            start(one, "prefect", prefect, "Check out the dashboard at")
            start(one, "mlflow", mlflow, "Application startup complete")
            first = start(one, "operate", addresses + operate, "Ready: ")
            submit(other, f"train-pair/train-pair -p pair={PAIR}")
            assert list(one.clone.glob(f"models/deployments/*/{PAIR}/scores.json"))
            stop(first)
            start(other, "worker", addresses + further, "started!")
            submit(one, f"train-pair/train-pair -p pair={GATED}")
            assert list(other.clone.glob(f"models/deployments/*/{GATED}/scores.json"))
            submit(one, "promote/promote -p dataset=mnist5k")
            assert (tmp_path / "shared/bentoml/models/pixelcnn-mnist5k/latest").exists(), "it is served"
            lineage = "python -m pipelines.registry.lineage --version pixelcnn-mnist5k"
            other.type(f"{addresses}\n{lineage}/1 --verify\n{lineage}/2 --verify")
        finally:
            for process in reversed(terminals):
                stop(process)
    assert list((tmp_path / "shared/mlartifacts").rglob("model.safetensors"))
    assert not list(tmp_path.rglob("*.db")), "nothing was left to SQLite"
