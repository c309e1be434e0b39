"""A champion's reference of drawings, its challenger, and what follows from drift."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from streamlit.testing.v1 import AppTest

from app.canvas.drawing import TOUCHED, Drawing, known_cells, levels_of, per_cell, strength_of
from app.service.champions import load_champion
from app.service.operation.drift import SCORE_EVERY, drifts_from
from pipelines import operate
from pipelines.flows import drift
from pipelines.flows.evaluate import evaluate_champions
from pipelines.promotion.move import run_shadow
from pipelines.promotion.reference import NUM_DRAWINGS, reference_of
from pipelines.promotion.register import release, repair_all
from pipelines.registry import store
from pixelcnn import Dataset, GatedPixelCNNConfig, build_model, load_dataset, save_checkpoint
from pixelcnn.completion import complete, drawing_bits_per_dim, shares_of_drawing
from pixelcnn.observed import beginnings, ink_of, pen_noise, strokes
from tests.local import Handler, LocalServer
from tests.pipelines.sites import tags_of_last_run


def test_a_champion_has_a_reference_and_may_have_a_challenger(weights: Path) -> None:
    release("pixelcnn-mnist5k")
    tag = store.latest("pixelcnn-mnist5k")
    assert tag
    folder = store.home() / "models" / tag.replace(":", "/")
    found = json.loads((folder / "beginnings.json").read_text())
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
    file, told = store.folder_of(tag) / "beginnings.json", store.metadata_of(tag)
    assert not file.exists()
    assert "will not be watched for drift until they are, and `python -m pipelines.steps repair` has run" in caplog.text
    assert repair_all() == []
    data.rename("data/mnist5k.safetensors")
    assert repair_all() == [f"mnist5k: {tag} has a reference of its drawings now."]
    assert json.loads(file.read_text()) == reference_of(weights, load_dataset("data/mnist5k.safetensors"))
    now = store.metadata_of(tag)
    assert load_champion(store.folder_of(tag)).reference, "the service takes it"
    assert now == told | {"manifest_sha256": now["manifest_sha256"]}
    assert repair_all() == []


def default_known(painting: bool, sees_all: bool) -> None:
    """Show the canvas's choice of what counts as known: a page for AppTest."""
    from app.canvas.widgets import choose_known

    choose_known(painting, sees_all)


@pytest.mark.parametrize(("channels", "context_features"), [(1, 0), (1, 2), (3, 0)])
def test_beginnings_of_held_out_images_sent_as_the_canvas_does_are_no_drift(
    tmp_path: Path, channels: int, context_features: int
) -> None:
    shape = (channels, 20, 20)
    drawn = torch.from_numpy(strokes(np.random.default_rng(0), 400, 20, 20)).to(torch.uint8)
    images = drawn[:, None].repeat(1, channels, 1, 1)
    parts = dict(zip(("train", "validation", "test"), images.split([1, 199, 200]), strict=True))
    labels = {split: torch.zeros(len(part), dtype=torch.int64) for split, part in parts.items()}
    data = Dataset(name="strokes", num_levels=2, protocol="toy", label_names=["a"], images=parts, labels=labels)
    config = GatedPixelCNNConfig(
        image_shape=shape, num_levels=2, num_features=3, num_layers=1, kernel_size=3, context_features=context_features
    )
    model = build_model(config).eval()
    save_checkpoint(tmp_path, model, {})
    drifts = drifts_from(reference_of(tmp_path, data))

    page = AppTest.from_function(default_known, args=(channels == 3, context_features > 0)).run()
    mode = str(page.button_group[0].value)
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    levels = data.levels("test", slice(None))
    ink = ink_of(levels, 2)
    begun = beginnings(pen_noise(rng, *ink.shape), ink, rng.uniform(0.1, 0.7, len(ink)))
    for number, (image, one) in enumerate(zip(levels.permute(0, 2, 3, 1).numpy(), begun, strict=True)):
        image = image.squeeze() * per_cell(one, image.squeeze())
        drawing = Drawing(strength_of(image, 2), np.where(one, TOUCHED, 0))
        known = torch.from_numpy(known_cells(drawing, mode, 2))[None, None].bool()
        sent = torch.from_numpy(levels_of(drawing, 2)).view(20, 20, channels).permute(2, 0, 1)[None]
        found = shares_of_drawing(sent, known, 2)
        if number % SCORE_EVERY == 0:
            completion = complete(model, sent, known, torch.rand(sent.shape, generator=generator, dtype=torch.float64))
            found["bits_per_dim"] = drawing_bits_per_dim(model, completion, known)
        for name, value in found.items():
            drifts[name].add(value.item())
    told = {name: (drift.num_windows, drift.has_drifted) for name, drift in drifts.items()}
    assert told == dict.fromkeys(("bits_per_dim", "ink_share", "known_share"), (2, False)), drifts


class Other(LocalServer):
    """A service that tells of drift to whoever sends its token, and a webhook: what it was sent."""

    def __init__(self, drifted_since: str | None, token: str | None = None) -> None:
        drift = {"ink_share": {"drifted": True, "distance": 0.5, "limit": 0.29, "windows": 3, "in_window": 0}}
        told = {"mnist5k": {"version": "1", "drifted_since": drifted_since, "drift": drift, "shadow": None}}
        told["mnist5k"]["watched"] = drifted_since is not None
        self.sent: list[bytes] = []
        sent = self.sent

        class Telling(Handler):
            def do_GET(self) -> None:
                if token and self.headers["Authorization"] != f"Bearer {token}":
                    return self.reply(401)
                self.reply(200, json.dumps(told).encode())

            def do_POST(self) -> None:
                sent.append(self.rfile.read(int(self.headers["content-length"])))
                self.reply(200, b"{}")

        super().__init__(Telling)


class Page(Handler):
    """Of another program."""

    def do_GET(self) -> None:
        self.reply(200, b"<html>")


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
    with LocalServer(Page) as server, pytest.raises(ConnectionError, match="does not tell of drawings"):
        drift.watch_drift("report", server.url)
    with pytest.raises(LookupError, match="no service is named: set service_url"):
        drift.watch_drift()
    with Other("2030-01-01T00:00:00+00:00") as other:
        assert drift.watch_drift("nothing", f"{other.url}/") == {"mnist5k": ["ink_share"]}
        store.set_feeder({"registry": "known"})
        monkeypatch.setattr(drift.registry, "versions", lambda _: [])
        with pytest.raises(LookupError, match=r"version 1 of mnist5k, which this registry has not: .* was asked for\."):
            drift.watch_drift("retrain", other.url)


def test_a_service_is_asked_with_its_token_and_by_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "tag_run", lambda *_: None)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY", "PIXELCNN_TOKEN"):
        monkeypatch.setenv(name, "")
    with Other("2030-01-01T00:00:00+00:00", token="secret") as other:
        with pytest.raises(ConnectionError, match=r"asks for a token: set PIXELCNN_TOKEN to its own"):
            drift.watch_drift.fn("nothing", other.url)
        monkeypatch.setenv("PIXELCNN_TOKEN", "secret")
        assert drift.watch_drift.fn("nothing", other.url) == {"mnist5k": ["ink_share"]}


def test_each_time_that_drift_begins_the_champions_pair_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict] = []
    versions = [SimpleNamespace(version=number, tags={"pair": f"pair {number}"}) for number in ("1", "2", "3")]
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    monkeypatch.setattr(drift, "run_deployment", lambda name, **values: asked.append(values))
    monkeypatch.setattr(drift, "get_run_logger", logging.getLogger)
    monkeypatch.setattr(drift.registry, "versions", lambda _: versions)
    for dataset, since in (("a", "monday"), ("a", "monday"), ("a", "tuesday"), ("b", "monday")):
        drift._retrain(dataset, "2", since)
    first, again, *others = (values["idempotency_key"] for values in asked)
    assert first == again
    assert len({first, *others}) == 3, "of a key Prefect never makes a second run"
    assert [values["parameters"]["pair"] for values in asked] == ["pair 2"] * 4
    assert [values["timeout"] for values in asked] == [0] * 4, "it is not waited for"


def test_a_dataset_that_the_registry_lacks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def retrain(dataset: str, version: str, since: str) -> None:
        if dataset == "b":
            raise LookupError("which this registry has not.")
        trained.append(dataset)

    told = {"version": "1", "watched": True, "drifted_since": "monday", "drift": {}}
    trained: list[str] = []
    monkeypatch.setattr(drift, "tag_run", lambda *_: None)
    monkeypatch.setattr(drift, "get_run_logger", logging.getLogger)
    monkeypatch.setattr(drift, "create_table_artifact", lambda *_, **__: None)
    monkeypatch.setattr(drift, "_retrain", retrain)

    class Telling(Handler):
        def do_GET(self) -> None:
            self.reply(200, json.dumps({"b": told, "a": told}).encode())

    with LocalServer(Telling) as server, pytest.raises(LookupError, match=r"^which this registry has not\.$"):
        drift.watch_drift.fn("retrain", server.url)
    assert trained == ["a"]


@pytest.mark.parametrize("answer", [b"[]", b'{"a": 1}', b'{"a": {"version": "1"}}', b"<html>"])
def test_another_answer_than_the_services_is_one_sentence(answer: bytes) -> None:
    class Other(Handler):
        def do_GET(self) -> None:
            self.reply(200, answer)

    with (
        LocalServer(Other) as server,
        pytest.raises(ConnectionError, match=r"does not tell of drawings \(.*\)$") as raised,
    ):
        drift.watch_drift.fn("nothing", server.url)
    assert "\n" not in str(raised.value)


def test_what_somebody_has_set_is_asked_of_the_server(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIXELCNN_ENVIRONMENT", raising=False)
    monkeypatch.setattr(operate, "POOL", "there")
    assert operate.read_server() == (set(), {})
    with get_client(sync_client=True) as client:
        for name in ("there", "of-others"):
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    deploy = drift.watch_drift.to_deployment
    deploy(name="switched-on", cron="*/15 * * * *", work_pool_name="there").apply()
    limit = ConcurrencyLimitConfig(limit=2, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    for name, set_limit in (("limited", 3), ("cancelling", limit)):
        deploy(name=name, paused=True, concurrency_limit=set_limit, work_pool_name="there").apply()
    evaluate_champions.to_deployment(name="limited", work_pool_name="of-others").apply()  # the newest of this name
    pools, known = operate.read_server()
    assert (pools, known.keys()) == ({"there"}, {"switched-on", "limited", "cancelling"})
    assert known["switched-on"] == {
        "folder": None,
        "paused": False,
        "concurrency_limit": None,
        "active": {"*/15 * * * *": True},
    }
    assert known["limited"] == {"folder": None, "paused": True, "concurrency_limit": 3, "active": {}}
    assert known["cancelling"]["concurrency_limit"] == {"limit": 2, "collision_strategy": "CANCEL_NEW"}


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
        with get_client(sync_client=True) as client:
            shown = client.read_block_document(block._block_document_id, include_secrets=False)
        assert other.url not in shown.model_dump_json()
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


def test_each_environment_calls_its_own_webhook(
    prefect_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own runs: on a common server the last one to begin would else be called for all, and no other."""
    monkeypatch.chdir(tmp_path)
    Path("environments.yaml").write_text("Eu_1: {registry: a, store: b}\n")
    for variable in ("MLFLOW_TRACKING_URI", "BENTOML_HOME", "PIXELCNN_SERVICE_URL"):
        monkeypatch.delenv(variable, raising=False)
    for environment in ("development", "Eu_1"):
        monkeypatch.setenv("PIXELCNN_ENVIRONMENT", environment)
        monkeypatch.setenv("PIXELCNN_NOTIFY_URL", f"http://127.0.0.1/{environment}")
        operate.automate()
    for environment, end, block_name in (("development", "", "on-call"), ("Eu_1", "-Eu_1", "on-call-eu-1")):
        automation = Automation.read(name=f"a failed watch notifies{end}")
        block = CustomWebhookNotificationBlock.load(block_name)
        assert block.secrets.get_secret_value() == {"url": f"http://127.0.0.1/{environment}"}
        assert [action.block_document_id for action in automation.actions] == [block._block_document_id]
        flows, pool = automation.trigger.model_dump(mode="json")["match_related"]
        assert flows["prefect.resource.name"] == ["evaluate-champions", "watch-drift"]
        assert pool == {"prefect.resource.role": "work-pool", "prefect.resource.name": f"pixelcnn{end}"}
