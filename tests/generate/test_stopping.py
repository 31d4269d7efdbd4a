"""Text ends before a stop string, wherever tokens are cut."""

import itertools

import pytest

from megayoco.data.tokenizer import ByteTokenizer
from megayoco.errors import UserError
from megayoco.generate.stopping import StopStrings


class Pieces(ByteTokenizer):
    """Token number i is pieces[i]."""

    def __init__(self, *pieces):
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids)


def shown(pieces, stops):
    """What each token shows, what the end shows, and the stop string met; tokens after it are not asked for."""
    text, parts = StopStrings(Pieces(*pieces), stops), []
    for token in range(len(pieces)):
        parts.append(text.push(token))
        if text.stopped is not None:
            break
    return [*parts, text.finish()], text.stopped


@pytest.mark.parametrize(
    ("pieces", "stops", "parts", "stopped"),
    [
        (["ab", "c"], [], ["ab", "c", ""], None),
        (["ab", "END", "c"], ["END"], ["ab", "", ""], "END"),
        (["abE", "N", "Dc", "d"], ["END"], ["ab", "", "", ""], "END"),
        # it looked like one
        (["abE", "N", "Ex", "EN"], ["END"], ["ab", "", "ENEx", "", "EN"], None),
        # the beginning of the string comes again before it is over
        (["aab", "aa", "bac"], ["aabac"], ["", "aab", "", ""], "aabac"),
        (["x\n", "\nUser", ": hi"], ["\n\n", "\nUser:"], ["x", "", ""], "\n\n"),
        (["x\n", "User", ": hi"], ["\nUser:", "ser"], ["x", "\nU", ""], "ser"),
        # complete at one character: the longest
        (["say END"], ["ND", "END", "D"], ["say ", ""], "END"),
        # complete first, though the other begins before
        (["abcd"], ["abcd", "bc"], ["a", ""], "bc"),
        (["a\xe9", "€", "b"], ["€"], ["a\xe9", "", ""], "€"),
        ([b"a\xe2", b"\x82", b"\xacb"], ["€b"], ["a", "", "", ""], "€b"),
        ([b"a\xe2", b"\x82"], ["€b"], ["a", "", "\ufffd"], None),
        ([b"a\xe2", b"b"], ["\ufffdb"], ["a", "", ""], "\ufffdb"),
    ],
    ids=str,
)
def test_text_ends_before_the_first_stop_string(pieces, stops, parts, stopped):
    assert shown(pieces, stops) == (parts, stopped)


def test_where_tokens_are_cut_does_not_matter():
    text = "abcabxabcdbc"
    for stops in (["abx"], ["bcd"], ["abcabxa", "cabx"], ["dbc", "bcab"], ["q"], ["c", "abcd"]):
        whole, stopped = shown([text], stops)
        for count in range(1, 4):
            for cuts in itertools.combinations(range(1, len(text)), count):
                pieces = [text[a:b] for a, b in itertools.pairwise((0, *cuts, len(text)))]
                parts, met = shown(pieces, stops)
                assert ("".join(parts), met) == ("".join(whole), stopped), (stops, pieces)


def test_nothing_passes_after_the_stop():
    text = StopStrings(Pieces("a#b", "c"), ["#"])
    assert [text.push(0), text.push(1), text.finish()] == ["a", "", ""]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        StopStrings(ByteTokenizer(), ["END", ""])
