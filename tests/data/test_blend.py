"""Data paths: Megatron's grammar for sane input, an error that shows the reading for the rest."""

import logging
from types import SimpleNamespace

import pytest

from megayoco.data.blend import Source, parse_blend
from megayoco.errors import UserError


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a b", [("a b", None)]),
        (["a"], [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        (["a", "b", "c"], [("a", None), ("b", None), ("c", None)]),
        (["0.3", "a", "7", "b"], [("a", 0.3), ("b", 7.0)]),
        ([0.3, "a", 7, "b"], [("a", 0.3), ("b", 7.0)]),
        ([1, "2024"], [("2024", 1.0)]),
        ([0, "a", 1, "b"], [("b", 1.0)]),
        ([{"prefix": "a", "weight": 2}, {"prefix": "b"}], [("a", 2.0), ("b", 1.0)]),
        ([SimpleNamespace(prefix="a", weight=0.5)], [("a", 0.5)]),
    ],
)
def test_data_paths(value, expected):
    assert parse_blend(value, "data.train") == [Source(*pair) for pair in expected]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "must be a prefix or a list"),
        (None, "must be a prefix or a list"),
        (["0.3", "a", "0.7"], "'0.3' stands where a prefix is expected. The 3 words were read as prefixes"),
        (["a", "0.5"], "'0.5' stands where a prefix is expected"),
        ([0.5, "a", "b", "c"], "0.5 stands where a prefix is expected"),
        ([-1, "a"], "weight of a is -1"),
        (["nan", "a"], "weight of a is nan"),
        (["inf", "a"], "weight of a is inf"),
        ([0, "a", 0, "b"], "all weights are 0"),
        (["a", "./a"], "given twice"),
        ([{"prefix": "a", "wieght": 1}], "expected {prefix: PATH, weight: NUMBER}"),
        ([{"weight": 1}], "expected {prefix: PATH, weight: NUMBER}"),
    ],
)
def test_mistakes_show_the_word(value, message):
    with pytest.raises(UserError, match=r"data\.train") as caught:
        parse_blend(value, "data.train")
    assert message in str(caught.value)


def test_a_final_bin_or_idx_is_removed_with_a_note(caplog):
    caplog.set_level(logging.INFO, "megayoco")
    assert parse_blend(["x/a.bin", "x/b.idx"], "data.train") == [Source("x/a", None), Source("x/b", None)]
    assert "reading x/a.bin as the prefix x/a" in caplog.text
