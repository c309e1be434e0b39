"""What is told of drawings: found when it changes, silent while it doesn't; and a challenger's figures beside."""

import dataclasses
import json
import math
import shutil
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import prometheus_client
import pytest
import torch
from torch import Tensor

from app.service.batching import Batcher, Job
from app.service.champions import Champion, Champions
from app.service.operation.drawings import Drawings
from app.service.operation.drift import LOOKED_AT, SCORE_EVERY, WINDOW, Drift, Paired, distance, drifts_from
from app.service.wire import Identity
from pipelines.registry import store
from pixelcnn import GatedPixelCNNConfig, build_model, log_prob
from pixelcnn.completion import drawing_bits_per_dim, shares_of_drawing
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.observed import strokes
from tests.service.champions import GREY, make_checkpoint, put, wait_until
from tests.service.test_metrics import read

IMAGE, OBSERVED = [[1, 0, 1, 0]] * 5, [[1] * 4] * 2 + [[0] * 4] * 3
SIDE = 10


def drawings(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random strokes as levels, and what is known: they and some of what surrounds them."""
    drawn = torch.from_numpy(strokes(np.random.default_rng(seed), num, SIDE, SIDE))[:, None]
    known = drawn | (torch.rand(drawn.shape, generator=torch.Generator().manual_seed(seed)) < 0.3)
    return drawn.long(), known


def statistics(model: AutoregressiveModel, levels: Tensor, known: Tensor) -> dict[str, list[float]]:
    found = {"bits_per_dim": drawing_bits_per_dim(model, levels, known), **shares_of_drawing(levels, known, 2)}
    return {name: values.tolist() for name, values in found.items()}


@pytest.fixture(scope="module")
def model() -> AutoregressiveModel:
    """A network that has learned strokes."""
    torch.manual_seed(0)
    config = GatedPixelCNNConfig(image_shape=(1, SIDE, SIDE), num_levels=2, num_features=4, num_layers=2, kernel_size=3)
    model = build_model(config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for seed in range(100, 130):
        loss = -log_prob(model, drawings(16, seed)[0]).mean()
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.01 * gradient
    return model.eval()


@pytest.fixture(scope="module")
def reference(model) -> dict[str, list[float]]:
    return statistics(model, *drawings(200, seed=1))


def test_no_false_alarm_in_10_000_of_the_reference_and_a_change_is_found_within_200(model, reference):
    drifts = drifts_from(reference)
    for name, values in statistics(model, *drawings(10_000, seed=2)).items():
        for value in values[:: SCORE_EVERY if name == "bits_per_dim" else 1]:
            drifts[name].add(value)
            assert not drifts[name].has_drifted
        assert drifts[name].num_windows == 10_000 // WINDOW
    values = statistics(model, *drawings(60, seed=3))["ink_share"]  # in the middle of a window
    changed = [0.5 * value for value in statistics(model, *drawings(200, seed=4))["ink_share"]]
    drift = Drift(reference["ink_share"])
    found = [drift.add(value) and drift.has_drifted for value in [*values, *changed]]
    assert True in found
    assert found.index(True) < 60 + 200
    for value in statistics(model, *drawings(200, seed=5))["ink_share"]:
        drift.add(value)
    assert not drift.has_drifted, "it ends with its cause"


def watching(folder, batcher, champion: Champion, challenger: Champion | None = None, dataset="strokes") -> Drawings:
    """Return the watch on drawings for a dataset that has this champion, and perhaps a challenger."""
    champions = Champions(folder)
    champions._loaded[dataset, "champion"] = champion
    if challenger:
        champions._loaded[dataset, "challenger"] = challenger
    return Drawings(batcher, champions)


def draw(watch: Drawings, champion: Champion, levels: Tensor, known: Tensor) -> None:
    """Tell of each drawing, as one that was completed."""
    for image, observed in zip(levels[:, None], known[:, None], strict=True):
        request = SimpleNamespace(dataset="strokes")
        job: Any = SimpleNamespace(champion=champion, request=request, image=image, levels=image)
        job.observed, job.label = observed, None
        watch.completed("complete", job)


def test_nothing_is_scored_while_a_request_waits_and_then_one_at_a_time(model, reference, tmp_path, monkeypatch):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion = Champion(model, Identity(**lineage), {}, reference)
    calls: list[list[str]] = []
    run_together = Job.run_together

    def note(jobs: list[Any]) -> None:
        calls.append([job.lane for job in jobs])
        run_together(jobs)

    monkeypatch.setattr(Job, "run_together", staticmethod(note))
    batcher, request, looks = Batcher(36, 1), Job("strokes", "key", 1), []
    in_turn = batcher._in_turn
    monkeypatch.setattr(batcher, "_in_turn", lambda lane: looks.append(lane) or in_turn(lane))
    request.not_before, request.answer = time.monotonic() + 60, lambda: "answered"
    batcher.submit(request)
    watch = watching(tmp_path, batcher, champion)
    draw(watch, champion, *drawings(3 * SCORE_EVERY, seed=3))
    time.sleep(0.1)
    assert (calls, batcher.num_waiting) == ([], 1), "a drawing is no request, and takes no request's place"
    assert looks.count("/drawings") < 10, "its lane looks again when something has changed"
    with batcher._changed:
        request.not_before = 0
        batcher._changed.notify_all()
    wait_until(lambda: len(calls) == 4, 10)
    batcher.close()
    assert calls == [["strokes"], *[["/drawings"]] * 3]


def test_of_many_drawings_the_last_50_wait_to_be_scored(model, reference, tmp_path, caplog):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion, submitted = Champion(model, Identity(**lineage), {}, reference), []
    watch = watching(tmp_path, SimpleNamespace(submit=submitted.append), champion)
    draw(watch, champion, *drawings(50 * SCORE_EVERY, seed=3))
    submitted[0].on_call()
    draw(watch, champion, *drawings(3 * SCORE_EVERY, seed=4))
    submitted[1].on_call()  # as if its call had begun while it was dropped
    assert [score.done.cancelled() for score in submitted] == [False, True, True, *[False] * 50], "what is begun counts"
    watch._champions._loaded.clear()
    watch.forget()
    assert all(score.done.cancelled() for score in submitted[1:]), "nobody is to be told"
    submitted[0].done.set_result([1.0])
    assert (watch.describe(), caplog.records) == ({}, [])


def test_a_drawing_that_comes_when_the_service_ends_is_not_scored(model, reference, tmp_path):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion, batcher = Champion(model, Identity(**lineage), {}, reference), Batcher(36, 48)
    batcher.close()
    watch = watching(tmp_path, batcher, champion)
    draw(watch, champion, *drawings(SCORE_EVERY, seed=3))
    assert watch.describe()["strokes"]["drift"]["bits_per_dim"]["in_window"] == 0


def test_a_score_that_fails_is_logged_and_the_next_one_is_begun(model, reference, tmp_path, caplog):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion, submitted = Champion(model, Identity(**lineage), {}, reference), []
    watch = watching(tmp_path, SimpleNamespace(submit=submitted.append), champion)
    draw(watch, champion, *drawings(2 * SCORE_EVERY, seed=3))
    first, second = submitted
    first.done.set_exception(ValueError("out of order"))
    assert "a drawing of strokes could not be scored" in caplog.text
    assert "out of order" in caplog.text
    second.done.set_result([1.0])
    assert watch.describe()["strokes"]["drift"]["bits_per_dim"]["in_window"] == 1


def test_a_challenger_without_labels_scores_drawings_that_have_one(tmp_path):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    configs = (GREY, dataclasses.replace(GREY, num_labels=0))
    models = [make_checkpoint(tmp_path / str(config.num_labels), config, 0) for config in configs]
    levels, known, label = torch.tensor([[IMAGE]]), torch.tensor([[OBSERVED]]).bool(), torch.tensor([2])
    batcher = Batcher(36, 48)
    champion, challenger = (
        Champion(model, Identity(**lineage | {"version": str(i)}), {}) for i, model in enumerate(models)
    )
    watch = watching(tmp_path, batcher, champion, challenger, "grey")
    request = SimpleNamespace(dataset="grey")
    job: Any = SimpleNamespace(
        champion=champion, request=request, image=levels, levels=levels, observed=known, label=label
    )
    for _ in range(2 * SCORE_EVERY):  # an interval is of two at least
        watch.completed("complete", job)
    wait_until(lambda: watch.describe()["grey"]["shadow"] is not None, 20)
    batcher.close()
    bits = [
        drawing_bits_per_dim(*one).item() for one in ((models[0], levels, known, label), (models[1], levels, known))
    ]
    difference = watch.describe()["grey"]["shadow"]["bits_per_dim_difference"]["mean"]
    assert difference == pytest.approx(bits[1] - bits[0], abs=1e-5)


@pytest.mark.parametrize("other", [{"image_shape": (1, 5, 5)}, {"num_levels": 3}, {"num_labels": 2}], ids=str)
def test_a_challenger_for_other_images_or_labels_scores_nothing(model, reference, tmp_path, other):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    config, submitted = dataclasses.replace(model.config, num_labels=3), []
    networks: list[Any] = [SimpleNamespace(config=c) for c in (config, dataclasses.replace(config, **other))]
    champion, challenger = (
        Champion(network, Identity(**lineage | {"version": str(i)}), {}, reference)
        for i, network in enumerate(networks)
    )
    batcher: Any = SimpleNamespace(submit=submitted.append)
    draw(watching(tmp_path, batcher, champion, challenger), champion, *drawings(SCORE_EVERY, seed=3))
    assert [score.models for score in submitted] == [[champion]], "its own score is not lost"
    assert [score.client for score in submitted] == ["strokes"], "datasets take turns, as clients do"


def test_a_change_of_bits_per_dim_alone_is_found_within_200_requests_however_fast(model, reference, tmp_path):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion = Champion(model, Identity(**lineage), {}, reference)
    batcher = Batcher(36, 48)
    watch = watching(tmp_path, batcher, champion)

    def drift() -> dict[str, Any]:
        return dict(watch.describe()["strokes"]["drift"])

    def drifted() -> dict[str, bool]:
        return {name: told["drifted"] for name, told in drift().items()}

    def scored() -> tuple[int, int]:
        return drift()["bits_per_dim"]["windows"], drift()["bits_per_dim"]["in_window"]

    draw(watch, champion, *drawings(150, seed=3))  # to the middle of a window
    wait_until(lambda: scored() == divmod(150 // SCORE_EVERY, WINDOW // SCORE_EVERY))
    assert not any(drifted().values())
    # The same shares of ink and of what is known, but scattered dots in place of strokes.
    levels, known = drawings(200, seed=4)
    places = torch.rand(levels.shape, generator=torch.Generator().manual_seed(0)).flatten(2).argsort(2)
    draw(watch, champion, *(values.flatten(2).gather(2, places).view_as(levels) for values in (levels, known)))
    wait_until(lambda: drifted()["bits_per_dim"])
    assert drifted() == {"bits_per_dim": True, "ink_share": False, "known_share": False}
    batcher.close()


def test_a_drift_ends_with_its_cause_and_a_blank_drawing_is_none(model, reference, tmp_path, caplog):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion = Champion(model, Identity(**lineage), {}, reference)
    busy: Any = SimpleNamespace(submit=lambda score: None)  # nothing is scored
    watch = watching(tmp_path, busy, champion)
    levels, known = drawings(WINDOW, seed=3)
    draw(watch, champion, levels[:1], torch.zeros_like(known[:1]))
    assert watch.describe() == {}
    draw(watch, champion, torch.zeros_like(levels), known)
    draw(watch, champion, torch.zeros_like(levels), known)
    assert watch.describe()["strokes"]["drifted_since"]
    assert caplog.text.count("are not like the reference") == 1, "it has begun once"
    draw(watch, champion, levels, known)
    assert watch.describe()["strokes"]["drifted_since"] is None


def test_who_began_with_the_last_champion_takes_nothing_from_the_next(model, reference, tmp_path):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    last, now = (Champion(model, Identity(**lineage | {"version": v}), {}, reference) for v in "12")
    submitted: list[Any] = []
    watch = watching(tmp_path, SimpleNamespace(submit=submitted.append), last)
    draw(watch, last, *drawings(2 * SCORE_EVERY, seed=2))
    begun, waiting = submitted
    begun.on_call()
    watch._champions._loaded["strokes", "champion"] = now
    draw(watch, now, *drawings(3, seed=3))
    draw(watch, last, *drawings(1, seed=4))
    begun.done.set_result([1.0])
    assert waiting.done.cancelled()
    told = watch.describe()["strokes"]
    assert told["version"] == "2"
    assert [told["drift"][name]["in_window"] for name in ("ink_share", "bits_per_dim")] == [3, 0]


def test_two_challengers_are_not_mixed_and_one_difference_has_no_interval(model, reference, tmp_path):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion, *others = (Champion(model, Identity(**lineage | {"version": v}), {}, reference) for v in "123")
    bits = {"1": 1.0, "2": 0.5, "3": 2.0}
    batcher: Any = SimpleNamespace()
    batcher.submit = lambda job: job.done.set_result([bits[one.identity.version] for one in job.models])
    watch = watching(tmp_path, batcher, champion)
    for other in others:
        watch._champions._loaded["strokes", "challenger"] = other
        draw(watch, champion, *drawings(SCORE_EVERY, seed=3))
        assert watch.describe()["strokes"]["shadow"] is None, "infinity is no JSON"
        draw(watch, champion, *drawings(SCORE_EVERY, seed=4))
        told, difference = watch.describe()["strokes"]["shadow"], bits[other.identity.version] - 1
        assert (told["version"], told["drawings"]) == (other.identity.version, 2)
        assert set(told["bits_per_dim_difference"].values()) == {difference}


def test_what_was_scored_for_a_challenge_that_has_ended_does_not_bring_it_back(model, reference, tmp_path):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion, other = (Champion(model, Identity(**lineage | {"version": v}), {}, reference) for v in "12")
    submitted: list[Any] = []
    batcher: Any = SimpleNamespace(submit=submitted.append)
    watch = watching(tmp_path, batcher, champion, other)
    draw(watch, champion, *drawings(3 * SCORE_EVERY, seed=3))
    for score in submitted[:2]:
        score.done.set_result([1.0, 0.5])
    assert watch.describe()["strokes"]["shadow"]["drawings"] == 2
    watch._champions._loaded["strokes", "challenger"] = Champion(model, champion.identity, {}, reference)
    watch.forget()
    assert watch.describe()["strokes"]["shadow"] is None
    submitted[2].done.set_result([1.0, 0.5])
    assert watch._watched["strokes"].challenger is None
    assert read("pixelcnn_shadow_drawings", dataset="strokes") == 0
    assert watch.describe()["strokes"]["drift"]["bits_per_dim"]["in_window"] == 3, "the champion's part counts"


@pytest.mark.parametrize(("num", "is_watched"), [(0, False), (5, False), (7, False), (200, True)])
def test_only_a_reference_from_which_drawings_can_differ_is_watched(model, reference, tmp_path, num, is_watched):
    lineage: dict[str, Any] = dict.fromkeys(Identity.model_fields, "1")
    champion = Champion(model, Identity(**lineage), {}, {name: values[:num] for name, values in reference.items()})
    watch = watching(tmp_path, Batcher(36, 48), champion)
    draw(watch, champion, *drawings(1, seed=3))
    told = watch.describe()["strokes"]
    assert told["watched"] == is_watched == (read("pixelcnn_drift_watched", dataset="strokes") == 1)
    assert set(told["drift"]) == (set(reference) if is_watched else set())
    assert math.isnan(read("pixelcnn_drift", dataset="strokes", statistic="ink_share")) != is_watched
    assert math.isnan(read("pixelcnn_drift_distance", dataset="strokes", statistic="ink_share")), "of no window yet"


def test_the_limit_keeps_the_rate_of_false_alarms_that_it_states():
    """Of windows of the reference's own distribution, none in thousands comes near the limit; shifted ones do."""
    rng = np.random.default_rng(0)
    found = [distance(rng.random(WINDOW).tolist(), rng.random(200).tolist()) for _ in range(3000)]
    assert max(found) < Drift([0.0] * 200).limit
    # The bound at a rate that can be counted: 1 % of windows at most exceed the limit for 1 % of windows.
    one_percent = np.sqrt(np.log(2 / 0.01) / 2 * (1 / WINDOW + 1 / 200))
    assert 0.001 < np.mean(np.array(found) > one_percent) <= 0.013
    assert distance([0, 0, 1], [1, 1, 2]) == pytest.approx(2 / 3)


def test_the_rounding_of_a_reference_is_no_distance():
    """Shares are of few pixels: 13 of 28 rows, rounded, would lie beside all drawings of as many."""
    rows = np.random.default_rng(0).integers(10, 20, WINDOW) / 28
    assert distance(rows.tolist(), [round(share, 5) for share in rows.tolist()]) == 0


def test_the_interval_of_differences_may_be_looked_at_each_time():
    rng, num_missed = np.random.default_rng(0), 0
    for _ in range(100):
        paired, has_missed = Paired(), False
        assert paired.interval() == {"low": -np.inf, "mean": 0, "high": np.inf}
        for value in (values := rng.normal(0.1, 0.5, LOOKED_AT)):
            paired.add(value)
            low, mean, high = paired.interval().values()
            has_missed |= paired.num >= 20 and not low < 0.1 < high
        num_missed += has_missed
        assert (low + high) / 2 == pytest.approx(values.mean()) == pytest.approx(mean)
        assert high - low == pytest.approx(1.55 * 2 * 1.96 * values.std(ddof=1) / LOOKED_AT**0.5, rel=0.01)
    assert num_missed <= 5


def test_the_service_tells_of_drift_and_of_a_challenger(client, use_home, service_home, tmp_path, caplog):
    # A champion with a reference that is not like what is drawn here; its challenger is another version.
    tags = []
    for version, seed in (("1", 5), ("2", 6)):
        tag = put(tmp_path, "watched", GREY, version, seed)
        tags.append(tag)
    checkpoint = tmp_path / "again"
    make_checkpoint(checkpoint, GREY, 5)
    reference = {name: [0.001 * i for i in range(200)] for name in ("bits_per_dim", "ink_share", "known_share")}
    (checkpoint / "beginnings.json").write_text(json.dumps(reference))
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
        "limit": pytest.approx(Drift([0.0] * 200).limit),
        "windows": 1,
        "in_window": 0,
    }
    # The same drawing and seed each time: the difference of the two models on it, without any spread.
    models = [make_checkpoint(tmp_path / f"model-{seed}", GREY, seed) for seed in (5, 6)]
    levels, known = torch.tensor([answers[0]["completions"]])[0][:, None], torch.tensor([[OBSERVED]]).bool()
    bits = [drawing_bits_per_dim(model, levels, known).item() for model in models]
    assert told["shadow"]["version"] == "2"
    assert told["shadow"]["bits_per_dim_difference"]["mean"] == pytest.approx(bits[1] - bits[0], abs=1e-5)
    assert told["shadow"]["bits_per_dim_difference"]["low"] == pytest.approx(bits[1] - bits[0], abs=1e-5)
    assert read("pixelcnn_shadow_drawings", dataset="watched") >= told["shadow"]["drawings"]
    assert answers[0]["model"]["version"] == "3"
    assert told["watched"]
    assert read("pixelcnn_drift_watched", dataset="watched") == 1

    # A challenge ends once the challenger is the champion itself; nobody needs to draw for that.
    store.serve(tag, "challenger")
    wait_until(lambda: client.get("/drawings").json()["watched"]["shadow"] is None)
    wait_until(lambda: read("pixelcnn_champion", dataset="watched", version="2", role="challenger") == 0)
    assert not read("pixelcnn_champion", dataset="watched", version="3", role="challenger"), "it is loaded once"
    assert read("pixelcnn_shadow_drawings", dataset="watched") == 0
    assert all(math.isnan(read("pixelcnn_shadow_bits_per_dim", dataset="watched", bound=b)) for b in ("low", "high"))
    # What is no longer served is no longer told of.
    shutil.rmtree(service_home / "models/pixelcnn-watched")
    wait_until(lambda: "watched" not in client.get("/drawings").json())
    for name in ("pixelcnn_drift", "pixelcnn_drift_watched", "pixelcnn_drift_distance"):
        assert math.isnan(read(name, dataset="watched")), name
    # A champion without a reference: nothing is tested, and that is told.
    client.post("/complete", json={**body, "dataset": "grey"})
    wait_until(lambda: "grey" in client.get("/drawings").json())
    told = client.get("/drawings").json()["grey"]
    assert (told["watched"], told["drift"]) == (False, {})
    assert prometheus_client.REGISTRY.get_sample_value("pixelcnn_drift_watched", {"dataset": "grey"}) == 0
    assert math.isnan(read("pixelcnn_drift", dataset="grey", statistic="ink_share")), "neither 0 nor 1"
