"""Training to complete: masks by seed and step, a better completion than raster clamping, the joint model kept."""

import copy
import dataclasses
import json
import math

import pytest
import torch

from pixelcnn import (
    build_model,
    completion_log_prob,
    evaluate,
    fit,
    load_checkpoint,
    log_prob,
    save_checkpoint,
    save_dataset,
    training,
)
from pixelcnn.__main__ import main
from pixelcnn.data import Dataset
from pixelcnn.evaluation import evaluate_completion, per_image_completion_nll, per_image_nll
from pixelcnn.observed import SCORED
from pixelcnn.training import ContextPredictor
from pixelcnn.training.optimizers import OPTIMIZERS
from tests.core.test_training import batches_seen, config, run, same, weights
from tests.core.tiny import ARCHITECTURES, tiny_config, tiny_model, toy_dataset


def mirrored_dataset() -> Dataset:
    """Return binary 4x4 images whose lower half repeats the upper one: the lower half gives the upper away."""
    generator = torch.Generator().manual_seed(0)
    images = {}
    for split, num in (("train", 512), ("validation", 64), ("test", 64)):
        half = torch.randint(2, (num, 1, 2, 4), generator=generator)
        images[split] = torch.cat([half, half], dim=2).to(torch.uint8)
    return Dataset(
        name="mirrored",
        num_levels=2,
        protocol="8-bit",
        label_names=["all"],
        images=images,
        labels={split: torch.zeros(len(x), dtype=torch.int64) for split, x in images.items()},
    )


def context_model(data: Dataset, architecture: str = "pixelcnn", num_labels: int = 0, **changes: bool):
    torch.manual_seed(0)
    sizes = {"num_features": 8, "context_features": 8, "context_width": 16, **changes}
    return build_model(tiny_config(architecture, data.image_shape, data.num_levels, num_labels, **sizes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fit_learns_to_use_what_is_known_further_down(architecture):
    data = mirrored_dataset()
    model = context_model(data, architecture)
    best, reports = run(
        model, data, config(batch_size=64, max_epochs=24, learning_rate=0.02, num_validations=2, ema_decay=0.95)
    )
    scores = evaluate_completion(model, data)
    # The joint model cannot know: eight fair coins. The drawing says it all.
    assert scores["test/completion_top_raster_nats"] > 7 * math.log(2)
    assert scores["test/completion_top_nats"] < 0.5 * scores["test/completion_top_raster_nats"]
    assert scores["test/completion_pixels50_nats"] < scores["test/completion_pixels50_raster_nats"] - 0.5
    # And the same weights are the joint model.
    joint = evaluate(model, data)
    assert joint["test/nll_nats"] < 8 * math.log(2) + 1
    last = reports[-1]
    assert last.validation_nll_nats == pytest.approx(joint["validation/nll_nats"], abs=1.0)
    assert last.validation_completion_nats < last.validation_nll_nats
    assert best <= last.validation_nll_nats + 0.75 * (last.validation_completion_nats - last.validation_nll_nats) + 1e-6


def test_masks_depend_on_seed_and_step_alone_and_a_resumed_run_is_the_same_run(tmp_path):
    data, state = toy_dataset(shape=(1, 4, 4), num_levels=2), tmp_path / "state"
    model = context_model(data, num_labels=2)
    whole = copy.deepcopy(model)
    batches = batches_seen(whole, data, config(max_epochs=4))
    assert all(len(inputs) == 4 for inputs in batches)
    masks = [observed for _, _, _, observed in batches]
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:])
    torch.manual_seed(9)
    again = batches_seen(copy.deepcopy(model), data, config(max_epochs=4))
    assert same(masks, [observed for _, _, _, observed in again])
    blank = dataclasses.replace(data, images={split: x * 0 for split, x in data.images.items()})
    of_seeds = [batches_seen(copy.deepcopy(model), blank, config(max_epochs=4, seed=seed)) for seed in (0, 1)]
    distinct = {observed.numpy().tobytes() for seen in of_seeds for _, _, _, observed in seen}
    assert len(distinct) == 2 * 12, "without ink to follow, a step of a seed has masks of its own"
    # Levels and labels are those of a model without a context network.
    joint = tiny_model("pixelcnn", (1, 4, 4), 2, 2)
    plain = batches_seen(joint, data, config(max_epochs=4))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(batches, plain, strict=True))

    class Interrupted(Exception):
        pass

    def stop(report):
        if report.step == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(copy.deepcopy(model), data, config(max_epochs=4), stop, state)
    resumed = copy.deepcopy(model)
    _, reports = run(resumed, data, config(max_epochs=4), state_file=state)
    assert reports[0].step == 6, "it went on, not started afresh"
    assert same(weights(resumed), weights(whole))


def test_the_loss_is_that_of_the_missing_part():
    data = toy_dataset(shape=(1, 4, 4), num_levels=2)
    model = tiny_model("pixelcnn", (1, 4, 4), 2, 2, context_features=3)
    before = copy.deepcopy(model)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs) if module.training else None)
    _, reports = run(model, data, config(context_share=1.0, accumulate=3))
    levels, label, drawing, observed = (torch.cat([part[i] for part in seen[:3]]) for i in range(4))
    assert observed.any()
    assert torch.equal(drawing, levels)
    expected = -completion_log_prob(before, levels, observed, label).mean().item()
    assert reports[0].train_nll_nats == pytest.approx(expected, rel=1e-6)


def test_without_a_share_it_trains_the_joint_model():
    data = toy_dataset(shape=(1, 4, 4), num_levels=2)
    model = tiny_model("pixelcnn", (1, 4, 4), 2, 2, context_features=3)
    before = copy.deepcopy(model)
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs) if module.training else None)
    _, reports = run(model, data, config(context_share=0.0))
    levels, label, _, observed = seen[0]
    assert not observed.any()
    assert reports[0].train_nll_nats == pytest.approx(-log_prob(before, levels, label).mean().item(), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_best_is_dropped_where_the_run_that_goes_on_measures_something_else(tmp_path, share):
    """Another context_share is another loss: one that was lower kept every later weight from being the best."""
    data, state = mirrored_dataset(), tmp_path / "state"
    settings = config(batch_size=64, max_epochs=4, learning_rate=0.02, context_share=1 - share)
    fit(context_model(data), data, settings, state_file=state)
    model = context_model(data)
    # Nothing is left to be trained: what was kept is scored anew.
    score = fit(model, data, dataclasses.replace(settings, context_share=share), state_file=state)
    joint = evaluate(model, data)["validation/nll_nats"]
    assert (score == pytest.approx(joint)) == (share == 0)
    later = dataclasses.replace(settings, max_epochs=8, context_share=share)
    best, reports = run(model, data, later, state_file=state)
    validated = [(r.validation_nll_nats, r.validation_completion_nats) for r in reports if r.validation_nll_nats]
    assert best == pytest.approx(min((1 - share) * nll + share * completion for nll, completion in validated))
    assert evaluate(model, data)["validation/nll_nats"] in [pytest.approx(nll) for nll, _ in validated]


@pytest.mark.parametrize("protocol", ["dynamic", "8-bit"])
def test_scores_do_not_depend_on_the_batch_size(protocol):
    """Random masks followed it: an image's mask is its own now, and so is its Bernoulli sample."""
    data = toy_dataset(shape=(1, 5, 4), num_levels=2, protocol=protocol)
    model = tiny_model("pixelcnn", (1, 5, 4), 2, 2, context_features=3)
    for score in (per_image_completion_nll, lambda *args, **kwargs: {"nll": per_image_nll(*args, **kwargs)}):
        expected = score(model, data, "train", batch_size=24)
        for batch_size in (1, 7, 50):
            found = score(model, data, "train", batch_size=batch_size)
            assert found.keys() == expected.keys()
            for key, nats in found.items():
                torch.testing.assert_close(nats, expected[key], rtol=1e-9, atol=1e-9, msg=key)
        some = score(model, data, "train", num_images=5, batch_size=3)
        assert all(torch.allclose(nats, expected[key][:5]) for key, nats in some.items())


def test_a_completer_is_trained_by_itself():
    data = toy_dataset(shape=(1, 4, 4), num_levels=2)
    model = context_model(data, "pixelcnn", completer_features=8)
    with pytest.raises(ValueError, match="is trained in parts: call fit on a model of"):
        fit(model, data, config(max_epochs=1))
    model.begin_completer()
    joint = copy.deepcopy({n: w for n, w in model.state_dict().items() if not n.startswith("completer.")})
    levels, observed = data.levels("validation", slice(0, 6)), torch.zeros(6, 1, 4, 4, dtype=torch.bool)
    observed[:, :, :2] = True
    assert torch.equal(model(levels, None, levels, observed), model(levels)), "it begins as the joint model"
    fit(model.completer, data, config(max_epochs=5, context_share=1.0, learning_rate=0.03))
    assert not torch.equal(model(levels, None, levels, observed), model(levels))
    assert all(torch.equal(w, joint[name]) for name, w in model.state_dict().items() if name in joint)
    narrow = context_model(data, "pixelcnn", completer_features=2)
    before = copy.deepcopy(narrow.completer.state_dict())
    narrow.begin_completer()
    assert all(torch.equal(w, before[name]) for name, w in narrow.completer.state_dict().items())


def test_a_context_network_learns_by_itself_to_tell_what_is_missing():
    data = mirrored_dataset()
    model = context_model(data)
    before = copy.deepcopy(model.state_dict())
    predictor = ContextPredictor(model)
    levels, observed = data.levels("validation", slice(None)), torch.zeros(64, 1, 4, 4, dtype=torch.bool)
    observed[:, :, 2:] = True
    settings = config(batch_size=64, max_epochs=25, learning_rate=0.01)
    best = fit(predictor, data, settings)
    assert best == pytest.approx(
        training.trainer.ContextTrainer(predictor, data, settings).mean_nll("validation", None)
    )
    logits = predictor(levels, observed)
    assert logits.shape == (64, 2, 1, 4, 4)
    assert (logits.argmax(1) == levels)[:, :, :2].double().mean() > 0.99, "the lower half gives the upper one away"
    assert torch.equal(predictor(torch.where(observed, levels, 1 - levels), observed), logits), "it sees what is known"
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if name.startswith("context_network.")}
    with pytest.raises(ValueError, match="a context network is needed: set context_features"):
        ContextPredictor(context_model(data, context_features=0, context_width=0))


def test_a_prediction_has_a_place_for_each_sub_pixel():
    model = tiny_model("gated_pixelcnn", (3, 4, 5), 6, context_features=4)
    levels, observed = torch.zeros(2, 3, 4, 5, dtype=torch.int64), torch.ones(2, 1, 4, 5, dtype=torch.bool)
    assert ContextPredictor(model).double()(levels, observed).shape == (2, 6, 3, 4, 5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completion_is_scored_on_fixed_masks(architecture):
    data = toy_dataset(shape=(1, 4, 4), num_levels=2)
    model = tiny_model(architecture, (1, 4, 4), 2, context_features=3)
    scores = evaluate_completion(model, data, num_images=5)
    assert set(scores) == {
        f"test/completion_{name}_{kind}" for name in SCORED
        for kind in ("nats", "nats_stderr", "raster_nats", "raster_nats_stderr")
    } | {"test/completion_num_images"}  # fmt: skip
    levels = data.images["test"][:5].long()
    observed = torch.ones(5, 1, 4, 4, dtype=torch.bool)
    observed[:, :, :2] = False
    nats = -completion_log_prob(model, levels, observed)
    assert scores["test/completion_top_nats"] == pytest.approx(nats.mean().item(), rel=1e-9)
    assert scores["test/completion_top_nats_stderr"] == pytest.approx((nats.std() / 5**0.5).item(), rel=1e-9)
    assert evaluate_completion(model, data, num_images=5) == scores
    # Without its context network the same model clamps in raster order.
    plain = tiny_model(architecture, (1, 4, 4), 2)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "context" not in k})
    clamped = evaluate_completion(plain, data, num_images=5)
    for name in SCORED:
        assert clamped[f"test/completion_{name}_nats"] == scores[f"test/completion_{name}_raster_nats"]
        assert clamped[f"test/completion_{name}_raster_nats"] == scores[f"test/completion_{name}_raster_nats"]
        assert scores[f"test/completion_{name}_nats"] != scores[f"test/completion_{name}_raster_nats"]


def test_the_command_line_trains_on_from_joint_weights_and_scores_completion(tmp_path, capsys):
    data = dataclasses.replace(toy_dataset(shape=(1, 4, 4), num_levels=2), data_hash="")
    save_dataset(tmp_path / "toy.safetensors", data)
    joint = tiny_model("pixelcnn", (1, 4, 4), 2, 2).float()
    save_checkpoint(tmp_path / "joint", joint, {})
    arguments = [
        "train", "pixelcnn", "--data", f"{tmp_path}/toy.safetensors", "--out", f"{tmp_path}/model",
        "--num-features", "4", "--num-blocks", "2", "--first-kernel-size", "3", "--context-features", "3",
        "--batch-size", "8", "--learning-rate", "1e-9", "--max-epochs", "1", "--context-share", "1",
        "--init-from", f"{tmp_path}/joint",
    ]  # fmt: skip
    assert main(arguments) == 0
    model, scores = load_checkpoint(tmp_path / "model")
    assert (model.config.context_features, model.config.context_width) == (3, 3)
    assert scores["test/completion_top_nats"] > 0
    assert scores["test/nll_nats"] == pytest.approx(evaluate(joint, data)["test/nll_nats"], rel=1e-4)
    assert "goes on from" not in capsys.readouterr().out
    assert main(arguments) == 0
    message = (
        f"goes on from {tmp_path}/model.state: --init-from counts only at a start. Delete that file to start afresh.\n"
    )
    assert message in capsys.readouterr().out
    command = ["evaluate", "--checkpoint", f"{tmp_path}/model", "--data", f"{tmp_path}/toy.safetensors"]
    assert main(command) == 0
    assert "completion" not in capsys.readouterr().out
    assert main([*command, "--completion"]) == 0
    printed = json.loads(capsys.readouterr().out)
    for key, value in evaluate_completion(model, data).items():
        assert printed[key] == pytest.approx(value, rel=1e-6)
    assert main([*arguments[:-1], f"{tmp_path}/nowhere"]) == 1
    assert "nowhere is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("setting", ["joint_share", "context_network_share"])
def test_a_completer_learns_what_it_begins_with_at_a_share_of_the_rate(setting, optimizer, share):
    data = mirrored_dataset()
    begins_with = {
        "joint_share": {n for n, _ in build_model(context_model(data).config.without_context()).named_parameters()},
        "context_network_share": {n for n, _ in context_model(data).named_parameters() if "context_network." in n},
    }[setting]

    def moved(share):
        model = context_model(data)
        for weight in model.parameters():  # what enters the layers begins at zero: no gradient would come further
            torch.nn.init.normal_(weight, std=0.1)
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        settings = config(batch_size=64, optimizer=optimizer, ema_decay=0, clip_norm=1e9, **{setting: share})
        training.Trainer(model, data, settings).train_step()
        if share == 0:
            assert begins_with <= {name for name, w in model.named_parameters() if w.grad is None}
        return {name: w.detach() - before[name] for name, w in model.named_parameters()}

    whole, slowed = moved(1.0), moved(share)
    assert any(whole[name].any() for name in begins_with)
    assert any(whole[name].any() for name in whole.keys() - begins_with)
    for name in whole:
        assert torch.allclose(slowed[name], whole[name] * (share if name in begins_with else 1.0), atol=1e-6), name


@pytest.mark.parametrize("setting", ["joint_share", "context_network_share"])
def test_a_network_that_sees_no_drawings_has_no_part_that_learns_slowly(setting):
    data = mirrored_dataset()
    with pytest.raises(ValueError, match=rf"^{setting} must be 1: the network sees no drawings, so all of it is the j"):
        fit(context_model(data, context_features=0, context_width=0), data, config(**{setting: 0.5}))


def batch_of_a_step(trainer):
    """Let a trainer take a step; return what it lowered the loss of: levels, labels, masks, probabilities."""
    seen = []

    def nlls(*of_batch):
        seen.append(of_batch)
        return training.Trainer.nlls(trainer, *of_batch)

    trainer.nlls_to_lower = nlls
    trainer.train_step()
    (of_batch,) = seen
    return of_batch


def test_where_a_mask_follows_the_ink_the_loss_is_that_of_the_levels_drawn():
    data = toy_dataset((1, 4, 4), 2, protocol="dynamic", num_train=24)
    trainer = training.Trainer(context_model(data), data, config(batch_size=24, context_share=1.0))
    _, _, probabilities, _ = trainer.batch()
    levels, _, _, used = batch_of_a_step(trainer)
    _, follows_ink = trainer.masks(levels, 2, 0, share=1.0)
    assert 0 < follows_ink.sum() < 24
    assert torch.equal(used[~follows_ink], probabilities[~follows_ink])
    assert torch.equal(used[follows_ink], torch.stack([1 - levels, levels], dim=1)[follows_ink].float())


def test_halves_are_those_of_images_that_are_not_drawn_anew():
    data = toy_dataset((1, 4, 4), 2, protocol="dynamic", num_train=64)
    settings = config(batch_size=64, context_share=0.0, halves_share=1.0, redrawn_share=0.5)
    trainer = training.Trainer(context_model(data), data, settings)
    is_redrawn = trainer.batch()[3]
    assert 0 < is_redrawn.sum() < 64
    _, _, observed, _ = batch_of_a_step(trainer)
    num_known = observed.sum(dim=(1, 2, 3))
    assert num_known.tolist() == torch.where(is_redrawn, 0, 8).tolist()


def test_a_context_network_learns_the_mean_over_what_a_pixel_may_be():
    data = toy_dataset((1, 4, 4), 2, protocol="dynamic")
    trainer = training.trainer.ContextTrainer(ContextPredictor(context_model(data)), data, config())
    levels, _, probabilities, _ = trainer.batch()
    observed = torch.zeros(8, 1, 4, 4, dtype=torch.bool)
    observed[:, :, 2:] = True
    expected = -(probabilities * trainer.model(levels, observed).log_softmax(dim=1)).sum(dim=1) * ~observed
    torch.testing.assert_close(trainer.nlls(levels, None, observed, probabilities), expected)


def test_every_batch_of_a_validation_counts_with_masks_of_its_own():
    data = mirrored_dataset()
    trainer = training.Trainer(context_model(data), data, config())
    total = 0.0
    for i, levels in enumerate(data.levels("train", slice(0, 300)).split(250)):
        total += trainer.nlls(levels, None, trainer.masks(levels, 3, i, share=1.0)[0]).sum().item()
    assert trainer.masked_nll("train", 300, with_labels=False) == pytest.approx(total / 300, rel=1e-6)


def test_completions_are_validated_given_the_labels_that_training_gives():
    data = toy_dataset((1, 4, 4), 2, num_labels=3)
    model = context_model(data, num_labels=3)

    def validated(label_dropout):
        trainer = training.Trainer(model, data, config(label_dropout=label_dropout))
        return trainer, trainer.completion_nll(None)

    trainer, given = validated(0.0)
    levels, labels = data.levels("validation", slice(None)), data.labels["validation"]
    nlls = trainer.nlls(levels, labels, trainer.masks(levels, 3, 0, share=1.0)[0])
    assert given == pytest.approx(nlls.sum().item() / len(levels), rel=1e-5)
    unlabelled, without = validated(0.8)
    assert without != given
    assert validated(0.5)[1] == without
    assert unlabelled.objective() != trainer.objective(), "the two scores do not compare"
    assert math.isfinite(training.Trainer(context_model(data), data, config(label_dropout=0.0)).completion_nll(None))
