"""What an indexed pair holds: counts, lengths, samples of its text, and whether it is whole. Without torch.

Shapes: S sequences. Everything is read in blocks: memory stays small whatever the size of the pair.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megayoco.data.indexed import read_meta
from megayoco.data.lengths import Lengths, length_statistics
from megayoco.data.pair import BLOCK, Pair, find_damage, open_pair
from megayoco.data.tokenizer import Tokenizer, build_described
from megayoco.errors import UserError

SAMPLED_PLACES = 256
SAMPLED_TOKENS = 4096


@dataclass(frozen=True)
class Content:
    """What was found among the tokens.

    Attributes:
        tokens: how many were looked at; all of the pair if `whole`.
        low, high: smallest and largest id.
        outside: ids that are negative or not below the vocabulary's size; `first_outside` says where the first is.
        ends, ends_with_eod: last tokens of documents that were looked at, and how many of them are the end of document.
    """

    whole: bool
    tokens: int = 0
    low: int = 0
    high: int = -1
    outside: int = 0
    first_outside: str | None = None
    ends: int = 0
    ends_with_eod: int | None = None


@dataclass(frozen=True)
class Excerpt:
    """The beginning and the end of one sequence; text is None without a tokenizer."""

    sequence: int
    length: int
    head: list[int]
    tail: list[int]
    head_text: str | None
    tail_text: str | None


@dataclass
class Summary:
    """All that is known of one pair; what could not be found out because of damage is None."""

    prefix: str
    dtype: str | None = None
    bin_bytes: int | None = None
    sequences: int | None = None
    documents: int | None = None
    empty_documents: int | None = None
    tokens: int | None = None
    meta: dict[str, Any] | None = None
    lengths: Lengths | None = None
    content: Content | None = None
    excerpts: list[Excerpt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same as plain objects, for json.dumps."""
        return dataclasses.asdict(self)


def inspect_pair(
    prefix: str,
    *,
    check: bool = False,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    samples: int = 0,
    excerpt_tokens: int = 64,
    seed: int = 0,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Look at a pair. Damage does not raise, it is what the summary says.

    Args:
        check: read every token, instead of SAMPLED_TOKENS in each of SAMPLED_PLACES. The index is read
            as a whole in either case.
        tokenizer: for the text of samples and the end of document; without it, the one that the meta file names.
        vocab_size: ids must be below it; without it, the tokenizer's.
        samples: how many sequences to show, drawn by `seed`.
        excerpt_tokens: shown of the beginning of each.
        report: called with the tokens read and all tokens.
    """
    summary = Summary(prefix)
    try:
        pair = open_pair(prefix)
    except UserError as error:
        summary.damage.append(str(error))
        return summary
    summary.dtype, summary.bin_bytes = pair.dtype.name, pair.bin_bytes
    summary.sequences, summary.documents, summary.tokens = pair.num_sequences, pair.num_documents, pair.num_tokens
    summary.damage = find_damage(pair)
    try:
        summary.meta = read_meta(prefix)
    except UserError as error:
        summary.damage.append(str(error))
    if tokenizer is None:
        tokenizer = _tokenizer_of(prefix, summary)
    eod, known_size = _expectations(tokenizer, summary.meta)
    vocab_size = known_size if vocab_size is None else vocab_size
    if summary.damage:
        summary.notes.append("lengths, ids and samples were left out because of the damage")
        return summary
    summary.lengths = length_statistics(lambda: pair.blocks("lengths"))
    summary.empty_documents = count_empty(pair)
    if check:
        summary.content = scan(pair, eod=eod, vocab_size=vocab_size, report=report)
    else:
        summary.content = sample(pair, eod=eod, vocab_size=vocab_size)
    _judge(summary, summary.content, eod, vocab_size)
    generator = np.random.default_rng(seed)
    if pair.num_sequences:
        chosen = generator.choice(pair.num_sequences, min(samples, pair.num_sequences), replace=False)
        summary.excerpts = [excerpt(pair, number, tokenizer, excerpt_tokens) for number in sorted(chosen.tolist())]
    return summary


def saved_tokenizer(prefix: str, saved: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the meta file of a pair names.

    Raises:
        UserError: its model is gone, or has changed since the pair was made.
    """
    tokenizer = build_described(saved, os.path.dirname(prefix))
    if "sha256" in saved and tokenizer.identity()["sha256"] != saved["sha256"]:
        raise UserError(
            f"{tokenizer.model or tokenizer.type} is not the tokenizer that made {prefix}: it has changed since"
        )
    return tokenizer


def count_empty(pair: Pair) -> int:
    """Documents without a token: of no sequence, or of sequences of length 0."""
    empty, ends = 0, _DocumentEnds(pair)
    tokens_before = first = 0  # of the document that is open, and the sequence where the block begins
    for lengths in pair.blocks("lengths"):
        entries = ends.up_to(first + len(lengths))
        totals = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        at = np.concatenate(([-tokens_before], totals[entries - first]))
        empty += int((np.diff(at) == 0).sum())
        tokens_before = int(totals[-1] - at[-1])
        first += len(lengths)
    return empty + (pair.num_documents if not pair.num_sequences else 0)


class _DocumentEnds:
    """Where documents end, as numbers of sequences, given out in ascending parts."""

    def __init__(self, pair: Pair):
        self._blocks = pair.blocks("documents")
        self._rest = next(self._blocks)[1:]  # the first entry is where the first document begins

    def up_to(self, sequence: int) -> np.ndarray:
        """The ends (n,) int64 <= sequence that were not given out yet, one per document."""
        parts = []
        while True:
            count = int(np.searchsorted(self._rest, sequence, side="right"))
            parts.append(self._rest[:count])
            self._rest = self._rest[count:]
            if len(self._rest):
                return np.concatenate(parts)
            block = next(self._blocks, None)
            if block is None:
                return np.concatenate(parts)
            self._rest = block


def scan(
    pair: Pair,
    *,
    eod: int | None,
    vocab_size: int | None,
    report: Callable[[int, int], None] = lambda done, total: None,
    block: int = 4 * BLOCK,
) -> Content:
    """Read every token of a pair without damage in its index."""
    found = _Found(eod, vocab_size)
    report(0, pair.num_tokens)
    ends, first, end = _DocumentEnds(pair), 0, 0
    for lengths in pair.blocks("lengths"):
        start, borders = end, end + np.cumsum(lengths, dtype=np.int64)
        last = ends.up_to(first + len(lengths)) - first - 1  # last sequences of documents, again for empty ones
        last = last[np.diff(last, prepend=-1) > 0]
        closing = borders[last[lengths[last] > 0]] - 1  # last tokens of documents
        end = int(borders[-1])
        for at in range(start, end, block):
            tokens = pair.tokens(at, min(block, end - at))
            inside = closing[slice(*np.searchsorted(closing, [at, at + len(tokens)]))]
            place = found.look_at(tokens)
            found.look_at_ends(tokens[inside - at])
            if place is not None:
                sequence = first + int(np.searchsorted(borders, at + place, side="right"))
                found.first_outside = f"token {at + place:,}, in sequence {sequence:,}"
            report(at + len(tokens), pair.num_tokens)
        first += len(lengths)
    return found.content(whole=True)


def sample(pair: Pair, *, eod: int | None, vocab_size: int | None) -> Content:
    """Look at tokens in places that are spread evenly over the pair, and at the ends of as many documents."""
    found = _Found(eod, vocab_size)
    seen = 0
    for place in _spread(pair.num_tokens - SAMPLED_TOKENS):
        start, seen = max(place, seen), min(place + SAMPLED_TOKENS, pair.num_tokens)
        outside = found.look_at(pair.tokens(start, seen - start))
        if outside is not None:
            found.first_outside = f"token {start + outside:,}"
    for number in _spread(pair.num_documents - 1) if pair.num_documents else ():
        first, after = pair.number("documents", number), pair.number("documents", number + 1)
        if first < after and (length := pair.number("lengths", after - 1)):
            end = pair.number("offsets", after - 1) // pair.dtype.itemsize + length
            found.look_at_ends(pair.tokens(end - 1, 1))
    return found.content(whole=False)


def _spread(last: int) -> list[int]:
    """At most SAMPLED_PLACES different numbers from 0 to `last`, evenly spread, in ascending order."""
    last = max(last, 0)
    return np.linspace(0, last, min(SAMPLED_PLACES, last + 1)).astype(np.int64).tolist()


class _Found:
    """Collects what is seen of tokens."""

    def __init__(self, eod: int | None, vocab_size: int | None):
        self.eod, self.vocab_size = eod, vocab_size
        self.low: int | None = None
        self.high, self.tokens, self.outside, self.ends, self.eods = -1, 0, 0, 0, 0
        self.first_outside: str | None = None

    def look_at_ends(self, tokens: np.ndarray) -> None:
        """Note last tokens (n,) of documents."""
        self.ends += len(tokens)
        if self.eod is not None:
            self.eods += int((tokens == self.eod).sum())

    def look_at(self, tokens: np.ndarray) -> int | None:
        """Note tokens (n,); returns the place of the first id outside that was ever seen, if it is among them."""
        if not len(tokens):
            return None
        low, high = int(tokens.min()), int(tokens.max())
        self.low = low if self.low is None else min(self.low, low)
        self.high = max(self.high, high)
        self.tokens += len(tokens)
        if low >= 0 and (self.vocab_size is None or high < self.vocab_size):
            return None
        outside = tokens < 0
        if self.vocab_size is not None:
            outside |= tokens >= self.vocab_size
        self.outside += int(outside.sum())
        return int(np.argmax(outside)) if self.outside == int(outside.sum()) else None

    def content(self, whole: bool) -> Content:
        return Content(
            whole=whole,
            tokens=self.tokens,
            low=self.low or 0,
            high=self.high,
            outside=self.outside,
            first_outside=self.first_outside,
            ends=self.ends,
            ends_with_eod=None if self.eod is None else self.eods,
        )


def excerpt(pair: Pair, sequence: int, tokenizer: Tokenizer | None, count: int) -> Excerpt:
    """The first `count` tokens of a sequence and, of a longer one, the last count / 4."""
    start = pair.number("offsets", sequence) // pair.dtype.itemsize
    length = pair.number("lengths", sequence)
    head = pair.tokens(start, min(count, length)).tolist()
    rest = min(max(count // 4, 1), length - len(head))
    tail = pair.tokens(start + length - rest, rest).tolist()
    return Excerpt(sequence, length, head, tail, _text(tokenizer, head), _text(tokenizer, tail))


def _text(tokenizer: Tokenizer | None, ids: Sequence[int]) -> str | None:
    return None if tokenizer is None or min(ids, default=0) < 0 else tokenizer.decode(ids)


def _tokenizer_of(prefix: str, summary: Summary) -> Tokenizer | None:
    """The tokenizer of the meta file; None, with a note, if there is none that can be used."""
    saved = (summary.meta or {}).get("tokenizer")
    if not saved:
        if not summary.damage:
            summary.notes.append("no meta file names its tokenizer; give --tokenizer-type to see text")
        return None
    try:
        return saved_tokenizer(prefix, saved)
    except UserError as error:
        summary.notes.append(f"no text is shown: {error}")
        return None


def _expectations(tokenizer: Tokenizer | None, meta: Mapping[str, Any] | None) -> tuple[int | None, int | None]:
    """The end of document and the vocabulary's size, as far as anything says them."""
    if tokenizer is not None:
        return tokenizer.eod, tokenizer.vocab_size
    saved = (meta or {}).get("tokenizer", {})
    return saved.get("eod"), saved.get("vocab_size")


def _judge(summary: Summary, content: Content, eod: int | None, vocab_size: int | None) -> None:
    """Add to the summary what its parts say of each other: contradictions are damage, oddities are notes."""
    meta, data = summary.meta or {}, f"{summary.prefix}.bin"
    if content.outside:
        allowed = "are negative" if vocab_size is None else f"are outside the vocabulary 0..{vocab_size - 1}"
        summary.damage.append(
            f"{data}: {content.outside:,} ids of {content.tokens:,} {allowed} (they reach from {content.low} to"
            f" {content.high}); the first is {content.first_outside}"
        )
    actual = {"tokens": summary.tokens, "documents": summary.documents, "dtype": summary.dtype}
    if content.whole:
        actual["max_id"] = content.high
    for name, value in actual.items():
        if name in meta and meta[name] != value:
            summary.damage.append(f"{summary.prefix}.meta.json says {name} {meta[name]}, the pair holds {value}")
    if not content.whole and content.high > meta.get("max_id", content.high):
        summary.damage.append(f"{data}: id {content.high} is above the largest that the meta file knows")
    if content.ends_with_eod is not None and content.ends_with_eod < content.ends:
        state = f"{content.ends - content.ends_with_eod:,} of {content.ends:,} documents do not end with the id {eod}"
        if meta.get("append_eod"):
            summary.damage.append(f"{data}: {state}, but the meta file says that all do")
        else:
            summary.notes.append(f"{state}, which ends documents")
    if summary.sequences != summary.documents:
        summary.notes.append(
            f"{summary.sequences:,} sequences in {summary.documents:,} documents (split sentences, or empty documents):"
            " training shuffles sequences and treats each as a document"
        )
