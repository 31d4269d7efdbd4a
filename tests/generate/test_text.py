"""Text appears character by character, whatever the tokens cut through."""

import pytest

from megayoco.data.tokenizer import ByteTokenizer
from megayoco.generate.text import TERMINAL_SAFE, TextStream


def pieces(tokens):
    stream = TextStream(ByteTokenizer())
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_a_character_appears_when_its_last_byte_does():
    assert pieces("aé€🙂b".encode()) == ["a", "", "é", "", "", "€", "", "", "", "🙂", "b", ""]


@pytest.mark.parametrize(
    "raw",
    [b"\xe2\x82", b"\xe2\x82a", b"\xff\xfe", b"\x80abc\xc3", b"\xf0\x9f\x99\x82\xf0\x9f", b"\xed\xa0\x80"],
    ids=repr,
)
def test_bytes_that_are_no_character_become_what_decode_gives(raw):
    assert "".join(pieces(raw)) == ByteTokenizer().decode(raw)


def test_control_characters_cannot_reach_a_terminal():
    shown = "".join(map(chr, range(0x300))).translate(TERMINAL_SAFE)
    assert [c for c in shown if not c.isprintable() and c not in "\t\n\xa0\xad"] == []
    assert "\x1b[2J\r".translate(TERMINAL_SAFE) == "␛[2J␍"
    assert "naïve €\n\t".translate(TERMINAL_SAFE) == "naïve €\n\t"
