"""For which letter a judge takes the endings of half-drawn capitals.

    python -m pipelines.steps letters && python -m pipelines.steps add letters --images data/raw/letters.npz
    python -m benchmarks.letters weights/gated_pixelcnn-letters

The judge learns from half of the training images, and from such images spoiled; it accepts 95 % of real ones. Of each
capital among the test images a part is known, and one ending is drawn without a label, at the canvas's temperature.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.command import command
from pipelines.judging.acceptance import KNOWN, known_part
from pipelines.judging.judge import JUDGES, train_judge
from pipelines.stages.train import load
from pixelcnn import complete, load_checkpoint
from pixelcnn.data import Dataset, generator_for
from pixelcnn.models.base import AutoregressiveModel

TEMPERATURE = 0.9
EPOCHS = 12.0  # the 52 letters need more than ten digits do


def shown(model: AutoregressiveModel, data: Dataset, images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what is judged: its name, and (N, C, H, W) int64 levels."""
    yield "the test images themselves", images
    for known in ("top", "ink45"):
        observed = known_part(known, images, data.num_levels)
        yield f"{KNOWN[known].removeprefix('endings of ')}, without an ending", images * observed
        u = torch.rand(images.shape, generator=generator_for(0), dtype=torch.float64)
        yield KNOWN[known], complete(model, images * observed, observed, u, temperature=TEMPERATURE)


def main(folder: str) -> None:
    """Print the table of one checkpoint."""
    model, scores = load_checkpoint(folder)
    data = load(scores["dataset"])
    if data.data_hash != scores["data_hash"]:
        raise ValueError(f"data/{data.name}.safetensors is not what {folder} was trained on.")
    judge = train_judge(data, replace(JUDGES["judge"], epochs=EPOCHS), lambda line: print(line, file=sys.stderr))
    case = torch.tensor([ord(name.upper()) for name in data.label_names])  # of c and C the same: their shapes are
    is_capital = torch.tensor([name.isupper() for name in data.label_names])[data.labels["test"]]
    images = data.levels("test", slice(None))[is_capital]
    true = case[data.labels["test"][is_capital]]
    print(f"{folder}, {len(images)} capitals\n")
    print("| what the judge sees | takes it for that letter | for another | for none |\n| --- | --- | --- | --- |")
    for name, levels in shown(model, data, images):
        accepted, label = judge.look(levels, data.num_levels)
        right = accepted & (case[label] == true)
        shares = [part.float().mean().item() for part in (right, accepted & ~right, ~accepted)]
        print(f"| {name} | {' | '.join(f'{share:.3f}' for share in shares)} |")


if __name__ == "__main__":
    sys.exit(command(main))
