"""Continue a sequence of tokens: the prompt is read once, in chunks, and the contexts of the layers are the cache.

All prompt tokens but the last are absorbed: they pass the self-decoder and leave shared keys and values, but never
enter the cross-decoder. Each later token is one step of `Decoder.advance`.

Shapes: P prompt tokens, V vocabulary. Batch size 1.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megayoco.generate.sampling import Sampler, Sampling
from megayoco.model.decoder import Decoder, DecoderContext

PREFILL_CHUNK = 2048
"""Prompt tokens per call: bounds the memory of the prompt's activations; results do not depend on it."""


def cache_bytes(context: DecoderContext) -> int:
    """Bytes of everything that a context remembers: keys, values and states of all layers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(context.layers))


def prefill(
    decoder: Decoder, tokens: Sequence[int], *, chunk: int = PREFILL_CHUNK, context: DecoderContext | None = None
) -> DecoderContext:
    """Read `tokens` without asking for logits, `chunk` of them at a time; returns the context after the last.

    Args:
        decoder: the model.
        tokens: ids, any number of them.
        chunk: tokens per call, at least 1.
        context: what came before; None: nothing.

    Raises:
        ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    with torch.inference_mode():
        if context is None:
            context = decoder.empty_context(1)
        for start in range(0, len(tokens), chunk):
            context = decoder.absorb(_row(decoder, tokens[start : start + chunk]), context)
    return context


class Generation:
    """The tokens of one continuation as they come: iterate over it, once.

    Attributes:
        context: everything read so far (the last new token is not in it: it has only been chosen).
        prompt_tokens, new_tokens: counts so far.
        prefill_seconds: time until the first new token was chosen; the whole prompt was read in it.
        decode_seconds: time for the tokens after the first, without what the caller did between them.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], steps: Iterator[tuple[int, DecoderContext]]) -> None:
        self.context = decoder.empty_context(1)
        self.prompt_tokens = len(prompt)
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
    decoder: Decoder,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Collection[int] = (),
    *,
    prefill_chunk: int = PREFILL_CHUNK,
    vocab_size: int | None = None,
    context: DecoderContext | None = None,
) -> Generation:
    """Continue `tokens`, one token after another.

    Args:
        decoder: the model, in evaluation mode.
        tokens: the prompt, at least one id.
        max_new_tokens: stop after this many, at least 1.
        sampling: how each token is chosen.
        stop: ids that end the continuation; the one met is given, too, as the last.
        prefill_chunk: prompt tokens per call.
        vocab_size: ids from here on are never chosen. None: the whole vocabulary of the model.
        context: what came before the prompt (an earlier `Generation.context`, for a further turn). None: nothing.

    Returns:
        An iterator over the new tokens; the model runs when a token is asked for.

    Raises:
        ValueError: an empty prompt, or a number that is not positive.
    """
    if not tokens:
        raise ValueError("the prompt has no token: start from the end-of-document token")
    if max_new_tokens < 1 or prefill_chunk < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} and prefill_chunk {prefill_chunk} must be at least 1")
    sampler = Sampler(sampling, vocab_size)
    steps = _steps(decoder, tokens, max_new_tokens, sampler, frozenset(stop), prefill_chunk, context)
    return Generation(decoder, tokens, steps)


def _steps(
    decoder: Decoder,
    tokens: Sequence[int],
    max_new_tokens: int,
    sampler: Sampler,
    stop: frozenset[int],
    chunk: int,
    context: DecoderContext | None,
) -> Iterator[tuple[int, DecoderContext]]:
    """Each new token with the context that it was chosen from."""
    context = prefill(decoder, tokens[:-1], chunk=chunk, context=context)
    token = tokens[-1]
    for _ in range(max_new_tokens):
        # not around the yield: the mode would leak into the caller
        with torch.inference_mode():
            logits, context = decoder.advance(_row(decoder, [token]), context)
            token = sampler(logits[0, -1])
        yield token, context
        if token in stop:
            return


def _row(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    return torch.tensor([list(tokens)], dtype=torch.int64, device=decoder.embed_tokens.weight.device)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
