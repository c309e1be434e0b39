"""What the page makes of drawings: arrays alone, and the stand-in's answers."""

import io
import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest

from app.canvas.drawing import (
    HOLE,
    TOUCHED,
    Drawing,
    decode_drawing,
    drawing_text,
    encode_drawing,
    known_cells,
    levels_of,
    parse_drawing,
    strength_of,
    without,
)
from app.canvas.endings import Endings, Request, record, undrawn
from app.canvas.photo import fit_picture
from app.canvas.rendering import (
    ANIMATED_CELL,
    INK,
    MAX_FRAMES,
    PAPER,
    UNKNOWN,
    endings_html,
    gallery_html,
    png_size,
    saved_animation,
    saved_picture,
)
from app.canvas.views.surprise import labels_html
from tests.app.stub_service import StubService


def random_drawing(draw: np.random.Generator, shape: tuple[int, ...]) -> Drawing:
    """Ink or paint of any strength, marks of every kind."""
    return Drawing(draw.integers(256, size=shape), draw.choice([0, TOUCHED, HOLE], size=shape[:2]))


@pytest.mark.parametrize("shape", [(28, 28), (7, 6), (32, 32, 3), (5, 4, 3)])
def test_text_and_address_give_the_drawing_back(shape: tuple[int, ...]) -> None:
    draw = np.random.default_rng(1)
    for _ in range(100):
        drawing = random_drawing(draw, shape)
        for back in (parse_drawing(drawing_text(drawing), shape), decode_drawing(encode_drawing(drawing), shape)):
            assert np.array_equal(back.strength, drawing.strength)
            assert np.array_equal(back.mark, drawing.mark)


def test_old_addresses_are_still_read() -> None:
    drawing = decode_drawing("Y_hfwcDOwPCfgZGRiRFIAAA", (2, 4))  # from before there was colour
    assert drawing.strength.tolist() == [[0, 255, 120, 0], [7, 0, 0, 255]]
    assert drawing.mark.tolist() == [[0, 1, 1, 2], [1, 0, 1, 1]]


def test_address_of_another_shape_is_blank() -> None:
    for shape, other in (((28, 28), (32, 32, 3)), ((32, 32, 3), (28, 28)), ((32, 32), (28, 28))):
        address = encode_drawing(Drawing(np.ones(shape), np.ones(shape[:2])))  # a part of it would be a drawing
        assert not decode_drawing(address, other).mark.any()


def test_paint_is_known_whatever_its_colour() -> None:
    drawing = Drawing(np.zeros((3, 3, 3)), np.array([[0, 0, 0], [0, TOUCHED, HOLE], [0, HOLE, 0]]))
    assert known_cells(drawing, "ink", 256).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert known_cells(drawing, "above", 256).tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
    assert known_cells(drawing, "mask", 256).tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    assert known_cells(Drawing(drawing.strength[..., 0], drawing.mark), "ink", 256).sum() == 0  # ink of strength 0


def test_above_nothing_no_row_is_known() -> None:
    holes = Drawing(np.zeros((3, 3)), HOLE * np.eye(3, dtype=int))
    assert known_cells(holes, "above", 2).sum() == 0


@pytest.mark.parametrize(
    ("part", "removed"),
    [("lower", np.s_[2:, :]), ("upper", np.s_[:2, :]), ("left", np.s_[:, :2]), ("right", np.s_[:, 2:])],
)
def test_half_of_a_picture_becomes_a_hole(part: str, removed: tuple[slice, slice]) -> None:
    whole = Drawing(np.full((4, 5, 3), 200), np.full((4, 5), TOUCHED))
    half = without(whole, part)
    assert (half.mark[removed] == HOLE).all()
    assert not half.strength[removed].any()
    for values, before in ((half.mark, whole.mark), (half.strength, whole.strength)):
        kept = np.ones((4, 5), dtype=bool)
        kept[removed] = False
        assert (values[kept] == before[kept]).all()
    assert (without(whole, "").mark == TOUCHED).all()
    assert (whole.mark == TOUCHED).all()


def test_address_of_a_stroke_is_short() -> None:
    ink = np.zeros((28, 28), dtype=int)
    ink[4:12, 10:12] = 1
    assert len(encode_drawing(Drawing(255 * ink, ink))) < 100
    assert encode_drawing(Drawing(0 * ink, 0 * ink)) == ""


@pytest.mark.parametrize(
    "text", ["", "x", "AAAA", "ff01" * 783, "ff" * 784 + "03" * 784, "fg01" * 784, "\N{CHECK MARK}" * 3136, None]
)
def test_what_is_no_drawing_is_blank(text: str | None) -> None:
    drawing = parse_drawing(text, (28, 28))
    assert drawing.strength.shape == (28, 28)
    assert not drawing.mark.any()


@pytest.mark.parametrize("text", ["", "x", "%%%", "AAAA", "\N{CHECK MARK}", "eJztwTEBAAAAwqD1T20ND6AAAAAAAAAAAA"])
def test_what_is_no_drawing_in_an_address_is_blank(text: str) -> None:
    assert not decode_drawing(text, (28, 28)).strength.any()


def test_an_address_cannot_unpack_to_gigabytes() -> None:
    text = encode_drawing(Drawing(np.full((999, 999), 9), np.ones((999, 999))))
    tracemalloc.start()
    drawing = decode_drawing(text, (8, 8))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not drawing.mark.any()
    assert most < 500_000  # bytes, of the two million that are packed


def test_a_strength_counts_as_its_nearest_level() -> None:
    assert levels_of(Drawing(np.array([[127, 128]]), np.ones((1, 2))), 2).tolist() == [[0, 1]]
    for num_levels in (2, 8, 17, 256):
        levels = np.arange(num_levels)[None]
        drawing = Drawing(strength_of(levels, num_levels), np.ones(levels.shape))
        assert np.array_equal(levels_of(drawing, num_levels), levels)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_uploaded_picture_is_whole_and_centred() -> None:
    photograph = np.full((280, 140), 255, dtype=np.uint8)  # light paper
    photograph[:10, :10] = 0  # dark ink in its corner
    strength = fit_picture(png(photograph), (28, 28), dark_ink=True)
    assert np.argwhere(strength).tolist() == [[0, 7]]
    assert strength[0, 7] == 255
    strength = fit_picture(png(255 - photograph), (28, 28), dark_ink=False)
    assert np.argwhere(strength).tolist() == [[0, 7]]
    colour = np.zeros((64, 64, 3), dtype=np.uint8)
    colour[..., 1] = 200
    assert (fit_picture(png(colour), (32, 32, 3), dark_ink=False) == (0, 200, 0)).all()


def test_endings_are_continued_from_once_they_are_scored() -> None:
    ending = undrawn(Request("mnist5k", [[0, 1], [0, 0]], [[1, 1], [0, 0]], 2, None, 1.0, 5), 2, {})
    finished = replace(ending, images=np.maximum(ending.images, 0))
    for shown, number in ((ending, 0), (finished, 0), (replace(finished, log_probs=[-1.0, -2.0], seed=5), 2)):
        text = endings_html(shown, coloured=True, order="drawn")
        assert (text.count("data-ink"), text.count("<img")) == (number, 2)


def test_a_label_is_text_whatever_it_holds() -> None:
    """Those of pictures of one's own are names of folders."""
    ending = undrawn(Request("own", [[0]], [[0]], 1, None, 1.0, 5), 2, {})
    text = endings_html(replace(ending, log_probs=[-1.0], seed=5, names=["<i>a"]), coloured=True, order="drawn")
    assert "<b>&lt;i&gt;a</b>" in text
    assert 'title="1.443 bits/dim"' in text
    assert ": &lt;i&gt;a " in text, "in the picture's words, too, once"
    assert "&amp;lt;" not in text
    assert "<th>&lt;i&gt;a</th>" in labels_html(["<i>a"], [-1.0])


def test_bits_are_of_a_channel_of_what_was_added() -> None:
    ending = undrawn(Request("own", [[[0] * 3] * 2], [[1, 0]], 1, None, 1.0, 5), 256, {})
    text = endings_html(replace(ending, log_probs=[-6 * math.log(2)], seed=5), coloured=True, order="drawn")
    assert 'title="2.000 bits/dim"' in text


def test_the_likeliest_ending_stands_for_a_past_request() -> None:
    ending = undrawn(Request("own", [[0]], [[0]], 2, None, 1.0, 5), 2, {})
    text = gallery_html([replace(ending, images=np.array([[[0]], [[1]]]), log_probs=[-2.0, -1.0], seed=5)])
    assert text.count("data-ink") == text.count('data-ink="ff"') == 1


def test_an_animation_draws_pixel_by_pixel_and_rests_at_the_end() -> None:
    request = Request("own", [[0, 1], [0, 0]], [[1, 1], [0, 0]], 1, None, 1.0, 5)
    saved = saved_animation(Endings(request, 2, np.array([[[0, 1], [1, 0]]])), 0, coloured=False)
    gif, seen = PIL.Image.open(io.BytesIO(saved)), []
    for frame in PIL.ImageSequence.Iterator(gif):
        cells = np.array(frame.convert("RGB"))[::ANIMATED_CELL, ::ANIMATED_CELL]
        assert (cells[0] == (PAPER, INK)).all()
        seen.append(([tuple(cell) for cell in cells[1].tolist()], frame.info["duration"]))
    assert seen == [([UNKNOWN, UNKNOWN], 40), ([INK, UNKNOWN], 40), ([INK, PAPER], 2000)]
    assert gif.info["loop"] == 0, "without end"
    nothing = [[0] * 20] * 20
    whole = Endings(Request("own", nothing, nothing, 1, None, 1.0, 5), 2, np.array([nothing]))
    assert PIL.Image.open(io.BytesIO(saved_animation(whole, 0, coloured=False))).n_frames == MAX_FRAMES


def test_a_png_has_one_bit_per_pixel_where_that_holds_the_image() -> None:
    noise = np.random.default_rng(0).integers(2, size=(32, 32, 3))
    assert png_size(noise[..., 0], 2) < 256 < 3 * 32 * 32 / 8 < png_size(noise, 2)


def test_saved_sheet_is_large_and_crisp() -> None:
    request = Request("mnist5k", [[0, 1], [1, 0]], [[1, 1], [1, 1]], 4, None, 1.0, None)
    ending = Endings(request, 2, np.array([request.image] * 4))
    saved = np.array(PIL.Image.open(io.BytesIO(saved_picture(ending, True, "drawn", 3))))
    assert saved.shape == (110, 160, 3)
    assert (saved[10:30, 10:30] == PAPER).all()
    assert (saved[10:30, 30:50] == INK).all()
    alone = PIL.Image.open(io.BytesIO(saved_picture(replace(ending, images=ending.images[:1]), True, "drawn", 3)))
    assert alone.size == (60, 60), "no room for endings that are not there"


def test_record_is_a_request_that_gives_the_same_result(service: StubService) -> None:
    known = np.zeros((7, 6), dtype=int)
    request = Request("mnist5k", known.tolist(), known.tolist(), 3, 4, 0.5, None)
    answer = service.answer(vars(request))
    saved = json.loads(
        record(
            Endings(request, 2, np.array(answer["completions"]), answer["log_probs"], answer["seed"], answer["model"])
        )
    )
    again = service.answer(saved["request"])
    assert saved["request"]["seed"] == 4711
    assert {name: again[name] for name in ("completions", "log_probs")} == saved["result"]
    assert saved["model"]["version"] == "3"
