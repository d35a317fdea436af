"""TFRecord files and their `Example` messages in plain Python: framing, checksums, compression, protocol buffers.

A file is a row of records, each: uint64 length, uint32 masked CRC-32C of the length, payload, uint32 masked CRC-32C
of the payload (little-endian; TensorFlow, `core/lib/io/record_writer.h`). ZLIB and GZIP compress the whole file as one
stream. Only as much is held in memory as one record and one block need.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np

from genesplice_hf.data.crc32c import masked_crc32c
from genesplice_hf.data.files import GZIP_MAGIC, existing_file
from genesplice_hf.errors import DataError

_BLOCK_BYTES = 1 << 16
_HEAD_BYTES = 12
# zlib tells the two kinds of header apart itself.
_ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS

Feature = list[bytes] | np.ndarray


def read_records(path: str | PathLike[str], check_crc: bool = True) -> Iterator[bytes]:
    """Yields the payload of every record; whether the file is compressed, and how, is told by its content.

    Args:
        path: a TFRecord file, plain, ZLIB or GZIP.
        check_crc: check the payloads (that of the length is always checked).

    Raises:
        DataError: the file is absent, empty, of another kind, cut off, or damaged; with its name and the number of
            the record, counted from 0.
    """
    file = existing_file(path)
    with file.open("rb") as stream:
        yield from _records(_Stream(stream, file), check_crc)


def parse_example(payload: bytes) -> dict[str, Feature]:
    """The features of a serialised `tf.train.Example`.

    Returns:
        Key -> a list of byte strings, float32 (n,) or int64 (n,), as the feature holds them.

    Raises:
        DataError: the bytes are no `Example`.
    """
    try:
        return dict(_map_entry(entry) for features in _all(payload, 1) for entry in _all(features, 1))
    except (IndexError, ValueError, struct.error) as error:
        raise DataError(f"A record of {len(payload)} bytes is no tf.train.Example ({error}).") from error


class _Stream:
    """The decompressed bytes of a file, a few at a time."""

    def __init__(self, stream: BinaryIO, file: Path) -> None:
        self.file = file
        self.record = 0
        self._stream = stream
        self._held = bytearray()
        head = stream.read(_HEAD_BYTES)
        stream.seek(0)
        if not head:
            raise DataError(f"{file} is empty; it should hold TFRecords. Copy or download it again.")
        self._unpack = None if _frames(head) else self._decompressor(head)

    def read(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end of the data only."""
        while len(self._held) < count and (block := self._block()):
            self._held += block
        taken = bytes(memoryview(self._held)[:count])
        del self._held[:count]
        return taken

    def damaged(self, what: str) -> DataError:
        return DataError(f"{self.file} is {what} in record {self.record} (counted from 0); copy or download it again.")

    def _decompressor(self, head: bytes) -> "zlib._Decompress":
        is_zlib = head[0] & 0x0F == 8 and len(head) > 1 and (head[0] << 8 | head[1]) % 31 == 0
        if not is_zlib and not head.startswith(GZIP_MAGIC):
            raise DataError(f"{self.file} is no TFRecord file: neither plain, nor ZLIB, nor GZIP, or damaged at once.")
        return zlib.decompressobj(_ZLIB_OR_GZIP)

    def _block(self) -> bytes:
        if self._unpack is None:
            return self._stream.read(_BLOCK_BYTES)
        unpacked = b""
        while not unpacked:
            if self._unpack.eof and not self._next_member():
                return b""
            packed = self._unpack.unconsumed_tail or self._stream.read(_BLOCK_BYTES)
            if not packed:
                raise self.damaged("truncated")
            try:
                unpacked = self._unpack.decompress(packed, 16 * _BLOCK_BYTES)
            except zlib.error as error:
                raise self.damaged(f"damaged ({error})") from error
        return unpacked

    def _next_member(self) -> bool:
        """Goes on to a stream that follows the one that has ended; false where none does."""
        assert self._unpack is not None
        self._stream.seek(-len(self._unpack.unused_data), os.SEEK_CUR)
        if not (head := self._stream.read(_HEAD_BYTES)):
            return False
        self._stream.seek(-len(head), os.SEEK_CUR)
        self._unpack = self._decompressor(head)
        return True


def _frames(head: bytes) -> bool:
    """Whether these first bytes are a length and its checksum."""
    return len(head) == _HEAD_BYTES and masked_crc32c(head[:8]) == int.from_bytes(head[8:], "little")


def _records(stream: _Stream, check_crc: bool) -> Iterator[bytes]:
    while head := stream.read(_HEAD_BYTES):
        if len(head) < _HEAD_BYTES:
            raise stream.damaged("truncated")
        if not _frames(head):
            raise stream.damaged("damaged (the checksum of the length does not fit)")
        length = int.from_bytes(head[:8], "little")
        payload, crc = stream.read(length), stream.read(4)
        if len(payload) < length or len(crc) < 4:
            raise stream.damaged("truncated")
        if check_crc and masked_crc32c(payload) != int.from_bytes(crc, "little"):
            raise stream.damaged("damaged (the checksum of the payload does not fit)")
        yield payload
        stream.record += 1


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _message(data: bytes | memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yields `(field number, value)`: an int for a varint, else the bytes."""
    view, at = memoryview(data), 0
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield tag >> 3, value
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"wire type {kind}")
        size, at = _varint(view, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if at + size > len(view):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, view[at : at + size]
        at += size


def _all(data: bytes | memoryview, number: int) -> Iterator[memoryview]:
    for field, value in _message(data):
        if field == number:
            if isinstance(value, int):
                raise ValueError(f"field {number} is a number")
            yield value


def _map_entry(entry: memoryview) -> tuple[str, Feature]:
    key = b"".join(_all(entry, 1)).decode("utf-8")
    for number, value in _message(b"".join(_all(entry, 2))):
        if isinstance(value, int):
            raise ValueError(f"feature {key!r} is a number")
        if number == 1:
            return key, [bytes(item) for item in _all(value, 1)]
        if number == 2:
            return key, np.frombuffer(b"".join(_all(value, 1)), dtype="<f4")
        if number == 3:
            return key, np.array(list(_whole_numbers(value)), dtype=np.int64)
    return key, []


def _whole_numbers(data: memoryview) -> Iterator[int]:
    """Values of an `Int64List`, packed or one by one."""
    for number, value in _message(data):
        if number == 1 and isinstance(value, int):
            yield _signed(value)
        elif number == 1 and not isinstance(value, int):
            at = 0
            while at < len(value):
                whole, at = _varint(value, at)
                yield _signed(whole)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
