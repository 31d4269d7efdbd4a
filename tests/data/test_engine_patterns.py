"""The faster spelling of tiktoken's patterns cuts every text as the original does."""

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from megayoco.data.tokenizer import CL100K_PATTERN
from megayoco.data.tokenizer.engine import PLAIN

BYTES = {bytes([i]): i for i in range(256)}
TEXT = st.text(
    st.sampled_from("aZéſK's'LL've 0129٣_.,(!)\n\r\t\u00a0\u3000\u2028\u200b日本🙂\u0301")
    | st.characters(codec="utf-8")
)


def pieces(pattern: str, text: str) -> list[bytes]:
    """The matches of a pattern: with a rank for every piece of this text, each of them is one token."""
    ranks = dict(BYTES)
    data = text.encode()
    for start in range(len(data)):
        for end in range(start + 2, len(data) + 1):
            ranks.setdefault(data[start:end], len(ranks))
    encoding = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [encoding.decode_single_token_bytes(i) for i in encoding.encode_ordinary(text)]


def test_the_pattern_of_this_project_is_among_them():
    assert CL100K_PATTERN in PLAIN and not any("++" in plain or "*+" in plain for plain in PLAIN.values())


@pytest.mark.parametrize("pattern", PLAIN)
@settings(deadline=None, max_examples=250)
@given(text=TEXT.filter(lambda text: len(text) < 25))
def test_both_spellings_cut_alike(pattern, text):
    assert pieces(PLAIN[pattern], text) == pieces(pattern, text)


@pytest.mark.parametrize("pattern", PLAIN)
def test_both_spellings_cut_alike_at_every_character(pattern):
    engines = [
        tiktoken.Encoding("bytes", pat_str=spelling, mergeable_ranks=BYTES | {b"x" * 2: 256}, special_tokens={})
        for spelling in (pattern, PLAIN[pattern])
    ]
    # a pair of x is one token only where no border lies between them
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for context in ("x{0}x", "xx{0} {0}xx", " {0}\n{0}1"):
        text = "".join(context.format(c) for c in characters[:: 1 if context == "x{0}x" else 11])
        first, second = (engine.encode_ordinary(text) for engine in engines)
        assert first == second


@pytest.mark.parametrize(
    "run", [" " * 300_000, "\n" * 300_000, "a" * 20_000, "1" * 300_000, "!" * 20_000, " \n" * 100_000]
)
def test_long_runs_meet_no_new_limit(run):
    for pattern in PLAIN:
        first, second = (
            tiktoken.Encoding("bytes", pat_str=spelling, mergeable_ranks=BYTES, special_tokens={})
            for spelling in (pattern, PLAIN[pattern])
        )
        assert first.encode_to_numpy(run + "x").tobytes() == second.encode_to_numpy(run + "x").tobytes()
