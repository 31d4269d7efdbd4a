"""Texts that exceed tiktoken's limits, with the ids that tiktoken would give them: huge runs of blanks or letters.

The pieces come from the `regex` package, which has no limit on its stack, and tiktoken merges inside each of them. Its
Unicode tables may be of another version than tiktoken's: the text with its huge pieces cut short, which tiktoken can
encode itself, must give the same ids both ways. Slow (some MB/s), and needed for very few documents.
"""

import re
from array import array
from collections.abc import Mapping
from io import StringIO

import numpy as np
import regex  # type: ignore[import-untyped]
import tiktoken

HUGE = 10_000
"""Characters of a piece that is cut short for the comparison."""

WINDOW = 1 << 20
"""Bytes that are merged at once; tiktoken needs 66 times as much memory."""

_OVERLAP = 1 << 12
"""Bytes of a window that are merged again with the next one; more than any token has."""


# blank, digit, letter (also every byte of a character beyond ASCII), other
_KIND = np.array([0 if i <= 32 else 1 if 48 <= i < 58 else 2 if i > 127 or chr(i).isalpha() else 3 for i in range(256)])
_KIND = _KIND.astype(np.uint8)


def longest_run(text: str) -> int:
    """Bytes of the longest run of only blanks, digits, letters or other signs; a piece is rarely longer."""
    data = np.frombuffer(text.encode(), np.uint8)
    longest = start = 0
    for first in range(0, len(data), 1 << 24):
        kind = _KIND[data[max(first - 1, 0) : first + (1 << 24)]]
        borders = np.flatnonzero(kind[1:] != kind[:-1]) + (max(first - 1, 0) + 1)
        if len(borders):
            longest = max(longest, int(np.diff(borders, prepend=start).max()))
            start = int(borders[-1])
    return max(longest, len(data) - start)


def encode_long(
    text: str, encoding: tiktoken.Encoding, pattern: str, special_tokens: Mapping[str, int]
) -> np.ndarray | None:
    """Ids (n,) uint32 of a text without lone surrogates, or None if they cannot be told from the engine's.

    Args:
        encoding: tiktoken's engine, made of `pattern`.
        special_tokens: name -> id of those that are not plain text.
    """
    if special_tokens:
        names = sorted(special_tokens, key=len, reverse=True)
        parts = []
        for number, part in enumerate(re.split("(" + "|".join(map(re.escape, names)) + ")", text)):
            found = np.array([special_tokens[part]]) if number % 2 else encode_long(part, encoding, pattern, {})
            if found is None:
                return None
            parts.append(found)
        return np.concatenate(parts).astype(np.uint32)
    ids, expected, shortened = array("I"), array("I"), StringIO()
    core = encoding._core_bpe.encode_single_piece
    try:
        for match in regex.finditer(pattern, text, timeout=60 + len(text) / 1e5):
            piece = match.group()
            if len(piece) <= HUGE:
                part = core(piece.encode())
                ids.extend(part)
            else:
                ids.frombytes(encode_piece(encoding, piece.encode()).tobytes())
                piece = piece[: HUGE // 2] + piece[-HUGE // 2 :]
                part = core(piece.encode())
            expected.extend(part)
            shortened.write(piece)
        direct = encoding.encode_to_numpy(shortened.getvalue(), disallowed_special=())
    except (regex.error, TimeoutError, ValueError):
        return None
    return np.array(ids, np.uint32) if np.array_equal(direct, np.array(expected, np.uint32)) else None


def encode_piece(
    encoding: tiktoken.Encoding, piece: bytes, window: int = WINDOW, overlap: int = _OVERLAP
) -> np.ndarray:
    """Ids (n,) uint32 of one piece of the pattern, merged window by window, exactly as if merged at once.

    Merging chooses the lowest rank first and the leftmost of these. If it makes [.., s] of one text and [t, ..] of
    another, and [s, t] of the bytes of s and t, then it makes [.., s, t, ..] of both texts together. For suppose that
    some merge were the first to cross the border: until then both sides go as they go alone, so that the two tokens it
    takes are a tail of s and a head of t, and what happens inside s and t depends on nothing outside. The merge would
    then also happen in the bytes of s and t alone, which is not so.
    """
    core = encoding._core_bpe.encode_single_piece

    def encode(start: int, size: int) -> np.ndarray:
        return np.array(core(piece[start : start + size]), np.uint32)

    def joins(left: int, right: int) -> bool:
        both = encoding.decode_single_token_bytes(left) + encoding.decode_single_token_bytes(right)
        return core(both) == [left, right]

    parts: list[np.ndarray] = []
    start, ids = 0, encode(0, window)
    while start + window < len(piece):
        border = start + window
        for keep in range(len(ids) - 1, 0, -1):
            border -= len(encoding.decode_single_token_bytes(int(ids[keep])))
            left = int(ids[keep - 1])
            # a few bytes tell nearly always whether a border is right, and cost little
            if start + window - border >= overlap and joins(left, int(encode(border, overlap)[0])):
                following = encode(border, window)
                if joins(left, int(following[0])):
                    break
        else:
            return encode(0, len(piece))
        parts.append(ids[:keep])
        start, ids = border, following
    return np.concatenate([*parts, ids])
