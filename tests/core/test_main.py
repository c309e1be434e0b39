"""`python -m pixelcnn`: every command does its work on a tiny dataset, and says what is wrong in one sentence."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixelcnn import TrainConfig, level_probs, load_checkpoint, load_dataset, log_prob, save_dataset
from pixelcnn.__main__ import main
from pixelcnn.data import Dataset
from pixelcnn.images import to_png
from pixelcnn.models import registry
from pixelcnn.models.pixelcnn import PixelCNN, PixelCNNConfig
from pixelcnn.models.registry import architectures, build_model
from tests.local import run

NETWORK = ["--num-features", "4", "--num-blocks", "1"]
SCHEDULE = ["--batch-size", "8", "--learning-rate", "0.01", "--max-epochs", "1", "--warmup-steps", "0"]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "toy.safetensors"
    generator = torch.Generator().manual_seed(0)
    images = {split: torch.randint(4, (16, 1, 6, 5), generator=generator).byte() for split in ("train", "test")}
    images["validation"] = images["test"].clone()
    labels = {split: torch.arange(16) % 2 for split in images}
    dataset = Dataset(
        name="toy", num_levels=4, protocol="toy levels", label_names=["even", "odd"], images=images, labels=labels
    )
    save_dataset(path, dataset)
    return path


@pytest.fixture(scope="module")
def checkpoint(data_file: Path) -> Path:
    out = data_file.with_name("model")
    assert main(["train", "pixelcnn", "--data", str(data_file), "--out", str(out), *NETWORK, *SCHEDULE]) == 0
    return out


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pixelcnn.sampling.compiled", None)
    assert main(["compile"]) == 1
    assert "error: the sampler cannot be compiled here (" in capsys.readouterr().err


def test_train_writes_a_checkpoint_with_its_scores(checkpoint: Path, data_file: Path) -> None:
    model, scores = load_checkpoint(checkpoint)
    data = load_dataset(data_file)
    assert scores["protocol"] == "toy levels"
    assert scores["data_hash"] == data.data_hash
    nll = -log_prob(model, data.images["test"].long()).mean().item()
    assert scores["test/nll_nats"] == pytest.approx(nll, rel=1e-5)


def test_only_packing_needs_its_coder() -> None:
    code = """
import sys
sys.modules["constriction"] = None  # as if it were not installed
from pixelcnn.__main__ import main
assert main(["sample", "--help"]) == main(["train", "pixelcnn", "--help"]) == 0
"""
    assert run([sys.executable, "-c", code]).returncode == 0


def test_train_says_before_its_work_what_it_would_replace(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr("pixelcnn.__main__.fit", None)
    assert main(["train", "pixelcnn", "--data", str(data_file), "--out", str(tmp_path), *NETWORK, *SCHEDULE]) == 1
    assert "it holds notes.txt, which would be lost" in capsys.readouterr().err


def test_train_writes_into_the_folder_that_it_stands_in(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["train", "pixelcnn", "--data", str(data_file), "--out", ".", *NETWORK, *SCHEDULE]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "here.state"]
    load_checkpoint(tmp_path / "here")


def test_train_goes_on_from_its_state(checkpoint: Path, data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = [*SCHEDULE[:-3], "3", "--warmup-steps", "0"]
    assert main(["train", "pixelcnn", "--data", str(data_file), "--out", str(checkpoint), *NETWORK, *longer]) == 0
    assert "epoch 3.00" in capsys.readouterr().out
    assert json.loads((checkpoint / "scores.json").read_text())["test/num_images"] == 16


def test_evaluate_prints_scores_and_protocol(
    checkpoint: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--data", str(data_file), "--num-images", "4"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["protocol"] == "toy levels"
    assert scores["test/num_images"] == 4


def test_check_counts_no_leak(checkpoint: Path, data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in ([], ["--data", str(data_file)]):
        assert main(["check", "--checkpoint", str(checkpoint), *data]) == 0
        assert capsys.readouterr().out == "0 leaks in 30 sub-pixels; 29 reach a later logit\n"


def test_check_fails_where_there_are_leaks(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixelcnn.__main__.count_leaks", lambda model, levels, on_progress: (3, 29))
    assert main(["check", "--checkpoint", str(checkpoint)]) == 1
    out, error = capsys.readouterr()
    assert out.startswith("3 leaks in 30 sub-pixels")
    assert error.startswith("error: 3 of 30 sub-pixels reach their own or an earlier logit")


def test_a_model_and_data_that_do_not_fit_are_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.safetensors"
    images = {split: torch.zeros(8, 1, 4, 4, dtype=torch.uint8) for split in ("train", "validation", "test")}
    labels = {split: torch.arange(8) % 2 for split in images}
    save_dataset(
        other,
        Dataset(name="other", num_levels=4, protocol="p", label_names=["a", "b"], images=images, labels=labels),
    )
    message = "error: the model is for images (1, 6, 5) of 4 levels, other has (1, 4, 4) of 4.\n"
    for command in ("check", "evaluate"):
        assert main([command, "--checkpoint", str(checkpoint), "--data", str(other)]) == 1
        assert capsys.readouterr().err == message
    # A batch larger than the split, and the state of a network of another size.
    out = tmp_path / "model"
    train = ["train", "pixelcnn", "--data", str(other), "--out", str(out)]
    assert main([*train, *NETWORK, "--batch-size", "9", *SCHEDULE[2:]]) == 1
    message = "batch_size must be from 1 (accumulate times processes) to the 8 training images of other, got 9."
    assert capsys.readouterr().err == f"error: {message}\n"
    assert main([*train, *NETWORK, *SCHEDULE]) == 0
    assert main([*train, "--num-features", "5", "--num-blocks", "1", *SCHEDULE]) == 1
    said = "differs in its model (num_features, head_features). "
    said += "Set it back to go on, or delete the file to start afresh.\n"
    assert said in capsys.readouterr().err


def test_sample_writes_a_sheet(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "samples.png"
    command = ["sample", "--checkpoint", str(checkpoint), "--out", str(out), "--num-samples", "3", "--label", "1"]
    assert main(command) == 0
    first = out.read_bytes()
    assert capsys.readouterr().out.count("bits/dim") == 3
    assert Image.open(out).size == (3 * 22 + 2, 26 + 2)
    assert main(command) == 0
    assert out.read_bytes() == first  # the same seed
    assert main([*command, "--seed", "1"]) == 0
    assert out.read_bytes() != first


@pytest.mark.parametrize("known", ["top", "left", "bottom", "right"])
def test_complete_keeps_the_known_half(checkpoint: Path, tmp_path: Path, known: str) -> None:
    image, out = tmp_path / "image.png", tmp_path / "completed.png"
    levels = torch.randint(4, (1, 6, 5), generator=torch.Generator().manual_seed(1))
    image.write_bytes(to_png(levels, 4))
    command = ["complete", "--checkpoint", str(checkpoint), "--image", str(image), "--out", str(out)]
    assert main([*command, "--num-samples", "2", "--known", known]) == 0
    sheet = torch.tensor(list(Image.open(out).tobytes())).reshape(28, -1)
    half = {
        "top": (slice(0, 3), slice(0, 5)),
        "bottom": (slice(3, 6), slice(0, 5)),
        "left": (slice(0, 6), slice(0, 2)),
        "right": (slice(0, 6), slice(2, 5)),
    }[known]
    for i in range(3):  # given, then two completions
        cell = sheet[2:26:4, 2 + 22 * i : 22 * i + 22 : 4]
        assert torch.equal(cell[half], (levels[0] * 255 / 3).round().long()[half])


def test_complete_by_proposals(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(to_png(torch.randint(4, (1, 6, 5), generator=torch.Generator().manual_seed(1)), 4))
    command = ["complete", "--checkpoint", str(checkpoint), "--image", str(image), "--out", str(tmp_path / "out.png")]
    assert main([*command, "--num-samples", "3", "--known", "bottom", "--proposals", "5"]) == 0
    effective = re.search(r"^effective number of proposals: ([0-9.]+) of 5$", capsys.readouterr().out, re.MULTILINE)
    assert effective is not None
    assert 1 <= float(effective[1]) <= 5
    assert main([*command, "--proposals", "5", "--temperature", "0.5"]) == 1
    assert "--proposals needs --temperature 1." in capsys.readouterr().err


def test_bench_prints_and_writes_its_figures(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    command = ["bench", "--checkpoint", str(checkpoint), "--batch-sizes", "2", "--seconds", "0.05", "--out", str(out)]
    assert main([*command, "--samplers", "naive", "cached, compiled"]) == 0
    printed = capsys.readouterr().out
    assert [row["sampler"] for row in json.loads(out.read_text())["timings"]] == ["naive", "cached, compiled"]
    assert "float64: 0 of 16 images differ" in printed
    assert printed.endswith(f"wrote {out}\n")


def test_bench_fails_where_the_sampler_is_not_the_network(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pixelcnn.bench.level_probs", lambda model, levels: level_probs(model, levels).flip(1))
    command = ["bench", "--checkpoint", str(checkpoint), "--batch-sizes", "1", "--seconds", "0.01"]
    assert main([*command, "--samplers", "cached, compiled"]) == 1
    assert "error: in float64 the sampler is not the network: a block computes other" in capsys.readouterr().err


def test_train_refuses_before_its_work_what_cannot_be_sampled(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(model: object) -> None:
        raise ValueError("no sampler follows from so deep a network: use at most 200 blocks in a row.")

    monkeypatch.setattr("pixelcnn.__main__.Plan", refuse)
    command = ["train", "pixelcnn", "--data", str(data_file), "--out", str(tmp_path / "deep"), *NETWORK, *SCHEDULE]
    assert main(command) == 1
    assert "use at most 200 blocks in a row" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_label_beyond_64_bits_is_named(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--checkpoint", str(checkpoint), "--out", "x.png", "--label", str(2**63)]) == 2
    assert "Invalid value for '--label'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["train", "pixelcnn", "--data", "no.safetensors", "--out", "x"],
            "no.safetensors does not exist. Make it: python -m",
        ),
        (["evaluate", "--checkpoint", "nowhere", "--data", "no"], "nowhere is no checkpoint: config.json is missing."),
        (["sample", "--checkpoint", "{checkpoint}", "--out", "x.png", "--label", "7"], "label must lie in -1..1"),
        (["sample", "--checkpoint", "{checkpoint}", "--out", "x.png", "--temperature", "-1"], "temperature must be 0"),
        (["bench", "--checkpoint", "{checkpoint}", "--samplers", "fast"], "got 'fast'."),
    ],
)
def test_mistakes_end_in_one_sentence(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [part.format(checkpoint=checkpoint) for part in command]
    if command[0] == "train":
        arguments += NETWORK + SCHEDULE
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_learning_rate_out_of_range_is_named(data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rate in ("0", "1e9"):
        schedule = [*SCHEDULE[:3], rate, *SCHEDULE[4:]]
        out = data_file.with_name("never")
        assert main(["train", "pixelcnn", "--data", str(data_file), "--out", str(out), *NETWORK, *schedule]) == 1
        assert "train: learning_rate must be" in capsys.readouterr().err
        assert not out.exists()


def test_an_absent_gpu_is_named(
    checkpoint: Path, data_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data_file), "--device", "cuda"]
    assert main(command) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *(["trian"], ["train", "resnet"], ["evaluate"], ["evaluate", "--checkpoints", "x"]),
        ["evaluate", "--checkpoint", "x", "--data", "x", "--num-images", "0"],
        *(["sample", "--checkpoint", "x", "--out", "x.png", "--seed", seed] for seed in ("-1", str(2**63))),
        *(["sample", "--checkpoint", "x", "--out", out] for out in (".", "x.jpg")),
        ["bench", "--checkpoint", "x", "--out", "."],
    ],
)
def test_words_that_are_no_command_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        *(("sample", "--num-samples", value) for value in ("0", "1025")),
        *(("pack", "--block-images", value) for value in ("0", "4097")),
        *(("complete", "--proposals", value) for value in ("0", "1025")),
        *(("bench", option, "0") for option in ("--batch-sizes", "--sides", "--seconds")),
        *(("bench", "--seconds", "601"), ("bench", "--exact-images", "-1"), ("bench", "--sides", "257")),
    ],
)
def test_a_number_out_of_range_is_named(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = ["--out", "x.png", "--image", __file__]
    needed = {"sample": images[:2], "complete": images, "bench": [], "pack": ["--out", "x.pxl", "--images", __file__]}
    assert main([command, "--checkpoint", "x", *needed[command], option, value]) == 2
    assert f"Invalid value for '{option}': " in capsys.readouterr().err


def test_an_image_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "--checkpoint", "x", "--out", "x.png", "--image", "no.png"]) == 2
    assert "'no.png' does not exist." in capsys.readouterr().err


@pytest.mark.parametrize("architecture", architectures())
def test_the_options_of_train_are_the_settings_with_their_meaning(
    architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", architecture, "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for config_class in (architectures()[architecture], TrainConfig):
        for field in dataclasses.fields(config_class):
            parts = ("completer_features", "added_features", "added_context_width", "label_features")
            by_hand = field.name not in ("image_shape", "num_levels", "num_labels", *parts)
            assert (f"--{field.name.replace('_', '-')}" in printed) == by_hand
    assert "width of the network; a multiple of C" in printed
    assert "largest norm of the gradient of the loss in nats per sub-pixel. [default: 1.0]" in printed


def test_fields_of_ones_own_architecture_are_options(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class OwnConfig(PixelCNNConfig):
        dilations: tuple[int, ...] = (1, 2, 4)
        residual: bool = True

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class SeededConfig(PixelCNNConfig):
        seed: int = 0

    built = []
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    monkeypatch.setattr("pixelcnn.__main__.build_model", lambda config: built.append(config) or build_model(config))
    registry.register("own", OwnConfig)(PixelCNN)
    train = ["train", "own", "--data", str(data_file), *NETWORK, *SCHEDULE]
    assert main([*train, "--out", str(tmp_path / "as it is")]) == 0
    assert (
        main([*train, "--out", str(tmp_path / "other"), "--dilations", "3", "--dilations", "5", "--no-residual"]) == 0
    )
    assert [(config.dilations, config.residual) for config in built] == [((1, 2, 4), True), ((3, 5), False)]
    capsys.readouterr()
    registry.register("seeded", SeededConfig)(PixelCNN)
    assert main(["train", "own", "--help"]) == 1
    assert capsys.readouterr().err == (
        "error: SeededConfig has a field 'seed', which is an option of training: rename it.\n"
    )


def test_a_training_that_finds_no_memory_is_one_sentence(
    data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pixelcnn.training.trainer.Trainer.train_step", lambda _: torch.empty(2**50))
    train = ["train", "pixelcnn", "--data", str(data_file), *NETWORK, *SCHEDULE]
    assert main([*train, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        "error: a step does not fit into memory: lower batch_size, or raise accumulate, the parts that a batch is "
        "split into. The last saved state is untouched.\n"
    )
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_a_command_and_a_bug_of_ours_keeps_its_traceback(
    checkpoint: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--checkpoint", str(checkpoint), "--data", str(data_file)]
    for error in (KeyboardInterrupt(), KeyError("a bug")):

        def fail(*_args: object, error: BaseException = error, **_kwargs: object) -> None:
            raise error

        monkeypatch.setattr("pixelcnn.__main__.evaluate", fail)
        if isinstance(error, KeyError):
            with pytest.raises(KeyError, match="a bug"):
                main(command)
        else:
            assert main(command) == 130
            assert capsys.readouterr().err.strip() == "stopped"
