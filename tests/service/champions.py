"""Tiny champions for the service's tests."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipelines.registry import store
from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig, build_model, save_checkpoint
from pixelcnn.checkpoint import sha256_of

# Binary, not square, with labels; and colour with four levels, without.
GREY = GatedPixelCNNConfig(
    image_shape=(1, 5, 4), num_levels=2, num_features=4, num_layers=2, kernel_size=3, num_labels=3
)
COLOUR = PixelCNNConfig(image_shape=(3, 4, 5), num_levels=4, num_features=6, num_blocks=1, first_kernel_size=3)
SCORES = {"test/nll_nats": 12.5, "validation/nll_nats": 12.25}


def make_checkpoint(folder: Path, config, seed: int):
    """Write a checkpoint of random weights, large enough that pixels depend on each other; return the model."""
    torch.manual_seed(seed)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    save_checkpoint(folder, model, SCORES)
    return model


def put(folder: Path, dataset: str, config, version: str, seed: int) -> str:
    """Make a champion as promotion does; return its tag in the store, where it is not served yet."""
    checkpoint = folder / f"{dataset}-{version}"
    make_checkpoint(checkpoint, config, seed)
    metadata = {
        "name": f"pixelcnn-{dataset}",
        "version": version,
        "run_id": f"run-{version}",
        "git_commit": "c0ffee",
        "data_hash": "d41d8c",
        "weights_sha256": sha256_of(checkpoint / "model.safetensors"),
        "dataset": dataset,
        "label_names": ["cat", "dog", "owl", *(f"label {i}" for i in range(3, config.num_labels))],
        "protocol": "toy",
        "promoted_at": "2025-01-01T00:00:00+00:00",
    }
    return store.export(checkpoint, metadata)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something that the service does by itself."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
