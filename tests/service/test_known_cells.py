"""From a drawing on the grid to its endings and back: the canvas's code, the client's and the service's, in process."""

import dataclasses
import json
import os

import httpx
import numpy as np
import pytest
import torch

from app.canvas.drawing import (
    HOLE,
    TOUCHED,
    Drawing,
    drawing_text,
    known_cells,
    levels_of,
    parse_drawing,
    per_cell,
    strength_of,
)
from app.client import ServiceClient
from app.service.champions import Champion, Champions
from app.service.jobs import SamplingJob
from app.service.wire import CompleteRequest, Identity, server_sent_event
from tests.service.champions import COLOUR, GREY, make_checkpoint

# `make test-slow`: PIXELCNN_TEST_DRAWINGS=10000.
NUM_DRAWINGS = int(os.environ.get("PIXELCNN_TEST_DRAWINGS", "1000"))
MODES = ("above", "ink", "touched", "mask")


def random_drawing(draw: np.random.Generator, shape: tuple[int, ...]) -> Drawing:
    """Ink of any strength or full, marks of every kind, dense or sparse."""
    mark = draw.choice([0, TOUCHED, HOLE], size=shape[:2], p=draw.dirichlet([1, 1, 0.3]))
    strength = draw.choice([draw.integers(256, size=shape), np.full(shape, 255)]) * draw.integers(2, size=shape)
    return Drawing(np.where(per_cell(mark == 0, strength), 0, strength), mark)


def in_process(tmp_path, monkeypatch) -> ServiceClient:
    """Return a client whose requests are read, computed and answered by the service's code, without a server."""
    champions = Champions(tmp_path)
    identity = Identity(**dict.fromkeys(Identity.model_fields, "toy"))
    completing = dataclasses.replace(GREY, context_features=2, completer_features=4)
    for dataset, config in (("grey", completing), ("colour", COLOUR)):
        model = make_checkpoint(tmp_path / dataset, config, seed=0)
        monkeypatch.setitem(champions._loaded, (dataset, "champion"), Champion(model, identity, {}))

    def answer(request: httpx.Request) -> httpx.Response:
        values = CompleteRequest.model_validate(json.loads(request.content))
        job = SamplingJob(champions.get(values.dataset), values)
        job.run_together([job])
        text = server_sent_event("result", job.done.result().model_dump_json())
        return httpx.Response(200, text=text, headers={"Content-Type": "text/event-stream"})

    return ServiceClient("http://service.test", transport=httpx.MockTransport(answer))


@pytest.mark.repeated
def test_no_known_cell_changes_in_random_drawings(tmp_path, monkeypatch) -> None:
    client = in_process(tmp_path, monkeypatch)
    draw = np.random.default_rng(0)
    torch.set_num_threads(1)
    num_changed, num_known, num_drawn = 0, 0, 0
    for number in range(NUM_DRAWINGS):
        dataset, shape, levels = (("grey", (5, 4), 2), ("colour", (4, 5, 3), 4))[number % 2]
        drawing = random_drawing(draw, shape)
        known = known_cells(drawing, MODES[number // 2 % 4], levels)
        assert not known[drawing.mark == HOLE].any()
        image = levels_of(parse_drawing(drawing_text(drawing), shape), levels)
        image *= per_cell(known, image)
        (answer,) = client.complete_stream(dataset, image.tolist(), known.tolist(), seed=number)
        completion = np.array(answer.completions[0])
        num_changed += int((completion != image)[known == 1].sum())
        num_known += int(known.sum())
        num_drawn += int((completion != image)[known == 0].sum())
        taken = Drawing(strength_of(completion, levels), np.full(shape[:2], TOUCHED))  # by a click
        assert np.array_equal(levels_of(taken, levels), completion)
    assert num_known > 5 * NUM_DRAWINGS
    assert num_drawn > 5 * NUM_DRAWINGS
    assert num_changed == 0
