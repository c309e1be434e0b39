"""The alerts: sound by promtool, known to the runbooks, and seen to fire and resolve in a real Prometheus."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from prometheus_client import REGISTRY

from app.service.metrics import metrics
from pipelines.registry import store
from pixelcnn.completion import drawing_bits_per_dim
from tests.local import free_port, run, slow_alone, stop
from tests.service.champions import GREY, make_checkpoint, put, wait_until
from tests.service.served import ROOT, serving
from tests.service.test_service_faults import SLOW

OPS = ROOT / "ops"
RULES = yaml.safe_load((OPS / "prometheus/alerts.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
DASHBOARD = (OPS / "grafana/dashboard.json").read_text()

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="needs Debian's package prometheus"
)
DRAWING = {"image": [[1, 0, 1, 0]] * 5, "observed": [[1] * 4] * 5}


@needs_prometheus
def test_promtool_finds_nothing():
    done = run(["promtool", "check", "config", "prometheus.yaml"], cwd=OPS / "prometheus")
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_each_alert_has_its_runbook_and_each_runbook_its_alert():
    sections = re.findall(r"^## (.+)$", (ROOT / "docs/runbooks.md").read_text(), re.MULTILINE)
    assert sections == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
        assert rule["annotations"]["summary"]


@pytest.mark.usefixtures("client")
def test_what_rules_and_dashboard_show_is_told_by_the_service():
    metrics()
    told = {name for family in REGISTRY.collect() for name in (family.name, f"{family.name}_total")}
    told |= {f"{name}_{part}" for name in told for part in ("bucket", "sum", "count")}
    shown = set(re.findall(r"pixelcnn_\w+", json.dumps(RULES) + DASHBOARD))
    assert shown - told == set()
    assert json.loads(DASHBOARD)["panels"]


class Prometheus:
    """A Prometheus that scrapes a port each second; the rules' times are short, their numbers those of this test."""

    def __init__(self, folder: Path, target: int) -> None:
        text = (OPS / "prometheus/alerts.yaml").read_text().replace("[5m]", "[4s]").replace("[1d:5m]", "[1m:1s]")
        text = re.sub(r"for: \w+", "for: 0s", text).replace("> 2\n", "> 0.000001\n")
        text = re.sub(r">= [25]00", ">= 2", text)
        (folder / "alerts.yaml").write_text(text)
        settings = yaml.safe_load((OPS / "prometheus/prometheus.yaml").read_text())
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        settings["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = ["prometheus", f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.path=data"]
        with open(folder / "prometheus.log", "w") as log:
            self.process = subprocess.Popen(
                [*command, "--config.file=prometheus.yaml"],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def firing(self) -> set[str]:
        """Return the names of what fires, each alone and with its endpoint, as in `PixelCNNSlow complete`."""
        try:
            alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=5).json()["data"]["alerts"]
        except (httpx.TransportError, ValueError):  # it is only starting
            return set()
        found = [alert["labels"] for alert in alerts if alert["state"] == "firing"]
        names = {labels["alertname"] for labels in found}
        return names | {f"{labels['alertname']} {labels.get('endpoint')}" for labels in found}

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(self, *args: object) -> None:
        stop(self.process)


def champion(folder: Path, version: str, seed: int, reference: list[float] | None) -> str:
    """Put a champion of grey into the store, with a reference if there is one; return its tag."""
    tag = put(folder, "grey", GREY, f"{version}0", seed)  # for its metadata
    checkpoint = folder / f"with-reference-{version}"
    make_checkpoint(checkpoint, GREY, seed)
    names = ("bits_per_dim", "ink_share", "known_share")
    if reference is not None:
        (checkpoint / "beginnings.json").write_text(json.dumps(dict.fromkeys(names, reference)))
    metadata = {key: value for key, value in store.metadata_of(tag).items() if key != "manifest_sha256"}
    return store.export(checkpoint, {**metadata, "version": version})


@slow_alone
@needs_prometheus
@pytest.mark.timeout(600)
def test_each_alert_fires_and_resolves(tmp_path, monkeypatch):
    home = tmp_path / "bentoml"
    home.mkdir()
    monkeypatch.setenv("BENTOML_HOME", str(home))
    # The champion is the one of two that finds the drawing less likely.
    image, known = torch.tensor([[DRAWING["image"]]]), torch.ones(1, 1, 5, 4, dtype=torch.bool)
    bits = {s: drawing_bits_per_dim(make_checkpoint(tmp_path / f"s{s}", GREY, s), image, known).item() for s in (1, 2)}
    better, worse = sorted(bits, key=bits.__getitem__)
    port = free_port()
    fired: list[str] = []
    resolved: list[str] = []
    with Prometheus(tmp_path, port) as prometheus:

        def fires(*names: str) -> None:
            wait_until(lambda: set(names) <= prometheus.firing())
            fired.extend(names)

        def resolves(*names: str) -> None:
            wait_until(lambda: not set(names) & prometheus.firing())
            resolved.extend(names)

        fires("PixelCNNDown")
        values = {"PIXELCNN_DATASETS": "grey", "PIXELCNN_TIMEOUT_S": "1", "PIXELCNN_MAX_CLIENT_REQUESTS": "1"}
        with serving(home, tmp_path / "log", port=port, **values) as served:
            fires("PixelCNNNotReady")
            resolves("PixelCNNDown")
            tag = champion(tmp_path, "1", worse, [0.001 * i for i in range(200)])
            config = home / "models" / tag.replace(":", "/") / "config.json"
            whole = config.read_text()
            config.write_text("{")
            store.serve(tag)
            fires("PixelCNNChampionRefused")
            config.write_text(whole)
            store.serve(champion(tmp_path, "2", better, [0.5] * 200), "challenger")
            store.serve(put(tmp_path, "slow", SLOW, "1", seed=0))
            resolves("PixelCNNNotReady", "PixelCNNChampionRefused")
            wait_until(lambda: "slow" in httpx.get(f"{served.url}/models", timeout=30).json())

            (home / "models").rename(home / "gone")
            fires("PixelCNNStoreUnreadable")
            (home / "gone").rename(home / "models")
            resolves("PixelCNNStoreUnreadable")

            end = threading.Event()

            def ask(path: str, client: str, body: dict) -> None:
                while not end.wait(0.02):
                    httpx.post(f"{served.url}{path}", json=body, headers={"X-Client": client}, timeout=60)

            complete = {"dataset": "grey", **DRAWING}
            _, height, width = SLOW.image_shape
            unknown = {"image": [[[0, 0, 0]] * width] * height, "observed": [[0] * width] * height}
            endless = {"dataset": "slow", "num_samples": 16, **unknown}
            load: list[Callable[[], None]] = [
                lambda: ask("/complete_stream", "slow", endless),  # longer than may be: a stream that ends in 504
                lambda: ask("/complete", "one", complete),
                lambda: ask("/complete_stream", "two", complete),
                lambda: ask("/generate", "slow", {"dataset": "grey"}),  # the client's second request: 429
            ]
            threads = [threading.Thread(target=work) for work in load]
            for thread in threads:
                thread.start()
            under_load = (
                "PixelCNNFailing",
                "PixelCNNRefusing",
                "PixelCNNSlow",
                "PixelCNNChallengerBetter",
                "PixelCNNDrift",
            )
            try:
                for name in under_load:
                    fires(name)
                wait_until(lambda: {"PixelCNNSlow complete", "PixelCNNSlow complete_stream"} <= prometheus.firing())
            finally:
                end.set()
                for thread in threads:
                    thread.join()
            for version, reference in (("3", None), ("4", [0.5] * 200)):
                store.serve(champion(tmp_path, version, worse, reference))
                told = f'"version":"{version}"'
                wait_until(lambda told=told: told in httpx.get(f"{served.url}/models").text)
                httpx.post(f"{served.url}/complete", json=complete, timeout=60)
                if reference is None:
                    fires("PixelCNNDriftUnwatched")
            resolves(*under_load, "PixelCNNDriftUnwatched")
    assert set(fired) == set(resolved) == set(ALERTS)
