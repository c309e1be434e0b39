"""Training by command line survives what machines do to it: kill -9, a full disk; and several processes share it."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed

from pixelcnn import load_checkpoint, save_dataset
from pixelcnn.__main__ import main
from tests.core.tiny import toy_dataset
from tests.local import slow_alone

NUM_KILLS = int(os.environ.get("PIXELCNN_KILLS", "2"))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

pytestmark = pytest.mark.timeout(120 * (NUM_KILLS + 1))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "toy.safetensors"
    save_dataset(path, toy_dataset(num_levels=2, protocol="dynamic", data_hash=""))
    return path


def command(data_file: Path, out: Path, max_epochs: float, **settings: float) -> list[str]:
    """Return the words after `python -m pixelcnn`: 3 steps per epoch, the state saved after each."""
    values = {"num-features": 4, "num-blocks": 1, "batch-size": 8, "learning-rate": 0.003, "max-epochs": max_epochs}
    values |= {"save-minutes": 0, "num-validations": 5} | settings
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["train", "pixelcnn", "--data", str(data_file), "--out", str(out), *options]


@slow_alone
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(data_file: Path, tmp_path: Path) -> None:
    """kill -9, again and again: weights, loss and scores at the end are those of one whole run, bit for bit.

    PIXELCNN_KILLS=20 kills 20 times.
    """
    max_epochs = 30 * (NUM_KILLS + 1)

    def words(out: Path) -> list[str]:
        return [sys.executable, "-m", "pixelcnn", *command(data_file, out, max_epochs)]

    whole = subprocess.run(words(tmp_path / "whole"), env=ONE_THREAD, capture_output=True, text=True, check=True)
    images_per_s = float(re.findall(r"([0-9]+) images/s", whole.stdout)[-1])
    longest_s = 10 * 24 / images_per_s  # a third of its share: a machine that grows faster does not end it too soon
    moments, out, starts = random.Random(0), tmp_path / "killed", []
    for _ in range(NUM_KILLS):
        with subprocess.Popen(words(out), env=ONE_THREAD, stdout=subprocess.PIPE, text=True) as training:
            assert training.stdout is not None
            for line in training.stdout:
                if line.startswith("step "):
                    starts.append(int(line.split()[1].rstrip(",")))
                    break
            time.sleep(moments.uniform(0, longest_s))
            assert training.poll() is None, "the training ended before it was killed"
            training.send_signal(signal.SIGKILL)
    subprocess.run(words(out), env=ONE_THREAD, capture_output=True, check=True)
    assert len(starts) == NUM_KILLS
    assert starts[0] == 1
    assert starts == sorted(starts)
    assert starts[-1] > 1, "it went on, not started afresh"
    for name in ("model.safetensors", "scores.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_full_disk_leaves_the_saved_state_and_says_so(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    state = out.with_name("model.state")
    assert main(command(data_file, out, 2)) == 0
    before = state.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        code = main(command(data_file, out, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {state} could not be saved (")
    assert "Make room on its disk, then run the same command again" in error
    assert error.count("\n") == 1
    assert state.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.state"]
    assert main(command(data_file, out, 4)) == 0
    assert "step 12, epoch 4.00" in capsys.readouterr().out


@slow_alone
def test_two_processes_train_as_one(data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each takes half of every batch: the same losses, weights and scores, but for rounding. One of them speaks."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"accumulate": 2, "num-validations": 12, "ema-decay": 0.5}
    assert main(command(data_file, one, 4, **settings)) == 0
    alone = capsys.readouterr().out
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pixelcnn"]
    words = [*start, *command(data_file, two, 4, **settings)]
    shared = subprocess.run(words, env=ONE_THREAD, capture_output=True, text=True)
    assert shared.returncode == 0, shared.stderr

    def losses(text: str) -> list[str]:
        return [line.partition(" nats, validation")[0] for line in text.splitlines() if line.startswith("step ")]

    assert len(losses(alone)) == 12
    assert losses(shared.stdout) == losses(alone)
    (model, scores), (expected, expected_scores) = load_checkpoint(two), load_checkpoint(one)
    for found, weight in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-5, atol=1e-5)
    assert scores["test/nll_nats"] == pytest.approx(expected_scores["test/nll_nats"], abs=1e-4)


def test_a_batch_smaller_than_the_processes_is_refused(
    data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert main(command(data_file, tmp_path / "model", 4, **{"batch-size": 1})) == 1
    message = "error: batch_size must be from 2 (accumulate times processes) to the 24 training images of toy, got 1.\n"
    assert capsys.readouterr().err == message
