"""Pack and unpack whole files: blocks in parallel, in memory for a few of them, with an estimate of what is left."""

import math
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from pixelcnn.checkpoint import load_with_hash
from pixelcnn.data import replaced
from pixelcnn.packing.coder import ENGINE, Coder, OnImages
from pixelcnn.packing.container import MAX_BLOCK_IMAGES, Block, DamagedError, Header, Reader, block_bytes
from pixelcnn.packing.pictures import OnProgress, Unpacked, check_absent, load_labels, number_name, open_images

BATCH_IMAGES = 16  # more of them cost less per image for the coder, and more for the sampler's memory
# A block is decoded as a whole; its 12 bytes, and 4 that a code ends with, should not count.
BLOCK_BYTES = 24 * 1024

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` has made."""

    num_images: int
    num_bytes: int  # of the file
    num_header_bytes: int  # of them, those before the first block
    nats: float  # what the images cost by the model's own likelihood, given their labels
    num_left_out: int  # files of the folder that are no PNG


def _in_order(
    function: Callable[[Item, OnImages], Result], items: Iterable[Item], num_images: int, on_progress: OnProgress
) -> Generator[Result, None, None]:
    """Yield function(item, count) of each item, by threads, with no more than some results in memory.

    The function calls `count` with the images that it has done. Close the generator at the end.
    """
    num_threads = torch.get_num_threads()
    done, is_over, lock = 0, False, threading.Lock()

    def count(num: int) -> None:
        nonlocal done
        if is_over:  # the work of another thread has failed
            raise InterruptedError
        with lock:
            done += num
            on_progress(done, num_images)

    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item, count))
                if len(waiting) > num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            is_over = True
            pool.shutdown(cancel_futures=True)


def _crc(levels: Tensor, labels: Tensor | None) -> int:
    """Return the checksum of images and labels themselves."""
    crc = zlib.crc32(levels.byte().numpy().tobytes())
    return crc if labels is None else zlib.crc32((labels + 1).int().numpy().astype("<i4").tobytes(), crc)


def pack(
    checkpoint: Path,
    images: Path,
    out: Path,
    *,
    labels: Path | None = None,
    split: str = "test",
    block_images: int | None = None,
    on_progress: OnProgress = lambda done, num: None,
) -> Packed:
    """Pack images without loss into one file, which only the same checkpoint can unpack.

    Args:
        images: a folder of PNG files, one PNG, a `.npy` array (N, C, H, W), or a `split` of a prepared dataset.
        out: the file; it must not be there yet. It comes into being when all is packed.
        labels: a `.npy` array of whole numbers, or a dataset: they are kept, and told to the model.
        block_images: images per block: one of them costs the decoding of all; None for about 24 KiB per block.
        on_progress: called now and then, in any thread.

    Raises:
        ValueError: something does not fit; nothing was written.
    """
    check_absent(out)
    model, _, weights_sha256 = load_with_hash(checkpoint)
    config = model.config
    source = open_images(images, split, config)
    numbers = None if labels is None else load_labels(labels, split, source.num, config)
    coder = Coder(model, BATCH_IMAGES)

    def labels_of(some: range) -> Tensor | None:
        return None if numbers is None else numbers[some.start : some.stop]

    if block_images is None:
        # A first batch tells how many images a block can hold.
        first = range(min(BATCH_IMAGES, source.num))
        code, _ = coder.encode(source.read(0, first.stop), labels_of(first), lambda num: None)
        batches = math.ceil(BLOCK_BYTES / len(code) * len(first) / BATCH_IMAGES)
        block_images = min(batches * BATCH_IMAGES, MAX_BLOCK_IMAGES)
    is_numbered = source.names == [number_name(i, source.num) for i in range(source.num)]
    header = Header(
        image_shape=config.image_shape,
        num_levels=config.num_levels,
        num_images=source.num,
        block_images=block_images,
        batch_images=BATCH_IMAGES,
        has_labels=numbers is not None,
        weights_sha256=weights_sha256,
        engine=ENGINE,
        arithmetic=coder.arithmetic,
        probe=coder.probe(),
        names=None if is_numbered else source.names,
    )
    start = header.to_bytes()

    def encode(number: int, count: OnImages) -> tuple[bytes, float]:
        some = header.images_of(number)
        levels = source.read(some.start, some.stop)
        code, nats = coder.encode(levels, labels_of(some), count)
        return block_bytes(start, number, code, _crc(levels, labels_of(some))), nats

    total, encoded = 0.0, _in_order(encode, range(header.num_blocks), source.num, on_progress)
    with replaced(out) as new, open(new, "wb") as file, closing(encoded) as blocks:
        file.write(start)
        for block, nats in blocks:
            file.write(block)
            total += nats
    return Packed(
        num_images=source.num,
        num_bytes=out.stat().st_size,
        num_header_bytes=len(start),
        nats=total,
        num_left_out=source.num_left_out,
    )


def unpack(
    checkpoint: Path,
    file: Path,
    out: Path,
    *,
    images: tuple[int, int] | None = None,
    on_progress: OnProgress = lambda done, num: None,
) -> int:
    """Unpack what `pack` has packed; return how many images there were.

    Args:
        out: a `.npy` file, a folder for PNG files, or a `.png` for one image; it must not be there yet, or be empty.
        images: (start, stop) of the wanted ones; None for all. Only their blocks are read.
        on_progress: as of `pack`.

    Raises:
        ValueError: it cannot be unpacked here; nothing was written. Or it is damaged: what comes in whole blocks
            before the damage was written, if there is any.
    """
    if not file.is_file():
        raise ValueError(f"{file} is no file.")
    model, _, weights_sha256 = load_with_hash(checkpoint)
    with open(file, "rb") as opened:
        reader = Reader(opened, str(file))
        header = reader.header
        if header.weights_sha256 != weights_sha256 or (header.has_labels and not model.config.num_labels):
            raise ValueError(
                f"{file} holds images {header.image_shape} of {header.num_levels} levels, packed by the weights "
                f"{header.weights_sha256[:12]}..., those in {checkpoint} are {weights_sha256[:12]}.... Name the "
                "checkpoint that packed it."
            )
        first, stop = images or (0, header.num_images)
        if not 0 <= first < stop <= header.num_images:
            raise ValueError(f"{file} holds the images 0 to {header.num_images - 1}, got {first} to {stop - 1}.")
        if out.suffix == ".png" and stop - first != 1:
            raise ValueError(
                f"{out} can hold one image, not {stop - first}. Name a folder or a .npy file, or one image."
            )
        coder = Coder(model, header.batch_images)
        if header.engine != ENGINE or coder.probe() != header.probe:
            raise ValueError(
                f"{file} cannot be unpacked here: it was packed by {header.arithmetic}, whose results differ in their "
                f"last bits from those of {coder.arithmetic}. Take a machine, and versions, like the first."
            )
        wanted = range(first // header.block_images, (stop - 1) // header.block_images + 1)
        num_decoded = header.images_of(wanted[-1]).stop - header.images_of(wanted[0]).start

        def decode(block: Block | DamagedError, count: OnImages) -> tuple[Tensor, Tensor | None]:
            if isinstance(block, DamagedError):
                raise block
            number, code, images_crc = block
            some = header.images_of(number)
            try:
                levels, labels = coder.decode(code, len(some), header.has_labels, count)
            except ValueError as error:
                raise DamagedError(f"block {number}: {error}") from None
            if _crc(levels, labels) != images_crc:
                raise DamagedError(f"the images of block {number} do not come out as they were packed")
            here = slice(max(first - some.start, 0), stop - some.start)
            return levels[here], None if labels is None else labels[here]

        def name(i: int) -> str:
            return number_name(first + i, header.num_images) if header.names is None else header.names[first + i]

        unpacked = Unpacked(out, model.config, name)
        try:
            with closing(_in_order(decode, reader.blocks(wanted), num_decoded, on_progress)) as decoded:
                for levels, labels in decoded:
                    unpacked.write(levels, labels)
            unpacked.commit()
        except DamagedError as error:
            if unpacked.num == 0:
                raise ValueError(f"{file} is damaged: {error}. No image could be recovered.") from None
            unpacked.commit()
            end = first + unpacked.num
            lost = "the rest is lost" if end < stop else "none is lost"
            raise ValueError(
                f"{file} is damaged: {error}. Images {first} to {end - 1} are whole and now in {out}; {lost}."
            ) from None
        finally:
            unpacked.discard()
    return unpacked.num
