import contextlib
import copy
import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pixelcnn import Dataset, TrainConfig, evaluate, fit, log_prob, naive_sample, sample
from pixelcnn.data import save_tensors
from pixelcnn.evaluation import per_image_marginal_nll, per_image_nll
from pixelcnn.likelihood import expected_log_prob
from pixelcnn.models import registry
from pixelcnn.models.pixelcnn import PixelCNN, PixelCNNConfig
from pixelcnn.training import StepReport
from pixelcnn.training import config as training_config
from pixelcnn.training import redrawn as hand
from pixelcnn.training import trainer as training
from pixelcnn.training.optimizers import OPTIMIZERS
from pixelcnn.training.trainer import format_progress, read_state
from tests.core.tiny import ARCHITECTURES, beginning, exactly, tiny_config, tiny_model, toy_dataset

CONFIG = TrainConfig(
    batch_size=8, learning_rate=0.01, max_epochs=4, warmup_steps=2, ema_decay=0.9, num_validations=4, save_minutes=0
)  # on the toy dataset's 24 training images: 12 steps, scored after each epoch


def config(**changes) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def toy_model(data: Dataset, architecture: str = "pixelcnn", seed: int = 0):
    return tiny_model(architecture, data.image_shape, data.num_levels, len(data.label_names), seed=seed)


def run(model, data, train_config, **arguments) -> tuple[float, list[StepReport]]:
    reports: list[StepReport] = []
    return fit(model, data, train_config, on_step=reports.append, **arguments), reports


def batches_seen(model, data, train_config) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Return the (levels, label) of every training step; with a context network, the drawing and its mask too."""
    seen = []

    def remember(module, inputs):
        if module.training:
            given = inputs[:2] if inputs[2] is None else inputs
            seen.append(tuple(None if x is None else x.clone() for x in given))

    handle = model.register_forward_pre_hook(remember)
    fit(model, data, train_config)
    handle.remove()
    return seen


def test_samples_of_a_training_are_those_of_the_weights_of_that_moment():
    data = toy_dataset()
    model, seen = toy_model(data).double(), []
    u = torch.rand(2, *data.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def look(step: int) -> None:
        seen.append(sample(model, u))
        assert torch.equal(seen[-1], naive_sample(model, u))

    fit(model, data, config(learning_rate=0.1), on_validation=look)
    look(0)
    assert len(seen) == 5


def weights(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("protocol", "num_levels"), [("8-bit", 3), ("dynamic", 2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fit_lowers_the_loss(architecture, optimizer, protocol, num_levels):
    data = toy_dataset(num_levels=num_levels, protocol=protocol)
    images = {}
    for split, x in data.images.items():  # black and white in turn
        white = 255 if (split, protocol) == ("train", "dynamic") else num_levels - 1
        images[split] = (torch.arange(len(x)) % 2 * white).to(torch.uint8)[:, None, None, None].expand(-1, 1, 3, 3)
    data = dataclasses.replace(data, images=images)
    model = toy_model(data, architecture)
    before = evaluate(model, data)["validation/nll_nats"]
    best, reports = run(model, data, config(max_epochs=30, optimizer=optimizer, learning_rate=0.03))
    # Every image is all black or all white: one fair coin, log 2 nats.
    assert before > 3
    assert math.log(2) - 0.05 < best < 1.3
    assert evaluate(model, data)["validation/nll_nats"] == pytest.approx(best, rel=1e-9)
    assert reports[-1].train_nll_nats < reports[0].train_nll_nats / 2
    assert not model.training


def test_the_reported_loss_is_that_of_the_batch_in_nats_per_image():
    data = toy_dataset()
    model = toy_model(data)
    before = copy.deepcopy(model)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]) if module.training else None)
    _, reports = run(model, data, config())
    assert reports[0].train_nll_nats == pytest.approx(-log_prob(before, *seen[0]).mean().item(), rel=1e-6)


def test_every_epoch_is_a_permutation_of_the_training_images():
    data = toy_dataset(num_train=26)  # the last two of each epoch's order do not fill a batch
    keys = {tuple(image.flatten().tolist()): i for i, image in enumerate(data.images["train"])}
    assert len(keys) == 26
    seen = [[keys[tuple(x.flatten().tolist())] for x in levels] for levels, _ in
            batches_seen(toy_model(data), data, config(max_epochs=2))]  # fmt: skip
    assert [len(batch) for batch in seen] == [8] * 6
    epochs = [[i for batch in batches for i in batch] for batches in (seen[:3], seen[3:])]
    assert all(len(set(epoch)) == 24 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("protocol", ["8-bit", "dynamic"])
def test_the_seed_alone_decides(protocol):
    data = toy_dataset(num_levels=2, protocol=protocol)
    if protocol == "dynamic":  # all the same grey: their order decides nothing, the draw alone does
        grey = torch.full_like(data.images["train"], 128)
        data = dataclasses.replace(data, images={**data.images, "train": grey})
    finals, batches = [], []
    for torch_seed, seed in ((1, 0), (2, 0), (1, 5)):
        model = toy_model(data)
        torch.manual_seed(torch_seed)
        batches.append([levels for levels, _ in batches_seen(model, data, config(seed=seed))])
        finals.append(weights(model))
    assert same(finals[0], finals[1])
    assert same(batches[0], batches[1])
    assert not same(batches[0], batches[2])


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("saved_at", "stopped_at"), [(7, 7), (5, 8), (6, 9), (1, 1)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, optimizer, architecture, saved_at, stopped_at):
    data, settings = toy_dataset((1, 3, 3), num_levels=2, protocol="dynamic"), config(optimizer=optimizer)
    whole = toy_model(data, architecture)
    best, reports = run(whole, data, settings)
    state, kept = tmp_path / "state", tmp_path / "kept"

    def stop(report: StepReport) -> None:
        if report.step == saved_at:
            shutil.copy(state, kept)
        if report.step == stopped_at:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(toy_model(data, architecture), data, settings, stop, state)
    shutil.copy(kept, state)  # as if saves were rarer than steps
    resumed = toy_model(data, architecture, seed=3)  # its own fresh weights play no part
    resumed_best, rest = run(resumed, data, settings, state_file=state)
    assert [r.step for r in rest] == list(range(saved_at + 1, 13))
    for after, expected in zip(rest, reports[saved_at:], strict=True):
        assert after.train_nll_nats == expected.train_nll_nats
        assert after.validation_nll_nats == expected.validation_nll_nats
        assert (after.learning_rate, after.epoch) == (expected.learning_rate, expected.epoch)
    assert resumed_best == best
    assert same(weights(resumed), weights(whole))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept", "state"]
    # A finished run has nothing left to do.
    again = toy_model(data, architecture, seed=4)
    assert run(again, data, CONFIG, state_file=state) == (best, [])
    assert same(weights(again), weights(whole))
    assert not again.training


def test_saves_are_as_rare_as_asked(tmp_path):
    data, state = toy_dataset(), tmp_path / "new folder" / "state"
    there = []
    fit(toy_model(data), data, config(save_minutes=10), lambda report: there.append(state.exists()), state)
    assert there == [False] * 11 + [True]


@pytest.mark.parametrize(
    ("changes", "other_model", "other_data", "what"),
    [
        ({"clip_norm": 2.0}, {}, {}, "train settings (clip_norm)"),
        ({"seed": 1}, {}, {}, "train settings (seed)"),
        ({"warmup_steps": 3}, {}, {}, "train settings (warmup_steps)"),
        ({}, {"num_blocks": 3}, {}, "model (num_blocks)"),
        ({}, {"context_features": 4}, {}, "model (context_features, context_width)"),
        ({}, {}, {"data_hash": "other"}, "data hash"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, changes, other_model, other_data, what):
    data, state = toy_dataset(), tmp_path / "state"
    fit(toy_model(data), data, CONFIG, state_file=state)
    before = state.read_bytes()
    model = tiny_model("pixelcnn", (1, 3, 3), 3, 2, **other_model)
    message = f"{state} is the state of a run that differs in its {what}. "
    message += "Set it back to go on, or delete the file to start afresh."
    with pytest.raises(ValueError, match=exactly(message)):
        fit(model, dataclasses.replace(data, **other_data), config(**changes), state_file=state)
    assert state.read_bytes() == before


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_dataset_in_memory_is_known_by_what_it_holds(tmp_path, split, part):
    """It has no hash: a finished run on another one was gone on with, and its weights taken."""
    data, state = toy_dataset(data_hash=""), tmp_path / "state"
    best, _ = run(toy_model(data), data, CONFIG, state_file=state)
    assert run(toy_model(data), data, CONFIG, state_file=state) == (best, [])
    other = toy_dataset(data_hash="")
    getattr(other, part)[split][0] = 1 - getattr(other, part)[split][0].clamp(max=1)
    with pytest.raises(ValueError, match="is the state of a run that differs in its data hash"):
        fit(toy_model(data), other, CONFIG, state_file=state)


def test_an_older_state_of_a_dataset_in_memory_goes_on(tmp_path, monkeypatch):
    """Earlier releases wrote no hash for it."""
    data, state = toy_dataset(data_hash=""), tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "data_hash", "")
        best, _ = run(toy_model(data), data, CONFIG, state_file=state)
    assert run(toy_model(data), data, CONFIG, state_file=state) == (best, [])
    hashed = toy_dataset(data_hash="of a file")
    with pytest.raises(ValueError, match="is the state of a run that differs in its data hash"):
        fit(toy_model(data), hashed, CONFIG, state_file=state)


def test_the_state_of_other_weights_is_refused(tmp_path):
    """As of a label network of another width, or where the code of an architecture has changed."""
    data, state = toy_dataset(), tmp_path / "state"
    wide, narrow = (tiny_model("pixelcnn", (1, 3, 3), 3, 2, context_features=2, label_features=n) for n in (6, 4))
    fit(narrow.label_network, data, CONFIG, state_file=state)
    message = f"{state} is the state of a network of other weights. Delete it to start afresh."
    with pytest.raises(ValueError, match=exactly(message)):
        fit(wide.label_network, data, CONFIG, state_file=state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SidedConfig(PixelCNNConfig):
    sides: tuple[int, ...] = (3, 5)


def test_an_architecture_with_a_tuple_among_its_settings_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._ARCHITECTURES, "sided", (SidedConfig, PixelCNN))
    data, sizes = toy_dataset(), dataclasses.asdict(tiny_config("pixelcnn", (1, 3, 3), 3))
    for max_epochs in (1, 2):
        model = registry.build_model(SidedConfig(**sizes))
        _, reports = run(model, data, config(max_epochs=max_epochs), state_file=tmp_path / "state")
    assert [report.step for report in reports] == [4, 5, 6]


def test_a_state_older_than_a_setting_is_gone_on_with_at_its_default(tmp_path):
    data, state = toy_dataset(), tmp_path / "state"
    fit(toy_model(data), data, config(max_epochs=2), state_file=state)
    saved, tensors = read_state(state)
    for key, names in (("model", ("output", "num_mixtures")), ("train settings", ("clip_norm", "horizontal_flips"))):
        for name in names:
            del saved.description[key][name]
    saved.phases[-1]["head_features"] = saved.description["model"].pop("head_features")  # it was one that may change
    save_tensors(state, tensors, state=dataclasses.asdict(saved))
    _, reports = run(toy_model(data), data, config(max_epochs=3), state_file=state)
    assert [report.step for report in reports] == [7, 8, 9]
    save_tensors(state, tensors, state=dataclasses.asdict(saved))
    with pytest.raises(ValueError, match="differs in its train settings"):
        fit(toy_model(data), data, config(max_epochs=3, clip_norm=2.0), state_file=state)


@pytest.mark.parametrize("decay_fraction", [0, 0.5])
def test_a_schedule_changed_before_the_decay_gives_the_run_that_had_it_from_the_start(tmp_path, decay_fraction):
    """Without a time limit epochs alone decide: half of a run, resumed with twice the epochs, is the whole run.

    So it is with another decay, as long as it has not begun.
    """
    data, state = toy_dataset(num_levels=2, protocol="dynamic"), tmp_path / "state"
    settings = config(decay_fraction=decay_fraction, optimizer="muon", num_validations=2)
    whole = toy_model(data)
    best, reports = run(whole, data, settings)

    def stop_before_the_decay(report: StepReport) -> None:
        if decay_fraction and report.step == 3:
            raise Interrupted

    with contextlib.suppress(Interrupted):
        half = dataclasses.replace(settings, max_epochs=2, decay_fraction=0.8 * decay_fraction)
        fit(toy_model(data), data, half, stop_before_the_decay, state)
    resumed = toy_model(data, seed=3)
    resumed_best, rest = run(resumed, data, settings, state_file=state)
    assert [r.step for r in rest] == list(range(4 if decay_fraction else 7, 13))
    for after, expected in zip(rest, reports[-len(rest) :], strict=True):
        assert (after.train_nll_nats, after.learning_rate) == (expected.train_nll_nats, expected.learning_rate)
        assert after.validation_nll_nats == expected.validation_nll_nats
    assert resumed_best == best
    assert same(weights(resumed), weights(whole))


def test_a_run_that_goes_on_may_shift_some_settings_and_remembers(tmp_path):
    """To another machine's best precision, to another optimizer or batch, to fewer labels: the weights are kept."""
    data, state = toy_dataset(), tmp_path / "state"
    first: dict[str, Any] = {"label_dropout": 0.25, "precision": "bfloat16", "optimizer": "adam"}
    then: dict[str, Any] = {"label_dropout": 0.9, "precision": "float32", "optimizer": "muon"}
    both = {"redrawn_share": 0.0, "compiled": False}
    first |= {"learning_rate": 0.01, "decay_fraction": 0.3, "ema_decay": 0.9, "batch_size": 8, **both}
    then |= {"learning_rate": 0.002, "decay_fraction": 0.2, "ema_decay": 0.8, "batch_size": 4, **both}
    last = {**then, "batch_size": 12}
    losses, done = [], []
    for epochs, settings in ((10, first), (20, first), (30, then), (40, then), (41, last)):
        _, reports = run(toy_model(data), data, config(max_epochs=epochs, **settings), state_file=state)
        done.append((reports[0].epoch, reports[-1].epoch, reports[-1].step))
        losses.append([report.validation_nll_nats for report in reports if report.validation_nll_nats is not None])
    assert read_state(state)[0].phases == [
        {"from_step": 0, **first}, {"from_step": 60, **then}, {"from_step": 180, **last}
    ]  # fmt: skip
    assert losses[2][0] < losses[0][0], "it went on from the weights that it found"
    # An epoch takes 3 steps of 8 images, 6 of 4, 2 of 12.
    expected = [(0 + 1 / 3, 10, 30), (10 + 1 / 3, 20, 60), (20 + 1 / 6, 30, 120), (30 + 1 / 6, 40, 180)]
    expected.append((40 + 1 / 2, 41, 182))
    torch.testing.assert_close(torch.tensor(done), torch.tensor(expected))


def test_a_damaged_state_is_named(tmp_path):
    data, state = toy_dataset(), tmp_path / "state"
    fit(toy_model(data), data, CONFIG, state_file=state)
    whole = state.read_bytes()
    for damaged in (b"", b"hello", whole[:-7], whole[:50]):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state is no state of a training run .*Delete it to start afresh."):
            fit(toy_model(data), data, CONFIG, state_file=state)
        assert state.read_bytes() == damaged
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read_state(tmp_path)
    for metadata in (None, {"other": "{}"}, {"state": "{"}, {"state": json.dumps({"step": 1})}):
        save_file({"weights/0": torch.zeros(1)}, state, metadata)
        with pytest.raises(ValueError, match=r"state is no state of a training run .*Delete it to start afresh."):
            fit(toy_model(data), data, CONFIG, state_file=state)


def test_a_failure_while_saving_leaves_the_old_state(tmp_path, monkeypatch):
    data, state = toy_dataset(), tmp_path / "state"
    fit(toy_model(data), data, config(max_epochs=1), state_file=state)
    before = state.read_bytes()

    def fail(self, _content):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        fit(toy_model(data), data, CONFIG, state_file=state)
    assert state.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state(tmp_path, what):
    data, state = toy_dataset(), tmp_path / "state"
    model = toy_model(data)
    bytes_at = {}

    def break_it(report: StepReport) -> None:
        bytes_at[report.step] = state.read_bytes()
        if report.step == 5 and what == "loss":
            model.logits.bias.data[0] = math.nan
        if report.step == 5 and what == "gradient":
            model.logits.bias.register_hook(lambda gradient: gradient * math.inf)

    message = (
        r"^the loss or its gradient is not finite at step 6 .*lower learning_rate\. The last saved state is untouched"
    )
    with pytest.raises(FloatingPointError, match=message):
        fit(model, data, CONFIG, break_it, state)
    assert max(bytes_at) == 5
    assert state.read_bytes() == bytes_at[5]
    healthy = toy_model(data, seed=1)
    _, rest = run(healthy, data, CONFIG, state_file=state)
    assert [report.step for report in rest] == list(range(6, 13))
    assert all(math.isfinite(report.train_nll_nats) for report in rest)


def test_a_validation_that_is_not_finite_stops_the_run_and_keeps_the_state(tmp_path, monkeypatch):
    data, state, looked = toy_dataset(), tmp_path / "state", []
    monkeypatch.setattr(training.Trainer, "mean_nll", lambda *_: math.nan)
    message = r"^the validation loss is not finite at step 3 \(nan nats\): lower learning_rate\. "
    with pytest.raises(FloatingPointError, match=message):
        fit(toy_model(data), data, CONFIG, state_file=state, on_validation=looked.append)
    assert read_state(state)[0].step == 2
    assert looked == []


def ask_for_too_much(_: torch.Tensor) -> torch.Tensor:
    return torch.empty(2**50)


def run_out_on_cuda(_: torch.Tensor) -> torch.Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("exhaust", [ask_for_too_much, run_out_on_cuda])
def test_a_step_without_memory_stops_the_run_and_keeps_the_state(tmp_path, exhaust):
    data, state = toy_dataset(), tmp_path / "state"
    model = toy_model(data)

    def break_it(report: StepReport) -> None:
        if report.step == 5:
            model.logits.bias.register_hook(exhaust)

    with pytest.raises(MemoryError, match=r"^a step does not fit into memory: lower batch_size, or raise accumulate"):
        fit(model, data, CONFIG, break_it, state)
    assert read_state(state)[0].step == 5


def test_another_error_of_torch_stays_what_it_is():
    data = toy_dataset()
    model = toy_model(data)
    model.logits.bias.register_hook(lambda gradient: gradient @ gradient[:-1])
    with pytest.raises(RuntimeError, match="size"):
        fit(model, data, CONFIG)


@pytest.mark.parametrize("ema_decay", [0.0, 0.5, 0.9])
def test_the_averaged_weights_are_the_ones_scored_and_kept(ema_decay):
    data = toy_dataset()
    model = toy_model(data)
    average, scored = weights(model), copy.deepcopy(model)
    expected = []

    def follow(report: StepReport) -> None:
        nonlocal average
        decay = min(ema_decay, (1 + report.step) / (10 + report.step))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights(model), strict=True)]
        for parameter, value in zip(scored.parameters(), average, strict=True):
            parameter.data.copy_(value)
        if report.validation_nll_nats is not None:
            expected.append(evaluate(scored, data)["validation/nll_nats"])
            assert report.validation_nll_nats == pytest.approx(expected[-1], rel=1e-12)
            on_train = evaluate(scored, data, ("train",))["train/nll_nats"]
            assert report.train_subset_nll_nats == pytest.approx(on_train, rel=1e-12)
            if ema_decay:  # and scoring the average left the weights in training alone
                raw = evaluate(model, data)["validation/nll_nats"]
                assert raw != pytest.approx(expected[-1], rel=1e-4)

    best = fit(model, data, config(ema_decay=ema_decay), follow)
    assert len(expected) == 4
    assert best == pytest.approx(min(expected), rel=1e-12)
    assert evaluate(model, data)["validation/nll_nats"] == pytest.approx(best, rel=1e-12)


def test_the_weights_that_validated_best_are_kept_not_the_last():
    data = toy_dataset(num_levels=2)
    black, white = (torch.full((24, 1, 3, 3), level, dtype=torch.uint8) for level in (0, 1))
    # Trained on white, scored on black: it can only get worse.
    data = dataclasses.replace(data, images={"train": white, "validation": black[:6], "test": black[:7]})
    model = toy_model(data)
    best, reports = run(model, data, config(max_epochs=6, num_validations=6))
    history = [r.validation_nll_nats for r in reports if r.validation_nll_nats is not None]
    assert len(history) == 6
    assert history == sorted(history)
    assert best == history[0]
    assert evaluate(model, data)["validation/nll_nats"] == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("label_dropout", [0.0, 0.5, 1.0])
def test_label_dropout(label_dropout):
    data = toy_dataset(num_levels=3, num_labels=3)
    # Each image is filled with its label, so that a label that went astray shows.
    images = {s: x[:, None, None, None].expand(-1, 1, 3, 3).to(torch.uint8) for s, x in data.labels.items()}
    data = dataclasses.replace(data, images=images)
    seen = batches_seen(toy_model(data), data, config(max_epochs=20, label_dropout=label_dropout))
    levels, label = torch.cat([levels for levels, _ in seen]), torch.cat([label for _, label in seen])
    kept = label >= 0
    assert torch.equal(label[kept], levels[kept][:, 0, 0, 0])
    assert (label[~kept] == -1).all()
    share = 1 - kept.double().mean().item()
    assert share == label_dropout if label_dropout in (0, 1) else abs(share - label_dropout) < 0.1


def test_a_model_without_labels_is_given_none():
    data = toy_dataset()
    seen = batches_seen(tiny_model("pixelcnn", (1, 3, 3), 3), data, CONFIG)
    assert all(label is None for _, label in seen)


@pytest.mark.parametrize("flips", [True, False])
def test_horizontal_flips(flips):
    data = toy_dataset((1, 2, 3), num_levels=6)
    image = torch.tensor([[[0, 1, 2], [3, 4, 5]]], dtype=torch.uint8)
    data = dataclasses.replace(data, images={s: image.expand(len(x), -1, -1, -1) for s, x in data.images.items()})
    seen = batches_seen(toy_model(data), data, config(max_epochs=20, horizontal_flips=flips))
    levels = torch.cat([levels for levels, _ in seen])
    mirrored = (levels == torch.tensor([[2, 1, 0], [5, 4, 3]])).flatten(1).all(dim=1)
    plain = (levels == image.long()).flatten(1).all(dim=1)
    assert (mirrored | plain).all()
    assert abs(mirrored.double().mean().item() - 0.5) < 0.1 if flips else not mirrored.any()


@pytest.mark.parametrize(
    ("changes", "area"),
    [
        ({}, 1),
        ({"MAX_TURN": 0.6, "MAX_SLANT": 0.6, "MAX_SHIFT": 0.1}, 1),
        ({"SCALES": (1.5, 1.5)}, 1.5**2),
        ({"SCALES": (0.5, 0.5)}, 0.5**2),
        ({"PENS": (1.0, 1.0)}, (10 / 8) ** 2),
        ({"PENS": (-1.0, -1.0)}, (6 / 8) ** 2),
    ],
)
def test_the_ink_of_another_hand(monkeypatch, changes, area):
    still = {"MAX_TURN": 0.0, "MAX_SLANT": 0.0, "MAX_SHIFT": 0.0, "MAX_BEND": 0.0, "SCALES": (1, 1), "PENS": (0, 0)}
    for name, value in (still | changes).items():
        monkeypatch.setattr(hand, name, value)
    square = torch.zeros(50, 1, 32, 32)
    square[:, :, 12:20, 12:20] = 1
    found = hand.by_another_hand(square, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)) / 64, torch.full((50,), float(area)), rtol=0.06, atol=0)


def test_without_strength_what_is_drawn_anew_is_the_image_in_crisp_ink(monkeypatch):
    greys = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    monkeypatch.setattr(hand, "STRENGTH", 0.0)
    assert torch.equal(hand.redrawn(greys, torch.Generator()), (greys > 127).long())


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_images_is_drawn_anew(share):
    data = toy_dataset((1, 8, 8), num_levels=2, protocol="dynamic", num_train=8)
    bar = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    bar[:, :, 1:7, 4] = 255  # without grey: as it is, it is always the same
    data = dataclasses.replace(data, images={**data.images, "train": bar})
    seen = torch.cat(
        [levels for levels, _ in batches_seen(toy_model(data), data, config(max_epochs=30, redrawn_share=share))]
    )
    assert set(seen.unique().tolist()) == {0, 1}
    same = (seen == bar[:1] // 255).flatten(1).all(dim=1).double().mean().item()
    assert 0.9 - share < same < 1.1 - share / 2  # a hand may draw so small a bar as it was
    ink = seen.flatten(1).sum(dim=1)
    assert ink.double().mean() > 3  # it is still a bar
    again = torch.cat(
        [levels for levels, _ in batches_seen(toy_model(data), data, config(max_epochs=30, redrawn_share=share))]
    )
    assert torch.equal(again, seen)


def test_a_run_that_goes_on_may_draw_more_images_anew(tmp_path):
    data, state = toy_dataset((1, 8, 8), num_levels=2, protocol="dynamic"), tmp_path / "state"
    for epochs, share in ((2, 0.0), (4, 0.5)):
        fit(toy_model(data), data, config(max_epochs=epochs, redrawn_share=share), state_file=state)
    assert [phase["redrawn_share"] for phase in read_state(state)[0].phases] == [0.0, 0.5]


def test_only_binary_images_can_be_drawn_anew():
    data = toy_dataset((1, 4, 4), num_levels=6)
    message = f"redrawn_share must be 0 with protocol {data.protocol!r}: only images kept as intensities (protocol "
    with pytest.raises(ValueError, match=exactly(f"{message}'dynamic') can be drawn anew.")):
        fit(toy_model(data), data, config(redrawn_share=0.5))


def test_binarisation_is_drawn_anew_in_each_epoch():
    data = toy_dataset((1, 4, 4), num_levels=2, protocol="dynamic", num_train=8)
    half = torch.full((8, 1, 4, 4), 128, dtype=torch.uint8)
    data = dataclasses.replace(data, images={**data.images, "train": half})
    seen = torch.stack([levels for levels, _ in batches_seen(toy_model(data), data, config(max_epochs=6))])
    assert seen.min() == 0
    assert seen.max() == 1
    assert len({tuple(image.flatten().tolist()) for image in seen.flatten(0, 1)}) == 48


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("redrawn_share", [0.0, 0.5])
def test_the_loss_is_the_mean_over_what_a_pixel_may_be(redrawn_share, flips):
    data = toy_dataset((1, 4, 4), num_levels=2, protocol="dynamic", num_train=8)
    greys = torch.randint(64, 192, (8, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = dataclasses.replace(data, images={**data.images, "train": greys})
    settings = config(redrawn_share=redrawn_share, horizontal_flips=flips, label_dropout=1.0)
    trainer = training.Trainer(toy_model(data), data, settings)
    levels, label, probabilities, _ = trainer.batch()
    kinds = set()
    for grey, drawn, probability in zip(greys[trainer._order], levels, probabilities[:, 1], strict=True):
        as_it_may_be = {"grey": grey / 255, "mirrored": grey.flip(-1) / 255, "anew": drawn.float()}
        kinds |= {kind for kind, expected in as_it_may_be.items() if torch.equal(probability, expected)}
    assert kinds == {"grey"} | ({"mirrored"} if flips else set()) | ({"anew"} if redrawn_share else set())
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(levels.shape))
    nats = -expected_log_prob(trainer.model, levels, probabilities, label).sum().item() / 8
    assert trainer.train_step()[0] == pytest.approx(nats, rel=1e-6)


def test_learning_rate_schedule():
    data = toy_dataset(num_train=8)
    model = toy_model(data)
    start = weights(model)
    moved, rates = [], []

    def measure(report: StepReport) -> None:
        rates.append(report.learning_rate)
        moved.append(max((a - b).abs().max().item() for a, b in zip(start, weights(model), strict=True)))

    fit(
        model,
        data,
        config(learning_rate=0.1, max_epochs=10, warmup_steps=3, decay_fraction=0.5),
        measure,
    )
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02])
    assert moved[0] == pytest.approx(0.025, rel=1e-3)  # Adam's first step is the learning rate itself
    _, reports = run(toy_model(data), data, config(max_epochs=3, warmup_steps=0, decay_fraction=0))
    assert [report.learning_rate for report in reports] == [0.01] * 3


class Clock:
    """A clock that moves only when it is read."""

    def __init__(self, tick_s: float) -> None:
        self.now, self.tick_s = 0.0, tick_s

    def monotonic(self) -> float:
        self.now += self.tick_s
        return self.now


def test_max_minutes_ends_the_run_and_the_schedule_with_it(monkeypatch):
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=Clock(6.0).monotonic))
    _, reports = run(toy_model(toy_dataset()), toy_dataset(), config(max_epochs=100, max_minutes=1, warmup_steps=0))
    assert len(reports) == 10  # six seconds each
    assert reports[6].learning_rate == 0.01 > reports[8].learning_rate > reports[9].learning_rate > 0
    assert [r.step for r in reports if r.validation_nll_nats is not None] == [3, 5, 8, 10]
    assert reports[0].remaining_s == pytest.approx(54)
    assert reports[-1].remaining_s == 0
    _, reports = run(toy_model(toy_dataset()), toy_dataset(), config(max_epochs=1, max_minutes=1))
    assert len(reports) == 3, "the epochs end first"


def test_reports(monkeypatch):
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=Clock(2.0).monotonic))
    _, reports = run(toy_model(toy_dataset()), toy_dataset(), CONFIG)
    assert [r.step for r in reports] == list(range(1, 13))
    assert [r.epoch for r in reports] == pytest.approx([i / 3 for i in range(1, 13)])
    assert [r.images_per_s for r in reports] == pytest.approx([4.0] * 12)
    assert [r.remaining_s for r in reports] == pytest.approx([2.0 * (12 - i) for i in range(1, 13)])
    assert [r.step for r in reports if r.validation_nll_nats is not None] == [3, 6, 9, 12]


def test_more_validations_than_steps():
    _, reports = run(toy_model(toy_dataset()), toy_dataset(), config(max_epochs=1, num_validations=50))
    assert [r.validation_nll_nats is not None for r in reports] == [True] * 3


def test_the_time_left_follows_the_speed_since_the_resume(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=Clock(50.0).monotonic))
    run(toy_model(toy_dataset()), toy_dataset(), config(max_epochs=2), state_file=tmp_path / "state")
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=Clock(2.0).monotonic))
    _, reports = run(toy_model(toy_dataset()), toy_dataset(), CONFIG, state_file=tmp_path / "state")
    assert [r.remaining_s for r in reports][-3:] == pytest.approx([4.0, 2.0, 0.0])


def test_the_clock_goes_on_where_a_stopped_run_left_it(monkeypatch, tmp_path):
    """The time limit, and the minutes that are told of a training, are those of all its runs together."""
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=Clock(6.0).monotonic))
    data, state = toy_dataset(), tmp_path / "state"
    settings = config(max_epochs=100, max_minutes=1, save_minutes=0.3)

    def stop(report: StepReport) -> None:
        if report.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(toy_model(data), data, settings, stop, state)
    assert read_state(state)[0].elapsed_s == pytest.approx(24)  # the first that are more than 18
    _, rest = run(toy_model(data), data, settings, state_file=state)
    assert [report.step for report in rest] == list(range(5, 11))  # six seconds each
    assert read_state(state)[0].elapsed_s == pytest.approx(60)


def test_another_process_ends_when_the_first_one_says_and_with_its_weights(monkeypatch):
    """By its own clock it would end at another step, and one of them would wait for the other for ever."""
    sent = iter([30.0, 61.0, -5.0])  # the clock after each of two steps, the best score; then come weights
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, _: tensor.fill_(next(sent, 7.0)))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    model = toy_model(toy_dataset())
    assert fit(model, toy_dataset(), config(max_epochs=100, max_minutes=1)) == -5
    assert all((w == 7).all() for w in weights(model))


def test_num_validation_images():
    data = toy_dataset()
    model = toy_model(data)
    best, reports = run(model, data, config(num_validation_images=2, num_validations=1))
    assert best == pytest.approx(per_image_nll(model, data, "validation")[:2].mean().item(), rel=1e-9)
    on_train = per_image_nll(model, data, "train")[:2].mean().item()
    assert reports[-1].train_subset_nll_nats == pytest.approx(on_train, rel=1e-9)


def test_part_of_an_epoch():
    assert len(run(toy_model(toy_dataset()), toy_dataset(), config(max_epochs=0.6))[1]) == 2
    assert len(run(toy_model(toy_dataset()), toy_dataset(), config(max_epochs=0.001))[1]) == 1


def test_progress_for_a_person():
    report = StepReport(
        step=40, epoch=1.5, train_nll_nats=10.0, learning_rate=0.1, images_per_s=123.4, remaining_s=125.2,
        validation_nll_nats=None,
    )  # fmt: skip
    binary, colour = toy_dataset((1, 2, 2), 2), toy_dataset((3, 2, 2), 4)
    assert format_progress(report, binary) == "step 40, epoch 1.50: train 10.00 nats, 123 images/s, 2:05 left"
    report = dataclasses.replace(report, train_nll_nats=12 * math.log(2), validation_nll_nats=18 * math.log(2))
    assert format_progress(report, colour) == (
        "step 40, epoch 1.50: train 1.0000 bits/dim, validation 1.5000 bits/dim, 123 images/s, 2:05 left"
    )
    report = dataclasses.replace(report, train_nll_nats=2.25, validation_nll_nats=1.5)
    assert format_progress(report, colour, of_labels=True) == (
        "step 40, epoch 1.50: train of labels 2.25 nats, validation of labels 1.50 nats, 123 images/s, 2:05 left"
    )


def test_a_person_is_told_every_few_seconds_and_of_each_validation(monkeypatch):
    clock, told = Clock(0.0), []
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=clock.monotonic))
    on_step = training.tell_progress(told.append, toy_dataset())
    for step in range(1, 9):
        clock.now = 2.0 * step
        validated = 9.0 if step == 5 else None
        on_step(StepReport(step=step, epoch=1, train_nll_nats=9, learning_rate=0.1, images_per_s=1, remaining_s=1,
                           validation_nll_nats=validated))  # fmt: skip
    assert [line.partition(",")[0] for line in told] == [f"step {step}" for step in (1, 4, 5, 8)]


@pytest.mark.parametrize("clip_norm", [0.01, 1e9])
def test_the_gradient_is_clipped(clip_norm):
    data = toy_dataset()
    model = toy_model(data)
    before = copy.deepcopy(model)
    seen, norms = [], []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]) if module.training else None)

    def norm(module) -> float:
        return math.sqrt(sum(p.grad.square().sum().item() for p in module.parameters() if p.grad is not None))

    fit(model, data, config(clip_norm=clip_norm, max_epochs=1), lambda report: norms.append(norm(model)))
    (-log_prob(before, *seen[0]).mean() / 9).backward()  # nats per sub-pixel
    whole = norm(before)
    assert whole > 0.1
    assert norms[0] == pytest.approx(min(whole, clip_norm), rel=1e-4)
    assert max(norms) <= clip_norm * 1.0001


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_a_batch_in_parts_is_the_same_batch(parts):
    data = toy_dataset()
    _, whole = run(toy_model(data), data, config(label_dropout=0.5))
    _, split = run(toy_model(data), data, config(label_dropout=0.5, accumulate=parts))
    for a, b in zip(whole, split, strict=True):
        assert b.train_nll_nats == pytest.approx(a.train_nll_nats, rel=1e-6)


def test_a_run_that_lacked_memory_goes_on_in_parts(tmp_path):
    data, state = toy_dataset(), tmp_path / "state"
    _, whole = run(toy_model(data), data, config(max_epochs=2))
    fit(toy_model(data), data, config(max_epochs=1, decay_fraction=0), state_file=state)
    _, rest = run(toy_model(data), data, config(max_epochs=2, accumulate=4), state_file=state)
    assert rest[0].step == whole[3].step
    assert rest[0].train_nll_nats == pytest.approx(whole[3].train_nll_nats, rel=1e-6)


def test_the_forward_pass_is_given_the_parts():
    data = toy_dataset()
    sizes = [len(levels) for levels, _ in batches_seen(toy_model(data), data, config(accumulate=3))]
    assert sizes == [3, 3, 2] * 12


def test_bfloat16_trains_float32_weights_with_nearly_the_same_loss():
    data = toy_dataset()
    losses = {}
    for precision in ("float32", "bfloat16"):
        model = toy_model(data).float()
        _, reports = run(model, data, config(precision=precision))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        losses[precision] = [report.train_nll_nats for report in reports]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx2": True, "avx512_bf16": False}, "float32"), ({"avx512_bf16": True}, "bfloat16"), (None, "float32")],
)
def test_auto_is_bfloat16_where_the_processor_has_instructions_for_it(tmp_path, monkeypatch, capabilities, precision):
    if capabilities is None:  # an older torch
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    data, losses = toy_dataset(), []
    for name in ("auto", precision):
        _, reports = run(toy_model(data).float(), data, config(precision=name), state_file=tmp_path / name)
        losses.append([report.train_nll_nats for report in reports])
    assert losses[0] == losses[1]
    assert read_state(tmp_path / "auto")[0].phases[0]["precision"] == precision


@pytest.mark.slow
@pytest.mark.timeout(900)  # a C++ compiler at work
def test_compiled_training_follows_the_same_losses(tmp_path, monkeypatch):
    data, compiled = toy_dataset(), []
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or compile_it(function))
    losses = {}
    for setting in (False, True):
        model = toy_model(data).float()
        _, reports = run(model, data, config(compiled=setting), state_file=tmp_path / str(setting))
        losses[setting] = [report.train_nll_nats for report in reports]
        assert len(compiled) == setting
        assert read_state(tmp_path / str(setting))[0].phases[0]["compiled"] is setting
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_without_a_compiler_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(training_config, "CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"^compiled must be false: it takes the C\+\+ compiler no-such-compiler and "):
        fit(toy_model(toy_dataset()), toy_dataset(), config(compiled=True))
    config(compiled=True).check_for("8-bit", False)  # as params.yaml is read, on machines that only serve, too


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_evaluate_is_log_prob(architecture):
    data = toy_dataset()
    model = toy_model(data, architecture).train()
    modes, per_image = set(), {}
    model.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    scores = evaluate(model, data, batch_size=4, per_image=per_image)
    assert modes == {False}
    assert model.training  # as it came
    expected = {}
    for split in ("validation", "test"):
        levels, label = data.images[split].long(), data.labels[split]
        nll = -log_prob(model, levels).detach()
        torch.testing.assert_close(per_image[split], nll)
        expected[f"{split}/nll_nats"] = nll.mean().item()
        spread = ((nll - nll.mean()) ** 2).sum() / (len(nll) - 1)
        expected[f"{split}/nll_nats_stderr"] = (spread / len(nll)).sqrt().item()
        expected[f"{split}/bits_per_dim"] = nll.mean().item() / 9 / math.log(2)
        expected[f"{split}/num_images"] = len(nll)
        expected[f"{split}/nll_nats_given_label"] = -log_prob(model, levels, label).mean().item()
    assert scores == pytest.approx(expected, rel=1e-12)
    assert scores["test/nll_nats"] != pytest.approx(scores["test/nll_nats_given_label"], abs=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_the_label_summed_out_an_image_has_the_mean_probability_of_all_labels(architecture):
    data = toy_dataset()
    model = toy_model(data, architecture)
    levels = data.images["test"].long()
    given = [log_prob(model, levels, torch.full((len(levels),), y)) for y in range(model.config.num_labels)]
    expected = -torch.stack(given).exp().mean(dim=0).log().detach()
    torch.testing.assert_close(per_image_marginal_nll(model, data, "test", batch_size=4), expected.double())
    torch.testing.assert_close(per_image_marginal_nll(model, data, "test", num_images=3), expected[:3].double())


def test_evaluate_some_images_of_one_split():
    data = toy_dataset()
    model = tiny_model("pixelcnn", (1, 3, 3), 3)
    scores = evaluate(model, data, splits=("train",), num_images=5)
    assert set(scores) == {
        "train/nll_nats", "train/nll_nats_stderr", "train/bits_per_dim", "train/num_images"
    }  # fmt: skip
    assert scores["train/num_images"] == 5
    assert scores["train/nll_nats"] == pytest.approx(
        -log_prob(model, data.images["train"][:5].long()).mean().item(), rel=1e-12
    )
    assert evaluate(model, data, ("test",), num_images=1)["test/nll_nats_stderr"] == 0


def test_a_model_of_other_images_is_refused():
    for model, message in (
        (
            tiny_model("pixelcnn", (1, 4, 3), 3),
            "the model is for images (1, 4, 3) of 3 levels, toy has (1, 3, 3) of 3.",
        ),
        (
            tiny_model("pixelcnn", (1, 3, 3), 2),
            "the model is for images (1, 3, 3) of 2 levels, toy has (1, 3, 3) of 3.",
        ),
        (tiny_model("pixelcnn", (1, 3, 3), 3, num_labels=5), "the model has 5 labels, toy has 2."),
        (tiny_model("pixelcnn", (1, 3, 3), 3, num_labels=1), "the model has 1 labels, toy has 2."),
    ):
        with pytest.raises(ValueError, match=exactly(message)):
            fit(model, toy_dataset(), CONFIG)
        with pytest.raises(ValueError, match=exactly(message)):
            evaluate(model, toy_dataset())


def test_a_batch_larger_than_the_split_is_refused():
    data = toy_dataset()
    message = "batch_size must be from 1 (accumulate times processes) to the 24 training images of toy, got 25."
    with pytest.raises(ValueError, match=exactly(message)):
        fit(toy_model(data), data, config(batch_size=25))
    assert len(run(toy_model(data), data, config(batch_size=24))[1]) == 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0."),
        ({"batch_size": 1.5}, "batch_size must be a whole number of at least 1, got 1.5."),
        ({"batch_size": True}, "batch_size must be a whole number of at least 1, got True."),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0."),
        ({"learning_rate": 2}, "learning_rate must be a number from 0 to 1, got 2."),
        ({"learning_rate": math.nan}, "learning_rate must be a number from 0 to 1, got nan."),
        ({"learning_rate": "0.1"}, "learning_rate must be a number from 0 to 1, got '0.1'."),
        ({"max_epochs": 0}, "max_epochs must be above 0, got 0."),
        ({"max_epochs": math.inf}, "max_epochs must be a number from 0 to 1000000000.0, got inf."),
        ({"max_minutes": -1}, "max_minutes must be a number from 0 to 1000000000.0, got -1."),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, got -1."),
        ({"decay_fraction": 1.1}, "decay_fraction must be a number from 0 to 1, got 1.1."),
        ({"ema_decay": -0.1}, "ema_decay must be a number from 0 to 1, got -0.1."),
        ({"clip_norm": 0}, "clip_norm must be above 0, got 0."),
        ({"label_dropout": None}, "label_dropout must be a number from 0 to 1, got None."),
        ({"context_share": 1.5}, "context_share must be a number from 0 to 1, got 1.5."),
        ({"halves_share": 1.5}, "halves_share must be a number from 0 to 1, got 1.5."),
        ({"redrawn_share": -0.5}, "redrawn_share must be a number from 0 to 1, got -0.5."),
        ({"joint_share": 1.5}, "joint_share must be a number from 0 to 1, got 1.5."),
        ({"context_network_share": 1.5}, "context_network_share must be a number from 0 to 1, got 1.5."),
        ({"optimizer": "sgd"}, "optimizer must be one of adam, muon, got 'sgd'."),
        ({"horizontal_flips": 1}, "horizontal_flips must be true or false, got 1."),
        ({"compiled": 1}, "compiled must be true or false, got 1."),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16, auto, got 'float16'."),
        ({"accumulate": 0}, "accumulate must be a whole number of at least 1, got 0."),
        ({"accumulate": 9}, "accumulate must be at most batch_size (8), got 9."),
        ({"num_validations": 0}, "num_validations must be a whole number of at least 1, got 0."),
        ({"num_validation_images": -1}, "num_validation_images must be a whole number of at least 0, got -1."),
        ({"save_minutes": -2}, "save_minutes must be a number from 0 to 1000000000.0, got -2."),
        ({"batch_size": 10**6 + 1}, "batch_size must be at most 1000000, got 1000001."),
        ({"seed": 2**63}, "seed must be at most 9223372036854775807, got 9223372036854775808."),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1."),
    ],
)
def test_impossible_settings_are_named(bad, message):
    with pytest.raises(ValueError, match=beginning(message)):
        config(**bad)


def test_a_resume_is_logged(tmp_path, caplog):
    data, state = toy_dataset(), tmp_path / "state"
    fit(toy_model(data), data, CONFIG, state_file=state)
    with caplog.at_level(logging.INFO, logger="pixelcnn"):
        fit(toy_model(data), data, CONFIG, state_file=state)
    assert f"resumed from {state} at step 12" in caplog.text
