"""Samples cut from streams of whole documents: a stream goes on from batch to batch.

Shapes: N sequence length; a sample is N + 1 consecutive tokens; R streams.

Sample n belongs to stream n mod R and holds its tokens t N .. (t + 1) N + 1, t = n // R: with R the samples of a batch,
row r of every batch goes on where row r of the batch before ended. The streams take their documents from one sequence
of documents: at step t, in the order of their numbers, those that hold fewer than (t + 1) N + 1 tokens take the next
documents until they hold them. This is `doc_aware` of the released code of the Focused Transformer (arXiv 2307.03170),
and with N = k windows its `doc_aware_k`; one stream is its `linear`.

The sequence of documents passes over every dataset again and again, each time in another order. With several datasets
the next document comes from the one that has given the fewest tokens for its weight, so the shares hold to a document.

Which document goes where follows from the lengths alone. It is dealt out in units of many documents, one after the
other as they are needed, and each is kept in the cache (cache.py): any sample is found without reading what is before
it, and nothing has to be remembered of a run but the number of its samples.
"""

from __future__ import annotations

import heapq
import json
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megayoco.data.cache import OrderSettings, Places, cache_root, key_of, open_cached, places_key, sample_of
from megayoco.data.files import read_json_object, write_text_atomically
from megayoco.data.order import Permutation
from megayoco.data.samples import Sample
from megayoco.data.token_file import TokenFile
from megayoco.errors import UserError

_UNITS = 1 << 10, 1 << 18
"""Documents that are dealt out at once, in a fraction of a second: at least, and at most."""
_FORMAT = 1
_BLOCK = 4096


@dataclass(frozen=True)
class DocumentSource:
    """One dataset of the streams: places in the order of the file, its share of the tokens, what its cache follows
    from."""

    places: Places
    weight: float
    settings: OrderSettings


@dataclass(frozen=True)
class _State:
    """What has been dealt out before a unit: tokens of each stream; documents and tokens of each source."""

    streams: list[int]
    documents: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class _Unit:
    """Documents of a unit, grouped by stream, in the order of each stream.

    source, start, end (D,) int64: number of the dataset, first token in its file, tokens of the stream up to the
    document's end; firsts (R + 1,) int64: where each stream's documents begin among them; after: the state behind it.
    """

    source: np.ndarray
    start: np.ndarray
    end: np.ndarray
    firsts: np.ndarray
    after: _State


class DocumentStreams:
    """The samples of R streams of documents, see above.

    Args:
        sources: the datasets; together at least R documents.
        streams: R.
        sequence_length: N.
        seed: of the order of the documents.
        vocab_size: every id must be below it.
        cache_dir: where the units are kept; None: a folder beside the first dataset.
        unit: documents of a unit; None: an epoch, within bounds.

    Raises:
        UserError: fewer documents than streams; a file cannot be opened.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        *,
        streams: int,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        cache_dir: str | os.PathLike[str] | None,
        unit: int | None = None,
    ):
        documents = sum(len(source.places.starts) for source in sources)
        if documents < streams:
            raise UserError(
                f"data.pipeline doc_aware deals documents to {streams} streams, one for each sample of batch_size, and"
                f" there are only {documents}: one would stand in a batch twice. Give more, or a smaller batch_size."
            )
        self._sources, self._streams, self._length, self._seed = list(sources), streams, sequence_length, seed
        self._files = [TokenFile(source.places.prefix, source.places.dtype, vocab_size) for source in sources]
        self._root = cache_root(sources[0].places.prefix, cache_dir)
        self._unit_size = min(max(documents, _UNITS[0]), _UNITS[1]) if unit is None else unit
        self._follows_from = {
            "format": _FORMAT,
            "sources": [(places_key(s.places.prefix, s.settings), s.weight) for s in sources],
            "streams": streams,
            "sequence_length": sequence_length,
            "seed": seed,
            "documents": self._unit_size,
        }
        self._units: list[_Unit] = []

    def __getitem__(self, number: int) -> Sample:
        """Sample `number` >= 0. Raises UserError as TokenFile.read does."""
        N = self._length
        position, stream = divmod(number, self._streams)
        tokens, borders, filled = [], [], 0
        for source, first, count in self._pieces(stream, position * N, (position + 1) * N + 1):
            tokens.append(self._files[source].read([(first, count)]))
            borders.append(filled)
            filled += count
        return Sample(tokens=np.concatenate(tokens), borders=np.array(borders[1:], np.int64), num_targets=N)

    def _pieces(self, stream: int, begin: int, end: int) -> list[tuple[int, int, int]]:
        """(source, first token in its file, tokens) of each document between two tokens of a stream."""
        pieces = []
        number = bisect_right(self._units, begin, key=lambda unit: unit.after.streams[stream])
        while begin < end:
            unit = self._unit(number)
            first, last = unit.firsts[stream : stream + 2].tolist()
            ends = unit.end[first:last]
            at = first + int(np.searchsorted(ends, begin, "right"))
            while at < last and begin < end:
                stop = int(unit.end[at])
                start = self._begin_of(number, stream, at)
                take = min(stop, end) - begin
                pieces.append((int(unit.source[at]), int(unit.start[at]) + begin - start, take))
                begin += take
                at += 1
            number += 1
        return pieces

    def _begin_of(self, number: int, stream: int, at: int) -> int:
        """The token of a stream at which document `at` of a unit begins."""
        unit = self._units[number]
        if at > int(unit.firsts[stream]):
            return int(unit.end[at - 1])
        return self._units[number - 1].after.streams[stream] if number else 0

    def _unit(self, number: int) -> _Unit:
        """A unit from the cache, after dealing it and those before it out if need be."""
        while len(self._units) <= number:
            following = len(self._units)
            before = self._units[-1].after if self._units else self._nothing()
            self._units.append(self._dealt(following, before))
        return self._units[number]

    def _dealt(self, number: int, before: _State) -> _Unit:
        folder = self._root / f"documents-{key_of({**self._follows_from, 'unit': number})}"
        return open_cached(
            folder, lambda: _open(folder), lambda temporary: self._deal(temporary, before), "24 bytes per document"
        )

    def _nothing(self) -> _State:
        none = [0] * len(self._sources)
        return _State([0] * self._streams, none, none)

    def _deal(self, folder: Path, before: _State) -> None:
        """Deal out the documents of one unit and write it."""
        N, R = self._length, self._streams
        streams, given = list(before.streams), list(before.tokens)
        readers = [self._documents(i, first) for i, first in enumerate(before.documents)]
        # who takes the next document: the stream that is short at the earliest step, then the one of least number
        takers = [_short_at(tokens, N) * R + r for r, tokens in enumerate(streams)]
        heapq.heapify(takers)
        givers = [
            (tokens / source.weight, i) for i, (tokens, source) in enumerate(zip(given, self._sources, strict=True))
        ]
        heapq.heapify(givers)
        D = self._unit_size
        stream, source, start, end = (np.empty(D, np.int64) for _ in range(4))
        for d in range(D):
            i = givers[0][1]
            first, length = next(readers[i])
            given[i] += length
            heapq.heapreplace(givers, (given[i] / self._sources[i].weight, i))
            r = takers[0] % R
            streams[r] += length
            heapq.heapreplace(takers, _short_at(streams[r], N) * R + r)
            stream[d], source[d], start[d], end[d] = r, i, first, streams[r]
        counts = np.bincount(source, minlength=len(given))
        documents = [had + int(more) for had, more in zip(before.documents, counts, strict=True)]
        order = np.argsort(stream, kind="stable")
        firsts = np.searchsorted(stream[order], np.arange(R + 1))
        _write(folder, np.stack([source[order], start[order], end[order]]), firsts, _State(streams, documents, given))

    def _documents(self, source: int, first: int) -> Iterator[tuple[int, int]]:
        """(first token in the file, tokens) of the documents of a source from number `first` on, without end."""
        places, settings = self._sources[source].places, self._sources[source].settings
        P = len(places.starts)
        number = first
        while True:
            epoch, at = divmod(number, P)
            order = Permutation(P, "documents", self._seed, P, places.num_tokens, settings.part, epoch)
            for begin in range(at, P, _BLOCK):
                chosen = order.part(begin, min(begin + _BLOCK, P))
                ends = places.ends[chosen]
                begins = np.where(chosen > 0, places.ends[chosen - 1], 0)
                yield from zip(places.starts[chosen].tolist(), (ends - begins).tolist(), strict=True)
            number = (epoch + 1) * P


def _short_at(tokens: int, length: int) -> int:
    """The first step for which a stream of so many tokens holds too few."""
    return max(-(-tokens // length) - 1, 0)


def _write(folder: Path, documents: np.ndarray, firsts: np.ndarray, after: _State) -> None:
    np.save(folder / "documents.npy", documents)
    np.save(folder / "firsts.npy", firsts)
    samples = [sample_of(folder / name).hexdigest() for name in ("documents.npy", "firsts.npy")]
    write_text_atomically(folder / "unit.json", json.dumps({**vars(after), "samples": samples}) + "\n")


def _open(folder: Path) -> _Unit | None:
    """A unit that was written; None if it is absent or damaged."""
    files = [folder / name for name in ("documents.npy", "firsts.npy")]
    if not all(file.is_file() for file in files):
        return None
    try:
        described = read_json_object(folder / "unit.json", remedy="")
        if [sample_of(file).hexdigest() for file in files] != described.pop("samples"):
            return None
        source, start, end = np.load(files[0], mmap_mode="r").view(np.ndarray)
        return _Unit(source, start, end, np.load(files[1]), _State(**described))
    except (UserError, OSError, ValueError, EOFError, KeyError, TypeError):
        return None
