"""What the core's tests share: tiny networks in float64, all images of a small space, toy datasets."""

import itertools
import re

import torch
from torch import Tensor

from pixelcnn import Dataset, GatedPixelCNNConfig, PixelCNNConfig, build_model
from pixelcnn.completion import complete_and_score
from pixelcnn.config import ModelConfig
from pixelcnn.models.attentive_pixelcnn import AttentivePixelCNNConfig
from pixelcnn.models.base import AutoregressiveModel

ARCHITECTURES = ("pixelcnn", "gated_pixelcnn", "attentive_pixelcnn")
Shape = tuple[int, int, int]


def tiny_config(architecture: str, shape: Shape, num_levels: int, num_labels: int = 0, **changes: int) -> ModelConfig:
    """Return a config of two layers and about four features, with 3x3 kernels."""
    common = {
        "image_shape": shape,
        "num_levels": num_levels,
        "num_labels": num_labels,
        "num_features": {1: 4, 2: 4, 3: 6}[shape[0]],
    }
    if architecture == "pixelcnn":
        return PixelCNNConfig(**{**common, "num_blocks": 2, "first_kernel_size": 3, "kernel_size": 3, **changes})
    if architecture == "attentive_pixelcnn":
        attention = {"attention_every": 1, "key_features": 8}
        return AttentivePixelCNNConfig(**{**common, "num_layers": 2, "kernel_size": 3, **attention, **changes})
    return GatedPixelCNNConfig(**{**common, "num_layers": 2, "kernel_size": 3, **changes})


def tiny_model(
    architecture: str, shape: Shape, num_levels: int, num_labels: int = 0, seed: int = 0, **changes: int
) -> AutoregressiveModel:
    """Return a network in float64 and eval mode whose weights are all random: biases, tables and projections, too."""
    torch.manual_seed(seed)
    model = build_model(tiny_config(architecture, shape, num_levels, num_labels, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "table", "context.weight", "enter.weight", "null_value")):
                scale = 0.1 if name.endswith("enter.weight") else 0.5
                parameter.copy_(scale * torch.randn_like(parameter))
    return model


def all_images(shape: Shape, num_levels: int) -> Tensor:
    """Return every image there is, (K ** (C * H * W), C, H, W) int64."""
    size = shape[0] * shape[1] * shape[2]
    return torch.tensor(list(itertools.product(range(num_levels), repeat=size))).reshape(-1, *shape)


def fillings(image: Tensor, observed: Tensor, num_levels: int) -> Tensor:
    """Return every image that agrees with this one where it is observed: (1, C, H, W) -> (N, C, H, W)."""
    images = all_images(tuple(image.shape[1:]), num_levels)
    return images[((images == image) | ~observed).flatten(1).all(dim=1)]


def random_levels(shape: Shape, num_levels: int, num: int, seed: int = 0) -> Tensor:
    return torch.randint(num_levels, (num, *shape), generator=torch.Generator().manual_seed(seed))


def sample_and_score(model: AutoregressiveModel, u: Tensor, label: Tensor | None = None):
    """Return whole images, and what scores them: as completions of nothing."""
    observed = torch.zeros(len(u), 1, *u.shape[2:], dtype=torch.bool)
    return complete_and_score(model, torch.zeros_like(u, dtype=torch.int64), observed, u, label)


def in_raster_order(values: Tensor) -> Tensor:
    """Put the sub-pixels of (B, C, H, W) or (B, K, C, H, W) in a row: (B, D) or (B, D, K), channel running fastest."""
    if values.dim() == 4:
        return values.permute(0, 2, 3, 1).flatten(1)
    return values.permute(0, 3, 4, 2, 1).flatten(1, 3)


def from_raster_order(values: Tensor, shape: Shape) -> Tensor:
    """Undo `in_raster_order` for (B, D)."""
    channels, height, width = shape
    return values.reshape(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()


def interval_noise(log_probs: Tensor, images: Tensor, where: float = 0.5) -> Tensor:
    """Return, for each image, noise inside the intervals that give it, found from joint probabilities alone.

    Args:
        log_probs: (N,) nats, of each image.
        images: (N, C, H, W), all those that can come out; those of equal beginning share their earlier intervals.
        where: how far between an interval's ends, in (0, 1).

    Returns:
        (N, C, H, W) float64. A sub-pixel that is the same in every image gets 0.5, whatever its interval.
    """
    probs, values = log_probs.double().exp(), in_raster_order(images)  # (N,), (N, D)
    u = torch.full(values.shape, 0.5, dtype=torch.float64)
    for n, i in itertools.product(range(len(values)), range(values.shape[1])):
        if (values[:, i] == values[0, i]).all():
            continue
        same_beginning = (values[:, :i] == values[n, :i]).all(dim=1)
        below = probs[same_beginning & (values[:, i] < values[n, i])].sum()
        here = probs[same_beginning & (values[:, i] == values[n, i])].sum()
        u[n, i] = (below + here * where) / probs[same_beginning].sum()
    return from_raster_order(u, tuple(images.shape[1:]))


def toy_dataset(
    shape: Shape = (1, 3, 3),
    num_levels: int = 3,
    protocol: str = "8-bit",
    num_labels: int = 2,
    num_train: int = 24,
    data_hash: str = "toy",
) -> Dataset:
    """Return a small random dataset in memory; its training split holds intensities if the protocol is dynamic."""
    generator = torch.Generator().manual_seed(5)

    def draw(num: int, num_values: int) -> Tensor:
        return torch.randint(num_values, (num, *shape), generator=generator).to(torch.uint8)

    num_values = 256 if protocol == "dynamic" else num_levels
    images = {"train": draw(num_train, num_values), "validation": draw(6, num_levels), "test": draw(7, num_levels)}
    return Dataset(
        name="toy",
        num_levels=num_levels,
        protocol=protocol,
        label_names=[f"class {i}" for i in range(num_labels)],
        images=images,
        labels={split: torch.arange(len(x)) % num_labels for split, x in images.items()},
        data_hash=data_hash,
    )


def exactly(message: str) -> str:
    """Return the pattern for `pytest.raises` that matches this message and no other."""
    return f"^{re.escape(message)}$"


def beginning(message: str) -> str:
    """Return the pattern for `pytest.raises` that matches the messages that begin like this."""
    return f"^{re.escape(message)}"
