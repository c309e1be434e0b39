"""A champion's reference of drawings, its challenger, and what follows from drift."""

import json
from pathlib import Path

import pytest
from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter

from app.service.champions import load_champion
from pipelines import operate
from pipelines.flows import drift
from pipelines.promotion.move import run_shadow
from pipelines.promotion.reference import NUM_DRAWINGS, reference_of
from pipelines.promotion.register import release, repair_all
from pipelines.registry import store
from pixelcnn import load_dataset
from tests.local import Handler, LocalServer
from tests.pipelines.sites import tags_of_last_run


def test_a_champion_has_a_reference_and_may_have_a_challenger(weights: Path) -> None:
    release("pixelcnn-mnist5k")
    tag = store.latest("pixelcnn-mnist5k")
    assert tag
    folder = store.home() / "models" / tag.replace(":", "/")
    found = json.loads((folder / "reference.json").read_text())
    data = load_dataset("data/mnist5k.safetensors")
    assert found == reference_of(weights, data), "it is a function of model and data"
    assert set(found) == {"bits_per_dim", "ink_share", "known_share"}
    num = min(NUM_DRAWINGS, len(data.images["validation"]))
    assert all(0 < len(values) <= num for values in found.values())
    assert all(0 < value <= 1 for value in found["known_share"])
    assert all(ink <= known for ink, known in zip(found["ink_share"], found["known_share"], strict=True))
    assert "is the champion of mnist5k: no other version scores its drawings from now on" in run_shadow("mnist5k", 1)
    assert (folder.parent / "challenger").read_text() == folder.name
    with pytest.raises(LookupError, match=r"has no version 7: name one, --version N\. Known: 1\."):
        run_shadow("mnist5k", 7)
    with pytest.raises(LookupError, match="has no challenger: name one"):
        run_shadow("mnist5k")


def test_without_the_data_there_is_no_reference_until_a_repair_finds_them(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path("data/mnist5k.safetensors").rename("elsewhere")
    release("pixelcnn-mnist5k")
    tag = str(store.latest("pixelcnn-mnist5k"))
    file, told = store.folder_of(tag) / "reference.json", store.metadata_of(tag)
    assert not file.exists()
    assert "will not be watched for drift until they are, and `python -m pipelines.steps repair` has run" in caplog.text
    assert repair_all() == []
    data.rename("data/mnist5k.safetensors")
    assert repair_all() == [f"mnist5k: {tag} has a reference of its drawings now."]
    assert json.loads(file.read_text()) == reference_of(weights, load_dataset("data/mnist5k.safetensors"))
    now = store.metadata_of(tag)
    assert load_champion(store.home() / "models", tag).reference, "the service takes it"
    assert now == told | {"manifest_sha256": now["manifest_sha256"]}
    assert repair_all() == []


class Other(LocalServer):
    """A service that tells of drift, and a webhook: what it was sent."""

    def __init__(self, drifted_since: str | None) -> None:
        drift = {"ink_share": {"drifted": True, "distance": 0.5, "limit": 0.29, "windows": 3, "in_window": 0}}
        told = {"mnist5k": {"version": "1", "drifted_since": drifted_since, "drift": drift, "shadow": None}}
        told["mnist5k"]["watched"] = drifted_since is not None
        self.sent: list[bytes] = []
        sent = self.sent

        class Telling(Handler):
            def do_GET(self) -> None:
                self.reply(200, json.dumps(told).encode())

            def do_POST(self) -> None:
                sent.append(self.rfile.read(int(self.headers["content-length"])))
                self.reply(200, b"{}")

        super().__init__(Telling)


def test_drift_triggers_what_was_chosen(
    weights: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release("pixelcnn-mnist5k")
    asked: list[dict] = []
    monkeypatch.setattr(drift, "run_deployment", lambda name, **values: asked.append({"name": name, **values}))
    with Other("2030-01-01T00:00:00+00:00") as other:
        assert drift.watch_drift("nothing", other.url) == {"mnist5k": ["ink_share"]}
        assert tags_of_last_run("watch-drift") == {"mnist5k"}
        with get_client(sync_client=True) as client:
            assert not client.read_artifacts(artifact_filter=ArtifactFilter(key={"any_": ["drift-mnist5k"]}))
            drift.watch_drift("report", other.url)
            assert client.read_artifacts(artifact_filter=ArtifactFilter(key={"any_": ["drift-mnist5k"]}))
        assert not asked
        drift.watch_drift("retrain", other.url)
        drift.watch_drift("retrain", other.url)
        assert [one["parameters"] for one in asked] == [{"pair": "pixelcnn-mnist5k", "reuse": False}] * 2
        assert len({one["idempotency_key"] for one in asked}) == 1, "Prefect makes one run of a key"
    with Other(None) as other:
        assert drift.watch_drift("retrain", other.url) == {}
        assert "drawings of mnist5k are not watched: version 1 came without a reference" in caplog.text
    with pytest.raises(ConnectionError, match="does not tell of drawings"):
        drift.watch_drift("report", "http://127.0.0.1:9")
    with pytest.raises(LookupError, match="no service is named: set service_url"):
        drift.watch_drift()
    with Other("2030-01-01T00:00:00+00:00") as other:
        assert drift.watch_drift("nothing", f"{other.url}/") == {"mnist5k": ["ink_share"]}
        store.set_feeder({"registry": "known"})
        monkeypatch.setattr(drift.registry, "versions", lambda _: [])
        with pytest.raises(LookupError, match=r"version 1 of mnist5k, which this registry has not: .* was asked for\."):
            drift.watch_drift("retrain", other.url)


def test_which_schedules_are_on_is_asked_of_the_server(prefect_server: str) -> None:
    drift.watch_drift.to_deployment(name="switched-on", cron="*/15 * * * *").apply()
    assert operate.schedules_there()["switched-on"] == [True]


def test_a_failure_is_told_where_somebody_is_on_call(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The automation names a block of Prefect's, which calls the webhook; without one there is no such automation."""
    name = "a failed watch notifies"
    monkeypatch.delenv("PIXELCNN_NOTIFY_URL", raising=False)
    operate.automate()
    with pytest.raises(ValueError, match=name):
        Automation.read(name=name)
    with Other(None) as other:
        monkeypatch.setenv("PIXELCNN_NOTIFY_URL", other.url)
        operate.automate()
        (action,) = Automation.read(name=name).actions
        block = CustomWebhookNotificationBlock.load("on-call")
        assert action.block_document_id == block._block_document_id
        # A change of the file reaches a server that has it; whoever has switched it off has done so on purpose.
        Automation.read(name=name).disable()
        changed = tmp_path / "automations.yaml"
        changed.write_text(operate.AUTOMATIONS_FILE.read_text().replace("within: 90", "within: 77"))
        monkeypatch.setattr(operate, "AUTOMATIONS_FILE", changed)
        operate.automate()
        assert Automation.read(name="a silent run has crashed").trigger.within.total_seconds() == 77
        assert not Automation.read(name=name).enabled
        block.notify("mnist5k version 1 is damaged", "evaluate-champions is Failed")
        (sent,) = other.sent
    assert json.loads(sent)["text"] == "evaluate-champions is Failed\nmnist5k version 1 is damaged"
