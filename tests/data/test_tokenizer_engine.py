"""tiktoken's engine for batches: the same ids as one call per text, whatever the text, and no text lost."""

import time
from itertools import groupby

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from megayoco.data.tokenizer import CL100K_PATTERN
from megayoco.data.tokenizer.base import EncodingError
from megayoco.data.tokenizer.engine import LONG, SEPARATOR, TiktokenEngine
from megayoco.data.tokenizer.long_text import encode_long, encode_piece, longest_run

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# ranks whose merges compete: some tokens are made in several ways, some (b"abab" before b"ab" + b"ab") never
TOKENS = [
    b"aa",
    b"ab",
    b"ba",
    b"aab",
    b"bb",
    b"abb",
    b"aaaa",
    b"abab",
    b"  ",
    b"    ",
    b"\n\n",
    b"er",
    b"\xc3\xa9",
    b"he",
]
RANKS = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(TOKENS)}
SPECIALS = {"<|endoftext|>": 300, "<|end|>": 301}

texts_of_all_kinds = st.lists(
    st.one_of(
        st.text(),
        st.text("ab \n\r\t'é1!\u3000\u200d", max_size=40),
        st.sampled_from(
            ["", SEPARATOR, SEPARATOR[:-1], SEPARATOR[1:], "<|endoftext|>", "a<|end|>b", "\ud800", "\ud83d\ude00"]
        ),
    ),
    max_size=6,
)


@pytest.fixture(scope="module", params=[CL100K_PATTERN, GPT2_PATTERN], ids=["cl100k", "gpt2"])
def pattern(request):
    return request.param


@pytest.fixture(scope="module")
def engine(pattern):
    return TiktokenEngine("ranks", RANKS, pattern, SPECIALS)


@pytest.fixture(scope="module")
def reference(pattern):
    return tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=RANKS, special_tokens=SPECIALS)


@pytest.mark.parametrize("allow_special", [False, True])
def test_a_batch_equals_one_call_per_text(engine, reference, allow_special):
    @settings(max_examples=150, deadline=None)
    @given(texts_of_all_kinds)
    def check(texts):
        tokens, lengths = engine.encode(texts, allow_special)
        allowed = "all" if allow_special else set()
        expected = [reference.encode(text, allowed_special=allowed, disallowed_special=()) for text in texts]
        assert (tokens.dtype, lengths.dtype) == (np.uint32, np.int64)
        assert lengths.tolist() == [len(ids) for ids in expected]
        assert tokens.tolist() == [i for ids in expected for i in ids]

    check()


def test_the_separator_is_no_token_of_the_vocabulary(engine):
    assert engine.size == 302
    assert engine.bytes_of(302) == engine.bytes_of(303) == engine.bytes_of(10**9) == "\ufffd".encode()


HUGE_TEXTS = {
    "letters": "ab" * 150_000,
    "blanks before a word": " " * 1_000_000 + "word 12345",
    "tabs in text": "it's\t" + "\t" * 500_000 + "x\r\n y",
    "lines": "\n" * 1_000_000,
    "blank lines with specials": "<|end|>" + " \n" * 400_000 + "<|endoftext|>",
}


@pytest.mark.parametrize("text", HUGE_TEXTS.values(), ids=HUGE_TEXTS)
def test_huge_runs_come_back_and_take_no_time(engine, text):
    start = time.monotonic()
    tokens, lengths = engine.encode(["first", text, "last"], allow_special=False)
    assert time.monotonic() - start < 20  # it is about one second
    assert lengths.sum() == len(tokens)
    found = b"".join(map(engine.bytes_of, tokens[5 : 5 + lengths[1]].tolist()))
    assert found.decode() == text


def test_special_tokens_among_huge_runs(engine):
    text = "<|end|>" + " " * 600_000 + "a<|endoftext|>"
    tokens, _ = engine.encode([text], allow_special=True)
    assert tokens[0] == 301 and tokens[-1] == 300 and tokens[-2] == ord("a")
    assert b"".join(map(engine.bytes_of, tokens.tolist())).decode() == text


def test_the_way_for_huge_texts_gives_the_same_ids(engine, reference, pattern):
    @settings(max_examples=150, deadline=None)
    @given(st.text("ab \n\r\té'1!<|>\u3000", max_size=80), st.booleans())
    def check(text, allow_special):
        found = encode_long(text, reference, pattern, SPECIALS if allow_special else {})
        allowed = "all" if allow_special else set()
        assert found.tolist() == reference.encode(text, allowed_special=allowed, disallowed_special=())

    check()


@settings(max_examples=300, deadline=None)
@given(st.text("abx ", min_size=1, max_size=200), st.integers(12, 40))
def test_a_piece_merged_in_windows_equals_one_merged_at_once(text, window):
    encoding = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=RANKS, special_tokens={})
    piece = text.encode()
    expected = encoding._core_bpe.encode_single_piece(piece)
    assert encode_piece(encoding, piece, window=window, overlap=6).tolist() == expected


def test_a_long_document_is_encoded_in_windows(engine, monkeypatch):
    monkeypatch.setattr("megayoco.data.tokenizer.engine.LONG", 1000)
    text = "hello wörld 123 " * 50 + "ab" * 3000 + " \n" * 1500
    expected, _ = TiktokenEngine("ranks", RANKS, engine.pattern, SPECIALS).encode([text], False)
    monkeypatch.setattr("megayoco.data.tokenizer.engine.LONG", LONG)
    assert engine.encode([text], False)[0].tolist() == expected.tolist()


@settings(deadline=None)
@given(st.text("a1 é!", max_size=50))
def test_the_longest_run(text):
    kinds = "".join("a" if c == "é" else c for c in text for _ in c.encode())
    assert longest_run(text) == max((len(list(run)) for _, run in groupby(kinds)), default=0)


def test_a_pattern_that_leaves_out_text_is_refused():
    engine = TiktokenEngine("words.tiktoken", RANKS, r"\w+", {})
    assert engine.encode(["abc"], False)[0].tolist() == [257, ord("c")]
    with pytest.raises(EncodingError, match=r"words\.tiktoken: its pattern leaves out 1 bytes") as caught:
        engine.encode(["abc", "ab cd", "x"], False)
    assert caught.value.document == 1


def test_what_tiktoken_cannot_match_is_an_error_that_names_the_text(monkeypatch):
    engine = TiktokenEngine("ranks", RANKS, GPT2_PATTERN, {})
    monkeypatch.setattr("megayoco.data.tokenizer.engine.encode_long", lambda *_: None)
    with pytest.raises(EncodingError, match="exceeds what tiktoken can match") as caught:
        engine.encode(["a", "b", " " * 10**6 + "x"], False)
    assert caught.value.document == 2
