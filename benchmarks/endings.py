"""Which endings to show: a judge's acceptance, and how different they are, by temperature and by choice among more.

    python -m benchmarks.endings weights/gated_pixelcnn-mnist

Of each drawing, the first 45 % of a validation image's ink, nine endings are shown: nine drawn; or of 24 drawn the nine
likeliest, or nine unlike each other of the sixteen likeliest.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.command import command
from pipelines.judging.acceptance import known_part
from pipelines.judging.judge import load_judge
from pipelines.params import load_params
from pipelines.stages.train import load
from pixelcnn import load_checkpoint
from pixelcnn.completion import complete_and_score
from pixelcnn.data import generator_for

NUM_DRAWINGS, NUM_DRAWN, NUM_SHOWN, NUM_LIKELY = 100, 24, 9, 16
TEMPERATURES = (1.0, 0.9, 0.8, 0.7)


def unlike(endings: Tensor) -> Tensor:
    """Return the indices of nine endings, each as far as can be from those before it: (N, C, H, W) -> (9,)."""
    distance = torch.cdist(endings.flatten(1).float(), endings.flatten(1).float(), p=1)
    chosen = [0]
    while len(chosen) < NUM_SHOWN:
        chosen.append(int(distance[chosen].amin(dim=0).argmax()))
    return torch.tensor(chosen)


CHOICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nine drawn": lambda endings, order: torch.arange(NUM_SHOWN),
    "nine likeliest of 24": lambda endings, order: order[:NUM_SHOWN],
    "nine unlike each other": lambda endings, order: order[:NUM_LIKELY][unlike(endings[order[:NUM_LIKELY]])],
}


def main(folder: str) -> None:
    """Print the table of one checkpoint."""
    model, scores = load_checkpoint(folder)
    data = load(scores["dataset"])
    judge = load_judge(load_params().evaluate.judges[data.name], "judge", data)
    images = data.levels("validation", slice(NUM_DRAWINGS))
    observed = known_part("ink45", images, data.num_levels)
    u = torch.rand(NUM_DRAWINGS, NUM_DRAWN, *data.image_shape, generator=generator_for(0), dtype=torch.float64)
    print(f"{folder}: of nine endings of {NUM_DRAWINGS} drawings\n")
    print("| temperature | shown | accepted | different labels among the accepted |\n| --- | --- | --- | --- |")
    for temperature in TEMPERATURES:
        drawn = []
        for image, known, noise in zip(images, observed, u, strict=True):
            endings, score = complete_and_score(
                model,
                (image * known)[None].repeat(NUM_DRAWN, 1, 1, 1),
                known[None].repeat(NUM_DRAWN, 1, 1, 1),
                noise,
                temperature=temperature,
            )
            drawn.append((endings, score().argsort(descending=True)))
        for name, choose in CHOICES.items():
            shown = torch.stack([endings[choose(endings, order)] for endings, order in drawn])
            accepted, label = (x.view(-1, NUM_SHOWN) for x in judge.look(shown.flatten(0, 1), data.num_levels))
            labels = [len(set(seen[good].tolist())) for seen, good in zip(label, accepted, strict=True)]
            print(f"| {temperature} | {name} | {accepted.float().mean():.3f} | {sum(labels) / len(labels):.2f} |")


if __name__ == "__main__":
    sys.exit(command(main))
