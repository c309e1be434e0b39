"""Several pairs at once: how many, what one failure does to the others, what a cancelled run leaves, the comparison."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client

from pipelines import steps
from pipelines.flows import train as training_flow
from pipelines.flows import train_all as train_all_flow
from pipelines.flows.train_all import run_apart, train_all
from pipelines.registry import versions as registry
from tests.local import slow_alone, stop
from tests.pipelines.projects import PAIR, tiny_params, write_params
from tests.pipelines.sites import tags_of_last_run

GATED = "gated_pixelcnn-mnist5k"


def apart(code: dict[str, str], at_once: int, say=lambda text: None) -> dict[str, str]:
    commands = {name: [sys.executable, "-c", text] for name, text in code.items()}
    return run_apart(commands, at_once, Path("logs"), os.environ, say)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("at_once", [1, 2])
def test_never_more_at_once_than_allowed(folder: Path, at_once: int) -> None:
    work = f"""
import os, pathlib, time
print(time.time())
pathlib.Path(f"begun-{{os.getpid()}}").touch()
time.sleep(0.1)
while len(list(pathlib.Path().glob("begun-*"))) < {at_once}:  # as many as may
    time.sleep(0.01)
print(time.time())
"""
    assert apart(dict.fromkeys("abcd", work), at_once) == {}
    times = {name: [float(line) for line in Path(f"logs/{name}.log").read_text().split()] for name in "abcd"}
    changes = sorted([(begin, 1) for begin, _ in times.values()] + [(end, -1) for _, end in times.values()])
    under_way = [sum(change for _, change in changes[: i + 1]) for i in range(len(changes))]
    assert max(under_way) == at_once
    if at_once == 1:
        assert sorted(times, key=lambda name: times[name][0]) == list("abcd"), "in order"


def test_a_crash_neither_stops_nor_hides_the_others(folder: Path) -> None:
    said: list[str] = []
    failures = apart(
        {
            "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "mistake": "import sys; print('train-pair: no data here. Make them.'); print('late words'); sys.exit(1)",
            "bug": "raise AssertionError('ours')",
            "fine": "print('done')",
        },
        1,
        said.append,
    )
    assert failures == {
        "killed": "killed by signal 9; see logs/killed.log",
        "mistake": "no data here. Make them.",
        "bug": "exit code 1; see logs/bug.log",
    }
    assert Path("logs/fine.log").read_text() == "done\n"
    assert "AssertionError: ours" in Path("logs/bug.log").read_text()
    assert said[-1] == "fine: done"


def test_whoever_is_stopped_leaves_nothing_running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_all_flow, "GRACE_S", 0.5)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    work = "import os, pathlib, time; pathlib.Path('{}').write_text(str(os.getpid())); time.sleep(100)"
    pids: list[int] = []

    def cancel(text: str) -> None:
        if text.startswith("third: begins"):
            for path in (Path("one"), Path("two")):
                while not path.exists() or not path.read_text():
                    time.sleep(0.05)
                pids.append(int(path.read_text()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apart({"one": work.format("one"), "two": deaf + work.format("two"), "third": "print('never')"}, 3, cancel)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not Path("logs/third.log").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)  # a server and four processes, two of which compile the sampler where nobody has
def test_pairs_are_trained_and_compared(project: Path, prefect_server: str) -> None:
    """Two that are fine, and one without data."""
    with pytest.raises(ChildProcessError) as caught:
        train_all([PAIR, "pixelcnn-mnist", GATED], at_once=2)
    text = str(caught.value)
    assert "pixelcnn-mnist (data/mnist.safetensors does not exist. Make it: " in text
    assert text.endswith(f"Trained: {PAIR}, {GATED}.")
    assert {version.tags["pair"] for version in registry.versions("mnist5k")} == {PAIR, GATED}

    page = Path("reports/comparison.html").read_text()
    (reports,) = Path("models/deployments").glob("*/reports")
    for pair in (PAIR, GATED):
        nats = json.loads((reports / pair / "metrics.json").read_text())["test/nll_nats"]
        assert f"<td>{pair}</td><td>dynamic</td><td>{nats:.2f} ± " in page
        assert f'alt="{pair}: Samples"' in page
    assert "pixelcnn-mnist failed: data/mnist.safetensors does not exist." in page
    with get_client(sync_client=True) as client:
        found = [one for one in client.read_artifacts() if one.key == "comparison"]
    artifact = max(found, key=lambda one: one.created)  # other tests of this server's session make some, too
    rows = json.loads(str(artifact.data))
    assert {row["pair"] for row in rows} == {PAIR, GATED, "pixelcnn-mnist"}


@slow_alone
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the process's children are read from /proc")
def test_a_cancelled_run_stops_its_trainings(project: Path, prefect_server: str) -> None:
    values = tiny_params()
    values["pairs"][PAIR]["train"] |= {"max_epochs": 10_000}
    write_params(project, values)
    command = [sys.executable, "-m", "pipelines.steps", "train-all", PAIR]
    environment = {**os.environ, "PREFECT_API_URL": prefect_server}
    run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while not any("step" in log.read_text() for log in project.glob(f"models/deployments/*/logs/{PAIR}.log")):
            assert run.poll() is None
            time.sleep(0.2)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        training = [pid for pid in children if b"train-pair" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(training) == 1
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) != 0
        with pytest.raises(ProcessLookupError):
            os.kill(int(training[0]), 0)
    finally:
        stop(run)


def test_a_run_has_the_tags_of_its_pairs(project: Path, prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, list[str]]] = []

    def not_here(commands: dict[str, list[str]], *_: object) -> dict[str, str]:
        asked.append(commands)
        return dict.fromkeys(commands, "not here")

    monkeypatch.setattr(train_all_flow, "run_apart", not_here)
    for words in ({"pairs": [PAIR, GATED]}, {"again": True}):
        with pytest.raises(ChildProcessError, match="not here"):
            train_all(**words)
        assert tags_of_last_run("train-all") == {PAIR, GATED, "mnist5k"}, "those of the quick start, if none is named"
    assert [{"--reuse" in command for command in commands.values()} for commands in asked] == [{True}, {False}]


def test_the_words_of_a_command_reach_its_flow(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple] = []
    monkeypatch.setattr(training_flow, "train_pair", lambda *words: told.append(words))
    monkeypatch.setattr(train_all_flow, "train_all", lambda *words: told.append(words))
    for words in (
        f"train-pair {PAIR} --out o --report r --state s --half",
        f"train-pair {PAIR} --reuse",
        "train-all",
        f"train-all {PAIR} --at-once 2 --again",
    ):
        assert steps.main(words.split()) == 0
    assert told == [
        (PAIR, "o", "r", "s", True, False),
        (PAIR, None, None, None, False, True),
        (None, 1, False),
        ([PAIR], 2, True),
    ]


def test_how_many_is_checked_before_anything_starts(
    project: Path, prefect_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steps.main(["train-all", PAIR, "--at-once", "0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "train-all: at_once must be 1 or more, got 0."
    assert not Path("models").exists()
