"""What prompts have in common at their beginning is read once.

Sorted by their tokens, prompts with a common beginning stand together. While one is read, the context is kept at each
place where a later one leaves it; contexts are values, so each of these can be continued.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from megayoco.generate.generation import prefill
from megayoco.model.inference import DecoderContext, InferenceModel


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning, the last token of either not counted.

    The last is left out because a prompt that is already read gives no logits: its last token is yet to come.
    """
    size = max(min(len(a), len(b)) - 1, 0)
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if len(differ) else size


def shared_prefill(
    model: InferenceModel, prompts: Sequence[list[int]], *, chunk: int, reserve: int = 0
) -> Iterator[tuple[int, DecoderContext, Sequence[int]]]:
    """Each prompt, in any order, with the context of its beginning. Where windows depend on how long a prompt is, no
    two have a beginning in common, and nothing is read in advance.

    Args:
        model: the model; every rank of its replica makes the same call.
        prompts: tokens, none empty.
        chunk: tokens per call of the model.
        reserve: tokens to make room for behind each prompt.

    Yields:
        The prompt's number, the context after its first tokens, and the tokens that are left, at least one.
    """
    if model.empty_context(1).prompts is not None:
        for number, tokens in enumerate(prompts):
            yield number, model.empty_context(1, reserve=len(tokens) + reserve), tokens
        return
    order = sorted(range(len(prompts)), key=lambda number: prompts[number])
    common = [common_prefix(prompts[a], prompts[b]) for a, b in pairwise(order)]
    kept: list[DecoderContext] = []  # of growing length, all of them beginnings of the next prompt
    for place, number in enumerate(order):
        shared = common[place - 1] if place else 0
        kept = [context for context in kept if context.length <= shared]
        tokens = prompts[number]
        context = kept[-1] if kept else model.empty_context(1, reserve=len(tokens) + reserve)
        for cut in branches(common[place:], context.length):
            context = prefill(model, tokens[context.length : cut], chunk=chunk, context=context)
            kept.append(context)
        yield number, context, tokens[context.length :]


def branches(common: Sequence[int], begin: int) -> list[int]:
    """Where later prompts leave the present one, ascending, behind `begin`.

    Args:
        common: what each of the prompts, from the present one on, has in common with the next.
        begin: tokens of the present prompt that are read already.
    """
    cuts: list[int] = []
    for length in common:
        if length <= begin:
            break
        if not cuts or length < cuts[0]:
            cuts.insert(0, length)
    return cuts
