"""Samples as text: every token in one stretch, of the kind that training makes of it."""

import numpy as np

from megayoco.data.batches import IGNORE, collate
from megayoco.data.inspect_samples import describe_sample, stretches
from megayoco.data.samples import Sample
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.data.tuning import filled_up

TEXT = "Ask: yes"


def example(padding, length=16):
    ids = np.array([*TEXT.encode(), 256], np.int64)
    return filled_up(ids, np.arange(9) >= 5, length, padding)


def check(sample, window):
    """Against the targets that a batch has."""
    N = len(sample["tokens"]) - 1
    found = stretches(sample, window)
    targets = [IGNORE, *collate([sample], document_mask=False).targets[0].tolist()]
    kinds = {i: part.kind for part in found for i in range(part.begin, part.end)}
    assert list(kinds) == list(range(N + (targets[N] != IGNORE)))
    assert all((kinds[i] == "learned") == (targets[i] != IGNORE) for i in kinds)
    assert all(part.begin // window == part.window or part.begin == N for part in found)
    assert all(part.window == min(part.end - 1, N - 1) // window for part in found)
    return found


def test_an_example_between_its_padding():
    found = check(example(3), 4)
    assert [(p.begin, p.end, p.kind, p.document) for p in found] == [
        (0, 3, "filling", False),
        (3, 4, "given", True),
        (4, 8, "given", False),
        (8, 12, "learned", False),
        (12, 16, "filling", False),
    ]
    assert [p.kind for p in check(example(0), 16)] == ["given", "learned", "filling"]
    assert [p.kind for p in check(example(7), 16)] == ["filling", "given", "learned"]


def test_documents_of_a_stream_and_the_end_of_validation_data():
    sample = Sample(tokens=np.arange(9), borders=np.array([3, 8]), num_targets=8)
    assert [(p.begin, p.end, p.document) for p in check(sample, 4)] == [
        (0, 1, False),
        (1, 3, False),
        (3, 4, True),
        (4, 8, False),
        (8, 9, True),
    ]
    short = Sample(tokens=np.array([5, 6, 7, 0, 0]), borders=np.array([], np.int64), num_targets=2)
    assert [(p.begin, p.end, p.kind) for p in check(short, 4)] == [
        (0, 1, "given"),
        (1, 3, "learned"),
        (3, 4, "filling"),
    ]


def test_lines_show_texts_and_windows():
    lines = describe_sample(example(3), ByteTokenizer(), window=8, shown=4)
    assert lines == [
        "16 tokens, 4 learned, 7 fill it up",
        "  -- window 0 --",
        "   0 to  2  filling",
        "   3 to  7  document, given: 'Ask: '",
        "  -- window 1 --",
        "   8 to 11  learned: 'yes'",
        "  12 to 15  filling",
    ]
    long = Sample(tokens=np.arange(97, 97 + 21), borders=np.array([], np.int64), num_targets=20)
    shown = describe_sample(long, ByteTokenizer(), window=None, shown=8)
    assert shown[2] == "   1 to 20  learned: 'bcdefghi' ... 'tu'"
    assert describe_sample(example(0), None, window=None, shown=2)[1] == "   0 to  4  given: [65, 115] ... [32]"
