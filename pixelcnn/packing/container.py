"""The file: a header, then blocks of images, each with its length and its checksums.

    89 "PXL" 0D 0A 1A 0A    version u16    length u32    CRC u32    header: JSON, by zlib
    length u32    CRC u32    CRC of the images u32    code            of each block

Numbers are little-endian. A block's CRC begins with the header's and the block's number: no block of another file or
place passes for it. That of the images (bytes of levels, then labels + 1) is compared when they are decoded. All
blocks but the last hold `block_images` images: those before a block are skipped by their lengths.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pixelcnn.config import check_int, checked_config

MAGIC, VERSION = b"\x89PXL\r\n\x1a\n", 1
_START, _FRAME = struct.Struct("<8sHII"), struct.Struct("<III")
MAX_HEADER_BYTES = 2**26
MAX_RATIO, MIN_HEADER_BYTES = 64, 2**16  # names that differ are compressed by less: more is made to take memory
MAX_TEXT = 1000  # characters of a text
MAX_BLOCK_IMAGES = 4096
MAX_BATCH_IMAGES = 64  # whose states are in memory at once

Block = tuple[int, bytes, int]  # its number, the code, and the CRC of the images


class DamagedError(ValueError):
    """A file that begins well and then is cut or altered."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself."""

    image_shape: tuple[int, int, int]  # (C, H, W)
    num_levels: int  # K
    num_images: int  # in all blocks
    block_images: int  # images of a block, but for the last
    batch_images: int  # images of a block that are coded in turns
    has_labels: bool  # whether each image has a label
    weights_sha256: str  # of the checkpoint that is needed
    engine: str  # what computed the probabilities
    arithmetic: str  # how, for people
    probe: str  # what it computed for two images that every model has (`Coder.probe`)
    names: list[str] | None = None  # of the pictures, relative; None where they are numbers

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        check_int("num_levels", self.num_levels, 1)
        check_int("num_images", self.num_images, 1)
        check_int("block_images", self.block_images, 1, MAX_BLOCK_IMAGES)
        check_int("batch_images", self.batch_images, 1, MAX_BATCH_IMAGES)
        for name in ("weights_sha256", "engine", "arithmetic", "probe"):
            text = getattr(self, name)  # which an error may show on a terminal
            if not (isinstance(text, str) and text.isprintable() and len(text) <= MAX_TEXT):
                raise ValueError(f"{name} must be a text.")
        if self.names is not None:
            names = self.names
            if not isinstance(names, list) or len(names) != self.num_images or not all(map(is_plain, names)):
                raise ValueError("names must be as many plain relative names as there are images.")
            if len(set(names)) != len(names):
                raise ValueError("names must differ.")

    @property
    def num_blocks(self) -> int:
        return -(-self.num_images // self.block_images)

    def images_of(self, block: int) -> range:
        return range(block * self.block_images, min((block + 1) * self.block_images, self.num_images))

    def to_bytes(self) -> bytes:
        """Return the beginning of a file; ValueError if the names are too long to be read again."""
        text = json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")).encode()
        packed = zlib.compress(text, 9)
        if len(text) > most_text(len(packed)):
            raise ValueError(f"the pictures' names take too much room, {len(text):,} bytes. Pack them in parts.")
        return _START.pack(MAGIC, VERSION, len(packed), zlib.crc32(packed)) + packed


def most_text(num_packed: int) -> int:
    """Return how many bytes a header may take that is so long in a file."""
    return min(MAX_HEADER_BYTES, MIN_HEADER_BYTES + MAX_RATIO * num_packed)


def is_text(name: str) -> bool:
    """Return whether a name is one in UTF-8: what a file system gives may hold other bytes."""
    return name.encode(errors="ignore").decode() == name


def is_plain(name: Any) -> bool:
    """Return whether a name can be written below a folder, and nowhere else."""
    if not isinstance(name, str) or not name.endswith(".png") or set(name) & {"\0", "\\", ":"}:
        return False
    is_below = str(PurePosixPath(name)) == name and ".." not in name.split("/") and not name.startswith("/")
    return is_below and is_text(name)


def block_bytes(header: bytes, number: int, code: bytes, images_crc: int) -> bytes:
    """Return a block as it is written, from the beginning of its file, its number, and what `Coder.encode` made."""
    return _FRAME.pack(len(code), _crc(header, number, code, images_crc), images_crc) + code


def _crc(header: bytes, number: int, code: bytes, images_crc: int) -> int:
    return zlib.crc32(code, zlib.crc32(struct.pack("<II", number, images_crc), zlib.crc32(header)))


class Reader:
    """Reads a packed file, which errors call `name`; ValueError if its header is damaged, or of another version."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file = file
        self.size = file.seek(0, os.SEEK_END)
        file.seek(0)
        self._start = file.read(_START.size)
        if not self._start.startswith(MAGIC):
            raise ValueError(f"{name} is no packed file: it does not begin like one.")
        if len(self._start) < _START.size:
            raise ValueError(f"{name} is damaged: it ends in its header.")
        _, version, length, crc = _START.unpack(self._start)
        if version != VERSION:
            raise ValueError(f"{name} is of format version {version}, this program reads version {VERSION}.")
        packed = file.read(min(length, self.size))
        if zlib.crc32(packed) != crc:
            raise ValueError(f"{name} is damaged: its header's checksum is wrong. Nothing can be recovered.")
        self._start += packed
        try:
            most = most_text(len(packed))
            text = zlib.decompressobj().decompress(packed, most + 1)
            if len(text) > most:
                raise ValueError("it is too long")
            self.header: Header = checked_config(Header, json.loads(text), "header")
        except (ValueError, TypeError, zlib.error, RecursionError) as error:
            raise ValueError(f"{name} has a header that makes no sense ({error}).") from None

    def blocks(self, wanted: range) -> Iterator[Block | DamagedError]:
        """Yield the blocks of some numbers, in order; then what is wrong: one is cut or altered, or something follows.

        That is not raised here, since the blocks before it may still be worked on.
        """
        place = len(self._start)
        for number in range(wanted.stop):
            self.file.seek(place)
            frame = self.file.read(_FRAME.size)
            length, crc, images_crc = _FRAME.unpack(frame) if len(frame) == _FRAME.size else (0, 0, 0)
            place += _FRAME.size + length
            if len(frame) < _FRAME.size or place > self.size:
                yield DamagedError(f"the file ends in block {number}, or its length there is wrong")
                return
            if number < wanted.start:
                continue
            code = self.file.read(length)
            if _crc(self._start, number, code, images_crc) != crc:
                yield DamagedError(f"the checksum of block {number} is wrong")
                return
            yield number, code, images_crc
            if number == self.header.num_blocks - 1 and place < self.size:
                yield DamagedError("something follows its last block")
