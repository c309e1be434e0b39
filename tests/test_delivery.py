"""Make, container and workflow files: what is held to without Docker and GitHub. docs/packages.md says what was run."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import requires
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML

from tests.local import Webhook, free_port, run, stop
from tests.pipelines.projects import copy_project

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
UNLOCKED = {"torch", "torchvision"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def test_every_locked_version_has_hashes_and_no_index() -> None:
    locked, hashed = ((ROOT / name).read_text() for name in ("constraints.txt", "hashes.txt"))
    entries = re.split(r"\n(?=\S)", hashed.rstrip())
    pins = {re.sub("[._-]+", "-", line.lower()) for line in locked.splitlines() if "==" in line}
    assert {re.sub("[._-]+", "-", entry.split()[0].lower()) for entry in entries} == pins, (
        "docs/packages.md: uv pip compile"
    )
    assert all(re.fullmatch(r"\S+( \\\n +--hash=sha256:[0-9a-f]{64})+", entry) for entry in entries), "and nothing else"


def test_every_requirement_is_locked_but_those_whose_builds_differ() -> None:
    """Also what others bring along, llvmlite say; but for the two, which bring what their builds need."""
    groups = [PROJECT["project"]["dependencies"], *EXTRAS.values(), PROJECT["dependency-groups"]["dev"]]
    todo = [(Requirement(line), "") for group in groups for line in group]
    needed: set[tuple[str, str]] = set()  # name, extra
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for asked in {(canonicalize_name(requirement.name), one) for one in ("", *requirement.extras)} - needed:
            needed.add(asked)
            if asked[0] not in UNLOCKED:
                todo += [(Requirement(line), asked[1]) for line in requires(asked[0]) or []]
    locked = re.findall(r"^([^#=]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {name for name, _ in needed} - {canonicalize_name(name) for name in locked} == UNLOCKED


def test_an_installation_that_was_interrupted_begins_anew(tmp_path: Path) -> None:
    """A virtual environment has its Python at once, and pip seconds later."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    venv.create(tmp_path / ".venv", with_pip=False)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >>asked\n[ "$2" != venv ]\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "install", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode != 0
    assert (tmp_path / "asked").read_text().splitlines()[-1] == "-m venv --clear --upgrade-deps .venv"


def test_make_check_asks_for_the_architecture_too() -> None:
    assert "tests/test_architecture.py" in run(["make", "-n", "check"], cwd=ROOT).stdout


def test_the_bento_takes_what_the_service_does() -> None:
    """And pins what the bits depend on at the build: tests/service/test_bento.py."""
    packages = yaml.safe_load((ROOT / "bentofile.yaml").read_text())["python"]["packages"]
    wanted = {*EXTRAS["service"], *EXTRAS["tracing"]}
    assert wanted <= set(packages) <= wanted | set(PROJECT["project"]["dependencies"])


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Return a folder in which `make install` has nothing to do; its Python is this one."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    write_program(tmp_path / ".venv/bin/python", f'exec {sys.executable} "$@"')
    (tmp_path / ".venv/installed").write_text(f"{tmp_path}\n")
    return tmp_path


def write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_an_environment_of_another_folder_or_without_python_is_refused(installed: Path) -> None:
    def made() -> subprocess.CompletedProcess[str]:
        return run(["make", "--silent", "install"], cwd=installed)

    assert made().returncode == 0
    sentence = "error: .venv was made in another folder, or its Python is gone. Run make clean, then this again.\n"
    (installed / ".venv/bin/python").rename(installed / ".venv/bin/python3")
    assert (made().returncode, made().stdout) == (2, sentence)
    (installed / ".venv/bin/python3").rename(installed / ".venv/bin/python")
    (installed / ".venv/installed").write_text("/elsewhere\n")
    assert (made().returncode, made().stdout) == (2, sentence)


def test_the_audit_asks_about_torch_too(installed: Path) -> None:
    (installed / ".venv/audit/bin").mkdir(parents=True)
    for name in ("python", "cyclonedx-py"):
        write_program(installed / ".venv/audit/bin" / name, "")
    write_program(installed / ".venv/audit/bin/pip-audit", 'cat "$2" "$4"  # those that it requires')
    done = run(["make", "--silent", "audit", "PYTHON=true"], cwd=installed)
    asked = dict(line.split("==") for line in done.stdout.splitlines() if re.fullmatch(r"[\w.-]+==[\w.]+", line))
    assert asked.keys() >= {"numpy", *UNLOCKED}, done.stderr


def test_a_release_is_of_the_version_that_its_tag_names() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())
    check = next(step["run"] for step in workflow["jobs"]["release"]["steps"] if "GITHUB_REF_NAME#v" in str(step))
    version = PROJECT["project"]["version"]
    for tag, code in ((f"v{version}", 0), (f"v{version}1", 1)):
        assert run(["bash", "-c", check], cwd=ROOT, env={**os.environ, "GITHUB_REF_NAME": tag}).returncode == code
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_what_an_image_copies_is_its_users_to_read() -> None:
    """Under a strict umask files are their owner's alone, and Docker keeps that."""
    assert re.findall(r"^COPY (?!--chown=pixelcnn ).*", (ROOT / "Dockerfile").read_text(), re.MULTILINE) == []


def test_a_database_is_not_ready_before_it_is_reached_by_tcp() -> None:
    check = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["postgres"]["healthcheck"]["test"]
    assert check[check.index("--host") + 1] == "127.0.0.1"


def test_containers_are_closed() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    stages = re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    users = {stage.split()[2]: re.findall(r"^USER (\w+)", stage, re.MULTILINE) for stage in stages}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] or name == "worker", name
        assert "PASSWORD" not in service.get("command", ""), "which every user of this machine can read"
        if "build" in service:
            assert users[service["build"]["target"]] == ["pixelcnn"], "not root"
        has_check = "HEALTHCHECK" in next((s for s in stages if s.split()[2] == name), "") or "healthcheck" in service
        assert has_check, name


def test_a_worker_has_what_a_project_consists_of(tmp_path: Path) -> None:
    """Also the entries of datasets of one's own, which outlive its container."""
    copy_project(tmp_path)
    taken = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert [path.name for path in tmp_path.iterdir() if not any(path.match(name) for name in taken)] == []
    worker = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["worker"]
    assert {volume.partition("/srv/pixelcnn/")[2] for volume in worker["volumes"]} >= {"data", "models", "own"}


def test_prometheus_takes_what_compose_gives_it(tmp_path: Path) -> None:
    compose = YAML(typ="safe").load((ROOT / "compose.yaml").read_text())  # which refuses a key that is there twice
    YAML(typ="safe").load(compose["configs"]["prometheus"]["content"])
    if promtool := shutil.which("promtool"):
        for config in compose["services"]["prometheus"]["configs"]:
            given, path = compose["configs"][config["source"]], tmp_path / Path(config["target"]).name
            path.write_text(given["content"] if "content" in given else (ROOT / given["file"]).read_text())
        command = [promtool, "check", "config", str(tmp_path / "prometheus.yml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's package prometheus")
def test_each_alert_fires_at_its_limit_and_after_its_time() -> None:
    command = ["promtool", "test", "rules", str(ROOT / "ops/prometheus/alerts_test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rules, tested = ((ROOT / f"ops/prometheus/{name}.yaml").read_text() for name in ("alerts", "alerts_test"))
    assert set(re.findall(r"alert: (\w+)", rules)) == set(re.findall(r"alertname=\"(\w+)\"", tested))


@pytest.mark.skipif(shutil.which("prometheus-alertmanager") is None, reason="needs Debian's prometheus-alertmanager")
def test_an_alert_reaches_the_webhook_and_its_end_too(tmp_path: Path) -> None:
    """As ops/alertmanager says, but for the times; Slack's form, with what the runbooks need."""
    settings = yaml.safe_load((ROOT / "ops/alertmanager/alertmanager.yaml").read_text())
    settings["route"] |= {"group_wait": "0s", "group_interval": "1s"}
    (channel,) = settings["receivers"][0]["slack_configs"]
    channel["api_url_file"] = str(tmp_path / "notify_url")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        "prometheus-alertmanager",
        "--config.file=settings.yaml",
        "--storage.path=.",
        "--cluster.listen-address=",
    ]
    with (tmp_path / "log").open("w") as log, Webhook() as slack:
        (tmp_path / "notify_url").write_text(f"{slack.url}\n")
        listen = f"--web.listen-address={url.removeprefix('http://')}"
        process = subprocess.Popen([*command, listen], cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
        try:
            client = httpx.Client(transport=httpx.HTTPTransport(retries=6))  # while it starts
            alert = {
                "labels": {"alertname": "PixelCNNDown", "instance": "one:3000", "severity": "page"},
                "annotations": {"summary": "it is down", "runbook_url": "docs/runbooks.md#pixelcnndown"},
            }
            for end, status in (({}, "firing"), ({"endsAt": "2020-01-01T00:00:00Z"}, "resolved")):
                client.post(f"{url}/api/v2/alerts", json=[alert | end]).raise_for_status()
                said = slack.told.get(timeout=20)["attachments"][0]
                assert said["title"] == f"PixelCNNDown is {status}"
                assert said["text"].strip() == "it is down (docs/runbooks.md#pixelcnndown)"
        finally:
            stop(process)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_little_and_calls_what_is_there(workflow: Path) -> None:
    text = workflow.read_text()
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}, "more is for a job to ask for"
    steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
    assert all(re.fullmatch(r"[\w./-]+@(v\d+|[0-9a-f]{40})", step["uses"]) for step in steps if "uses" in step)
    assert "run: .ci/run" in text or workflow.stem != "tests", "with the packages that tests need"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)", text)) <= set(targets)
    # What others wrote is no part of a script: it comes as a variable of the environment.
    assert not [step for step in steps if "${{" in step.get("run", "")]
