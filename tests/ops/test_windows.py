"""Rules of windows: what they say of every token, whatever chunks a text comes in."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megayoco.ops.windows import Eviction, PromptWindows, Span, Windows


def begins(windows: Windows, row: int = 0) -> list[int]:
    """Begin of each token's window."""
    return [span.begin for span in windows.rows[row] for _ in range(span.start, span.stop)]


def simulated(window: int, evicted: int, tokens: int) -> list[int]:
    """Begin of each token's window, by a window that is filled and emptied token after token."""
    found, begin = [], 0
    for index in range(tokens):
        if index - begin == window:
            begin += evicted
        found.append(begin)
    return found


@pytest.mark.parametrize(("window", "evicted"), [(1, 1), (4, 4), (4, 2), (4, 3), (4, 1), (6, 4)])
def test_the_oldest_leave_when_the_window_is_full(window, evicted):
    rule = Eviction(window=window, evicted=evicted)
    expected = simulated(window, evicted, 31)
    assert begins(rule.windows([0], 31)) == expected
    assert [rule.begin(index) for index in range(31)] == expected
    for first in range(30):
        chunk = rule.windows([first], 31 - first)
        assert begins(chunk) == expected[first:]
        assert chunk.next_begin == (rule.begin(31),)
        spans = chunk.rows[0]
        assert (spans[0].start, spans[-1].stop) == (first, 31)
        assert all(a.stop == b.start and a.begin < b.begin for a, b in pairwise(spans))
    assert rule.windows([0], 3).overlap == (evicted < window)


def test_every_row_has_windows_of_its_own_and_padding_is_apart():
    windows = Eviction(window=4, evicted=2).windows([-3, 0, -9], 6)
    assert windows.rows == ((Span(-3, 0, -3), Span(0, 3, 0)), (Span(0, 4, 0), Span(4, 6, 2)), (Span(-9, -3, -9),))
    assert windows.next_begin == (0, 4, 0)
    # the next token of the second row sees two tokens and remembers all, that of the first three
    assert (windows.needed(False), windows.needed(True)) == (3, 6)


def test_a_capacity_bounds_what_is_needed():
    windows = Eviction(window=4, evicted=2, capacity=3).windows([0], 20)
    assert windows.next_begin == (18,)
    assert (windows.needed(False), windows.needed(True)) == (2, 5)
    assert [windows.remembered_from(begin) for begin in (0, 2, 4, 18)] == [0, 0, 1, 15]


def read(state: PromptWindows, length: int, *counts: int) -> tuple[list[int], PromptWindows, int]:
    """Begin of the windows of chunks that come one after the other, and what follows."""
    found: list[int] = []
    for count in counts:
        rule, state = state.take(length, count)
        found += begins(rule.windows([length], count))
        length += count
    return found, state, length


def test_a_prompt_is_cut_before_its_last_tokens():
    """W = 4, lc = 3: ten tokens are the windows 0-3, 4-6 and 7-9."""
    state = PromptWindows(4, 3).announce(0, 10)
    expected = [0, 0, 0, 0, 4, 4, 4, 7, 7, 7]
    for chunks in ([10], [1] * 10, [3, 3, 4], [7, 3], [8, 2]):
        found, after, length = read(state, 0, *chunks)
        assert found == expected
        assert (after.begin, after.waiting) == (7, 0)
    # decoding fills the window, and empties it when it is full
    assert read(after, length, 1, 1, 1, 1, 1, 1)[0] == [7, 11, 11, 11, 11, 15]


def test_further_turns_join_the_open_window_or_empty_it():
    state = read(PromptWindows(8, 5), 0, 5)[1]
    assert read(state, 5, 3)[0] == [0, 0, 0]  # it fits
    assert read(state, 5, 4)[0] == [5, 5, 5, 5]  # it does not
    # 12 tokens: 7 through windows, which do not fit either; the last five do not join these seven
    assert read(state, 5, 12)[0] == [5] * 7 + [12] * 5
    # 7 tokens: two join, the other five do not
    found, after, _ = read(state, 5, 7)
    assert found == [0] * 2 + [7] * 5
    assert after.begin == 7


def test_columns_count_the_padding_and_windows_begin_behind_it():
    """W = 4, lc = 4, rows of 10 columns with 0, 5, 3 and 9 of padding: windows at the columns 0, 4 and 6."""
    rule, _ = PromptWindows(4, 4).take(0, 10)
    windows = rule.windows([0, -5, -3, -9], 10)
    assert begins(windows, 0) == [0] * 4 + [4] * 2 + [6] * 4
    assert begins(windows, 1) == [-5] * 5 + [0] + [1] * 4
    assert begins(windows, 2) == [-3] * 3 + [0] + [1] * 2 + [3] * 4
    assert begins(windows, 3) == [-9] * 9 + [0]
    assert windows.next_begin == (6, 1, 3, 0)


def test_announcements_are_kept():
    state = PromptWindows(4, 3).announce(0, 6)
    with pytest.raises(ValueError, match="a prompt was announced, and 6 of its tokens are yet to come"):
        state.announce(0, 2)
    _, state = state.take(0, 4)
    with pytest.raises(ValueError, match="3 tokens come, but only 2 of the announced prompt are missing"):
        state.take(4, 3)
    assert state.take(4, 2)[1].waiting == 0
