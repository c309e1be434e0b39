"""Write app/canvas/examples/DATASET.png, the test images whose beginnings the canvas offers:

    python -m tools.write_examples

from the project's root. They are taken from tests/released/DATASET.safetensors, side by side, by their numbers there.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[1]
CHOSEN = {"mnist": (32, 4, 18, 35, 7), "fashion_mnist": (0, 1, 13, 31, 6), "cifar10": (13, 1, 7, 10, 11)}


def main() -> None:
    """Write the strips."""
    for name, numbers in CHOSEN.items():
        levels = load_file(ROOT / "tests" / "released" / f"{name}.safetensors")["levels"]  # (N, C, H, W) uint8
        strength = levels[list(numbers)] * (255 if name == "mnist" else 1)
        strip = np.concatenate(list(strength.transpose(0, 2, 3, 1)), axis=1)
        path = ROOT / "app" / "canvas" / "examples" / f"{name}.png"
        Image.fromarray(strip.squeeze()).save(path, optimize=True)
        print(f"wrote {path}: test images {', '.join(map(str, numbers))}")


if __name__ == "__main__":
    main()
