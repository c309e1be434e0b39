import io
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelcnn.images import MAX_PNG_BYTES, from_png, to_picture, to_png, to_sheet
from tests.core.tiny import exactly


def png_bytes(picture: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=file_format)
    return buffer.getvalue()


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    num_levels=st.integers(2, 256),
    data=st.data(),
)
def test_png_round_trip(channels, height, width, num_levels, data):
    size = channels * height * width
    values = data.draw(st.lists(st.integers(0, num_levels - 1), min_size=size, max_size=size))
    levels = torch.tensor(values).reshape(channels, height, width)
    read = from_png(to_png(levels, num_levels), (channels, height, width), num_levels)
    assert read.dtype == torch.int64
    assert torch.equal(read, levels)


@pytest.mark.parametrize("channels", [2, 4])
def test_there_are_no_pictures_of_other_channels(channels):
    levels = torch.zeros(channels, 4, 4, dtype=torch.int64)
    for work in (
        lambda: to_picture(levels, 2),
        lambda: to_sheet(levels[None], 2, 1),
        lambda: from_png(to_png(levels[:1], 2), (channels, 4, 4), 2),
    ):
        with pytest.raises(ValueError, match=f"1 channel .grey. or 3 .colour., the model's images have {channels}"):
            work()


def test_level_0_is_black_and_the_last_one_white():
    assert list(to_picture(torch.tensor([[[0, 1, 2]]]), 3).tobytes()) == [0, 128, 255]
    assert list(to_picture(torch.tensor([[[0, 1]]]), 2).tobytes()) == [0, 255]
    red_then_blue = torch.tensor([[[1, 0]], [[0, 0]], [[0, 1]]])
    assert list(to_picture(red_then_blue, 2).tobytes()) == [255, 0, 0, 0, 0, 255]


def test_grey_values_are_rounded_to_the_nearest_level():
    picture = Image.new("L", (4, 1))
    picture.putdata([0, 127, 128, 255])
    assert from_png(png_bytes(picture), (1, 1, 4), 2).tolist() == [[[0, 0, 1, 1]]]
    assert from_png(png_bytes(picture), (1, 1, 4), 3).tolist() == [[[0, 1, 1, 2]]]


def test_other_kinds_of_png_are_converted():
    rgb = Image.new("RGB", (1, 1), (255, 255, 255))
    assert from_png(png_bytes(rgb), (1, 1, 1), 256).tolist() == [[[255]]]
    palette = Image.new("RGB", (1, 1), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert from_png(png_bytes(palette), (3, 1, 1), 256).flatten().tolist() == [10, 20, 30]
    assert from_png(png_bytes(Image.new("L", (1, 1), 7)), (3, 1, 1), 256).flatten().tolist() == [7, 7, 7]


def test_what_is_transparent_is_not_read_as_ink():
    """White strokes on white that is clear would be a white page."""
    clear = torch.tensor([[True, False], [False, False]])
    alpha = Image.fromarray(torch.where(clear, 0, 255).byte().numpy())
    message = "image is transparent where it counts: lay it on black or white first."
    for mode in ("L", "RGB"):
        picture = Image.new(mode, (2, 2), "white")
        picture.putalpha(alpha)
        for observed in (None, clear, clear[None, None], clear[:1]):
            with pytest.raises(ValueError, match=exactly(message)):
                from_png(png_bytes(picture), (1, 2, 2), 2, observed=observed)
        assert bool((from_png(png_bytes(picture), (1, 2, 2), 2, observed=~clear) == 1).all())
    palette = io.BytesIO()
    Image.new("P", (2, 2)).save(palette, "PNG", transparency=0)
    with pytest.raises(ValueError, match=exactly(message)):
        from_png(palette.getvalue(), (1, 2, 2), 2)


def test_a_png_of_another_size_is_never_resized():
    for shape in ((2, 3), (3, 2), (28, 28)):
        with pytest.raises(ValueError, match=exactly(f"image must be 4 x 5 pixels, got {shape[0]} x {shape[1]}.")):
            from_png(png_bytes(Image.new("L", shape)), (1, 5, 4), 2)


@pytest.mark.parametrize("bad", [b"", b"hello", b"\x89PNG\r\n\x1a\n", png_bytes(Image.new("L", (4, 5)), "GIF")])
def test_what_is_no_png_is_refused(bad):
    with pytest.raises(ValueError, match="image is no readable PNG: "):
        from_png(bad, (1, 5, 4), 2)


def test_a_damaged_png_is_refused_or_read_never_anything_else():
    good = to_png(torch.arange(20).reshape(1, 5, 4), 20)
    refusals = []
    for i in range(len(good)):
        for damaged in (good[:i], good[:i] + bytes([good[i] ^ 0xFF]) + good[i + 1 :]):
            try:
                assert from_png(damaged, (1, 5, 4), 20).shape == (1, 5, 4)
            except ValueError as error:
                refusals.append(str(error))
    assert len(refusals) > 50
    assert all(message.startswith("image ") for message in refusals)


def test_what_would_be_read_as_something_else_is_refused():
    with pytest.raises(ValueError, match=exactly("image is a PNG of 16 bits per channel: save it with 8.")):
        from_png(png_bytes(Image.new("I;16", (4, 5))), (1, 5, 4), 2)
    pictures = [Image.new("L", (4, 5), grey) for grey in (0, 255)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG", save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match=exactly("image is an animated PNG: take one picture of it.")):
        from_png(buffer.getvalue(), (1, 5, 4), 2)


def test_chunks_that_a_decoder_trips_over_are_no_error_of_ours():
    """Their checksums are right: whoever made them meant it."""
    good = to_png(torch.zeros(1, 5, 4, dtype=torch.int64), 2)
    for kind in ("IHDR", "PLTE", "tRNS", "gAMA", "cHRM", "pHYs", "iCCP", "sRGB", "tEXt", "zTXt", "iTXt", "eXIf"):
        for body in (b"", b"\0", b"\xff" * 3, b"a\0b\0c", bytes(30)):
            named = kind.encode() + body
            chunk = struct.pack(">I", len(body)) + named + struct.pack(">I", zlib.crc32(named))
            for place in (8, 33):
                try:
                    assert from_png(good[:place] + chunk + good[place:], (1, 5, 4), 2).shape == (1, 5, 4)
                except ValueError as error:
                    assert str(error).startswith("image ")  # noqa: PT017


def test_a_large_file_is_refused_unread():
    with pytest.raises(ValueError, match=exactly("image must be a PNG of at most 1000000 bytes, got 1000001.")):
        from_png(b"x" * (MAX_PNG_BYTES + 1), (1, 5, 4), 2)


def test_a_sheet_lays_images_out_row_by_row():
    levels = torch.tensor([0, 1, 0, 1, 1])[:, None, None, None].expand(5, 1, 2, 3)  # black, white, black, white, white
    sheet = to_sheet(levels, 2, num_columns=3, zoom=2, gap=1)
    assert (sheet.mode, sheet.size) == ("L", (3 * 7 + 1, 2 * 5 + 1))
    # One pixel of ground, then 6 of image, and so on; the last cell of the second row stays ground.
    ground, first = [128] * 22, [128, *[0] * 6, 128, *[255] * 6, 128, *[0] * 6, 128]
    second = [128, *[255] * 6, 128, *[255] * 6, *[128] * 8]
    rows = [[sheet.getpixel((x, y)) for x in range(22)] for y in range(11)]
    assert rows == [ground, *[first] * 4, ground, *[second] * 4, ground]


def test_a_colour_sheet():
    sheet = to_sheet(torch.tensor([1, 0, 0]).reshape(1, 3, 1, 1), 2, num_columns=1, zoom=1, gap=2)
    assert (sheet.mode, sheet.size) == ("RGB", (5, 5))
    assert sheet.getpixel((2, 2)) == (255, 0, 0)
    assert sheet.getpixel((1, 2)) == (128, 128, 128)
