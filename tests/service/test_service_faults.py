"""A service under load whose clients, worker and store fail: a real one, in processes of its own."""

import errno
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest

from app.service.champions import Champions, load_champion, pinned_models
from pipelines.registry import store
from pixelcnn import GatedPixelCNNConfig
from tests.service.champions import COLOUR, GREY, put, wait_until
from tests.service.served import serving
from tests.service.test_metrics import read

# The sizes that the documents state: PIXELCNN_TEST_KILLS=20 PIXELCNN_TEST_FLIPS=400.
NUM_KILLS = int(os.environ.get("PIXELCNN_TEST_KILLS", "1"))
NUM_FLIPS = int(os.environ.get("PIXELCNN_TEST_FLIPS", "40"))

# Sixteen images of it take seconds, also on a fast machine.
SLOW = GatedPixelCNNConfig(image_shape=(3, 40, 40), num_levels=16, num_features=120, num_layers=10, kernel_size=5)
LONG = {"dataset": "slow", "num_samples": 16, "seed": 1}
SHORT = {"dataset": "grey", "num_samples": 2, "seed": 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    home = folder / "bentoml"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BENTOML_HOME", str(home))
        for dataset, config in (("grey", GREY), ("slow", SLOW)):
            store.serve(put(folder, dataset, config, "1", seed=0))
    with serving(home, folder / "log") as served:
        yield served


def post(served, path: str, body: dict, timeout: float = 120) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", json=body, timeout=timeout)


def head(path: str, length: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()


def stream_request(num_samples: int = 16) -> dict:
    unknown = {"image": [[[0] * 3] * 40] * 40, "observed": [[0] * 40] * 40}
    return {"dataset": "slow", "num_samples": num_samples, "seed": 1, **unknown}


def metric(served, name: str) -> float:
    lines = httpx.get(f"{served.url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


@pytest.mark.parametrize("path", ["/generate", "/complete_stream"])
def test_a_client_that_leaves_is_noticed_and_its_work_stops(served, path):
    before = metric(served, "pixelcnn_left_requests_total")
    body = LONG if path == "/generate" else stream_request()
    with (
        httpx.stream("POST", served.url + path, json=body, timeout=60)
        if path != "/generate"
        else (pytest.raises(httpx.ReadTimeout))
    ):
        if path == "/generate":
            post(served, path, body, timeout=0.5)
    wait_until(lambda: metric(served, "pixelcnn_left_requests_total") > before, 30)
    # Its lane is free: a short request there does not wait for sixteen images.
    start = time.monotonic()
    assert post(served, "/generate", {**LONG, "num_samples": 1}).status_code == 200
    short = time.monotonic() - start
    start = time.monotonic()
    assert post(served, "/generate", {**LONG, "num_samples": 1}).status_code == 200
    assert short < 4 * (time.monotonic() - start) + 1


def test_a_body_that_never_ends_is_cut_off_at_the_limit(served):
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.settimeout(30)
        connection.sendall(head("/generate", "Transfer-Encoding: chunked"))
        sent = 0
        try:
            while sent < 20_000_000:
                connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
                sent += 10_000
        except OSError:
            pass  # it was closed
        answer = b""
        try:
            while more := connection.recv(65536):
                answer += more
        except ConnectionResetError:
            pass
    assert sent < 20_000_000
    assert not answer or answer.startswith(b"HTTP/1.1 413")


def test_readers_that_take_nothing_do_not_hold_up_others(served):
    connections = []
    try:
        for _ in range(8):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", served.port))
            body = httpx.Request("POST", served.url, json=stream_request(num_samples=1)).content
            connection.sendall(head("/complete_stream", f"Content-Length: {len(body)}") + body)
            connections.append(connection)
        for _ in range(5):
            assert post(served, "/generate", SHORT, timeout=30).status_code == 200
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.slow
@pytest.mark.repeated
@pytest.mark.timeout(180 + 60 * NUM_KILLS)
def test_a_killed_worker_comes_back_and_loses_only_what_it_computed(served):
    """Whoever asked meanwhile sees a broken connection, never a wrong answer; the canvas and clients ask again."""
    expected = post(served, "/generate", SHORT).json()
    recoveries, lost, wrong, right = [], 0, 0, 0
    for _ in range(NUM_KILLS):
        end = threading.Event()

        def keep_asking(end: threading.Event = end) -> list[str]:
            seen = []
            while not end.is_set():
                try:
                    response = post(served, "/generate", SHORT, timeout=120)
                    seen.append("right" if response.status_code == 200 and response.json() == expected else "wrong")
                except httpx.TransportError as error:
                    seen.append("refused" if isinstance(error, httpx.ConnectError) else "lost")
                    time.sleep(0.02)
            return seen

        with ThreadPoolExecutor(4) as crowd:
            asking = [crowd.submit(keep_asking) for _ in range(4)]
            time.sleep(0.5)
            (worker,) = served.workers()
            os.kill(worker, signal.SIGKILL)
            wait_until(lambda worker=worker: served.workers() not in ([], [worker]), 60)
            recoveries.append(served.wait_until_ready())
            end.set()
            seen = [outcome for task in asking for outcome in task.result()]
        assert post(served, "/generate", SHORT).json() == expected
        right, wrong, lost = right + seen.count("right"), wrong + seen.count("wrong"), lost + seen.count("lost")
    assert wrong == 0
    assert right > 0
    assert lost <= 8 * NUM_KILLS  # what it computed for four clients, and what their connections had accepted
    print(f"\n{NUM_KILLS} kills: {right} right, {wrong} wrong, {lost} lost answers; "
          f"back after {np.median(recoveries):.1f} s (median), {max(recoveries):.1f} s (longest)")  # fmt: skip


def test_sigterm_finishes_what_was_taken_and_refuses_the_rest(served):
    """The last test of this service."""
    counted = metric(served, "pixelcnn_batch_images_sum")
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(post, served, "/generate", {**LONG, "num_samples": 3})
        wait_until(lambda: metric(served, "pixelcnn_batch_images_sum") > counted, 30)
        served.process.send_signal(signal.SIGTERM)
        assert taken.result().status_code == 200
    served.process.wait(30)
    with pytest.raises(httpx.ConnectError):
        post(served, "/generate", SHORT)


def test_a_killed_server_leaves_no_worker_that_keeps_the_port(tmp_path):
    (tmp_path / "bentoml").mkdir()
    with serving(tmp_path / "bentoml", tmp_path / "log") as served:
        [worker] = [psutil.Process(number) for number in served.workers()]
        served.process.kill()
        worker.wait(20)
        with pytest.raises(httpx.ConnectError):
            post(served, "/generate", SHORT)


# The store.


def champions_of(tmp_path, monkeypatch):
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    (tmp_path / "bentoml").mkdir()
    tag = put(tmp_path, "grey", GREY, "1", seed=0)
    store.serve(tag)
    return Champions(tmp_path / "bentoml/models"), tmp_path / "bentoml/models" / tag.replace(":", "/")


@pytest.mark.repeated
def test_no_flipped_bit_of_a_model_is_ever_loaded(tmp_path, monkeypatch):
    """Except where it changes nothing that is read: then what is loaded equals the model, field by field."""
    _, folder = champions_of(tmp_path, monkeypatch)
    good = load_champion(folder)
    draw = np.random.default_rng(0)
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    num_refused = num_equal = 0
    for i in range(NUM_FLIPS):
        file = files[i % len(files)]
        whole = file.read_bytes()
        at = int(draw.integers(len(whole)))
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(draw.integers(8))]) + whole[at + 1 :])
        try:
            found = load_champion(folder)
        except Exception:
            num_refused += 1
        else:
            same = all(a.equal(b) for a, b in zip(found.model.parameters(), good.model.parameters(), strict=True))
            assert same, file.name
            assert found.identity == good.identity, file.name
            assert found.description == good.description, (file.name, at)
            num_equal += 1
        file.write_bytes(whole)
    print(f"\n{NUM_FLIPS} flipped bits: {num_refused} refused, {num_equal} in bytes that are not read, 0 loaded")


REFUSED = {"pickle": "does not belong into its folder", "symlink": "is no plain file", "folder": "is no plain file"}
REFUSED |= dict.fromkeys(("linked folder", "linked name"), "its folder is a link")
REFUSED |= dict.fromkeys(("absolute", "outside", "pointer"), "is no name of a version")


@pytest.mark.parametrize("what", REFUSED)
def test_a_model_of_anything_but_plain_files_in_its_folder_is_refused(tmp_path, monkeypatch, caplog, what):
    champions, folder = champions_of(tmp_path, monkeypatch)
    champions.refresh()
    assert champions.get("grey").identity.version == "1"
    tag = put(tmp_path, "grey", GREY, "2", seed=1)
    folder = champions.folder / tag.replace(":", "/")
    weights, elsewhere = folder / "model.safetensors", tmp_path / "elsewhere.safetensors"
    if what == "pickle":
        (folder / "model.pkl").write_bytes(b"\x80\x04.")
    elif what == "symlink":
        weights.rename(elsewhere)
        weights.symlink_to(elsewhere)
    elif what == "folder":
        (folder / "more").mkdir()
    elif what == "linked folder":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    elif what == "linked name":
        folder.parent.rename(tmp_path / "moved")
        folder.parent.symlink_to(tmp_path / "moved")
    else:
        name = {"absolute": str(folder), "outside": f"../pixelcnn-grey/{folder.name}", "pointer": f"{folder.name}\0"}
        (champions.folder / "pixelcnn-grey/latest").write_text(name[what])
        champions.refresh()
        assert champions.get("grey").identity.version == "1"
        assert REFUSED[what] in caplog.text
        return
    store.serve(tag)
    champions.refresh()
    assert champions.get("grey").identity.version == "1"
    assert REFUSED[what] in caplog.text
    assert "version 1 is still served" in caplog.text


@pytest.mark.parametrize("damaged", [b"", b"\xff", b"No Version"])
def test_a_damaged_pointer_keeps_no_other_model_from_being_served(tmp_path, monkeypatch, caplog, damaged):
    _, folder = champions_of(tmp_path, monkeypatch)
    store.serve(put(tmp_path, "colour", COLOUR, "1", seed=0))
    (folder.parent / "latest").write_bytes(damaged)
    assert [model.tag.name for model in pinned_models()] == ["pixelcnn-colour"]
    assert "pixelcnn-grey/latest names no version" in caplog.text


@pytest.mark.parametrize("what", ["folder", "pointer", "pointer that is none"])
def test_a_model_that_is_gone_is_refused_aloud_and_served_once_it_is_back(tmp_path, monkeypatch, caplog, what):
    champions, folder = champions_of(tmp_path, monkeypatch)
    tag, pointer = f"pixelcnn-grey:{folder.name}", folder.parent / "latest"
    if what == "folder":
        folder.rename(tmp_path / "gone")
    elif what == "pointer that is none":
        pointer.unlink()
        pointer.mkdir()
    else:
        pointer.write_bytes(b"\xff")
    for _ in range(2):
        champions.refresh()
    assert caplog.text.count("cannot be served") == 1
    assert "nothing is served for it" in caplog.text
    assert read("pixelcnn_champion_refused", dataset="grey", role="champion") == 1
    if what == "folder":
        (tmp_path / "gone").rename(folder)
    else:
        pointer.rmdir() if pointer.is_dir() else pointer.unlink()
        store.serve(tag)
    champions.refresh()
    assert champions.get("grey").identity.version == "1"
    assert read("pixelcnn_champion_refused", dataset="grey", role="champion") == 0


def test_a_swap_that_failed_once_is_tried_again_though_no_file_changed(tmp_path, monkeypatch, caplog):
    """First after a second, then at growing intervals; it is logged once."""
    champions, _ = champions_of(tmp_path, monkeypatch)
    champions.refresh()
    store.serve(put(tmp_path, "grey", GREY, "2", seed=1))
    tries, now = [], [1000.0]
    monkeypatch.setattr("app.service.champions.time.monotonic", lambda: now[0])

    def read_badly(file) -> str:
        tries.append(now[0])
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("app.service.champions.sha256_of", read_badly)
        for _ in range(600):
            champions.refresh()
            now[0] += 1
    assert champions.get("grey").identity.version == "1"
    assert np.diff(tries).tolist()[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert caplog.text.count("Input/output error") == 1
    now[0] += 60
    champions.refresh()
    assert champions.get("grey").identity.version == "2"


def test_a_failure_without_a_text_is_told_by_its_name(tmp_path, monkeypatch, caplog):
    def fail(folder) -> None:
        raise MemoryError

    champions, _ = champions_of(tmp_path, monkeypatch)
    monkeypatch.setattr("app.service.champions.load_champion", fail)
    champions.refresh()
    assert "cannot be served: MemoryError() nothing is served for it." in caplog.text


def test_a_look_at_the_store_that_fails_is_not_the_last(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("app.service.champions.POLL_S", 0.01)
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 2:  # the first is that of the start
            raise RuntimeError("out of order")

    monkeypatch.setattr("app.service.champions.compile_sampler", lambda: None)
    champions = Champions(tmp_path, on_poll=look)
    champions.start()
    try:
        wait_until(lambda: len(looks) > 2)
    finally:
        champions.stop()
    assert "out of order" in caplog.text


def test_the_last_good_champion_outlives_its_store(tmp_path, monkeypatch):
    """A disk that fails is no order to stop serving; a dataset that is removed from a readable store is."""
    champions, _ = champions_of(tmp_path, monkeypatch)
    champions.refresh()
    champions.folder.rename(tmp_path / "gone")
    champions.refresh()
    assert champions.get("grey").identity.version == "1"
    (tmp_path / "gone").rename(champions.folder)
    champions.refresh()
    assert champions.get("grey").identity.version == "1"


def test_a_store_that_cannot_be_read_is_told_once_and_one_that_is_not_there_yet_is_not(tmp_path, caplog):
    for folder, times in ((tmp_path / "none", 0), (tmp_path / "file", 1)):
        if times:
            folder.write_text("")
        champions = Champions(folder)
        for _ in range(3):
            champions.refresh()
            champions._loaded["grey", "champion"] = None  # released weights
        assert caplog.text.count("the model store cannot be read") == times
