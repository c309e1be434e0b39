"""The Bento, taken to an empty store as one file, and served there from another folder; BENTOML_HOME is nowhere set."""

import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from tests.local import free_port, run, share_compiled, stop

ROOT = Path(__file__).parents[2]
BENTOML = str(Path(sys.executable).with_name("bentoml"))
REQUEST = {
    "dataset": "grey",
    "image": [[1, 0, 1, 0]] * 5,
    "observed": [[1] * 4] * 2 + [[0] * 4] * 3,
    "num_samples": 4,
    "seed": 42,
}


@pytest.mark.slow
def test_bento_answers_like_the_service(client, service_home, tmp_path):
    project, home = tmp_path / "project", tmp_path / "home"
    for folder in ("app", "pixelcnn"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("bentofile.yaml", "constraints.txt"):
        shutil.copy(ROOT / file, project)
    (project / "pixelcnn/only_here.py").touch()
    with open(project / "app/service/jobs.py", "a") as file:
        file.write("import pixelcnn.only_here\n")
    (project / ".bentoml").symlink_to(service_home)
    environment = {**os.environ, "HOME": str(home), "BENTOML_DO_NOT_TRACK": "True"}
    # A Bento brings its own code: what is installed here must not stand in for it. (It lacks `only_here`.)
    for name in ("PYTHONPATH", "BENTOML_HOME"):
        environment.pop(name, None)
    old = home / "bentoml/models/pixelcnn-grey/latest"  # of a Bento that was built before
    old.parent.mkdir(parents=True)
    old.write_text("v0-0")
    built = run([BENTOML, "build", "--output", "tag"], cwd=project, env=environment)
    assert built.returncode == 0, built.stderr
    sources = home / "bentoml/bentos/pixelcnn" / built.stdout.strip().rpartition(":")[2] / "src"
    files = {str(file.relative_to(sources)) for file in sources.rglob("*") if file.is_file()}
    assert {"app/service/api.py", "pixelcnn/models/base.py"} <= files
    own = ("app", "pixelcnn", "bentofile.yaml", "constraints.txt")
    assert not [file for file in files if file.split("/")[0] not in own]
    assert "app/canvas/main.py" not in files

    # What the bits depend on is what answers here.
    requirements = (sources.parent / "env/python/requirements.txt").read_text().splitlines()
    assert {f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "numba", "llvmlite", "numpy")} <= set(
        requirements
    )

    # It holds the models that are served, those and no others.
    for words in (
        ["export", built.stdout.strip().removeprefix("__tag__:"), str(tmp_path / "pixelcnn.bento")],
        ["import", str(tmp_path / "pixelcnn.bento")],
    ):
        done = run([BENTOML, *words], env=environment)
        assert done.returncode == 0, done.stderr
        environment["HOME"] = str(tmp_path / "empty")
    (package,) = (tmp_path / "empty/bentoml/bentos/pixelcnn").glob("*/src/pixelcnn")
    share_compiled(package)
    models = tmp_path / "empty/bentoml/models"
    served = {str(path.relative_to(models)) for path in models.glob("*/*/")}
    assert served == {f"{latest.parent.name}/{latest.read_text()}" for latest in service_home.glob("models/*/latest")}

    port = free_port()
    log = tmp_path / "log"
    with open(log, "w") as output:
        server = subprocess.Popen(
            [BENTOML, "serve", "pixelcnn:latest", "--port", str(port)],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 150
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        # By now both have the compiled sampler.
        assert (
            httpx.post(f"{url}/complete", json=REQUEST, timeout=60).json()
            == client.post("/complete", json=REQUEST).json()
        )
        assert httpx.get(f"{url}/models").json() == client.get("/models").json()
        # Through a real server, too, a huge body is refused in the one form.
        response = httpx.post(
            f"{url}/complete", content=b" " * 50_000_000, headers={"Content-Type": "application/json"}, timeout=60
        )
        assert response.status_code == 413
        assert list(response.json()) == ["error"]
        # It listens on the loopback address alone, without being told so.
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", port))
    finally:
        stop(server)
