import itertools
import json
import os
import pickle
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixelcnn import checkpoint, load_checkpoint, save_checkpoint
from pixelcnn.config import ModelConfig
from pixelcnn.models import registry
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.models.layers import MaskedConv2d, masked_1x1
from pixelcnn.models.masks import colour_groups, raster_mask
from pixelcnn.models.registry import count_weights
from tests.core.tiny import ARCHITECTURES, beginning, exactly, random_levels, tiny_model

SHAPE = (1, 3, 3)
SCORES = {"test/nll_nats": 5.25, "dataset": "toy", "label_names": ["a", "b"]}


def saved(folder: Path, architecture: str = "pixelcnn", seed: int = 0) -> Path:
    """Write a checkpoint of a small float32 network."""
    save_checkpoint(folder, tiny_model(architecture, SHAPE, 2, num_labels=2, seed=seed).float(), SCORES)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refresh_sha256(folder: Path) -> None:
    """Make config.json agree with whatever weights file lies there."""
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = checkpoint.sha256_of(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(architecture, tmp_path):
    model = tiny_model(architecture, SHAPE, 2, num_labels=2).float()
    folder = tmp_path / "deep" / "down"
    save_checkpoint(folder, model, SCORES)
    loaded, scores = load_checkpoint(folder)
    assert scores == SCORES
    assert loaded.config == model.config
    assert not loaded.training
    levels, label = random_levels(SHAPE, 2, num=4), torch.tensor([0, 1, -1, 0])
    assert torch.equal(loaded(levels, label), model(levels, label))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "scores.json"}
    assert [path.name for path in folder.parent.iterdir()] == ["down"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == architecture
    assert config["weights_sha256"] == checkpoint.sha256_of(folder / "model.safetensors")


def test_a_mixture_of_more_levels_than_it_has_weights(tmp_path):
    model = tiny_model("pixelcnn", SHAPE, 65_536, output="logistic_mixture", num_mixtures=1).float()
    assert sum(weight.numel() for weight in model.parameters()) < 65_536
    save_checkpoint(tmp_path / "model", model, SCORES)
    assert load_checkpoint(tmp_path / "model")[0].config == model.config


def test_saving_again_replaces_the_whole_folder(tmp_path):
    folder = saved(tmp_path / "model")
    save_checkpoint(folder, tiny_model("gated_pixelcnn", SHAPE, 2).float(), {})
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "scores.json"}
    assert type(load_checkpoint(folder)[0]).__name__ == "GatedPixelCNN"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_that_was_cut_off_leaves_no_released_weights(tmp_path, monkeypatch):
    for name in ("tiny-digits", ".tiny-digits.new"):  # the latter without scores, which the service reads first
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    monkeypatch.setattr(checkpoint, "_RELEASED", (tmp_path,))
    assert checkpoint.released() == {"tiny-digits": tmp_path / "tiny-digits"}


def test_a_folder_that_is_there_comes_before_released_weights_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = next(iter(checkpoint.released()))
    saved(Path(name))
    assert load_checkpoint(name)[1] == SCORES


def test_a_checkpoint_is_loaded_from_within_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(saved(tmp_path / "model"))
    assert load_checkpoint(".")[1] == SCORES


def test_a_compiled_model_is_saved_as_the_one_that_it_wraps(tmp_path):
    model = tiny_model("pixelcnn", SHAPE, 2, num_labels=2).float()
    save_checkpoint(tmp_path / "compiled", torch.compile(model), SCORES)
    assert content(tmp_path / "compiled") == content(saved(tmp_path / "plain"))
    load_checkpoint(tmp_path / "compiled")


def test_a_link_to_a_folder_stays_one(tmp_path):
    link, target = tmp_path / "model", tmp_path / "elsewhere" / "real"
    saved(target)
    link.symlink_to(target)
    for seed in (1, 2):
        saved(link, seed=seed)
        assert link.readlink() == target
        assert content(target) == content(saved(tmp_path / "expected", seed=seed))
    target.rename(target.with_name(".real.old"))  # as a killed save leaves it
    load_checkpoint(link)
    saved(link)
    assert [path.name for path in target.parent.iterdir()] == ["real"]


def test_equal_weights_give_equal_bytes(tmp_path):
    assert content(saved(tmp_path / "a")) == content(saved(tmp_path / "b"))


def fail(*_args, **_kwargs):
    raise OSError("No space left on device")


@pytest.mark.parametrize("before_it", [True, False], ids=["over an old one", "into nothing"])
@pytest.mark.parametrize("failure", ["weights", "scores", "rename"])
def test_a_failure_while_saving_leaves_what_was_there(tmp_path, monkeypatch, failure, before_it):
    folder = tmp_path / "model"
    if before_it:
        saved(folder)
    old = content(tmp_path)
    model = tiny_model("pixelcnn", SHAPE, 2, num_labels=2, seed=1).float()
    rename = Path.rename
    with monkeypatch.context() as patch:
        if failure == "weights":
            patch.setattr(Path, "write_bytes", fail)
        if failure == "rename":  # of the new folder; others go through
            patch.setattr(Path, "rename", lambda self, to: fail() if ".new" in self.name else rename(self, to))
        scores = {"test/nll_nats": float("nan")} if failure == "scores" else SCORES
        expected = (
            (ValueError, "values that JSON has") if failure == "scores" else (OSError, "/model could not be saved")
        )
        with pytest.raises(expected[0], match=expected[1]):
            save_checkpoint(folder, model, scores)
    assert content(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if before_it else [])
    save_checkpoint(folder, model, SCORES)
    assert load_checkpoint(folder)[1] == SCORES


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")


def in_child(work, killed_before: int | None = None) -> int:
    """Do some work in a process of its own, killed before its n-th step on the file system; return its exit code."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def kill(event: str, _args: object) -> None:
            nonlocal count
            if event in FILE_EVENTS:
                if count == killed_before:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        try:
            if killed_before is not None:
                sys.addaudithook(kill)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("folder_before", ["whole", "set aside"])
def test_killed_at_any_step_a_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path, folder_before):
    """There was a moment without any folder, and `load_checkpoint` did not know of it."""
    models = [tiny_model("pixelcnn", SHAPE, 2, num_labels=2, seed=seed).float() for seed in (0, 1)]
    seen = []
    for step in itertools.count():
        folder = tmp_path / str(step) / "model"
        save_checkpoint(folder, models[0], {"seed": 0})
        if folder_before == "set aside":  # as another killed save leaves it
            folder.rename(folder.with_name(".model.old"))
        code = in_child(lambda folder=folder: save_checkpoint(folder, models[1], {"seed": 1}), killed_before=step)
        model, scores = load_checkpoint(folder)
        seen.append(scores["seed"])
        expected = models[scores["seed"]].state_dict()
        assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
        save_checkpoint(folder, models[1], {"seed": 2})
        assert load_checkpoint(folder)[1] == {"seed": 2}
        assert [path.name for path in folder.parent.iterdir()] == ["model"], "nothing is left behind"
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert len(seen) > 10
    assert seen == sorted(seen), "old before some step, new after it"
    assert set(seen) == {0, 1}


def test_a_checkpoint_can_be_read_while_it_is_replaced(tmp_path):
    models = [tiny_model("pixelcnn", SHAPE, 2, num_labels=2, seed=seed).float() for seed in (0, 1)]
    folder = tmp_path / "model"
    save_checkpoint(folder, models[0], {"seed": 0})

    def replace_often() -> None:
        for i in range(100):
            save_checkpoint(folder, models[i % 2], {"seed": i % 2})

    with ThreadPoolExecutor() as pool:
        saving = pool.submit(in_child, replace_often)
        while not saving.done():
            model, scores = load_checkpoint(folder)
            expected = models[scores["seed"]].state_dict()
            assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
        assert saving.result() == 0


def test_a_checkpoint_that_changes_at_each_look_is_given_up(tmp_path, monkeypatch):
    folder, changes = saved(tmp_path / "model"), itertools.count()
    monkeypatch.setattr(checkpoint, "_current", lambda folder: (folder, next(changes), 0))
    with pytest.raises(ValueError, match=exactly(f"{folder} is replaced faster than it can be read. Try again.")):
        load_checkpoint(folder)


def test_an_altered_byte_is_named(tmp_path):
    folder = saved(tmp_path / "model")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    message = f"{folder / 'model.safetensors'} is not the file that was saved: its SHA-256 is "
    with pytest.raises(ValueError, match=beginning(message) + r".*\. Fetch the checkpoint again\.$"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_named(tmp_path, keep):
    folder = saved(tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is not the file that was saved"):
        load_checkpoint(folder)
    refresh_sha256(folder)  # even where the digest agrees
    with pytest.raises(ValueError, match=r"model.safetensors does not fit config.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "scores.json"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = saved(tmp_path / "model")
    (folder / name).unlink()
    text = f"{folder} is no checkpoint: {name} is missing. Name a folder that holds one, or released weights: "
    with pytest.raises(ValueError, match=re.escape(text)):
        load_checkpoint(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no checkpoint: config.json is missing."):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", "[" * 200_000, '{"model": "pixelcnn"}', "\udcff"])
def test_a_damaged_config_is_named(tmp_path, text):
    folder = saved(tmp_path / "model")
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"model is no checkpoint: config.json or scores.json is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["3", "null", "[1, 2]", '"text"'])
def test_damaged_scores_are_named(tmp_path, text):
    folder = saved(tmp_path / "model")
    (folder / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=r"model is no checkpoint: config.json or scores.json is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "change",
    [
        *({"num_features": 8}, {"num_blocks": 3}, {"num_blocks": 1}, {"num_levels": 3}),
        *({"num_features": 10**7}, {"num_levels": 10**12}, {"kernel_size": 10**9 + 1}),
    ],
)
def test_a_config_of_another_size_is_refused(tmp_path, change):
    folder = saved(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model.safetensors does not fit config.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("change", [{"num_features": 300}, {"context_features": 4, "context_scales": 9}])
def test_a_network_of_more_weights_than_its_file_takes_no_memory(tmp_path, monkeypatch, change):
    folder = saved(tmp_path / "model", "gated_pixelcnn")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    built: list = []
    monkeypatch.setattr("pixelcnn.checkpoint.build_model", built.append)
    with pytest.raises(ValueError, match=r"a network of these sizes has more than its [\d,]+ weights"):
        load_checkpoint(folder)
    assert built == []


@pytest.mark.parametrize(("architecture", "depth"), [("gated_pixelcnn", "num_layers"), ("pixelcnn", "num_blocks")])
def test_a_network_of_more_layers_than_its_file_has_tensors_is_not_even_counted(
    tmp_path, monkeypatch, architecture, depth
):
    """Of so many weights in one tensor, each claimed layer took 20 kB: a file of 1 MB more than the memory."""
    folder = saved(tmp_path / "model", architecture)
    config = json.loads((folder / "config.json").read_text()) | {depth: 999}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"all": torch.zeros(1000)}, folder / "model.safetensors")
    refresh_sha256(folder)
    monkeypatch.delattr("pixelcnn.checkpoint.count_weights")
    with pytest.raises(ValueError, match=r"a network of these sizes has more than its 1,000 weights in 1 tensors"):
        load_checkpoint(folder)


def test_layers_that_share_their_weights_are_loaded(tmp_path, monkeypatch):
    """An architecture may use one block for all of its layers, which then has fewer tensors than layers."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))

    @dataclass(frozen=True, kw_only=True)
    class SharingConfig(ModelConfig):
        num_layers: int

    @registry.register("sharing", SharingConfig)
    class Sharing(AutoregressiveModel):
        def __init__(self, config):
            super().__init__(config, in_maps=4)
            self.first = MaskedConv2d(raster_mask("A", 3, torch.arange(1), colour_groups(4, 1)), right=1)
            self.block = masked_1x1("B", colour_groups(4, 1), colour_groups(4, 1))

        def features(self, x, label, context):
            x = self.first(x)
            for _ in range(self.config.num_layers):
                x = x + self.block(torch.relu(x))
            return x

    config = SharingConfig(image_shape=SHAPE, num_levels=2, num_features=4, num_layers=30)
    model = registry.build_model(config).eval()
    save_checkpoint(tmp_path / "model", model, SCORES)
    levels = random_levels(SHAPE, 2, num=4)
    assert torch.equal(load_checkpoint(tmp_path / "model")[0](levels), model(levels))


def test_a_constructor_that_looks_at_numbers_is_counted_by_none(monkeypatch):
    config = tiny_model("pixelcnn", (1, 3, 3), 2).config
    assert count_weights(config) > 0
    init = torch.nn.Module.__init__

    def looking(self):
        init(self)
        torch.ones(1).item()

    monkeypatch.setattr(torch.nn.Module, "__init__", looking)
    assert count_weights(config) == 0


def test_numbers_of_an_unknown_kind_are_refused(tmp_path):
    folder = saved(tmp_path / "model")
    header = b'{"head.bias":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refresh_sha256(folder)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit config.json"):
        load_checkpoint(folder)


def test_weights_of_the_other_architecture_are_refused(tmp_path):
    folder, other = saved(tmp_path / "model"), saved(tmp_path / "other", "gated_pixelcnn")
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(ValueError, match="is not the file that was saved"):
        load_checkpoint(folder)
    refresh_sha256(folder)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit config.json"):
        load_checkpoint(folder)


def test_an_unknown_architecture_is_refused(tmp_path):
    folder = saved(tmp_path / "model")
    for name in ("pixelcnn++", [], 3, None):
        config = json.loads((folder / "config.json").read_text()) | {"model": name}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=exactly(f"unknown model {name!r}. Known: ")[:-1]):
            load_checkpoint(folder)


def test_layers_may_share_their_weights(tmp_path):
    model = tiny_model("pixelcnn", (1, 3, 3), 2)
    model.blocks[1] = model.blocks[0]
    save_checkpoint(tmp_path / "model", model, {})
    again, levels = load_checkpoint(tmp_path / "model")[0].double(), random_levels((1, 3, 3), 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(again(levels), model(levels))


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_a_pickle_is_never_loaded(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")

    def refuse(*_args, **_kwargs):
        raise AssertionError("a checkpoint was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    refresh_sha256(folder)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit config.json"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["weight", "\x1b[2J", "x" * 10_000])
def test_weights_of_other_names_are_refused(tmp_path, name):
    """In one line of text, whatever a stranger has named them: a terminal takes some characters for commands."""
    folder = saved(tmp_path / "model")
    save_file({name: torch.zeros(1000), **load_file(folder / "model.safetensors")}, folder / "model.safetensors")
    refresh_sha256(folder)
    with pytest.raises(ValueError, match=r"model.safetensors does not fit config.json: .*Unexpected key") as error:
        load_checkpoint(folder)
    text = str(error.value).removeprefix(str(folder))
    assert text.isprintable()
    assert len(text) < 1100
    config = json.loads((folder / "config.json").read_text()) | {"weights_sha256": "\x1b[2J"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json says \\x1b\[2J\.\.\.\. Fetch the checkpoint again"):
        load_checkpoint(folder)


def test_a_plain_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("not a folder")
    with pytest.raises(ValueError, match=exactly(f"{path} is no checkpoint that can be read: Not a directory.")):
        load_checkpoint(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_on_disk_is_float32_once_loaded(architecture, tmp_path):
    model = tiny_model(architecture, SHAPE, 2, num_labels=2).float()
    save_checkpoint(tmp_path / "half", model, SCORES, torch.float16, card="# A model\n")
    save_checkpoint(tmp_path / "whole", model, SCORES)
    loaded, _ = load_checkpoint(tmp_path / "half")
    for found, weight in zip(loaded.parameters(), model.parameters(), strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, weight.half().float())
    stored = {tensor.dtype for tensor in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert stored == {torch.float16}
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["weights_sha256"] == checkpoint.sha256_of(tmp_path / "half" / "model.safetensors")
    assert (tmp_path / "half" / "README.md").read_text() == "# A model\n"
    assert not (tmp_path / "whole" / "README.md").exists()


def test_weights_that_half_precision_cannot_hold_are_refused(tmp_path):
    model = tiny_model("pixelcnn", SHAPE, 2).float()
    next(model.parameters()).data.fill_(1e6)
    with pytest.raises(ValueError, match=exactly("a weight is too large for torch.float16. Store the model as it is.")):
        save_checkpoint(tmp_path / "model", model, SCORES, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_whoever_reads_the_scores_reads_the_weights(tmp_path):
    save_checkpoint(tmp_path / "model", tiny_model("pixelcnn", (1, 3, 3), 3), {})
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "model").iterdir()}
    assert modes["model.safetensors"] == modes["scores.json"]


@pytest.mark.parametrize("theirs", ["thesis.txt", "config.json", "photo.png"])
@pytest.mark.parametrize("text", ['{"models": [{"weights_sha256": "of another program"}]}', "3"])
def test_a_folder_of_something_else_is_not_replaced(tmp_path, theirs, text):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / theirs).write_text(text)
    with pytest.raises(ValueError, match=rf"{folder} is no checkpoint that may be replaced: it holds {theirs}, which "):
        saved(folder)
    assert content(tmp_path) == {f"folder/{theirs}": text.encode()}
    (folder / theirs).unlink()
    saved(folder)
    saved(folder, seed=1)
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"it holds notes\.txt, which would be lost"):
        saved(folder)


def test_what_are_no_scores_does_not_take_the_place_of_a_checkpoint(tmp_path):
    folder = saved(tmp_path / "model")
    old, (model, _) = content(folder), load_checkpoint(folder)
    for scores in (None, [0.5], {"test/nll_nats": torch.tensor(0.5)}):
        with pytest.raises(ValueError, match="scores must be values that JSON has, by name"):
            save_checkpoint(folder, model, scores)
    assert content(folder) == old


def test_float64_stays(tmp_path):
    model = tiny_model("gated_pixelcnn", SHAPE, 2)
    save_checkpoint(tmp_path / "model", model, {})
    loaded, _ = load_checkpoint(tmp_path / "model")
    levels = torch.zeros(1, *SHAPE, dtype=torch.int64)
    assert torch.equal(loaded(levels), model(levels))
