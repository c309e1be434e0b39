"""Packing against general codecs: `python -m benchmarks.packing` measures test images, and writes into docs/packing.md.

    python -m benchmarks.packing                                    # all released pairs whose data are prepared
    python -m benchmarks.packing gated_pixelcnn-cifar10 --images 500
    python -m benchmarks.packing --folder DIR --checkpoint DIR      # a folder of PNG files of the model's size

Codecs for pictures get each image as a file of its own, and once all images as one sheet; general ones get the levels
of all, at 1 bit each where there are two. What they make is read again and compared. Times are of the processor, so
that other work on the machine does not count, and of one thread; JPEG XL and optipng start a process for each image.
Needed beside the project: optipng, cjxl and djxl (Debian: optipng, libjxl-tools), zstd, xz.
"""

import io
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from typer import Argument, Option

from benchmarks.command import command
from pixelcnn.checkpoint import WEIGHTS_FILE, load_checkpoint
from pixelcnn.data import load_dataset
from pixelcnn.images import to_picture, to_sheet, with_fewest_bits
from pixelcnn.packing import pack, unpack
from pixelcnn.packing.pictures import open_images
from pixelcnn.sampling.fast import sample, warm_up

PAGE, BEGIN, END = Path("docs/packing.md"), "<!-- python -m benchmarks.packing{} -->\n", "<!-- end -->\n"
TOOLS = ("optipng", "cjxl", "djxl", "zstd", "xz")
T = TypeVar("T")


class Row(NamedTuple):
    """What a codec makes of some images."""

    name: str
    num_images: int
    num_bytes: int
    pack_s: float
    unpack_s: float


def processor_s() -> float:
    """Return the processor time of this process and those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return the result of some work, and its processor time."""
    start = processor_s()
    result = work()
    return result, processor_s() - start


def pixels_of(pictures: Sequence[Image.Image]) -> bytes:
    return b"".join(picture.convert("RGB").tobytes() for picture in pictures)


def by_pillow(name: str, pictures: list[Image.Image], **options: Any) -> Row:
    """Code each picture by Pillow."""

    def encoded(picture: Image.Image) -> io.BytesIO:
        buffer = io.BytesIO()
        picture.save(buffer, **options)
        return buffer

    files, pack_s = timed(lambda: [encoded(picture) for picture in pictures])
    decoded, unpack_s = timed(lambda: [Image.open(file).convert("RGB") for file in files])
    assert pixels_of(decoded) == pixels_of(pictures), name
    return Row(name, len(pictures), sum(len(file.getvalue()) for file in files), pack_s, unpack_s)


def by_programs(name: str, pictures: list[Image.Image], encode: str, decode: str | None) -> Row:
    """Code each picture by a program.

    Args:
        encode: its words, from {png} to {file}; without {file} the PNG is replaced.
        decode: likewise, back; None where Pillow reads it.
    """
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        pngs = [folder / f"{i}.png" for i in range(len(pictures))]
        files = [png.with_suffix(".jxl") if "{file}" in encode else png for png in pngs]
        for picture, png in zip(pictures, pngs, strict=True):
            picture.save(png)

        def call(words: str) -> None:
            for png, file in zip(pngs, files, strict=True):
                filled = [word.format(png=png, file=file) for word in words.split()]
                subprocess.run(filled, check=True, capture_output=True)

        _, pack_s = timed(lambda: call(encode))
        num_bytes = sum(file.stat().st_size for file in files)
        unpack_s = timed(lambda: call(decode))[1] if decode else 0.0
        decoded, read_s = timed(lambda: [Image.open(png).convert("RGB") for png in pngs])
        assert pixels_of(decoded) == pixels_of(pictures), name
        return Row(name, len(pictures), num_bytes, pack_s, unpack_s or read_s)


def by_archiver(name: str, levels: Tensor, num_levels: int, encode: str, decode: str) -> Row:
    """Code the levels of all images as one file, by a program from standard input to standard output."""
    values = levels.byte().numpy()
    raw = np.packbits(values).tobytes() if num_levels == 2 else values.tobytes()

    def call(words: str, content: bytes) -> bytes:
        return subprocess.run(words.split(), input=content, capture_output=True, check=True).stdout

    made, pack_s = timed(lambda: call(encode, raw))
    back, unpack_s = timed(lambda: call(decode, made))
    assert back == raw, name
    return Row(name, len(levels), len(made), pack_s, unpack_s)


def by_model(checkpoint: Path, levels: Tensor, num_alone: int) -> tuple[list[Row], float]:
    """Pack by a model, and sample as many images as tell the time.

    Returns:
        All images packed, the first `num_alone` of them, and the sampler; and the size over the likelihood's.
    """
    model, _ = load_checkpoint(checkpoint)
    warm_up(model)
    num = min(64, len(levels))
    u = torch.rand(num, *model.config.image_shape, generator=torch.Generator().manual_seed(0))
    sample_s = timed(lambda: sample(model, u))[1] / num * len(levels)
    with tempfile.TemporaryDirectory() as name:
        given, file, back = (Path(name) / part for part in ("given.npy", "packed.pxl", "back.npy"))
        np.save(given, levels.byte().numpy())
        made, pack_s = timed(lambda: pack(checkpoint, given, file))
        _, unpack_s = timed(lambda: unpack(checkpoint, file, back))
        assert back.read_bytes() == given.read_bytes(), checkpoint
        np.save(given, levels[:num_alone].byte().numpy())
        some = pack(checkpoint, given, file.with_name("some.pxl"))
    over = (made.num_bytes - made.num_header_bytes) * 8 * np.log(2) / made.nats - 1
    rows = [
        Row(f"`{checkpoint.name}`", made.num_images, made.num_bytes, pack_s, unpack_s),
        Row(f"`{checkpoint.name}`", some.num_images, some.num_bytes, 0.0, 0.0),
        Row("its sampler", made.num_images, 0, 0.0, sample_s),
    ]
    return rows, over


def by_codecs(levels: Tensor, num_levels: int, num_alone: int) -> list[Row]:
    """Code images by general codecs: `num_alone` of them as a file each, all of them as one."""
    pictures = [with_fewest_bits(to_picture(image, num_levels), num_levels) for image in levels[:num_alone]]
    sheet = to_sheet(levels, num_levels, num_columns=int(np.ceil(np.sqrt(len(levels)))), zoom=1, gap=0)
    sheets = [with_fewest_bits(sheet, num_levels)]
    webp = {"format": "WEBP", "lossless": True, "quality": 100, "method": 6}
    cjxl, djxl = "cjxl -d 0 -e {} --num_threads=0 {{png}} {{file}}", "djxl --num_threads=0 {file} {png}"
    by_sheet = [
        by_pillow("all, one sheet, WebP lossless", sheets, **webp),
        by_programs("all, one sheet, JPEG XL -e 7", sheets, cjxl.format(7), djxl),
    ]
    return [
        by_pillow("PNG, Pillow optimized", pictures, format="PNG", optimize=True),
        by_programs("PNG, optipng -o7", pictures, "optipng -quiet -o7 {png}", None),
        by_pillow("WebP lossless", pictures, **webp, exact=True),
        by_programs("JPEG XL -e 9", pictures, cjxl.format(9), djxl),
        by_archiver("all, zstd -19", levels, num_levels, "zstd -19 --long -c", "zstd -d --long -c"),
        by_archiver("all, xz -9e", levels, num_levels, "xz -9e -T1 -c", "xz -d -c"),
        *(row._replace(num_images=len(levels)) for row in by_sheet),
    ]


def table(checkpoint: Path, images: str, levels: Tensor, rows: list[Row], over: float) -> str:
    """Return the figures of a pair in Markdown, from the rows of `by_model`, then those of others."""
    ours, some, sampler, *others = rows
    dims = levels[0].numel()
    weights = (checkpoint / WEIGHTS_FILE).stat().st_size
    each = {row.name: row.num_bytes / row.num_images for row in (ours, *others)}
    best = min((row for row in others if row.num_images == ours.num_images), key=lambda row: each[row.name])
    # By name: where few are measured, a file each are as many as all.
    best_alone = min((row for row in others if not row.name.startswith("all,")), key=lambda row: each[row.name])
    lines = [
        f"### `{checkpoint.name}`, {len(levels):,} {images}",
        "",
        "| codec | images | bytes per image | bits/dim | against the model | pack, ms per image | unpack |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in (ours, *others):
        model = ours if row.num_images == ours.num_images else some  # of the same images
        pack_ms, unpack_ms = (1000 * s / row.num_images for s in (row.pack_s, row.unpack_s))
        lines.append(
            f"| {row.name} | {row.num_images:,} | {each[row.name]:,.1f} | {each[row.name] * 8 / dims:.4f} | "
            f"{each[row.name] * model.num_images / model.num_bytes:.2f}x | {pack_ms:.2f} | {unpack_ms:.2f} |"
        )
    sample_ms = 1000 * sampler.unpack_s / sampler.num_images
    smaller = 1 - each[ours.name] / each[best.name]
    smaller_alone = 1 - some.num_bytes / best_alone.num_bytes
    pays_from = int(np.ceil(weights / (each[best.name] - each[ours.name]))) if smaller > 0 else 0
    lines += [
        "",
        f"0 mismatches. Size over the model's own NLL: {over:+.3%} (header apart). Unpacking takes "
        f"{ours.unpack_s / sampler.unpack_s:.2f} times its sampler's {sample_ms:.2f} ms. Against the best other, "
        f"{best.name}: {smaller:.0%} smaller"
        + (f"; with the weights, {weights:,} bytes, it pays from {pays_from:,} images on. " if pays_from else ". ")
        + f"Against the best of a file each, {best_alone.name}: {smaller_alone:.0%} smaller.",
        "",
    ]
    return "\n".join(lines)


def measured(checkpoint: Path, images: str, levels: Tensor, num_alone: int) -> str:
    """Pack images, (N, C, H, W), by a model and by the codecs; return the table."""
    num_levels = load_checkpoint(checkpoint)[0].config.num_levels
    rows, over = by_model(checkpoint, levels, num_alone)
    made = table(checkpoint, images, levels, rows + by_codecs(levels, num_levels, num_alone), over)
    print(made, flush=True)
    return made


def measure(
    pairs: Annotated[list[str] | None, Argument(help="released ones; all whose data are there if left out")] = None,
    num_images: Annotated[int, Option("--images", help="the first so many of the test split", min=1)] = 10_000,
    num_alone: Annotated[int, Option("--alone", help="images that picture codecs get as a file each", min=1)] = 1000,
    folder: Annotated[Path | None, Option(help="PNG files to pack instead, of the model's size and levels")] = None,
    checkpoint: Annotated[Path | None, Option(help="the model to pack them by")] = None,
) -> None:
    """Measure packing, and write the tables of docs/packing.md."""
    if (folder is None) != (checkpoint is None) or (folder is not None and pairs):
        raise ValueError("--folder and --checkpoint go together, and without pairs.")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise ValueError(
            f"{', '.join(missing)} must be installed: Debian's packages are optipng, libjxl-tools, zstd, xz-utils."
        )
    torch.set_num_threads(1)
    tables = []
    if folder is not None and checkpoint is not None:
        images = open_images(folder, "test", load_checkpoint(checkpoint)[0].config)
        levels = images.read(0, min(num_images, images.num))
        tables.append(measured(checkpoint, f"pictures of a folder, `{folder.name}`", levels, num_alone))
    released = sorted(path.parent.name for path in Path("weights").glob("[!.]*/config.json"))
    for pair in [] if folder else pairs or released:
        data = Path("data") / f"{pair.rpartition('-')[2]}.safetensors"
        if not pairs and not data.exists():
            print(f"left out: {pair}, for want of {data}")
            continue
        levels = load_dataset(data).levels("test", slice(0, num_images))
        tables.append(measured(Path("weights") / pair, "test images", levels, num_alone))
    if not tables:
        raise ValueError(f"nothing is measured, and {PAGE} stays: prepare data, or name --folder and --checkpoint.")
    begin = BEGIN.format(" --folder" if folder else "")
    before, rest = PAGE.read_text().split(begin)
    after = rest.split(END, 1)[1]
    PAGE.write_text(before + begin + "\n" + "\n".join(tables) + END + after)
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    sys.exit(command(measure))
