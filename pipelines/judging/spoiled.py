"""What is nearly an image of a dataset and is none: real images spoiled, for a judge to learn from."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


class Spoiler:
    """Spoils the images of a batch, each in a way of its own."""

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
        """Return spoiled images.

        Args:
            x: (B, C, H, W) float in [0, 1], 0 where an image is blank.
            label: (B,) int64: what is put together has two labels.

        Returns:
            (B, C, H, W) float in [0, 1].
        """
        order = torch.randperm(len(x), generator=self.generator)
        other, same = x[order], label[order] == label
        way = torch.randint(len(self.ways), (len(x),), generator=self.generator)
        result = torch.zeros_like(x)
        for i, spoil in enumerate(self.ways):
            chosen = way == i
            if chosen.any():
                result[chosen] = spoil(x[chosen], other[chosen])
        if same.any():  # of a partner of its own label something sound could come out
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
