"""A judge: a small classifier with one class more than the dataset has, for what is none of its images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipelines.errors import reason
from pixelcnn.data import DYNAMIC_PROTOCOL, Dataset, generator_for, save_tensors
from pixelcnn.training.config import resolved_precision
from pixelcnn.training.redrawn import by_another_hand

JUDGES_FOLDER = Path("judges")
BATCH = 64  # images as they are, and as many spoiled ones
REDRAWN = 0.3  # share that is drawn by another hand first
CRISP_SHARE = 0.5  # of binary images
REAL = 0.95  # share of real validation images that a judge accepts: it sets the threshold
LOG_STEPS = 100


@dataclass(frozen=True)
class JudgeConfig:
    """What tells one judge from another: two should not be wrong about the same images."""

    width: int  # features of the first half of the convolutions, twice as many of the second
    kernel_size: int
    half: int  # 0 or 1: it learns from the training images of even or of odd index
    seed: int  # of weights, batches and spoiled images
    epochs: float = 8.0


# By the end of their files' names. By the first one's answers settings may be chosen; by the other's nothing is.
JUDGES = {"judge": JudgeConfig(24, 3, 0, seed=0), "held_back": JudgeConfig(16, 5, 1, seed=1)}


class Judge(nn.Module):
    """Convolutions on an image; the last class stands for what is no image of the dataset."""

    threshold: Tensor

    def __init__(self, channels: int, num_labels: int, config: JudgeConfig) -> None:
        super().__init__()
        widths = [channels, config.width, config.width, 2 * config.width, 2 * config.width]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, after, config.kernel_size, 1 + i % 2, config.kernel_size // 2), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(4), nn.Flatten())
        self.classes = nn.Sequential(nn.Linear(32 * config.width, 128), nn.ReLU(), nn.Linear(128, num_labels + 1))
        self.register_buffer("threshold", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the classes: (B, C, H, W) float in [0, 1] -> (B, num_labels + 1)."""
        logits: Tensor = self.classes(self.features(x))
        return logits

    @torch.inference_mode()
    def probs(self, levels: Tensor, num_levels: int) -> Tensor:
        """Return the classes' probabilities: (B, C, H, W) int64 in [0, K) -> (B, num_labels + 1)."""
        return torch.cat([self(part.float() / (num_levels - 1)).softmax(dim=1) for part in torch.split(levels, 500)])

    def look(self, levels: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
        """Return (B,) bool, whether an image passes for one of the dataset's; and (B,) int64, as which label."""
        probs = self.probs(levels, num_levels)
        return probs[:, -1] <= self.threshold, probs[:, :-1].argmax(dim=1)


class Spoiler:
    """Makes what is nearly an image of a dataset and is none, for a judge to learn from: each in a way of its own."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.ways: list[Callable[[Tensor, Tensor], Tensor]] = [
            lambda x, other: torch.where(self.half_plane(x, 0.15), x, self.shifted(other, 0.1)),
            self.a_part_gone,
            lambda x, other: torch.maximum(x, self.shifted(other, 0.3)),
            lambda x, other: torch.where(self.half_plane(x, 0.15), x, self.shifted(x, 0.45)),
            lambda x, other: self.bent(x),
            self.a_stroke_too_many,
            lambda x, other: self.scattered(x),
        ]

    def __call__(self, x: Tensor, label: Tensor) -> Tensor:
        """Return spoiled images: (B, C, H, W) float in [0, 1], 0 where blank, with (B,) int64 labels -> the same."""
        order = torch.randperm(len(x), generator=self.generator)
        other, same = x[order], label[order] == label
        way = torch.randint(len(self.ways), (len(x),), generator=self.generator)
        result = torch.zeros_like(x)
        for i, spoil in enumerate(self.ways):
            chosen = way == i
            if chosen.any():
                result[chosen] = spoil(x[chosen], other[chosen])
        if same.any():  # what is put together has two labels: of one label something sound could come out
            result[same] = self.bent(x[same])
        return result

    def between(self, num: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num, 1, 1, 1, generator=self.generator)

    def half_plane(self, x: Tensor, most: float) -> Tensor:
        """Return (B, 1, H, W) bool: one side of a line in any direction, at most `most` of half a side off centre."""
        num, _, height, width = x.shape
        angle, offset = self.between(num, 0, 2 * math.pi), self.between(num, -most, most)
        y, xs = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
        return angle.sin() * y + angle.cos() * xs > offset

    def a_part_gone(self, x: Tensor, other: Tensor) -> Tensor:
        """Leave 25 to 65 % of the ink: one side of a line, of lines tried those that leave as much."""
        result = x * self.half_plane(x, 0.2)
        for _ in range(8):
            share = result.sum(dim=(1, 2, 3)) / x.sum(dim=(1, 2, 3)).clamp(min=1e-6)
            again = (share < 0.25) | (share > 0.65)
            result = torch.where(again.view(-1, 1, 1, 1), x * self.half_plane(x, 0.3), result)
        return result

    def a_stroke_too_many(self, x: Tensor, other: Tensor) -> Tensor:
        """Add a piece of another image, elsewhere."""
        return torch.maximum(x, self.shifted(other * self.half_plane(x, 0.3) * self.half_plane(x, 0.3), 0.4))

    def scattered(self, x: Tensor) -> Tensor:
        """Move 5 to 100 % of the pixels anywhere; of some images leave nothing."""
        order = torch.rand(x.flatten(1).shape, generator=self.generator).argsort(dim=1)
        elsewhere = x.flatten(1).gather(1, order).view(x.shape)
        moved = torch.rand(x.shape, generator=self.generator) < self.between(len(x), 0.05, 1)
        return torch.where(moved, elsewhere, x) * (self.between(len(x), 0, 1) < 0.9)

    def warped(self, x: Tensor, shift: Tensor) -> Tensor:
        """Sample images where a displacement says: shift is (B, 2, H, W), in half sides."""
        identity = torch.eye(2, 3).expand(len(x), -1, -1)
        grid = F.affine_grid(identity, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid + shift.permute(0, 2, 3, 1), align_corners=False)

    def shifted(self, x: Tensor, most: float) -> Tensor:
        """Move images by up to `most` of half a side, and by a third of that at least."""
        angle, length = self.between(len(x), 0, 2 * math.pi), self.between(len(x), most / 3, most)
        shift = torch.cat([angle.cos() * length, angle.sin() * length], dim=1)
        return self.warped(x, shift.expand(-1, -1, *x.shape[2:]))

    def bent(self, x: Tensor) -> Tensor:
        """Distort images beyond what a hand does."""
        shift = torch.randn(len(x), 2, 5, 5, generator=self.generator) * self.between(len(x), 0.2, 0.4)
        return self.warped(x, F.interpolate(shift, size=x.shape[2:], mode="bicubic", align_corners=False))


def train_judge(data: Dataset, config: JudgeConfig, log: Callable[[str], object]) -> Judge:
    """Train a judge on half of the training split: images as they are, and images spoiled.

    Binary images are seen as Bernoulli samples and in crisp ink, as those of models and of people are.
    """
    torch.manual_seed(config.seed)
    judge = Judge(data.image_shape[0], len(data.label_names), config)
    generator = generator_for(config.seed)
    spoil = Spoiler(generator)
    images, labels = (part["train"][config.half :: 2] for part in (data.images, data.labels))
    fast = resolved_precision("auto", torch.device("cpu")) == "bfloat16"
    most = 255 if data.protocol == DYNAMIC_PROTOCOL else data.num_levels - 1
    num_steps = max(1, round(config.epochs * len(images) / BATCH))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=num_steps)
    for step in range(num_steps):
        index = torch.randint(len(images), (BATCH,), generator=generator)
        x, label = images[index].float() / most, labels[index]
        # Real images are warped, too: otherwise the judge would tell spoiled ones by the blur of resampling.
        anew = torch.rand(len(x), 1, 1, 1, generator=generator) < REDRAWN
        x = torch.where(anew, by_another_hand(x, generator), x)
        both = torch.cat([x, spoil(x, label)])
        if data.num_levels == 2:
            crisp = torch.rand(len(both), 1, 1, 1, generator=generator) < CRISP_SHARE
            threshold = torch.where(crisp, 0.5, torch.rand(both.shape, generator=generator))
            both = (threshold < both).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = judge(both)
        none = torch.full_like(label, len(data.label_names))
        loss = F.cross_entropy(logits.float(), torch.cat([label, none]), label_smoothing=0.02)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if (step + 1) % LOG_STEPS == 0:
            log(f"judge: step {step + 1} of {num_steps}, loss {loss.item():.3f}")
    judge.eval()
    doubt = judge.probs(data.levels("validation", slice(None)), data.num_levels)[:, -1]
    judge.threshold.fill_(float(doubt.quantile(REAL)))
    return judge


def judge_file(dataset: str, which: str) -> Path:
    """Return where a dataset's judge lies: `which` is one of `JUDGES`."""
    return JUDGES_FOLDER / f"{dataset}-{which}.safetensors"


def write_judges(data: Dataset, log: Callable[[str], object]) -> None:
    """Train the judges of a dataset, and write their weights in half precision. It is done once: they lie in git."""
    if not data.label_names:
        raise ValueError(f"{data.name} has no labels, and a judge learns what is an image of it by telling them apart.")
    for which, config in JUDGES.items():
        judge, file = train_judge(data, config, log), judge_file(data.name, which)
        save_tensors(file, {name: weight.half() for name, weight in judge.state_dict().items()})
        log(f"wrote {file}")


def load_judge(dataset: str, which: str, data: Dataset) -> Judge:
    """Read a dataset's judge, for images and labels such as those of `data`; ValueError if it is missing or damaged."""
    path = judge_file(dataset, which)
    judge = Judge(data.image_shape[0], len(data.label_names), JUDGES[which])
    try:
        judge.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} is no judge of {data.name} ({reason(error)}). Make it: python -m pipelines.steps judge {dataset}"
        ) from None
    return judge.eval()
