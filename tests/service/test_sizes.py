"""The service takes images of any side up to 64, of 2 to 256 levels, grey or in colour, with any number of labels."""

import base64
import shutil

import numpy as np
import pytest
import torch

from pipelines.registry import store
from pixelcnn import GatedPixelCNNConfig, PixelCNNConfig
from pixelcnn.images import to_png
from tests.service.champions import put, wait_until

SCAN = GatedPixelCNNConfig(image_shape=(1, 48, 32), num_levels=2, num_features=4, num_layers=1, kernel_size=3)
SPRITE = PixelCNNConfig(
    image_shape=(1, 16, 16), num_levels=4, num_features=4, num_blocks=1, first_kernel_size=3, num_labels=62
)
PHOTOGRAPH = PixelCNNConfig(image_shape=(3, 64, 64), num_levels=256, num_features=6, num_blocks=1, first_kernel_size=3)


@pytest.mark.parametrize("config", [SCAN, SPRITE, PHOTOGRAPH], ids=["48x32", "16x16", "64x64x3"])
@pytest.mark.usefixtures("use_home")
def test_images_of_any_kind(client, service_home, tmp_path, config) -> None:
    channels, height, width = config.image_shape
    shape = (height, width) if channels == 1 else (height, width, channels)
    store.serve(put(tmp_path, "any", config, "1", seed=0))
    try:
        wait_until(lambda: "any" in client.get("/models").json())
        described = client.get("/models").json()["any"]
        assert (described["shape"], described["levels"]) == ([channels, height, width], config.num_levels)
        assert len(described["labels"]) == config.num_labels
        label = config.num_labels - 1
        asked = {"dataset": "any", "num_samples": 2, "seed": 1, "label": label}
        generated = np.array(client.post("/generate", json=asked).json()["images"])
        assert generated.shape == (2, *shape)
        assert generated.max() == config.num_levels - 1 or config.num_levels == 256
        # A completion keeps what is known, given as levels or as a PNG.
        levels = torch.from_numpy(generated[0]).reshape(height, width, channels).permute(2, 0, 1)
        png = base64.b64encode(to_png(levels, config.num_levels)).decode()
        observed = np.arange(height * width).reshape(height, width) < height * width // 2
        asked |= {"image": generated[0].tolist(), "observed": observed.astype(int).tolist()}
        completed = client.post("/complete", json=asked).json()
        assert (np.array(completed["completions"])[:, observed] == generated[0][observed]).all()
        assert client.post("/complete", json={**asked, "image": png}).json() == completed
        question = {"dataset": "any", "image": png, "label": label}
        answer = client.post("/likelihood", json=question).json()
        assert np.array(answer["surprise"]).shape == (height, width)
        assert np.array(answer["surprise"]).sum() == pytest.approx(-answer["log_prob"], rel=1e-4)
    finally:
        shutil.rmtree(service_home / "models" / "pixelcnn-any")
        wait_until(lambda: "any" not in client.get("/models").json())
