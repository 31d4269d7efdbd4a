"""Text appears character by character, whatever the tokens cut through, and as a terminal can bear it."""

import io

import pytest

from megayoco.data.tokenizer import ByteTokenizer
from megayoco.generate.text import TERMINAL_SAFE, TextStream, terminal_writer, turn_reader


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


class Terminal(io.TextIOWrapper):
    def __init__(self, raw=b""):
        super().__init__(io.BytesIO(raw), encoding="ascii")

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("make", "raw"),
    [(Terminal, "é\u241b?".encode()), (lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"), "é\x1b?".encode())],
    ids=["terminal", "pipe"],
)
def test_text_is_written_as_utf8_and_harmless_to_a_terminal(monkeypatch, make, raw):
    out = make()
    monkeypatch.setattr("sys.stdout", out)
    terminal_writer()("é\x1b\udc80")
    assert out.buffer.getvalue() == raw


def test_turns_from_a_pipe(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xc3\xa9\xff\n\nlast"), encoding="ascii"))
    read = turn_reader()
    assert [read() for _ in range(5)] == ["a é\ufffd\n", "\n", "last", None, None]


@pytest.mark.parametrize(
    ("typed", "turn", "told"), [("hi", "hi", ""), (EOFError, None, "\n"), (KeyboardInterrupt, "", "\n/exit or Ctrl-D")]
)
def test_turns_from_a_terminal(monkeypatch, capsys, typed, turn, told):
    def answer(question):
        if isinstance(typed, str):
            return typed
        raise typed

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    assert turn_reader()() == turn
    assert capsys.readouterr().err.startswith(told)
