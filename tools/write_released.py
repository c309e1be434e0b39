"""Write tests/released/DATASET.safetensors, the images that the released weights are checked on without the data:

    python -m tools.write_released mnist fashion_mnist cifar10 letters

from the project's root, after `dvc repro full/dvc.yaml:prepare@DATASET`, of letters after `python -m pipelines.steps
add`. They are the first images of the test split.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save

from pixelcnn import load_dataset

FOLDER = Path(__file__).parents[1] / "tests" / "released"
NUM_IMAGES = 200


def main(datasets: list[str]) -> None:
    if not datasets:
        sys.exit("error: name the datasets to write, such as mnist.")
    FOLDER.mkdir(exist_ok=True)
    for name in datasets:
        data = load_dataset(Path("data") / f"{name}.safetensors")
        levels = data.levels("test", slice(0, NUM_IMAGES)).to(torch.uint8)
        label = data.labels["test"][:NUM_IMAGES].to(torch.uint8)
        path = FOLDER / f"{name}.safetensors"
        path.write_bytes(save({"levels": levels.contiguous(), "label": label}, {"data_hash": data.data_hash}))
        print(f"wrote {path}: {len(levels)} images")


if __name__ == "__main__":
    main(sys.argv[1:])
