"""Files that may be packed: plain, gzip or zstd, told by their first bytes, read as a stream of blocks."""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
SUFFIXES = (".gz", ".zst", ".zstd")
BLOCK_BYTES = 1 << 18
_PACKED_BYTES = 1 << 16  # small, because what a damaged block unpacked to is lost


class Damaged(Exception):
    """The data of a file end in a way that shows that something is missing or changed."""


def unpacked(raw: BinaryIO, skip: int = 0, block_bytes: int = BLOCK_BYTES, name: str = "") -> Iterator[bytes]:
    """The content of a file, plain, gzip or zstd by its first bytes, from byte `skip` of the unpacked content on.

    The blocks are of about block_bytes, those of zstd as large as its own. A file without a byte whose `name` ends as
    those of packed files do is damaged: no packer writes one.

    Raises:
        Damaged: after everything that could be read.
    """
    head = b""
    while len(head) < 4 and (more := raw.read(4 - len(head))):
        head += more
    if not head and name.lower().endswith(SUFFIXES):
        raise Damaged("the file holds no packed data")
    if head[:2] == GZIP:
        blocks = _gunzip(raw, head, block_bytes)
    elif head == ZSTD:
        blocks = _unzstd(raw, head, block_bytes)
    else:
        if skip:
            raw.seek(skip)
            head = b""
        if head:
            yield head + raw.read(block_bytes)
        while block := raw.read(block_bytes):
            yield block
        return
    for block in blocks:
        if skip < len(block):
            yield block[skip:]
        skip = max(skip - len(block), 0)


def _gunzip(raw: BinaryIO, packed: bytes, block_bytes: int) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=31)
    while packed := packed or raw.read(min(_PACKED_BYTES, block_bytes)):
        try:
            if unpacker.eof:  # a file may hold several members, and zeros behind the last
                packed = packed.lstrip(b"\0")
                if not packed:
                    continue
                unpacker = zlib.decompressobj(wbits=31)
            block = unpacker.decompress(packed, block_bytes)
        except zlib.error as error:
            raise Damaged(f"the gzip data are damaged ({error})") from error
        packed = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
        if block:
            yield block
    if not unpacker.eof:
        if rest := unpacker.flush():
            yield rest
        raise Damaged("the gzip data are cut short")


def _unzstd(raw: BinaryIO, packed: bytes, block_bytes: int) -> Iterator[bytes]:
    import zstandard

    unpacker = zstandard.ZstdDecompressor().decompressobj()
    while packed := packed or raw.read(min(_PACKED_BYTES, block_bytes)):
        try:
            if unpacker.eof:
                unpacker = zstandard.ZstdDecompressor().decompressobj()
            block = unpacker.decompress(packed)
        except zstandard.ZstdError as error:
            raise Damaged(f"the zstd data are damaged ({error})") from error
        packed = unpacker.unused_data if unpacker.eof else b""
        if block:
            yield block
    if not unpacker.eof:
        raise Damaged("the zstd data are cut short")
