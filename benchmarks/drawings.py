"""Twenty drawings as people make them with a mouse, and how a checkpoint ends them: a sheet, and what judges accept.

    python -m benchmarks.drawings weights/gated_pixelcnn-mnist --sheet docs/drawings.png

As on the canvas: a square pen, all else unknown, nine endings at temperature 0.9.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from typer import Argument, Option

from benchmarks.command import command
from pipelines.judging.judge import load_judge
from pipelines.params import load_params
from pipelines.stages.train import load
from pixelcnn import load_checkpoint
from pixelcnn.completion import complete_and_score
from pixelcnn.data import generator_for

SIZE, NUM_ENDINGS, TEMPERATURE = 28, 9, 0.9
ZOOM, GAP = 3, 8  # of the sheet: pixels per cell, pixels between pictures
PAPER, INK, UNKNOWN, MODEL = (255, 255, 255), (20, 24, 40), (232, 234, 240), (230, 120, 20)

Stroke = Sequence[tuple[float, float]]
# Name, width of the pen in cells, strokes in cells (x, y): thin and thick, tiny and huge, off-centre, incomplete ones.
DRAWINGS: list[tuple[str, int, list[Stroke]]] = [
    ("upper half of a 3", 2, [[(9, 8), (10, 6), (12, 4.5), (15, 4.5), (17.5, 6), (18, 8.5), (16.5, 10.5), (14, 12)]]),
    ("lower half of an 8", 2, [[(18, 14), (19.5, 17), (18.5, 21), (15, 23), (11.5, 21.5), (10, 18), (12, 14.5)]]),
    ("left stroke of a 4", 2, [[(9.5, 6), (9, 10), (8.5, 14), (12, 14.5)]]),
    ("the bar of a 7, thin", 1, [[(7, 6.5), (12, 6), (20, 6.5)]]),
    ("the bar of a 5 or 7", 2, [[(9, 5.5), (19, 5)]]),
    ("a slash in the middle", 2, [[(17, 8), (13, 20)]]),
    ("a straight bar, upright", 3, [[(14, 5), (14, 13)]]),
    ("a dot on the right, thick", 3, [[(20, 14), (20.5, 14.5)]]),
    ("left part of a thick ring", 3, [[(14, 5), (9, 8), (7, 14), (9, 20), (14, 23)]]),
    ("left part of a thin ring", 1, [[(15, 5), (11, 7), (8.5, 12), (9, 17), (11, 21), (14, 22.5)]]),
    ("a small loop, upper", 2, [[(13, 5), (10.5, 7), (11, 10.5), (14, 12), (17, 10), (17, 7), (14.5, 5), (13, 5)]]),
    ("a small loop, lower", 2, [[(13, 15), (10, 17), (10.5, 21), (14, 23), (17.5, 21), (17, 17), (13, 15)]]),
    ("a hook, as a 2 or 3 begins", 2, [[(8.5, 8.5), (10, 5.5), (14, 4.5), (18, 6), (18, 9.5)]]),
    ("a hook to the left, as a 5 ends", 2, [[(11, 13), (16, 13), (19, 16), (18, 20), (14, 23), (9, 22)]]),
    ("an angle, as a 4 or an L", 2, [[(10, 6), (8.5, 15), (19, 15)]]),
    ("a tiny 2's head in the corner", 1, [[(2.5, 4), (4, 2.5), (5.5, 4), (4.5, 5.5)]]),
    ("the head of a huge 2", 3, [[(3, 8), (6, 3), (14, 1.5), (22, 4), (23, 10), (18, 16)]]),
    ("the left half of a huge 0", 2, [[(15, 2), (8, 4), (3.5, 10), (3.5, 18), (8, 24.5), (14, 26)]]),
    ("the head of a 9, far to the right", 2, [[(24, 7), (21, 5.5), (18.5, 8), (19.5, 11.5), (22.5, 11.5), (24.5, 8)]]),
    ("two strokes of a 4, wide apart", 2, [[(8, 6), (7, 12)], [(18, 5), (17, 23)]]),
]


def ink(pen: int, strokes: Sequence[Stroke]) -> Tensor:
    """Return the cells under a pen as app/canvas/grid/grid.js has them: (1, H, W) bool."""
    cells = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    for stroke in strokes:
        for (x0, y0), (x1, y1) in zip([stroke[0], *stroke], stroke, strict=False):
            steps = max(1, math.ceil(2 * max(abs(x1 - x0), abs(y1 - y0))))
            for i in range(1, steps + 1):
                # JavaScript's Math.round: halves go up.
                left, top = (math.floor(a + (b - a) * i / steps - pen / 2 + 0.5) for a, b in ((x0, x1), (y0, y1)))
                cells[0, max(top, 0) : max(top + pen, 0), max(left, 0) : max(left + pen, 0)] = True
    return cells


def picture(drawings: Tensor, endings: Tensor) -> PIL.Image.Image:
    """Return a row for each drawing with its endings behind it: (N, 1, H, W) bool, (N, 9, 1, H, W) int64."""
    known = drawings[:, None].expand_as(endings).numpy()[..., 0, :, :, None]
    ended = np.where(known, INK, np.where(endings.numpy()[..., 0, :, :, None] > 0, MODEL, PAPER))
    drawn = np.where(known[:, :1], INK, UNKNOWN)
    pictures = np.concatenate([drawn, ended], axis=1).astype(np.uint8)  # (N, 10, H, W, 3)
    pictures = pictures.repeat(ZOOM, axis=2).repeat(ZOOM, axis=3)
    edges = ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0))
    rows = np.pad(pictures, edges, constant_values=255).swapaxes(1, 2)
    return PIL.Image.fromarray(rows.reshape(rows.shape[0] * rows.shape[1], -1, 3))


def main(
    checkpoint: Annotated[str, Argument(help="the folder of a model of binary digits")],
    sheet: Annotated[Path | None, Option(help="PNG to write")] = None,
    seed: int = 0,
) -> None:
    """End the drawings, and print what judges accept."""
    model, scores = load_checkpoint(checkpoint)
    data = load(scores["dataset"])
    drawings = torch.stack([ink(pen, strokes) for _, pen, strokes in DRAWINGS])
    observed = drawings.repeat_interleave(NUM_ENDINGS, dim=0)
    u = torch.rand(observed.shape, generator=generator_for(seed), dtype=torch.float64)
    endings, score = complete_and_score(model, observed.long(), observed, u, temperature=TEMPERATURE)
    order = score().view(-1, NUM_ENDINGS).argsort(dim=1, descending=True)  # the likely ones first
    shown = endings.view(len(drawings), NUM_ENDINGS, *drawings.shape[1:])[torch.arange(len(drawings))[:, None], order]
    which = load_params().evaluate.judges[data.name]
    judges = {name: load_judge(which, name, data) for name in ("judge", "held_back")}
    looks = {name: judge.look(shown.flatten(0, 1), data.num_levels) for name, judge in judges.items()}
    print("| drawing | the judge takes, of nine | the one held back | as which digits |\n| --- | --- | --- | --- |")
    for i, (name, _, _) in enumerate(DRAWINGS):
        part = slice(i * NUM_ENDINGS, (i + 1) * NUM_ENDINGS)
        taken = {judge: look[0][part] for judge, look in looks.items()}
        digits = sorted(set(looks["held_back"][1][part][taken["held_back"]].tolist()))
        counts = " | ".join(str(int(accepted.sum())) for accepted in taken.values())
        print(f"| {name} | {counts} | {', '.join(data.label_names[d] for d in digits)} |")
    shares = " | ".join(f"{look[0].float().mean():.2f}" for look in looks.values())
    print(f"| all | {shares} | |")
    if sheet:
        picture(drawings, shown).quantize(8).save(sheet, optimize=True)


if __name__ == "__main__":
    sys.exit(command(main))
