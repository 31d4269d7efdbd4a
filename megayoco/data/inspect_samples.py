"""What a run is trained on, as text: which tokens are learned, where windows and documents begin. Without torch.

Shapes: N sequence length; a sample is N + 1 tokens, the last of which is only a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megayoco.data.samples import Sample
from megayoco.data.tokenizer import Tokenizer

LEARNED, GIVEN, FILLING = "learned", "given", "filling"


@dataclass(frozen=True)
class Stretch:
    """Tokens begin .. end - 1 of a sample, all of one kind, window and document.

    kind: `learned` (targets of the tokens before them), `given` (no loss) or `filling` (padding).
    """

    begin: int
    end: int
    kind: str
    window: int
    document: bool
    """Whether a document begins here."""


def stretches(sample: Sample, window: int | None = None) -> list[Stretch]:
    """A sample in stretches, in order: all of its N tokens, and the last target if it is one.

    Args:
        window: tokens of a window, counted from the first token; None: one window.
    """
    N = len(sample["tokens"]) - 1
    learned = np.zeros(N + 1, bool)
    learned[1 : sample["num_targets"] + 1] = True
    if "labelled" in sample:
        learned[1:] &= sample["labelled"]
    kinds = np.where(learned, LEARNED, GIVEN).astype(object)
    padding = sample.get("padding", 0)
    kinds[:padding] = FILLING
    kinds[sample["num_targets"] + 1 :] = FILLING
    end = N + 1 if learned[N] else N
    documents = {padding} if padding else set()
    documents |= set(sample["borders"].tolist())
    windows = np.arange(N + 1) // (window or N + 1)
    windows[N] = windows[N - 1]  # the last target belongs to the token before it
    cuts = {0, end, *(d for d in documents if d < end)}
    cuts |= {i for i in range(1, end) if kinds[i] != kinds[i - 1] or windows[i] != windows[i - 1]}
    return [Stretch(a, b, str(kinds[a]), int(windows[a]), a in documents) for a, b in pairwise(sorted(cuts))]


def describe_sample(sample: Sample, tokenizer: Tokenizer | None, *, window: int | None, shown: int = 32) -> list[str]:
    """A sample line by line.

    Args:
        tokenizer: for text; None: ids are shown.
        window: tokens of a window of memory layers; None: the model has none.
        shown: tokens of the beginning of a stretch, and a quarter of them of its end, that are shown.
    """
    parts = stretches(sample, window)
    N = len(sample["tokens"]) - 1
    learned = sum(part.end - part.begin for part in parts if part.kind == LEARNED)
    filling = sum(part.end - part.begin for part in parts if part.kind == FILLING)
    lines = [f"{N:,} tokens, {learned:,} learned" + (f", {filling:,} fill it up" if filling else "")]
    width, before = len(f"{N:,}"), None
    for part in parts:
        if window is not None and part.window != before:
            lines.append(f"  -- window {part.window} --")
            before = part.window
        mark = "document, " if part.document else ""
        place = f"{part.begin:>{width},} to {part.end - 1:>{width},}"
        text = "" if part.kind == FILLING else f": {_shown(sample['tokens'][part.begin : part.end], tokenizer, shown)}"
        lines.append(f"  {place}  {mark}{part.kind}{text}")
    return lines


def _shown(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer | None, shown: int) -> str:
    """Text as Python would spell it, so that no control character reaches a terminal, or ids."""
    ids = np.asarray(tokens).tolist()
    tail = max(shown // 4, 1)
    if len(ids) <= shown + tail:
        return _spelled(ids, tokenizer)
    return f"{_spelled(ids[:shown], tokenizer)} ... {_spelled(ids[-tail:], tokenizer)}"


def _spelled(ids: list[int], tokenizer: Tokenizer | None) -> str:
    return str(ids) if tokenizer is None else repr(tokenizer.decode(ids))
