"""The services of compose.yaml together: their commands, environments and health checks, as processes in one network.

What is Docker's stays unseen: images, users, what may be written. The service is a Bento that was taken to its store.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pixelcnn.data import save_dataset
from pixelcnn.images import to_png
from tests.local import run, stop
from tests.pipelines.projects import PAIR, ROOT, copy_project, tiny_dataset
from tests.pipelines.test_postgres import NUM_MACHINES, namespaces, running
from tests.pipelines.toys import Toy
from tests.service.champions import wait_until

PAGE = (ROOT / "docs/packages.md").read_text()
PASSWORD, TOKEN = "p4ss", "t0ken"
GIVEN = {  # by the one who starts them
    "POSTGRES_PASSWORD": PASSWORD,
    "PIXELCNN_TOKEN": TOKEN,
    "PIXELCNN_DATASETS": "mnist5k",
    "PIXELCNN_DRAIN_S": "1",
    "PIXELCNN_NOTIFY_URL": "http://127.0.0.1:8065",
}
BENTOML = str(Path(sys.executable).with_name("bentoml"))
URLOPEN = """
import sys
from urllib.request import Request, urlopen
print(urlopen(Request(sys.argv[1], headers={"Authorization": f"Bearer {sys.argv[2]}"})).read().decode())
"""
ON_CALL = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class OnCall(BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")
HTTPServer(("127.0.0.1", 8065), OnCall).serve_forever()
"""


class Composed:
    """The services as compose.yaml and Dockerfile describe them, with /srv in a folder of the test's own."""

    def __init__(self, folder: Path, inside: list[str]) -> None:
        self.folder, self._inside = folder, inside
        (folder / "srv").mkdir()
        self._docker = self._here((ROOT / "Dockerfile").read_text())
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: GIVEN[found[1]], (ROOT / "compose.yaml").read_text())
        described = yaml.safe_load(self._here(text))
        self.services, self.configs = described["services"], described["configs"]
        self._processes: list[subprocess.Popen] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIXELCNN", "PYTHONPATH"))}
        self._environment = {**kept, "PREFECT_HOME": f"{folder}/prefect", "OMP_NUM_THREADS": "1"}
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}:{programs}"

    def _here(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/(srv|etc/prometheus|etc/alertmanager)/", rf"{self.folder}/\1/", text)

    def of_stage(self, stage: str, word: str) -> str:
        """Return what an instruction of one of Dockerfile's stages says, empty without one."""
        stages = re.split(r"^FROM ", self._docker, flags=re.MULTILINE)
        text = next(text for text in stages if text.partition("\n")[0].endswith(f"AS {stage}"))
        found = re.search(rf"^{word} (?:--\S+ )*(.*)$", text, re.MULTILINE)
        return found[1] if found else ""

    def unpacking(self) -> str:
        """Return the command that unpacks the Bento."""
        return f"python {self.of_stage('service', 'RUN python').partition(' &&')[0]}"

    def environment(self, name: str) -> dict[str, str]:
        """Return what a service's processes find in their environment."""
        image = shlex.split(self.of_stage(name, "ENV")) if name in ("service", "canvas") else []
        told = {**dict(word.split("=", 1) for word in image), **self.services[name].get("environment", {})}
        return {**self._environment, **told}

    def run(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a service's container."""
        return run([*self._inside, *command], 300, cwd=self.folder / "srv/pixelcnn", env=self.environment(name))

    def configure(self, name: str) -> None:
        """Write a service's configurations to where its container has them; alerts and who is called do not wait."""
        for given in self.services[name].get("configs", []):
            config, target = self.configs[given["source"]], Path(given["target"])
            text = config.get("content") or self._here((ROOT / config["file"]).read_text())
            text = re.sub(r"(for|group_wait|scrape_interval|evaluation_interval): \w+", r"\1: 1s", text)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)

    def start(self, name: str, command: list[str] | None = None) -> subprocess.Popen:
        """Start a service's command, and wait until its health check passes."""
        said = self.services[name].get("command")
        command = command or (shlex.split(said) if said else json.loads(self.of_stage(name, "CMD")))
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [*self._inside, *command],
                cwd=self.folder / "srv/pixelcnn",
                env=self.environment(name),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.append(process)
        self.wait_for(name, process)
        return process

    def wait_for(self, name: str, process: subprocess.Popen | None = None) -> None:
        check = self.services[name].get("healthcheck", {})
        if check.get("disable"):
            return
        words = check["test"][1:] if check else shlex.split(self.of_stage(name, "HEALTHCHECK").removeprefix("CMD "))
        if words[0] == "wget":  # which that image has
            words = ["python", "-c", URLOPEN, words[-1], ""]
        deadline = time.monotonic() + 180
        while self.run(name, *words).returncode:
            said = (self.folder / f"{name}.log").read_text() if process else ""
            assert process is None or process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)

    def fetch(self, url: str) -> dict:
        """Return what a service answers the canvas's container, as JSON."""
        done = self.run("canvas", "python", "-c", URLOPEN, url, TOKEN)
        assert done.returncode == 0, done.stderr
        found: dict = json.loads(done.stdout)
        return found

    def stop(self) -> None:
        for process in reversed(self._processes):
            stop(process)


@pytest.fixture
def network() -> Iterator[list[str]]:
    """Yield what runs a command in a network in which each service has its name."""
    with namespaces("c") as (name,):
        hosts = Path("/etc/netns", name, "hosts")  # which `ip` lays over /etc/hosts
        hosts.parent.mkdir(parents=True)
        try:
            names = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
            hosts.write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
            assert run(["ip", "-n", name, "link", "set", "lo", "up"]).returncode == 0
            yield ["ip", "netns", "exec", name]
        finally:
            shutil.rmtree(hosts.parent)


def pack_bento(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a Bento that holds a champion of another registry, as docs/packages.md says."""
    folder.mkdir()
    with monkeypatch.context() as context:
        context.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        context.setenv("BENTOML_HOME", f"{folder}/bentoml")
        context.chdir(folder)
        toy = Toy("mnist5k", folder)
        toy.train(0.3)
        toy.promote()
        context.delenv("PYTHONPATH", raising=False)
        for words in (["build"], ["export", "pixelcnn:latest", str(out)]):
            done = run([BENTOML, *words], 300, cwd=ROOT)
            assert done.returncode == 0, done.stderr


def test_no_volume_hides_the_code_of_a_newer_image(tmp_path: Path) -> None:
    """A volume is filled from the image that it is first used with."""
    all_of_it = Composed(tmp_path, [])
    served = Path(json.loads(all_of_it.of_stage("service", "CMD"))[-1])
    volumes = [Path(volume.partition(":")[2]) for volume in all_of_it.services["service"]["volumes"]]
    assert served == tmp_path / "srv/pixelcnn" / all_of_it.unpacking().split()[-1]
    assert not [volume for volume in volumes if served.is_relative_to(volume)]


@pytest.mark.repeated
@pytest.mark.skipif(NUM_MACHINES < 2, reason="eight services take minutes: make test-slow")
@pytest.mark.timeout(1200)
def test_all_services_together(network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are healthy; a training and a promotion by the worker reach the service, and Prometheus sees it.

    Pictures of one's own can be added; what Prefect and Prometheus complain of reaches who is on call.
    """
    all_of_it = Composed(tmp_path, network)
    srv = tmp_path / "srv"
    (srv / "pixelcnn").mkdir()
    pack_bento(tmp_path / "elsewhere", srv / "pixelcnn/pixelcnn.bento", monkeypatch)
    copy_project(srv / "pixelcnn")
    shutil.copytree(ROOT / "app", srv / "pixelcnn/app")
    save_dataset(srv / "pixelcnn/data/mnist5k.safetensors", tiny_dataset())
    pictures = srv / "pixelcnn/data/pictures"
    pictures.mkdir()
    for index, image in enumerate(tiny_dataset().levels("train", slice(0, 30))):
        (pictures / f"{index}.png").write_bytes(to_png(image, 2))
    for name in ("prometheus", "alertmanager"):
        all_of_it.configure(name)
    with running("--auth-local=peer --auth-host=scram-sha-256", 5432, *network) as (socket, user):
        told = all_of_it.services["postgres"]["environment"]
        for line in (  # as that image makes them
            f"CREATE ROLE {told['POSTGRES_USER']} SUPERUSER LOGIN PASSWORD '{told['POSTGRES_PASSWORD']}'",
            f"CREATE DATABASE {told['POSTGRES_DB']}",
            all_of_it.configs["databases"]["content"],
        ):
            done = run([*user, "psql", "-h", str(socket), "-c", line], cwd="/")
            assert done.returncode == 0, done.stderr
        try:
            all_of_it.wait_for("postgres")
            for command in (all_of_it.unpacking(), f"bentoml {all_of_it.of_stage('service', 'RUN bentoml')}"):
                done = all_of_it.run("service", "sh", "-c", command)
                assert done.returncode == 0, done.stderr
            done = all_of_it.run(
                "worker", "sh", "-c", f"dvc {all_of_it.of_stage('pipeline', 'RUN dvc').partition('&&')[0]}"
            )
            assert done.returncode == 0, done.stderr
            on_call = shlex.join([sys.executable, "-c", ON_CALL])
            all_of_it.services["on-call"] = {"command": on_call, "healthcheck": {"disable": True}}
            all_of_it.start("on-call")
            service = all_of_it.start("service")
            for name in ("canvas", "mlflow", "prefect", "worker"):
                all_of_it.start(name)
            scrape = f"--config.file={tmp_path}/etc/prometheus/prometheus.yml --storage.tsdb.path={tmp_path}/metrics"
            call = f"--config.file={tmp_path}/etc/alertmanager/alertmanager.yml --storage.path={tmp_path}/alerting"
            all_of_it.start("alertmanager", ["prometheus-alertmanager", *call.split(), "--cluster.listen-address="])
            all_of_it.start("prometheus", ["prometheus", *scrape.split()])

            def served() -> str:
                sha256: str = all_of_it.fetch("http://service:3000/models")["mnist5k"]["model"]["weights_sha256"]
                return sha256

            def scraped() -> list[tuple[str, str]]:
                found = all_of_it.fetch("http://prometheus:9090/api/v1/query?query=up")["data"]["result"]
                return [(one["metric"]["instance"], one["value"][1]) for one in found]

            before = served()
            address = "PREFECT_API_URL=http://prefect:4200/api"
            wait_until(lambda: "Ready: " in (tmp_path / "worker.log").read_text(), 180)
            adopt, add = re.findall(r"^docker compose exec worker (.*?)(?: +#.*)?$", PAGE, re.MULTILINE)
            submit = f"env {address} prefect deployment run --watch --watch-timeout 240"
            for line in (
                adopt,
                add.replace("NAME", "dots"),
                f"{submit} train-pair/train-pair -p pair={PAIR}",
                f"{submit} promote/promote -p dataset=mnist5k",
            ):
                done = all_of_it.run("worker", *shlex.split(line))
                assert done.returncode == 0, done.stdout + done.stderr
            wait_until(lambda: served() != before, 30)  # the promotion reaches it
            wait_until(lambda: scraped() == [("service:3000", "1")], 20)

            calls = tmp_path / "on-call.log"
            unknown = f"{submit} evaluate-champions/evaluate-champions -p".split()
            assert all_of_it.run("worker", *unknown, 'datasets=["svhn"]').returncode == 1
            wait_until(lambda: "evaluate-champions is Failed" in calls.read_text(), 60)
            assert "PixelCNN" not in calls.read_text(), "no alert until now"
            stop(service)
            wait_until(lambda: "PixelCNNDown is firing" in calls.read_text(), 60)
        finally:
            all_of_it.stop()
    assert not list(srv.rglob("*.db")), "nothing was left to SQLite"
