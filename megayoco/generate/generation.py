"""Continue sequences of tokens: the prompt is read once, in chunks, and the contexts of the layers are the cache.

All prompt tokens but the last are absorbed: they pass the self-decoder and leave shared keys and values, but never
enter the cross-decoder. Each later token is one step of `InferenceModel.advance`.

Shapes: B rows, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megayoco.generate.sampling import Sampler, Sampling
from megayoco.model.inference import DecoderContext, InferenceModel

PREFILL_CHUNK = 2048
"""Prompt tokens per call: bounds the memory of the prompt's activations; results do not depend on it."""


def prefill(
    model: InferenceModel,
    tokens: Sequence[int],
    *,
    chunk: int = PREFILL_CHUNK,
    context: DecoderContext | None = None,
    reserve: int | None = None,
) -> DecoderContext:
    """Read `tokens` without asking for logits, `chunk` of them at a time; returns the context after the last.

    All of them are one prompt, unless they belong to one that was announced (`DecoderContext.announce`).

    Args:
        model: the model.
        tokens: ids, any number of them.
        chunk: tokens per call, at least 1.
        context: what came before; None: nothing.
        reserve: without context, tokens to make room for; None: these.

    Raises:
        ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if context is None:
        context = model.empty_context(1, reserve=len(tokens) if reserve is None else reserve)
    if not context.is_announced:
        context = context.announce(len(tokens))
    for start in range(0, len(tokens), chunk):
        context = model.absorb(_row(model, tokens[start : start + chunk]), context)
    return context


ROOM = 4096
"""New tokens that room is made for in advance: most end long before their limit."""


class Generation:
    """The tokens of one continuation as they come: iterate over it, once.

    Attributes:
        context: everything read so far (the last new token is not in it: it has only been chosen).
        prompt_tokens, new_tokens: counts so far.
        prefill_seconds: time until the first new token was chosen; the whole prompt was read in it.
        decode_seconds: time for the tokens after the first, without what the caller did between them.
    """

    def __init__(self, context: DecoderContext, prompt_tokens: int, steps: Iterator[tuple[int, DecoderContext]]):
        self.context = context
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self._steps = steps

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        before = time.perf_counter()
        token, self.context = next(self._steps)
        seconds = time.perf_counter() - before
        if self.new_tokens == 0:
            self.prefill_seconds = seconds
        else:
            self.decode_seconds += seconds
        self.new_tokens += 1
        return token


def generate(
    model: InferenceModel,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Collection[int] = (),
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    vocab_size: int | None = None,
    context: DecoderContext | None = None,
    history: Sequence[int] = (),
) -> Generation:
    """Continue `tokens`, one token after another.

    Args:
        model: the model; every rank of its replica makes the same call.
        tokens: the prompt, at least one id.
        max_new_tokens: stop after this many, at least 1.
        sampling: how each token is chosen.
        stop: ids that end the continuation; the one met is given, too, as the last.
        prefill_chunk: prompt tokens per call.
        vocab_size: ids from here on are never chosen. None: the whole vocabulary of the model.
        context: what came before the prompt (an earlier `Generation.context`, for a further turn). None: nothing.
        history: the tokens of `context`, for a repetition penalty.

    Returns:
        An iterator over the new tokens; the model runs when a token is asked for.

    Raises:
        ValueError: an empty prompt, or a number that is not positive.
    """
    if not tokens:
        raise ValueError("the prompt has no token: start from the end-of-document token")
    if max_new_tokens < 1 or prefill_chunk < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and prefill_chunk {prefill_chunk} must be at least 1")
    if context is None:
        context = model.empty_context(1, reserve=len(tokens) + min(max_new_tokens, ROOM))
    sampler = Sampler(agreed(model, sampling), vocab_size)
    steps = _steps(model, tokens, max_new_tokens, sampler, frozenset(stop), prefill_chunk, context, history)
    return Generation(context, len(tokens), steps)


def _steps(
    model: InferenceModel,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler,
    stop: frozenset[int],
    chunk: int,
    context: DecoderContext,
    history: Sequence[int],
) -> Iterator[tuple[int, DecoderContext]]:
    """Each new token with the context that it was chosen from."""
    seen = [*history, *tokens] if sampler.needs_history else None
    context = context.announce(len(tokens))
    context = prefill(model, tokens[:-1], chunk=chunk, context=context)
    token = tokens[-1]
    for _ in range(max_new_tokens):
        logits, context = model.advance(_row(model, [token]), context)
        token = sampler(logits[0, -1], seen)
        if seen is not None:
            seen.append(token)
        yield token, context
        if token in stop:
            return


def generate_batch(
    model: InferenceModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    stop: Collection[int] = (),
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    vocab_size: int | None = None,
    finished: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue prompts of any lengths together; each gets what it would get alone, up to rounding.

    Args:
        model: the model; every rank of its replica makes the same call.
        prompts: B lists of ids, none empty. Shorter ones are padded on the left to the longest: equal lengths save
            work.
        max_new_tokens: at most so many new tokens, for all rows or for each; at least 1.
        sampling: how each token is chosen; row number r draws from a random stream of its own.
        stop: ids that end a row; the one met is its last.
        prefill_chunk: prompt tokens per row and call.
        vocab_size: ids from here on are never chosen.
        finished: asked after each new token with a row's number and its new tokens; true ends the row.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: no prompts, an empty one, or a number that is not positive.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs a token: start from the end-of-document token")
    if len(limits) != len(prompts) or min(limits) < 1 or prefill_chunk < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and prefill_chunk {prefill_chunk} must be at least 1")
    tokens, padding = pad_left(model, prompts)
    context = model.empty_context(len(prompts), padding=padding, reserve=tokens.shape[1] + min(max(limits), ROOM))
    context = context.announce(tokens.shape[1])
    for start in range(0, tokens.shape[1] - 1, prefill_chunk):
        context = model.absorb(tokens[:, start : min(start + prefill_chunk, tokens.shape[1] - 1)], context)
    sampler = Sampler(agreed(model, sampling), vocab_size)
    histories = [list(prompt) for prompt in prompts] if sampler.needs_history else None
    new: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    last = tokens[:, -1:]
    while any(running):
        logits, context = model.advance(last, context)
        chosen = sampler.batch(logits[:, -1], histories)
        for row, token in enumerate(chosen):
            if not running[row]:
                continue
            new[row].append(token)
            if histories is not None:
                histories[row].append(token)
            ended = token in stop or len(new[row]) == limits[row]
            running[row] = not (ended or (finished is not None and finished(row, new[row])))
        last = torch.tensor(chosen, dtype=torch.int64, device=model.device)[:, None]
    return new


def pad_left(model: InferenceModel, rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """(B, N) int64 on the model's device, N the longest row's length, and how many tokens of each row are padding."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    table = [[0] * pad + list(row) for pad, row in zip(padding, rows, strict=True)]
    return torch.tensor(table, dtype=torch.int64, device=model.device), padding


def agreed(model: InferenceModel, sampling: Sampling) -> Sampling:
    """The same draws on every rank of a replica."""
    if sampling.seed is not None or sampling.temperature == 0:
        return sampling
    return replace(sampling, seed=model.agree(random.SystemRandom().getrandbits(32)))


def _row(model: InferenceModel, tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64, device=model.device)
