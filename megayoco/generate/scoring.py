"""How likely given tokens are: losses of a long text, and of continuations. Logits never exist for more than a chunk.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megayoco.generate.generation import PREFILL_CHUNK, pad_left
from megayoco.model.inference import DecoderContext, InferenceModel


class Scores(NamedTuple):
    """What a model thinks of a text, on the CPU."""

    losses: Tensor
    """(T - 1,) fp32: -log p of tokens 1 .. T-1, natural logarithm, each given all before it."""
    greedy: Tensor
    """(T - 1,) bool: whether the token was the most likely one."""
    context: DecoderContext
    """After all tokens but the last."""


def score(
    model: InferenceModel,
    tokens: Sequence[int],
    *,
    chunk: int = PREFILL_CHUNK,
    context: DecoderContext | None = None,
) -> Scores:
    """The loss of every token of a text but its first.

    Args:
        model: the model; every rank of its replica makes the same call.
        tokens: ids, at least two.
        chunk: tokens per call: bounds memory, does not change results.
        context: what came before tokens[0]; None: nothing.

    Raises:
        ValueError: fewer than two tokens, or a chunk that is not positive.
    """
    if len(tokens) < 2 or chunk < 1:
        raise ValueError(f"{len(tokens)} tokens in chunks of {chunk}: there must be 2 and 1 at least")
    ids = torch.as_tensor(tokens, dtype=torch.int64)[None]
    count = ids.shape[1] - 1
    if context is None:
        context = model.empty_context(1, reserve=count)
    context = context.announce(count)
    losses, greedy = [], []
    for start in range(0, count, chunk):
        end = min(start + chunk, count)
        part, targets = (ids[:, a : a + end - start].to(model.device) for a in (start, start + 1))
        loss, right, context = model.losses(part, targets, context)
        losses.append(loss[0].float().cpu())
        greedy.append(right[0].cpu())
    return Scores(torch.cat(losses), torch.cat(greedy), context)


def score_continuations(
    model: InferenceModel, requests: Sequence[tuple[Sequence[int], Sequence[int]]], *, chunk: int = PREFILL_CHUNK
) -> list[tuple[float, bool]]:
    """How likely continuations are, each after its own context; all requests are read as one batch.

    Args:
        model: the model; every rank of its replica makes the same call.
        requests: (context, continuation) pairs of ids, neither empty. Only positions of the continuations enter the
            cross-decoder.
        chunk: tokens per row and call.

    Returns:
        Of each request the sum of log p over its continuation, and whether each of these tokens was the most likely.

    Raises:
        ValueError: no request, or an empty context or continuation.
    """
    if not requests or not all(before and after for before, after in requests):
        raise ValueError("every request needs a token of context and one of continuation")
    tokens, padding = pad_left(model, [[*before, *after] for before, after in requests])
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    wanted = max(len(after) for _, after in requests)
    context = model.empty_context(len(requests), padding=padding, reserve=inputs.shape[1])
    context = context.announce(inputs.shape[1])
    first = inputs.shape[1] - wanted
    for start in range(0, first, chunk):
        context = model.absorb(inputs[:, start : min(start + chunk, first)], context)
    losses, greedy = [], []
    for start in range(first, inputs.shape[1], chunk):
        part = slice(start, min(start + chunk, inputs.shape[1]))
        loss, right, context = model.losses(inputs[:, part], targets[:, part], context)
        losses.append(loss.double().cpu())
        greedy.append(right.cpu())
    loss_table, greedy_table = torch.cat(losses, 1), torch.cat(greedy, 1)
    counts = [len(after) for _, after in requests]
    return [
        (-float(loss_table[row, -count:].sum()), bool(greedy_table[row, -count:].all()))
        for row, count in enumerate(counts)
    ]
