"""Loss by position in long documents: a model that uses what it has read loses less the more it has read.

A position is the number of tokens before the one that is predicted, the start token included. Reported are the mean
negative log-likelihood (nats per token) of each bin of positions, and of all positions up to its end (cumulative). Two
more views:

- AR-hit and first occurrence: tokens that complete a pair of tokens which stood earlier in the document, where looking
  back helps, and all others. Source: YOCO, arXiv 2405.05254, appendix "Fine-grained perplexity", after Zoology,
  arXiv 2312.04927. Zoology also leaves out pairs that are frequent in training, which is not known here.
- Context ablation: the loss of the same last tokens, given less and less of what stands before them.

Documents that are too short are left out and counted: text joined from short ones shows nothing beyond their length.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megayoco.config.evaluation import PerplexityOptions
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.evaluate.cases import start_tokens
from megayoco.evaluate.documents import Documents, long_documents
from megayoco.evaluate.plots import curves
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.results import ResultsFolder, settings_of
from megayoco.evaluate.subject import Subject
from megayoco.evaluate.work import Item, Record, work_through, writes
from megayoco.generate.scoring import score, score_continuations
from megayoco.model.inference import InferenceModel

logger = logging.getLogger(__name__)

NAME = "perplexity"


def check(tokenizer: Tokenizer, options: PerplexityOptions, trained_length: int | None) -> None:
    """Raises the UserError that `run` would: reads the documents."""
    _documents(tokenizer, options, wanted_length(options, trained_length), tokenizer.vocab_size)


def run(
    model: InferenceModel,
    tokenizer: Tokenizer,
    options: PerplexityOptions,
    output: Path | None = None,
    progress: Progress | None = None,
    subject: Subject = Subject(),  # noqa: B008 (immutable)
) -> dict[str, float]:
    """Read documents and average their losses. Collective over all ranks; the same on any layout.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        options: which documents, and how much of them.
        output: folder of the results, used by the first rank; a folder with a part of them is completed. None: none.
        progress: told after each document, on the first rank.
        subject: what is known of the model.

    Returns:
        perplexity/nll and perplexity/perplexity over all positions, perplexity/nll-last-bin, perplexity/ar-hit and
        perplexity/first-occurrence where there are such tokens, and perplexity/context-N for each context of the
        ablation, the longest being all that precedes the last tokens.

    Raises:
        UserError: no document is long enough, or the folder cannot be used.
    """
    length = wanted_length(options, subject.trained_length)
    start = start_tokens(options.start_token, tokenizer)
    documents = _documents(tokenizer, options, length, model.config.vocab_size)
    notes = _notes(documents.excluded, len(documents.tokens), length, options, subject)
    for note in notes:
        if writes(model):
            logger.warning("%s", note)
    edges = bin_edges(length, options.bin_width)

    def evaluate(keys: Sequence[str]) -> Iterator[Record]:
        for key in keys:
            tokens = np.concatenate([np.array(start, np.int64), documents.tokens[int(key)]])
            yield {"key": key, **measure(model, tokens, edges, options)}

    folder = None
    if output is not None:
        text = {"documents_sha256": documents.sha256, "length": length}
        folder = ResultsFolder(output, settings_of(NAME, options, subject, text=text))
    cost = length + sum(context + options.num_ablation_tokens for context in options.contexts or ())
    groups = [[Item(str(number), cost)] for number in range(len(documents.tokens))]
    records = work_through(model, groups, evaluate, folder, progress, _describe)
    rows = table(records, edges)
    summary = summarise(records, rows)
    if folder is not None and writes(model):
        draw(folder.path / "curve.png", rows, len(records), subject.trained_length)
        folder.finish(summary, rows, subject, notes)
    return summary


def _documents(tokenizer: Tokenizer, options: PerplexityOptions, length: int, vocab_size: int) -> Documents:
    start = start_tokens(options.start_token, tokenizer)
    needed = length + 1 - len(start)
    return long_documents(
        tokenizer, needed, options.documents, text=options.text, data=options.data, vocab_size=vocab_size
    )


def wanted_length(options: PerplexityOptions, trained_length: int | None) -> int:
    """Tokens that are read of each document. Raises UserError if nothing tells, or the ablation needs more."""
    length = options.length or trained_length
    if length is None:
        raise UserError("nothing tells the length that the model was trained for. Give --length.")
    if options.contexts and (needed := max(options.contexts) + options.num_ablation_tokens) > length:
        raise UserError(
            f"--contexts {max(options.contexts)} and --ablation-tokens {options.num_ablation_tokens} need {needed}"
            f" tokens, {length} are read of each document. Give smaller ones, or a greater --length."
        )
    return length


def bin_edges(length: int, width: int | None) -> list[int]:
    """Borders of the bins of positions 1 .. length, the first 1 and the last length + 1.

    Args:
        length: the last position.
        width: positions per bin; None: two bins per octave.
    """
    if width is not None:
        return [*range(1, length + 1, width), length + 1]
    lasts = {round(2 ** (half / 2)) for half in range(2 * length.bit_length())}
    return [1, *(last + 1 for last in sorted(lasts) if last < length), length + 1]


def measure(
    model: InferenceModel, tokens: np.ndarray, edges: Sequence[int], options: PerplexityOptions
) -> dict[str, Any]:
    """Sums of the losses of one document, JSON-able.

    Args:
        model: the model; every rank of its replica makes the same call.
        tokens: (N + 1,) int64: N positions, and the target of the last.
        edges: borders of the bins.
        options: the ablation, and the tokens that are read at once.

    Returns:
        bins: sum of the losses of each bin; ar_hit and first_occurrence: sum and number of tokens; contexts: mean loss
        of the last tokens by the number of tokens before them.
    """
    losses = score(model, tokens.tolist(), chunk=options.prefill_chunk).losses.double().numpy()
    hits = is_repeated_pair(tokens)
    last = options.num_ablation_tokens
    contexts: dict[str, float] = {}
    for context in sorted(set(options.contexts or ())):
        request = (tokens[-last - context : -last].tolist(), tokens[-last:].tolist())
        [(log_p, _)] = score_continuations(model, [request], chunk=options.prefill_chunk)
        contexts[str(context)] = -log_p / last
    if contexts:
        contexts[str(len(tokens) - last)] = float(losses[-last:].mean())
    return {
        "bins": np.add.reduceat(losses, [edge - 1 for edge in edges[:-1]]).tolist(),
        "ar_hit": [float(losses[hits].sum()), int(hits.sum())],
        "first_occurrence": [float(losses[~hits].sum()), int((~hits).sum())],
        "contexts": contexts,
    }


def is_repeated_pair(tokens: np.ndarray) -> np.ndarray:
    """Whether each token but the first makes a pair with the one before it that occurred earlier.

    Args:
        tokens: (N + 1,) int64.

    Returns:
        (N,) bool.
    """
    pairs = tokens[:-1] * (int(tokens.max()) + 1) + tokens[1:]
    _, first = np.unique(pairs, return_index=True)
    repeated = np.ones(len(pairs), bool)
    repeated[first] = False
    return repeated


def table(records: Sequence[Record], edges: Sequence[int]) -> list[dict[str, Any]]:
    """One row per bin of positions."""
    sums = np.array([record["bins"] for record in records]).sum(0)
    counts = np.diff(edges) * len(records)
    cumulative = sums.cumsum() / counts.cumsum()
    return [
        {
            "first_position": edges[number],
            "last_position": edges[number + 1] - 1,
            "tokens": int(counts[number]),
            "nll": round(float(sums[number] / counts[number]), 6),
            "cumulative_nll": round(float(cumulative[number]), 6),
        }
        for number in range(len(sums))
    ]


def summarise(records: Sequence[Record], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The flat scalars of the evaluation; see `run`."""
    nll = rows[-1]["cumulative_nll"]
    scalars = {"nll": nll, "perplexity": math.exp(nll), "nll-last-bin": rows[-1]["nll"]}
    for name in ("ar_hit", "first_occurrence"):
        total, count = (sum(part) for part in zip(*(record[name] for record in records), strict=True))
        if count:
            scalars[name.replace("_", "-")] = total / count
    for context in records[0]["contexts"]:
        scalars[f"context-{context}"] = sum(record["contexts"][context] for record in records) / len(records)
    return {f"{NAME}/{name}": value for name, value in scalars.items()}


def draw(path: Path, rows: Sequence[dict[str, Any]], documents: int, trained_length: int | None) -> None:
    """The curves of binned and cumulative losses."""
    lines = {"in the bin": [row["nll"] for row in rows], "up to here": [row["cumulative_nll"] for row in rows]}
    title = f"loss by position, {documents:,} document{'s' * (documents > 1)}"
    curves(path, title, [row["last_position"] for row in rows], lines, trained_length)


def _describe(records: Sequence[Record]) -> str:
    positions = sum(record["ar_hit"][1] + record["first_occurrence"][1] for record in records)
    return f"nll {sum(sum(record['bins']) for record in records) / positions:.4f}" if positions else ""


def _notes(excluded: int, kept: int, length: int, options: PerplexityOptions, subject: Subject) -> list[str]:
    notes = []
    if excluded:
        notes.append(f"{excluded:,} documents have fewer than {length:,} tokens and are left out")
    if kept < options.documents:
        notes.append(f"{kept:,} documents are long enough, {options.documents:,} were asked for")
    if subject.trained_length is not None and length > subject.trained_length:
        trained = f"{subject.trained_length:,}"
        notes.append(f"{length:,} tokens are read; the model was trained on sequences of up to {trained}")
    return notes
