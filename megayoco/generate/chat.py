"""A conversation that stays in the cache: each turn, only what is new is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megayoco.data.tokenizer import Tokenizer
from megayoco.generate.chat_format import ChatFormat
from megayoco.generate.generation import PREFILL_CHUNK, Generation, generate
from megayoco.generate.sampling import Sampling
from megayoco.generate.stopping import StopStrings
from megayoco.model.inference import DecoderContext, InferenceModel, cache_bytes


@dataclass
class _Memory:
    """What the model has read, and what it has to read before the user's next text."""

    context: DecoderContext | None = None
    read: tuple[int, ...] = ()
    """The tokens of `context`."""
    unread: tuple[int, ...] = ()
    """Tokens of the last answer that were chosen and not read."""
    rest: str = ""
    """Text after them."""
    begun: bool = False
    """Whether a turn of the user's has been read."""


class Conversation:
    """Turns of a user and of a model.

    An answer stays in the cache token for token as the model wrote it. Where it ran into a stop string, the cache is
    taken back to before the answer, and the part that counts read again, only if what it has read does not belong to
    the conversation; the beginning of the user's next turn does.

    Args:
        model: the model; every rank of its replica makes the same calls.
        tokenizer: of the model.
        chat_format: what stands around the texts.
        sampling: how tokens are chosen; each turn draws from the seed plus its number.
        max_new_tokens: of one answer.
        stops: further strings that end an answer.
        prefill_chunk: tokens read at once.
        interruptible: Ctrl-C ends an answer, and `ask` returns; otherwise it is raised.
        memory: the context of a text that was read before, in front of all turns, and its tokens. None and (): none.
    """

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: Tokenizer,
        chat_format: ChatFormat,
        sampling: Sampling,
        max_new_tokens: int,
        *,
        stops: Sequence[str] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        interruptible: bool = True,
        memory: tuple[DecoderContext | None, tuple[int, ...]] = (None, ()),
    ) -> None:
        self._model, self._tokenizer, self._format = model, tokenizer, chat_format
        self._sampling, self._max_new_tokens, self._prefill_chunk = sampling, max_new_tokens, prefill_chunk
        self._stop_ids, markers = chat_format.stops(tokenizer)
        self._stops = [*markers, *stops]
        self._interrupts: tuple[type[BaseException], ...] = (KeyboardInterrupt,) if interruptible else ()
        self._start = _Memory(*memory)
        self.reset()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        return 0 if self._memory.context is None else cache_bytes(self._memory.context)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens in the cache, without those of a memory that was saved without its tokens."""
        return self._memory.read

    def reset(self) -> None:
        """Forgets everything but the text that was read before."""
        self._memory, self._turn = self._start, 0

    def ask(self, text: str, write: Callable[[str], None]) -> Generation:
        """Answers a text of the user's; the answer goes to `write` as it comes.

        Interrupted before its first token, the turn has never been.

        Returns:
            The generation, for its counts and times.
        """
        before, feed = self._memory, self._feed(text)
        seed = None if self._sampling.seed is None else self._sampling.seed + self._turn
        generation = generate(
            self._model,
            feed,
            self._max_new_tokens,
            replace(self._sampling, seed=seed),
            self._stop_ids,
            prefill_chunk=self._prefill_chunk,
            vocab_size=self._tokenizer.vocab_size,
            context=before.context,
            history=before.read,
        )
        shown = StopStrings(self._tokenizer, self._stops)
        answer: list[int] = []
        start: DecoderContext | None = None
        try:
            for token in generation:
                start = start or generation.context
                if token in self._stop_ids:
                    break
                answer.append(token)
                write(shown.push(token))
                if shown.stopped is not None:
                    break
            write(shown.finish())
        except self._interrupts:
            pass
        if start is not None:
            read = (*before.read, *feed)
            self._memory = self._settle(start, generation.context, read, answer, shown.stopped)
            self._turn += 1
        return generation

    def _feed(self, text: str) -> list[int]:
        memory = self._memory
        if not memory.begun:
            return self._format.opening(self._tokenizer, text)
        return [*memory.unread, *self._format.further(self._tokenizer, memory.rest, text)]

    def _settle(
        self, start: DecoderContext, end: DecoderContext, read: tuple[int, ...], answer: list[int], stopped: str | None
    ) -> _Memory:
        """What to go on from after an answer.

        Args:
            start, end: the context before the answer, and the newest one.
            read: the tokens of `start`.
            answer: the tokens that were chosen.
            stopped: the stop string that the answer ran into.
        """
        kept, rest = self._split(answer, stopped)
        further = end.length - start.length
        if further > kept:
            return _Memory(start, read, tuple(answer[:kept]), rest, begun=True)
        return _Memory(end, (*read, *answer[:further]), tuple(answer[further:kept]), rest, begun=True)

    def _split(self, answer: list[int], stopped: str | None) -> tuple[int, str]:
        """How many tokens of an answer belong to the conversation, and the text after them, up to the user's next."""
        pieces = [self._tokenizer.decode_bytes([token]) for token in answer]
        written = b"".join(pieces)
        end = len(written) if stopped is None else written.find(stopped.encode())
        wanted = written[: end if end >= 0 else len(written)] + self._format.continuing.encode()
        kept, size, length = 0, 0, 0
        for number, piece in enumerate(pieces, 1):
            if not wanted.startswith(piece, length):
                break
            length += len(piece)
            # between characters, so that the rest is a text
            if length == len(wanted) or wanted[length] & 0xC0 != 0x80:
                kept, size = number, length
        return kept, wanted[size:].decode("utf-8", "replace")


def converse(
    conversation: Conversation,
    read: Callable[[], str | None],
    write: Callable[[str], None],
    report: Callable[[str], None],
    trained_length: int | None = None,
) -> None:
    """Answers one turn after another, until there are no more or one says /exit.

    Args:
        conversation: what to go on with; /reset empties it.
        read: the user's next turn; None at the end.
        write: takes the answers as they come.
        report: takes a line about the conversation.
        trained_length: tokens that the model was trained to read; more are told, once.
    """
    warned = False
    while (text := read()) is not None:
        text = text.strip()
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            report("everything is forgotten" + (", but what --memory holds" if conversation.cache_bytes else ""))
        elif re.fullmatch("/[a-z]+", text):
            report(f"there is no {text}, only /reset and /exit")
        elif text:
            generation = conversation.ask(text, write)
            write("\n")
            report(_status(conversation, generation))
            if trained_length is not None and len(conversation.tokens) > trained_length and not warned:
                warned = True
                report(
                    f"the conversation has {len(conversation.tokens):,} tokens, the model was trained to read"
                    f" {trained_length:,}: expect worse answers, or say /reset"
                )


def _status(conversation: Conversation, generation: Generation) -> str:
    new, seconds = generation.new_tokens, generation.decode_seconds
    rate = f" at {(new - 1) / seconds:,.1f} tokens/s" if new > 1 else ""
    return (
        f"read {generation.prompt_tokens:,} tokens, wrote {new:,}{rate};"
        f" {len(conversation.tokens):,} in the cache, {conversation.cache_bytes:,} bytes"
    )
