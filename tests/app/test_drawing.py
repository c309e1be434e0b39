"""What the page makes of drawings: arrays alone, and the stand-in's answers."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from stub_service import StubService

from app.drawing import (
    HOLE,
    INK,
    PAPER,
    TOUCHED,
    Drawing,
    Ending,
    Request,
    decode_drawing,
    drawing_text,
    encode_drawing,
    ending_pixels,
    fit_picture,
    known_cells,
    levels_of,
    parse_drawing,
    record,
    sheet,
    strength_of,
)


def random_drawing(draw: np.random.Generator, shape: tuple[int, int]) -> Drawing:
    """Ink of any strength or full, marks of every kind, dense or sparse."""
    mark = draw.choice([0, TOUCHED, HOLE], size=shape, p=draw.dirichlet([1, 1, 0.3]))
    strength = draw.choice([draw.integers(256, size=shape), np.full(shape, 255)]) * draw.integers(2, size=shape)
    return Drawing(np.where(mark == 0, 0, strength), mark)


def test_no_known_cell_changes_in_10000_random_drawings(service: StubService) -> None:
    draw = np.random.default_rng(0)
    shape, num_changed, num_known = (7, 6), 0, 0
    datasets = {"mnist5k": 2, "fashion_mnist": 256}
    for number in range(10_000):
        drawing = random_drawing(draw, shape)
        dataset = ("mnist5k", "fashion_mnist")[number % 2]
        levels = datasets[dataset]
        known = known_cells(drawing, ("above", "ink", "touched", "mask")[number // 2 % 4], levels)
        assert not known[drawing.mark == HOLE].any()
        image = levels_of(parse_drawing(drawing_text(drawing), shape), levels) * known
        request = Request(dataset, image.tolist(), known.tolist(), 2, None, 1.0, number)
        ending = Ending(request, levels, np.array(service.answer(vars(request))["completions"]))
        for completion in ending.images:
            num_changed += int((completion != image)[known == 1].sum())
            num_known += int(known.sum())
            taken = Drawing(strength_of(completion, levels), np.full(shape, TOUCHED))  # by a click
            assert np.array_equal(levels_of(taken, levels), completion)
    assert num_known > 100_000
    assert num_changed == 0


def test_text_and_address_give_the_drawing_back() -> None:
    draw = np.random.default_rng(1)
    for _ in range(200):
        drawing = random_drawing(draw, (28, 28))
        for back in (
            parse_drawing(drawing_text(drawing), (28, 28)),
            decode_drawing(encode_drawing(drawing), (28, 28)),
        ):
            assert np.array_equal(back.strength, drawing.strength)
            assert np.array_equal(back.mark, drawing.mark)


def test_address_of_a_stroke_is_short() -> None:
    ink = np.zeros((28, 28), dtype=int)
    ink[4:12, 10:12] = 1
    assert len(encode_drawing(Drawing(255 * ink, ink))) < 100
    assert encode_drawing(Drawing(0 * ink, 0 * ink)) == ""


@pytest.mark.parametrize(
    "text", ["", "x", "AAAA", "ff1" * 783, "ff3" * 784, "fg1" * 784, "\N{CHECK MARK}" * 2352, None]
)
def test_what_is_no_drawing_is_blank(text: str | None) -> None:
    drawing = parse_drawing(text, (28, 28))
    assert drawing.strength.shape == (28, 28)
    assert not drawing.mark.any()


@pytest.mark.parametrize("text", ["", "x", "%%%", "AAAA", "\N{CHECK MARK}", "eJztwTEBAAAAwqD1T20ND6AAAAAAAAAAAA"])
def test_what_is_no_drawing_in_an_address_is_blank(text: str) -> None:
    assert not decode_drawing(text, (28, 28)).strength.any()


def test_an_address_cannot_unpack_to_gigabytes() -> None:
    assert not decode_drawing(encode_drawing(Drawing(np.full((999, 999), 9), np.ones((999, 999)))), (8, 8)).mark.any()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_uploaded_picture_is_whole_and_centred() -> None:
    photograph = np.full((280, 140), 255, dtype=np.uint8)  # light paper
    photograph[:10, :10] = 0  # dark ink in its corner
    strength = fit_picture(png(photograph), (28, 28), 1, dark_ink=True)
    assert np.argwhere(strength).tolist() == [[0, 7]]
    assert strength[0, 7] == 255
    strength = fit_picture(png(255 - photograph), (28, 28), 1, dark_ink=False)
    assert np.argwhere(strength).tolist() == [[0, 7]]
    colour = np.zeros((64, 64, 3), dtype=np.uint8)
    colour[..., 1] = 200
    assert (fit_picture(png(colour), (32, 32), 3, dark_ink=False) == (0, 200, 0)).all()


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_is_said(data: bytes) -> None:
    with pytest.raises(ValueError, match="no picture that can be read"):
        fit_picture(data, (28, 28), 1, dark_ink=True)


def test_saved_sheet_is_large_and_crisp() -> None:
    image = np.array([[0, 1], [1, 0]])
    pixels = ending_pixels(image, np.ones((2, 2)), 2, coloured=True)
    saved = np.array(PIL.Image.open(io.BytesIO(sheet([pixels] * 4, 3))))
    assert saved.shape == (110, 160, 3)
    assert (saved[10:30, 10:30] == PAPER).all()
    assert (saved[10:30, 30:50] == INK).all()


def test_record_is_a_request_that_gives_the_same_result(service: StubService) -> None:
    known = np.zeros((7, 6), dtype=int)
    request = Request("mnist5k", known.tolist(), known.tolist(), 3, 4, 0.5, None)
    answer = service.answer(vars(request))
    saved = json.loads(
        record(
            Ending(request, 2, np.array(answer["completions"]), answer["log_probs"], answer["seed"], answer["model"])
        )
    )
    again = service.answer(saved["request"])
    assert saved["request"]["seed"] == 4711
    assert {name: again[name] for name in ("completions", "log_probs")} == saved["result"]
    assert saved["model"]["version"] == "3"
