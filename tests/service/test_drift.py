"""What is told of drawings: found when it changes, silent while it doesn't; and a challenger's figures beside."""

import json

import numpy as np
import pytest
import torch

from app.service.operation import drawings as module
from app.service.operation.drift import WINDOW, Drift, Paired, distance, limit
from pipelines.registry import store
from pixelcnn.completion import drawing_bits_per_dim, shares_of_drawing
from pixelcnn.observed import strokes
from tests.service.champions import GREY, make_checkpoint, put, wait_until
from tests.service.test_metrics import read

IMAGE, OBSERVED = [[1, 0, 1, 0]] * 5, [[1] * 4] * 2 + [[0] * 4] * 3


def population(num: int, seed: int, side: int = 10) -> dict[str, list[float]]:
    """Return the shares of random strokes, known with some of what surrounds them."""
    rng = np.random.default_rng(seed)
    drawn = torch.from_numpy(strokes(rng, num, side, side))[:, None]
    known = drawn | (torch.rand(drawn.shape, generator=torch.Generator().manual_seed(seed)) < 0.3)
    return {name: values.tolist() for name, values in shares_of_drawing(drawn.long(), known, 2).items()}


def test_no_false_alarm_in_10_000_of_the_reference_and_a_change_is_found_within_200():
    reference = population(200, seed=1)
    for name, values in population(10_000, seed=2).items():
        drift = Drift(reference[name])
        for value in values:
            drift.add(value)
            assert not drift.has_drifted
        assert drift.num_windows == 10_000 // WINDOW
    values = population(60, seed=3)["ink_share"]  # in the middle of a window
    changed = [0.5 * value for value in population(200, seed=4)["ink_share"]]
    drift = Drift(reference["ink_share"])
    found = [drift.add(value) and drift.has_drifted for value in [*values, *changed]]
    assert True in found
    assert found.index(True) < 60 + 200
    for value in population(200, seed=5)["ink_share"]:
        drift.add(value)
    assert not drift.has_drifted, "it ends with its cause"


def test_the_limit_keeps_the_rate_of_false_alarms_that_it_states():
    """Of windows of the reference's own distribution, none in thousands comes near the limit; shifted ones do."""
    rng = np.random.default_rng(0)
    found = [distance(rng.random(WINDOW).tolist(), rng.random(200).tolist()) for _ in range(3000)]
    assert max(found) < limit(200)
    # The bound at a rate that can be counted: 1 % of windows at most exceed the limit for 1 % of windows.
    one_percent = np.sqrt(np.log(2 / 0.01) / 2 * (1 / WINDOW + 1 / 200))
    assert 0.001 < np.mean(np.array(found) > one_percent) <= 0.013
    assert distance([0, 0, 1], [1, 1, 2]) == pytest.approx(2 / 3)


def test_the_interval_of_differences():
    paired, values = Paired(), np.random.default_rng(0).normal(0.1, 0.5, 400)
    assert paired.interval() == (-np.inf, np.inf)
    for value in values:
        paired.add(value)
    low, high = paired.interval()
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == (pytest.approx(values.mean() - half), pytest.approx(values.mean() + half))


def test_the_service_tells_of_drift_and_of_a_challenger(client, use_home, service_home, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "SCORE_EVERY_S", 0)
    # A champion with a reference that is not like what is drawn here; its challenger is another version.
    tags = []
    for version, seed in (("1", 5), ("2", 6)):
        tag = put(tmp_path, "watched", GREY, version, seed)
        tags.append(tag)
    checkpoint = tmp_path / "again"
    make_checkpoint(checkpoint, GREY, 5)
    reference = {name: [0.001 * i for i in range(200)] for name in ("bits_per_dim", "ink_share", "known_share")}
    (checkpoint / "reference.json").write_text(json.dumps(reference))
    metadata = {key: value for key, value in store.metadata_of(tags[0]).items() if key != "manifest_sha256"}
    tag = store.export(checkpoint, {**metadata, "version": "3"})
    store.serve(tag)
    store.serve(tags[1], "challenger")
    wait_until(lambda: read("pixelcnn_champion", dataset="watched", role="challenger") == 1)
    wait_until(lambda: read("pixelcnn_champion", dataset="watched", role="champion") == 1)
    body = {"dataset": "watched", "image": IMAGE, "observed": OBSERVED, "seed": 3}
    answers = [client.post("/complete", json=body).json() for _ in range(WINDOW)]
    wait_until(lambda: read("pixelcnn_drift", dataset="watched", statistic="ink_share") == 1)
    wait_until(lambda: client.get("/drawings").json()["watched"]["drift"]["known_share"]["windows"] == 1)
    assert "drawings of watched are not like the reference of version 3" in caplog.text
    wait_until(lambda: client.get("/drawings").json()["watched"]["shadow"] is not None)
    told = client.get("/drawings").json()["watched"]
    assert told["drifted_since"]
    assert told["drift"]["known_share"] == {
        "drifted": True,
        "distance": 1.0,
        "limit": pytest.approx(limit(200)),
        "windows": 1,
        "in_window": 0,
    }
    # The same drawing and seed each time: the difference of the two models on it, without any spread.
    models = [make_checkpoint(tmp_path / f"model-{seed}", GREY, seed) for seed in (5, 6)]
    levels, known = torch.tensor([answers[0]["completions"]])[0][:, None], torch.tensor([[OBSERVED]]).bool()
    bits = [drawing_bits_per_dim(model, levels, known).item() for model in models]
    assert told["shadow"]["version"] == "2"
    assert told["shadow"]["bits_per_dim_less"]["mean"] == pytest.approx(bits[1] - bits[0], abs=1e-5)
    assert told["shadow"]["bits_per_dim_less"]["low"] == pytest.approx(bits[1] - bits[0], abs=1e-5)
    assert read("pixelcnn_shadow_drawings", dataset="watched") >= told["shadow"]["drawings"]
    # A champion without a reference: nothing is tested, and the answers are those of the champion alone.
    assert client.get("/drawings").json().get("grey", {"drift": {}})["drift"] == {}
    assert answers[0]["model"]["version"] == "3"
