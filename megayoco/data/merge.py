"""Indexed pairs one after the other in one pair, without torch and with little memory.

The result is byte for byte what megatron-core's `IndexedDatasetBuilder.add_index` makes of the same pairs: documents of
several or no sequences and the modes of multimodal datasets stay as they are. It grows in PREFIX.bin.partial and
PREFIX.idx.partial, which are renamed at the end, the index last.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megayoco.data.files import write_text_atomically
from megayoco.data.indexed import DTYPES, read_meta
from megayoco.data.indexed_writer import make_folder_of, pair_paths, publish_pair, refuse_existing, write_index
from megayoco.data.pair import BLOCK, Pair, find_damage, open_pair
from megayoco.errors import UserError

log = logging.getLogger(__name__)

COUNTS = ("empty_documents", "text_bytes", "skipped")
"""What is summed of meta files, beside what the pairs themselves say."""


def merge_pairs(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    overwrite: bool = False,
    assume_same_tokenizer: bool = False,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Pair:
    """Write the pair OUTPUT_PREFIX.{bin,idx,meta.json} that holds all documents of other pairs, in their order.

    Args:
        prefixes: of the pairs. Where their integer types differ, the result has the narrowest that holds them all.
        overwrite: replace an existing OUTPUT_PREFIX.
        assume_same_tokenizer: merge although the meta files name different tokenizers, or some are missing.
        report: called with the tokens copied and all tokens.

    Returns:
        The merged pair. It has a meta file if one of the pairs has; `merged` there names the pairs.

    Raises:
        UserError: a pair is damaged, is the output, or was made with another tokenizer; the output exists, is being
            written by another run, or cannot be written.
    """
    targets = pair_paths(output_prefix)
    refuse_existing(targets.values(), overwrite)
    pairs = [open_pair(prefix) for prefix in prefixes]
    for pair in pairs:
        if Path(f"{pair.prefix}.bin").resolve() == targets["bin"].resolve():
            raise UserError(f"{pair.prefix} is also the output. Choose another --output-prefix.")
        damage = find_damage(pair)
        if damage:
            raise UserError(f"{damage[0]}. Nothing was written. Copy both files again, or rebuild them.")
    metas = [read_meta(pair.prefix) for pair in pairs]
    if not assume_same_tokenizer:
        _check_tokenizers(pairs, metas)
    if len({pair.has_modes for pair in pairs if pair.num_sequences}) > 1:
        plain = next(pair for pair in pairs if pair.num_sequences and not pair.has_modes)
        raise UserError(f"{plain.prefix} is no multimodal dataset, but others are. They cannot be one dataset.")
    dtype = _common_dtype(pairs)
    temporary = {kind: Path(f"{path}.partial") for kind, path in targets.items()}
    with _alone(output_prefix, temporary, overwrite) as data:
        _warn_of_space(pairs, dtype, targets["bin"].parent)
        max_id = _copy_tokens(pairs, dtype, data, report)
        data.flush()
        os.fsync(data.fileno())
        _write_index(pairs, dtype, temporary["idx"])
        meta = merged_meta(pairs, metas, output_prefix, dtype, max_id)
        if meta is not None:
            write_text_atomically(temporary["meta.json"], json.dumps(meta, indent=2) + "\n")
        elif overwrite:
            targets["meta.json"].unlink(missing_ok=True)
        publish_pair(output_prefix, temporary)
    return open_pair(output_prefix)


def _check_tokenizers(pairs: Sequence[Pair], metas: Sequence[Mapping[str, Any] | None]) -> None:
    """Raise unless all datasets say that the same tokenizer made them, or none says anything."""
    remedy = "give --assume-same-tokenizer if you know that it is the same"
    known = [(pair.prefix, named) for pair, meta in zip(pairs, metas, strict=True) if (named := _tokenizer(meta))]
    for prefix, tokenizer in known:
        first, other = known[0][1], tokenizer
        if any(first.get(name) != other.get(name) for name in ("sha256", "vocab_size", "eod")):
            raise UserError(
                f"{prefix} was made with another tokenizer ({describe(other)}) than {known[0][0]} ({describe(first)}):"
                f" the same id means different text there. Prepare one of them again, or {remedy}."
            )
    unknown = [pair.prefix for pair, meta in zip(pairs, metas, strict=True) if not _tokenizer(meta)]
    if known and unknown:
        raise UserError(
            f"{unknown[0]} has no meta file that names its tokenizer, {known[0][0]} was made with"
            f" {describe(known[0][1])}. Prepare it again, or {remedy}."
        )
    if not known:
        log.warning("no dataset names its tokenizer: that the same one made them all is not checked")


def _tokenizer(meta: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return meta.get("tokenizer") if meta is not None else None


def describe(tokenizer: Mapping[str, Any]) -> str:
    """A tokenizer of a meta file in a few words."""
    size, digest = tokenizer.get("vocab_size", "?"), str(tokenizer.get("sha256", "?"))[:12]
    return f"{tokenizer.get('type', '?')} of {size} ids, {digest}"


def _common_dtype(pairs: Sequence[Pair]) -> np.dtype:
    """The narrowest integer type that holds the tokens of all pairs."""
    dtypes = [pair.dtype for pair in pairs]
    common = np.result_type(*dtypes)
    if common not in [np.dtype(kind) for kind in DTYPES.values()] or common.kind == "f":
        raise UserError(f"no integer type of the format holds the ids of {', '.join(sorted(map(str, set(dtypes))))}")
    if len(set(dtypes)) > 1:
        wider = [pair.prefix for pair in pairs if pair.dtype != common]
        log.warning("%s: written as %s, as the others are", ", ".join(wider), common)
    return common


def _copy_tokens(
    pairs: Sequence[Pair], dtype: np.dtype, file: BinaryIO, report: Callable[[int, int], None], block: int = 4 * BLOCK
) -> int:
    """Copy the tokens of all pairs; returns the largest id, -1 if there is none."""
    total, done, max_id = sum(pair.num_tokens for pair in pairs), 0, -1
    report(done, total)
    for pair in pairs:
        for first in range(0, pair.num_tokens, block):
            tokens = pair.tokens(first, min(block, pair.num_tokens - first))
            if tokens.min() < 0:
                raise UserError(f"{pair.prefix}.bin holds the negative token id {tokens.min()}. Rebuild the pair.")
            max_id = max(max_id, int(tokens.max()))
            file.write(tokens.astype(dtype, copy=False).data)
            done += len(tokens)
            report(done, total)
    return max_id


def _write_index(pairs: Sequence[Pair], dtype: np.dtype, path: Path) -> None:
    def documents() -> Iterator[np.ndarray]:
        yield np.zeros(1, np.int64)
        first = 0
        for pair in pairs:
            for number, entries in enumerate(pair.blocks("documents")):
                yield first + (entries[1:] if number == 0 else entries)  # the first is where the last pair's end
            first += pair.num_sequences

    write_index(
        path,
        dtype,
        sum(pair.num_sequences for pair in pairs),
        lambda: chain.from_iterable(pair.blocks("lengths") for pair in pairs),
        documents(),
        sum(pair.num_documents for pair in pairs),
    )
    with open(path, "ab") as file:
        for pair in pairs:
            for modes in pair.blocks("modes"):
                file.write(modes.data)


def merged_meta(
    pairs: Sequence[Pair], metas: Sequence[Mapping[str, Any] | None], output_prefix: str, dtype: np.dtype, max_id: int
) -> dict[str, Any] | None:
    """The meta file of a merged pair; None if no pair has one.

    COUNTS are summed if every pair has them, lists joined, and what is the same everywhere stays.
    """
    known = [meta for meta in metas if meta is not None]
    if not known:
        return None
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for meta in known for name in meta):
        values = [meta[name] for meta in known if name in meta]
        if name in ("dtype", "tokens", "documents", "max_id", "bin_bytes", "merged"):
            continue  # said of the merged pair below
        if name == "tokenizer":
            of = next(pair.prefix for pair, meta in zip(pairs, metas, strict=True) if meta is not None and name in meta)
            merged[name] = _moved(values[0], of, output_prefix)
        elif all(isinstance(value, list) for value in values):
            merged[name] = [item for value in values for item in value]
        elif len(values) < len(pairs):
            continue  # a sum or a common value of some of the pairs would be wrong for the whole
        elif name in COUNTS:
            merged[name] = sum(values)
        elif all(value == values[0] for value in values):
            merged[name] = values[0]
        else:
            log.warning("the datasets differ in %s: %s", name, ", ".join(sorted(map(repr, values))))
    tokens = sum(pair.num_tokens for pair in pairs)
    return merged | {
        "merged": [{"prefix": p.prefix, "documents": p.num_documents, "tokens": p.num_tokens} for p in pairs],
        "documents": sum(pair.num_documents for pair in pairs),
        "dtype": dtype.name,
        "tokens": tokens,
        "max_id": max_id,
        "bin_bytes": tokens * dtype.itemsize,
    }


def _moved(tokenizer: Mapping[str, Any], prefix: str, output_prefix: str) -> dict[str, Any]:
    """The same tokenizer, the paths in it relative to the folder of the output."""
    old, new = (os.path.dirname(os.path.realpath(p)) for p in (prefix, output_prefix))

    def moved(path: Any) -> Any:
        if isinstance(path, str) and os.path.exists(os.path.join(old, path)):
            return os.path.relpath(os.path.realpath(os.path.join(old, path)), new)
        return path

    changed = {**tokenizer, "model": moved(tokenizer.get("model"))}
    options = tokenizer.get("options")
    if isinstance(options, dict):
        changed["options"] = {k: moved(v) if k in ("vocab_file", "merge_file") else v for k, v in options.items()}
    return changed


def _warn_of_space(pairs: Sequence[Pair], dtype: np.dtype, folder: Path) -> None:
    needed = sum(p.num_tokens * dtype.itemsize + 12 * p.num_sequences + 8 * p.num_documents for p in pairs)
    free = shutil.disk_usage(folder).free
    if free < needed:  # no error: a file system may compress
        log.warning("%s has %.1f GB free, the merged dataset needs %.1f GB", folder, free / 1e9, needed / 1e9)


@contextmanager
def _alone(output_prefix: str, temporary: Mapping[str, Path], overwrite: bool) -> Iterator[BinaryIO]:
    """The temporary data file to write to, locked; all temporary files are gone afterwards."""
    make_folder_of(output_prefix)
    try:
        # "ab" does not truncate: until the lock is held, the file may be another run's
        with open(temporary["bin"], "ab") as data, ExitStack() as stack:
            try:
                fcntl.flock(data, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = os.path.samestat(os.fstat(data.fileno()), os.stat(temporary["bin"]))
            except (BlockingIOError, FileNotFoundError):
                mine = False
            if not mine:
                raise UserError(f"another run is writing {output_prefix} just now. Wait for it, or choose another one.")
            for path in temporary.values():
                stack.callback(path.unlink, missing_ok=True)
            refuse_existing(pair_paths(output_prefix).values(), overwrite)  # again: that run may have finished
            data.truncate(0)
            yield data
    except OSError as error:
        raise UserError(f"cannot write {output_prefix}.bin and .idx: {error.strerror}") from error
