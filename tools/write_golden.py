"""Write tests/golden/core.yaml: `python -m tools.write_golden`, from the project's root.

A change to that file beyond 1e-6 means that the networks or their training compute something else than before: say
why. Less differs from one processor to another.
"""

from pathlib import Path

import torch
import yaml

from pixelcnn import TrainConfig, fit
from pixelcnn.models.base import AutoregressiveModel
from pixelcnn.training.trainer import StepReport
from tests.core.tiny import ARCHITECTURES, random_levels, tiny_model, toy_dataset

PATH = Path(__file__).parents[1] / "tests" / "golden" / "core.yaml"
HEADER = """\
# What tiny networks with fixed seeds compute; tests compare with it to 1e-6 and never rewrite it.
# Written by: python -m tools.write_golden
"""


def golden_numbers() -> dict[str, list[float]]:
    """Return rows of numbers by name: five steps' losses, and a patch of logits before and after them."""
    data = toy_dataset((3, 3, 2), num_levels=4)
    levels, label = random_levels((3, 3, 2), 4, num=1), torch.tensor([1])
    config = TrainConfig(batch_size=8, learning_rate=0.005, max_epochs=5 / 3, warmup_steps=2, num_validations=1)
    rows = {}
    for architecture in ARCHITECTURES:
        model = tiny_model(architecture, (3, 3, 2), num_levels=4, num_labels=2)
        losses: list[float] = []

        def patch(model: AutoregressiveModel = model) -> list[float]:
            with torch.no_grad():
                values: list[float] = model(levels, label)[0, :, :, 1, 1].flatten().tolist()  # (K, C) of one pixel
            return values

        def record(report: StepReport, losses: list[float] = losses) -> None:
            losses.append(report.train_nll_nats)

        rows[f"{architecture}: logits of pixel (1, 1), fresh weights"] = patch()
        best = fit(model, data, config, on_step=record)
        rows[f"{architecture}: losses of five steps, then validation, nats per image"] = [*losses, best]
        rows[f"{architecture}: logits of pixel (1, 1), averaged weights"] = patch()
    return rows


def format_rows(rows: dict[str, list[float]]) -> str:
    rounded = {name: [round(x, 8) for x in numbers] for name, numbers in rows.items()}
    return HEADER + yaml.safe_dump(rounded, sort_keys=False, width=100, default_flow_style=None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(format_rows(golden_numbers()))
    print(f"wrote {PATH}")
