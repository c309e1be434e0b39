"""Levels to pictures and back: PNG files, and sheets of many images."""

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PNG_BYTES = 1_000_000


def mode_of(channels: int) -> str:
    """Return what Pillow calls pictures of so many channels; ValueError if there are none: only grey and RGB ones."""
    if channels not in (1, 3):
        raise ValueError(f"a picture has 1 channel (grey) or 3 (colour), the model's images have {channels}.")
    return "L" if channels == 1 else "RGB"


def to_picture(levels: Tensor, num_levels: int) -> Image.Image:
    """Return one image, (C, H, W) int64 levels, as a grey or RGB picture: level 0 is black, level K-1 is white."""
    mode_of(len(levels))
    pixels = (levels * 255 / (num_levels - 1)).round().to(torch.uint8)  # (C, H, W)
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy())  # grey has no third axis


def with_fewest_bits(picture: Image.Image, num_levels: int) -> Image.Image:
    """Return the smallest form of a picture that Pillow has: 1 bit per pixel for two levels of grey."""
    return picture.convert("1", dither=Image.Dither.NONE) if num_levels == 2 and picture.mode == "L" else picture


def to_png(levels: Tensor, num_levels: int, optimize: bool = False) -> bytes:
    """Return one image, (C, H, W) int64 levels, as a PNG; if optimized, of the fewest bytes that Pillow makes."""
    picture, buffer = to_picture(levels, num_levels), io.BytesIO()
    if optimize:
        picture = with_fewest_bits(picture, num_levels)
    picture.save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def from_png(
    png: bytes, image_shape: tuple[int, int, int], num_levels: int, exact: bool = False, observed: Tensor | None = None
) -> Tensor:
    """Read a PNG of exactly the size of an image as levels, (C, H, W) int64 in [0, K); it is never resized.

    Args:
        exact: refuse a picture whose pixels are not all levels, in place of rounding them.
        observed: (..., H, W) bool, or what broadcasts to it: the pixels that count; None for all.

    Raises:
        ValueError: it is no PNG, it is larger than 1 MB, of another size, of 16 bits, animated, transparent where it
            counts, or would be changed and must not.
    """
    channels, height, width = image_shape
    mode = mode_of(channels)
    if len(png) > MAX_PNG_BYTES:
        raise ValueError(f"image must be a PNG of at most {MAX_PNG_BYTES} bytes, got {len(png)}.")
    # Byte 24, in the header that begins every PNG, is the bit depth. Pillow would cut 16 bits to 8.
    if png[12:16] == b"IHDR" and png[24:25] == b"\x10":
        raise ValueError("image is a PNG of 16 bits per channel: save it with 8.")
    if b"acTL" in png[: png.find(b"IDAT")]:
        raise ValueError("image is an animated PNG: take one picture of it.")
    try:
        file = Image.open(io.BytesIO(png), formats=["PNG"])
        if file.size == (width, height):
            picture, rgba = np.array(file.convert(mode)), np.array(file.convert("RGBA"))
    except Image.DecompressionBombError:
        raise ValueError(f"image must be {width} x {height} pixels, got many more.") from None
    except Exception as error:  # a decoder that is fed with anything may raise anything
        # Of what is no PNG at all, Pillow's sentence names an object in memory.
        why = f" ({error})" if isinstance(error, OSError) and not isinstance(error, UnidentifiedImageError) else ""
        raise ValueError(f"image is no readable PNG{why}: save it anew.") from None
    if file.size != (width, height):
        raise ValueError(f"image must be {width} x {height} pixels, got {file.width} x {file.height}.")
    pixels = torch.from_numpy(picture).view(height, width, channels).permute(2, 0, 1)
    levels = (pixels.double() * (num_levels - 1) / 255).round().long()
    clear = torch.from_numpy(rgba[..., 3] < 255)
    if exact:
        is_8_bit = file.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
        if not is_8_bit or (rgba != np.array(to_picture(levels, num_levels).convert("RGBA"))).any():
            colours = "grey" if channels == 1 else "colour"
            raise ValueError(
                f"image must hold the {num_levels} levels of {colours} of the model and nothing else (black is the "
                "first one, white the last one): others would be changed."
            )
    elif bool((clear if observed is None else clear & observed).any()):
        raise ValueError("image is transparent where it counts: lay it on black or white first.")
    return levels


def to_sheet(levels: Tensor, num_levels: int, num_columns: int, zoom: int = 2, gap: int = 2) -> Image.Image:
    """Return images, (N, C, H, W) int64 in [0, K), as one picture, row by row, on a mid-grey ground.

    `zoom` is the side of each pixel, `gap` the pixels of ground around each image.
    """
    num, channels, height, width = levels.shape
    cell_height, cell_width = height * zoom + gap, width * zoom + gap
    num_rows = -(-num // num_columns)
    size = (num_columns * cell_width + gap, num_rows * cell_height + gap)
    sheet = Image.new(mode_of(channels), size, 128 if channels == 1 else (128, 128, 128))
    for i, image in enumerate(levels.cpu()):
        picture = to_picture(image, num_levels).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(picture, (gap + i % num_columns * cell_width, gap + i // num_columns * cell_height))
    return sheet
