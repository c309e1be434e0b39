"""Requests that come together share a call, and nobody can tell from an answer."""

import asyncio
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from app.service import api as service
from app.service import batching, jobs, wire
from app.service.batching import Batcher, Job
from app.service.champions import Champion
from pipelines.datasets.entry import NAME
from pipelines.registry import store
from pixelcnn import build_model
from tests.service.champions import GREY, put, wait_until

# The sizes that the documents state: PIXELCNN_TEST_CROWD=1000 PIXELCNN_TEST_SWAPS=20.
NUM_CROWD = int(os.environ.get("PIXELCNN_TEST_CROWD", "64"))
NUM_SWAPS = int(os.environ.get("PIXELCNN_TEST_SWAPS", "4"))


class Held(Job):
    """A job whose calls wait for `go`."""

    calls: list[list[str]]
    go: threading.Event

    def __init__(self, name: str, key: str = "k", num_images: int = 1, lane: str = "a") -> None:
        super().__init__(lane, key, num_images)
        self.name = name

    @staticmethod
    def run_together(jobs: list["Held"]) -> None:
        Held.calls.append([job.name for job in jobs])
        assert Held.go.wait(10)
        if "bad" in Held.calls[-1]:
            raise ValueError("it is bad")
        if "panic" in Held.calls[-1]:
            raise BaseException("a library panics")
        for job in jobs:
            job.finish(job.name)


class Twice(Held):
    """A job that its first call leaves unfinished."""

    @staticmethod
    def run_together(jobs: list[Held]) -> None:
        Held.calls.append([job.name for job in jobs])
        assert Held.go.wait(10)
        for job in jobs:
            if job.num_calls:
                job.finish(job.name)


@pytest.fixture
def batches():
    Held.calls, Held.go = [], threading.Event()
    batches = Batcher(max_images=4, max_waiting=6)
    yield batches
    Held.go.set()
    batches.close()


def submit(batches: Batcher, *jobs: Held) -> None:
    for job in jobs:
        batches.submit(job)


def test_an_idle_lane_starts_at_once_and_those_that_wait_share_the_next_call(batches):
    jobs = [Held(name) for name in "abc"]
    submit(batches, jobs[0])
    wait_until(lambda: Held.calls == [["a"]], 10)
    submit(batches, *jobs[1:])
    Held.go.set()
    assert [job.done.result(10) for job in jobs] == ["a", "b", "c"]
    assert Held.calls == [["a"], ["b", "c"]]


def test_a_call_holds_equal_keys_and_a_bounded_number_of_images(batches):
    submit(batches, Held("first"))
    wait_until(lambda: Held.calls == [["first"]], 10)
    jobs = [
        Held("a", num_images=3),
        Held("b", key="other"),
        Held("c", num_images=3),
        Held("d"),
        Held("e", num_images=9),
    ]
    submit(batches, *jobs)
    Held.go.set()
    assert [job.done.result(10) for job in jobs] == ["a", "b", "c", "d", "e"]
    assert Held.calls[1:] == [["a", "d"], ["b"], ["c"], ["e"]]


def test_a_lane_does_not_wait_for_another(batches):
    long = Held("long")
    submit(batches, long)
    wait_until(lambda: Held.calls == [["long"]], 10)
    submit(batches, Held("short", lane="b"))
    wait_until(lambda: ["short"] in Held.calls, 10)
    assert not long.done.done()


def test_who_floods_waits_behind_others(batches):
    def job(client: str, name: str) -> Held:
        held = Held(name, key=name)  # nothing is shared
        held.client = client
        return held

    batches.max_waiting = 20
    batches.submit(job("flood", "flood 0"))
    wait_until(lambda: Held.calls == [["flood 0"]], 10)
    submit(
        batches, *(job("flood", f"flood {i}") for i in range(1, 6)), job("a", "a 0"), job("b", "b 0"), job("a", "a 1")
    )
    waiting = [held.name for held in batches._in_turn("a")]
    assert waiting == ["a 0", "b 0", "flood 1", "a 1", *(f"flood {i}" for i in range(2, 6))]
    # Turns are remembered: jobs that come anew while the flood waits do not wait for it.
    Held.go.set()
    wait_until(lambda: not batches.num_waiting, 10)
    called = [name for [name] in Held.calls]
    assert called[:5] == ["flood 0", "a 0", "b 0", "flood 1", "a 1"]


def test_who_is_left_unfinished_has_another_call_behind_who_had_none(batches):
    twice, once = Twice("twice", key="1"), Held("once", key="2")
    submit(batches, twice)
    wait_until(lambda: Held.calls == [["twice"]], 10)
    submit(batches, once)
    Held.go.set()
    assert [job.done.result(10) for job in (once, twice)] == ["once", "twice"]
    assert Held.calls == [["twice"], ["once"], ["twice"]]
    Held.go.clear()
    gone = Twice("gone")
    submit(batches, gone)
    wait_until(lambda: Held.calls[-1] == ["gone"], 10)
    gone.done.cancel()
    Held.go.set()
    wait_until(lambda: not batches.num_waiting, 10)
    assert Held.calls.count(["gone"]) == 1


def test_who_has_had_a_call_waits_behind_who_had_none_but_a_later_turn(batches):
    had, none = Held("had"), Held("none")
    had.client, none.client, had.num_calls = "a", "b", 1
    batches._turns, batches._waiting = {"a": 1, "b": 2}, [had, none]
    assert batches._in_turn("a") == [none, had]


def test_a_job_that_rests_lets_others_go_first(batches):
    submit(batches, Held("first"))
    wait_until(lambda: Held.calls == [["first"]], 10)
    resting, other = Held("resting"), Held("other")
    resting.not_before = time.monotonic() + 60
    submit(batches, resting, other)
    Held.go.set()
    assert other.done.result(10) == "other"
    assert not resting.done.done()
    with batches._changed:
        resting.not_before = time.monotonic() + 0.1
        batches._changed.notify_all()
    assert resting.done.result(10) == "resting"
    assert time.monotonic() >= resting.not_before
    assert Held.calls == [["first"], ["other"], ["resting"]]


def test_clients_are_forgotten_one_day(batches, monkeypatch):
    monkeypatch.setattr(batching, "MAX_CLIENTS", 3)
    Held.go.set()
    for name in "abcad":
        job = Held(name)
        job.client = name
        batches.submit(job)
        job.done.result(10)
    assert list(batches._turns) == ["c", "a", "d"]


def test_what_waits_is_bounded_and_what_is_cancelled_makes_room(batches):
    submit(batches, Held("first"))
    wait_until(lambda: Held.calls == [["first"]], 10)
    jobs = [Held(str(i)) for i in range(6)]
    submit(batches, *jobs)
    with pytest.raises(wire.RequestError, match="6 requests wait already: send this one again") as caught:
        batches.submit(Held("too many"))
    assert caught.value.error_code == 429
    jobs[2].done.cancel()
    assert batches.num_waiting == 5
    jobs.append(Held("6"))
    submit(batches, jobs[6])
    Held.go.set()
    assert jobs[6].done.result(10) == "6"
    assert [name for names in Held.calls for name in names] == ["first", "0", "1", "3", "4", "5", "6"]


def test_a_failure_reaches_all_that_share_it_and_ends_nothing_else(batches):
    submit(batches, Held("first"))
    wait_until(lambda: Held.calls == [["first"]], 10)
    jobs = [Held("bad"), Held("good"), Held("panic", key="other"), Held("later", key="last")]
    submit(batches, *jobs)
    Held.go.set()
    for job in jobs[:2]:
        with pytest.raises(ValueError, match="it is bad"):
            job.done.result(10)
    with pytest.raises(RuntimeError, match="a library panics"):
        jobs[2].done.result(10)
    assert jobs[3].done.result(10) == "later"


@pytest.mark.parametrize("metric", ["waiting", "batch_images"])
def test_an_observer_that_raises_fails_no_job_and_ends_no_lane(batches, monkeypatch, caplog, metric):
    def fail(*values) -> None:
        raise RuntimeError("no metrics today")

    monkeypatch.setattr(getattr(batching.metrics(), metric), "set" if metric == "waiting" else "labels", fail)
    Held.go.set()
    for name in "ab":
        job = Held(name)
        batches.submit(job)
        assert job.done.result(10) == name
    assert "no metrics today" in caplog.text


def test_a_callback_of_a_job_that_raises_ends_no_lane(batches):
    def fail(done) -> None:
        raise RuntimeError("nobody to tell")

    Held.go.set()
    for name in "ab":
        job = Held(name)
        job.done.add_done_callback(fail)
        batches.submit(job)
        assert job.done.result(10) == name


def test_a_thread_that_cannot_start_ends_no_lane(batches, monkeypatch):
    def fail(self) -> None:
        raise RuntimeError("can't start new thread")

    Held.go.set()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            batches.submit(Held("a"))
    job = Held("b")
    batches.submit(job)
    assert job.done.result(10) == "b"


@pytest.mark.usefixtures("client", "use_home")
def test_no_dataset_can_have_the_name_of_another_lane():
    """Its requests would wait until no other does, or behind all likelihoods or pictures."""
    instance = service.PixelCNNService.inner()
    instance.champions.refresh()
    request = wire.LikelihoodRequest(dataset="grey", image=[[0] * 4] * 5)
    likelihood = jobs.LikelihoodJob(instance.champions.get("grey"), request)
    lanes = [batching.IDLE_LANE, likelihood.lane, jobs.ReadingJob(lambda: likelihood).lane]
    assert [lane for lane in lanes if NAME.fullmatch(lane)] == []


@pytest.mark.usefixtures("client", "use_home")
def test_an_on_row_that_raises_fails_its_own_job_alone():
    def fail(row, levels) -> None:
        raise RuntimeError("the reader is gone")

    instance = service.PixelCNNService.inner()
    instance.champions.refresh()
    champion = instance.champions.get("grey")
    request = wire.GenerateRequest(dataset="grey", seed=1)
    rows: list[int] = []
    bad, listens, quiet = (
        jobs.SamplingJob(champion, request, on_row) for on_row in (fail, lambda row, levels: rows.append(row), None)
    )
    jobs.SamplingJob.run_together([bad, listens, quiet])
    with pytest.raises(RuntimeError, match="the reader is gone"):
        bad.done.result(0)
    assert rows == list(range(5))
    assert listens.done.result(0) == quiet.done.result(0)
    # Where nobody else is left, the sampler stops.
    bad = jobs.SamplingJob(champion, request, fail)
    jobs.SamplingJob.run_together([bad])
    assert isinstance(bad.done.exception(0), RuntimeError)
    assert bad.levels is None


def test_closing_cancels_what_waits_and_what_its_call_leaves_unfinished(batches):
    first, waiting = Twice("first"), Held("waiting")
    submit(batches, first)
    wait_until(lambda: Held.calls == [["first"]], 10)
    submit(batches, waiting)
    batches.close()
    assert waiting.done.cancelled()
    Held.go.set()
    wait_until(first.done.cancelled, 10)
    assert Held.calls == [["first"]]
    with pytest.raises(wire.RequestError, match="wait already"):
        batches.submit(Held("late"))


# The same with the sampler.

SHAPES = {"grey": (5, 4), "colour": (4, 5, 3)}


def random_request(draw: np.random.Generator) -> tuple[str, dict]:
    """Return a path and a request; few temperatures, so that many can share a call."""
    dataset = str(draw.choice(["grey", "colour"]))
    shape = SHAPES[dataset]
    levels = {"grey": 2, "colour": 4}[dataset]
    path = str(draw.choice(["/complete", "/complete_stream", "/generate", "/likelihood"]))
    request: dict = {"dataset": dataset}
    if dataset == "grey":
        request["label"] = int(draw.integers(-1, 3))
    if path != "/generate":
        request["image"] = draw.integers(levels, size=shape).tolist()
    if path != "/likelihood":
        request |= {"seed": int(draw.integers(2**63)), "num_samples": int(draw.integers(1, 5))}
        request["temperature"] = float(draw.choice([1.0, 0.5]))
    if path.startswith("/complete"):
        request["observed"] = draw.integers(2, size=shape[:2]).tolist()
    return path, request


@pytest.mark.repeated
def test_the_answer_is_the_same_alone_and_in_a_crowd_of_32(client, monkeypatch):
    shared: list[int] = []
    run_together = jobs.SamplingJob.run_together

    def count(jobs: list) -> None:
        shared.append(len(jobs))
        if hold_s and not held.is_set():  # until the whole crowd has come
            held.set()
            time.sleep(hold_s)
        run_together(jobs)

    held = threading.Event()
    monkeypatch.setattr(jobs.SamplingJob, "run_together", staticmethod(count))
    draw = np.random.default_rng(0)
    requests = [random_request(draw) for _ in range(NUM_CROWD)]

    def ask(path_and_request: tuple[str, dict]) -> str:
        response = client.post(path_and_request[0], json=path_and_request[1])
        assert response.status_code == 200, response.text
        return response.text

    hold_s = 0.0
    alone = [ask(request) for request in requests]
    assert set(shared) == {1}
    shared.clear()
    hold_s = 1.0
    with ThreadPoolExecutor(32) as crowd:
        together = list(crowd.map(ask, requests))
    num_different = sum(a != b for a, b in zip(alone, together, strict=True))
    assert num_different == 0
    assert max(shared) > 2, "hardly anything was shared: the test shows nothing"
    print(f"\n{NUM_CROWD} requests, alone and in a crowd of 32: {num_different} differ; "
          f"{sum(shared)} of them sampled in {len(shared)} calls, at most {max(shared)} at once")  # fmt: skip


@pytest.mark.repeated
@pytest.mark.usefixtures("use_home")
def test_promotions_under_load_fail_no_request_and_mix_no_versions(client, tmp_path):
    """Every answer is what the version that it names gives: known from asking each version alone."""
    image = [[1, 0, 1, 0]] * 5
    request = {
        "dataset": "swaps",
        "image": image,
        "observed": [[1] * 4] * 2 + [[0] * 4] * 3,
        "num_samples": 2,
        "seed": 1,
    }

    def ask():
        return client.post("/complete", json=request)

    def version() -> str:
        return client.get("/models").json().get("swaps", {}).get("model", {}).get("version", "")

    expected = {}
    for number in ("1", "2"):
        store.serve(put(tmp_path, "swaps", GREY, number, seed=int(number)))
        wait_until(lambda number=number: version() == number)
        expected[number] = ask().text
    assert expected["1"].split('"model"')[0] != expected["2"].split('"model"')[0]
    answers = []
    end = threading.Event()

    def keep_asking() -> None:
        while not end.is_set():
            answers.append(ask())

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for i in range(NUM_SWAPS):
            number = "12"[i % 2]
            store.serve(put(tmp_path / str(i), "swaps", GREY, number, seed=int(number)))
            wait_until(lambda number=number: version() == number)
    finally:
        end.set()
        for thread in threads:
            thread.join()
    failed = [answer for answer in answers if answer.status_code != 200]
    mixed = [answer for answer in answers if answer.text != expected[answer.json()["model"]["version"]]]
    assert (failed, mixed) == ([], [])
    print(f"\n{NUM_SWAPS} promotions under load: {len(answers)} answers, {len(failed)} failed, {len(mixed)} mixed")


@pytest.mark.usefixtures("client", "use_home")
def test_a_batch_stops_when_its_last_client_has_left(monkeypatch):
    rows: list[int] = []
    stopped = threading.Event()

    def draw_for_ever(*arguments) -> None:
        try:
            while True:
                rows.append(len(rows))
                arguments[-1](0, torch.zeros(2, 1, 4, dtype=torch.int64))
                time.sleep(0.005)
        finally:
            stopped.set()

    monkeypatch.setattr(jobs, "SHORT_CALL", 0)
    monkeypatch.setattr(jobs, "complete_and_score", draw_for_ever)
    instance = service.PixelCNNService.inner()
    instance.champions.refresh()
    champion = instance.champions.get("grey")
    asked = [jobs.SamplingJob(champion, wire.GenerateRequest(dataset="grey")) for _ in range(2)]
    thread = threading.Thread(target=jobs.SamplingJob.run_together, args=(asked,))
    thread.start()
    asked[0].done.cancel()
    seen = len(rows)
    wait_until(lambda: len(rows) > seen + 5, 10)
    assert not stopped.is_set()
    asked[1].done.cancel()
    seen = len(rows)
    thread.join(10)
    assert stopped.is_set()
    assert len(rows) <= seen + 2


@pytest.mark.usefixtures("client", "use_home")
def test_a_client_that_leaves_takes_its_waiting_request_along(monkeypatch):
    go = threading.Event()
    drawn = []

    def wait(model, image, *arguments) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        drawn.append(len(image))
        assert go.wait(10)
        return image, lambda images, _: torch.zeros(len(image), dtype=torch.float64)[images]

    monkeypatch.setattr(jobs, "complete_and_score", wait)

    async def leave() -> None:
        instance = service.PixelCNNService.inner()
        instance.champions.refresh()

        def ask(num_samples: int) -> asyncio.Task:
            request = wire.GenerateRequest(dataset="grey", num_samples=num_samples)
            return asyncio.create_task(instance.generate(request))

        async def until(condition) -> None:
            async with asyncio.timeout(10):
                while not condition():
                    await asyncio.sleep(0.005)

        first = ask(1)
        await until(lambda: drawn)
        leaves, stays = ask(2), ask(3)
        await until(lambda: instance.batcher.num_waiting == 2)
        leaves.cancel()
        await until(lambda: instance.batcher.num_waiting == 1)
        go.set()
        assert len((await stays).images) == 3
        assert len((await first).images) == 1
        instance.batcher.close()

    asyncio.run(leave())
    assert drawn == [1, 3]


def test_endings_that_nobody_waits_for_are_not_scored(monkeypatch):
    """Neither those of a client that has left, nor further than to the row at which it leaves."""
    champion, rows = SimpleNamespace(model=build_model(GREY), config=GREY, num_parameters=1), []
    gone, leaves = (jobs.SamplingJob(champion, wire.GenerateRequest(dataset="grey")) for _ in range(2))

    def score(images: slice, on_row: Callable) -> None:
        assert images == slice(1, 2)
        for row in range(5):
            rows.append(row)
            if row == 2:
                leaves.done.cancel()
            on_row(row, None)

    monkeypatch.setattr(jobs, "complete_and_score", lambda model, image, *more: (image, score))
    gone.done.cancel()
    jobs.SamplingJob.run_together([gone, leaves])
    assert rows == [0, 1, 2]


@pytest.mark.parametrize("label", [None, -1])
def test_endings_drawn_live_are_scored_once_the_hand_rests(label):
    model = build_model(dataclasses.replace(GREY, context_features=2, completer_features=4, label_features=2))
    identity = wire.Identity(**dict.fromkeys(wire.Identity.model_fields, "toy"))
    champion = Champion(model, identity, {})
    request = wire.CompleteRequest(dataset="grey", image=[[1] * 4] * 5, observed=[[1] * 4, *[[0] * 4] * 4], label=label)
    streamed = jobs.SamplingJob(champion, request, on_row=lambda *_: None)
    awaited = jobs.SamplingJob(champion, request)
    told = jobs.SamplingJob(champion, request.model_copy(update={"label": 2}), on_row=lambda *_: None)
    start = time.monotonic()
    jobs.SamplingJob.run_together([streamed, told, awaited])
    assert len(told.done.result(0).log_probs) == 1, "whose label is known is scored already"
    assert streamed.not_before >= start + jobs.REST_S
    assert awaited.not_before == 0
    assert streamed.key != awaited.key  # each is scored in a call of its own
    assert not any(job.done.done() for job in (streamed, awaited))


def test_no_call_is_shared_where_the_bits_would_depend_on_it(monkeypatch):
    """Torch promises no equal bits in a larger batch."""
    champion = SimpleNamespace(model=build_model(GREY), config=GREY)

    def keys() -> set:
        return {jobs.SamplingJob(champion, wire.GenerateRequest(dataset="grey")).key for _ in range(2)}

    assert len(keys()) == 1
    monkeypatch.setattr(jobs, "engine_name", lambda model: "cached, in torch: numba is not installed")
    assert len(keys()) == 2


def test_a_call_is_for_one_network():
    """What a completer draws and what the joint model draws do not wait for each other."""
    model = build_model(dataclasses.replace(GREY, context_features=2, completer_features=4))
    champion = SimpleNamespace(model=model, config=model.config)
    whole = {"dataset": "grey"}
    drawn = whole | {"image": [[1] * 4] * 5, "observed": [[1] * 4, *[[0] * 4] * 4]}
    blank = drawn | {"observed": [[0] * 4] * 5}
    keys = [jobs.SamplingJob(champion, wire.GenerateRequest(**whole)).key]
    keys += [jobs.SamplingJob(champion, wire.CompleteRequest(**body)).key for body in (blank, drawn, drawn)]
    assert keys[0] == keys[1] != keys[2] == keys[3]
