"""A photo's ink is found whatever the light, and laid as in the model's images."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
import PIL.ImageOps
import pytest
import safetensors.numpy

from app.canvas.photo import Layout, find_ink, layout_of, open_picture

SHAPE = (28, 28)
# A 4: points of its strokes, in a square of side 1.
STROKES = [[(0.6, 0.0), (0.0, 0.65), (1.0, 0.65)], [(0.7, 0.35), (0.7, 1.0)]]


def photo(
    paper: float, ink: float, slope: float = 0.0, size: tuple[int, int] = (900, 700), width: int = 22, noise: float = 3
) -> PIL.Image.Image:
    """Return a grey picture of a 4, upright, off the middle, on unevenly lit paper."""
    mask = PIL.Image.new("L", size)
    for stroke in STROKES:
        points = [(150 + 260 * x, 120 + 400 * y) for x, y in stroke]
        PIL.ImageDraw.Draw(mask).line(points, fill=255, width=width, joint="curve")
    share = np.asarray(mask) / 255
    light = 1 + slope * (np.linspace(-1, 1, size[0])[None] + np.linspace(-1, 1, size[1])[:, None]) / 2
    values = (paper + (ink - paper) * share) * light + noise * np.random.default_rng(0).standard_normal(share.shape)
    return PIL.Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def with_dark_edges(picture: PIL.Image.Image) -> PIL.Image.Image:
    """As a lens takes it."""
    x, y = np.meshgrid(*(np.linspace(-1, 1, side) for side in picture.size))
    return PIL.Image.fromarray((np.asarray(picture) * (1 - (x * x + y * y) / 4)).astype(np.uint8))


def saved(picture: PIL.Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Return intersection over union of two grids' ink."""
    a, b = one >= 128, other >= 128
    return float((a & b).sum() / (a | b).sum())


CLEAN = find_ink(saved(photo(255, 0, noise=0)), SHAPE, Layout())


def test_the_ink_lies_as_in_mnist() -> None:
    ink = np.argwhere(CLEAN >= 128)
    assert ink.min(axis=0)[0] >= 3
    assert ink.max(axis=0)[0] - ink.min(axis=0)[0] + 1 == pytest.approx(20, abs=1)  # it is taller than wide
    middle = (np.indices(SHAPE) * CLEAN).sum(axis=(1, 2)) / CLEAN.sum()
    assert np.abs(middle - 13.5).max() <= 0.5
    assert CLEAN[:4].sum() == CLEAN[:, :4].sum() == 0
    assert CLEAN.max() == 255
    assert 60 <= (CLEAN >= 128).sum() <= 160  # a digit's ink: about a hundred cells


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(photo(235, 40), id="dark pen on white paper"),
        pytest.param(photo(150, 60, slope=0.6), id="grey paper, light from one side"),
        pytest.param(photo(40, 210, slope=0.3), id="light chalk on a dark board"),
        pytest.param(photo(200, 130, noise=8), id="a faint pencil, grainy"),
        pytest.param(photo(200, 156), id="a hard pencil"),
        pytest.param(photo(120, 50, slope=1.2), id="a corner in the dark"),
        pytest.param(with_dark_edges(photo(235, 60)), id="light in the middle"),
        pytest.param(photo(200, 100, noise=30), id="taken at night"),
    ],
)
def test_the_same_ink_is_found_in_any_light(picture: PIL.Image.Image) -> None:
    assert agreement(find_ink(saved(picture), SHAPE, Layout()), CLEAN) >= 0.85
    assert agreement(find_ink(saved(picture.convert("RGB"), "JPEG", quality=80), SHAPE, Layout()), CLEAN) >= 0.85


def test_a_photo_is_turned_as_its_camera_says() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    lying = photo(235, 40).transpose(PIL.Image.Transpose.ROTATE_90)
    assert agreement(find_ink(saved(lying, "JPEG", exif=exif), SHAPE, Layout()), CLEAN) >= 0.85


def test_a_photo_of_more_pixels_than_a_picture_may_have_is_read_at_a_smaller_size() -> None:
    assert open_picture(saved(PIL.Image.new("L", (6400, 4800)), "JPEG")).size == (800, 600)


def test_a_photo_that_is_held_as_a_whole_counts_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = PIL.Image.new("L", (3200, 2400))
    monkeypatch.setattr("app.canvas.photo.MAX_PIXELS", 2_000_000)
    assert open_picture(saved(picture, "JPEG")).size == (800, 600)
    with pytest.raises(ValueError, match="too large"):
        open_picture(saved(picture, "JPEG", progressive=True))


def test_grey_of_16_bits_is_read_in_full() -> None:
    gradient = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    opened = np.asarray(open_picture(saved(PIL.Image.fromarray(gradient))))
    assert (opened[..., 0] == np.arange(256).reshape(16, 16)).all()


def test_what_no_decoder_of_ours_should_see_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    def trip(_: object) -> None:
        raise TypeError("a tag of the camera's is of no type")

    for kind in ("GIF", "EPS", "TIFF"):  # whatever the file is called
        with pytest.raises(ValueError, match="no picture that can be read"):
            open_picture(saved(photo(255, 0), kind))
    monkeypatch.setattr(PIL.ImageOps, "exif_transpose", trip)
    with pytest.raises(ValueError, match="no picture that can be read"):
        open_picture(saved(photo(255, 0), "JPEG"))


def test_a_thin_pen_becomes_a_stroke() -> None:
    thin = find_ink(saved(photo(235, 40, width=5)), SHAPE, Layout())
    assert (thin >= 128).sum() >= 60
    assert agreement(thin, CLEAN) >= 0.6


def test_a_thin_pen_does_not_keep_the_page_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow works for as long as a filter's window has pixels, and no other visit gets an answer meanwhile."""
    sizes, max_filter = set(), PIL.ImageFilter.MaxFilter
    monkeypatch.setattr(PIL.ImageFilter, "MaxFilter", lambda size: sizes.add(size) or max_filter(size))
    find_ink(saved(photo(235, 40, width=4)), SHAPE, Layout())
    assert sizes == {3}


def test_ink_on_a_clear_ground_and_pictures_as_small_as_the_grid() -> None:
    clear = PIL.Image.new("RGBA", (300, 300))
    PIL.ImageDraw.Draw(clear).ellipse((100, 60, 220, 180), fill=(10, 20, 90, 255))
    disc = find_ink(saved(clear), (28, 28), Layout(by_mass=False))
    assert [int(v) for v in (disc >= 128).any(axis=1).nonzero()[0][[0, -1]]] == [4, 23]
    own = PIL.Image.fromarray((255 * (CLEAN >= 128)).astype(np.uint8))
    assert agreement(find_ink(saved(own), SHAPE, Layout()), CLEAN) >= 0.8


def test_no_ink_leaves_the_grid_however_it_is_laid() -> None:
    tadpole = PIL.Image.new("L", (300, 400), 255)
    PIL.ImageDraw.Draw(tadpole).ellipse((100, 30, 200, 130), fill=0)
    PIL.ImageDraw.Draw(tadpole).line((150, 130, 150, 370), fill=0, width=4)
    rows, _ = np.argwhere(find_ink(saved(tadpole), SHAPE, Layout(stroke=0)) > 0).T
    assert (rows.max() - rows.min() + 1, rows.max()) == (20, 27)


def test_the_grid_need_not_be_square() -> None:
    ink = find_ink(saved(photo(235, 40)), (48, 32), Layout(fill=0.9, by_mass=False))
    rows, columns = np.argwhere(ink >= 128).T
    assert ink.shape == (48, 32)
    assert columns.max() - columns.min() + 1 == pytest.approx(0.9 * 32, abs=2)
    assert rows.max() + rows.min() == pytest.approx(47, abs=2)


def test_the_layout_is_measured() -> None:
    levels = safetensors.numpy.load_file(Path(__file__).parents[1] / "released" / "mnist.safetensors")["levels"]
    layout = layout_of(255 * levels[:16, 0].astype(int))
    assert layout.fill == pytest.approx(20 / 28, abs=0.04)
    assert layout.by_mass
    assert layout.has_paper
    assert layout.stroke == pytest.approx(Layout().stroke, abs=0.5)
    boxes = np.zeros((8, 24, 20), dtype=int)
    for i in range(8):
        boxes[i, 3:21, 4 : 7 + i] = boxes[i, 3:6, 4:16] = 255
    assert layout_of(boxes).fill == pytest.approx(0.75)
    assert not layout_of(boxes).by_mass
    filled = layout_of(np.full((3, 9, 9), 200))
    assert (filled.has_paper, filled.stroke) == (False, 9 / 12)
    assert not layout_of(np.full((3, 9, 9), 200) * (np.arange(9) < 1)).has_paper
    assert layout_of(np.zeros((3, 9, 9))) == Layout()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(PIL.Image.new("1", (8000, 8000))), "This picture is too large. Upload one of at most 25 million"),
        (b"", "This file is no picture that can be read. Upload a PNG or a JPEG."),
        (b"no picture", "This file is no picture that can be read. Upload a PNG or a JPEG."),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "This file is no picture that can be read. Upload a PNG or a JPEG."),
        *(  # what shows through the paper is no ink either
            (saved(photo(200, ink)), "No ink was found in this picture. Take it nearer, on plain paper.")
            for ink in (200, 180)
        ),
        *(
            (saved(PIL.Image.new("L", size, 255)), "No ink was found in this picture. Take it nearer, on plain paper.")
            for size in ((300, 200), (1, 1))
        ),
    ],
)
def test_what_holds_no_ink_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_ink(data, SHAPE, Layout())
