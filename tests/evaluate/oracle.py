"""A model that has nothing to learn: it answers questions about numbers by looking them up in what it has read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megayoco.data.tokenizer import ByteTokenizer
from megayoco.model.inference import DecoderContext

TOKENIZER = ByteTokenizer()
ASKED = re.compile(r"(?:The special magic ([A-Z][A-Za-z ]*?) number is|(The pass key is)) *([^\n]*)\Z")


def look_up(text: str) -> str:
    """The number that a prompt asks for at its end; texts that ask nothing get nothing."""
    before, _, question = text.rpartition("\n")
    if city := re.search(r"special magic ([A-Z][A-Za-z ]*?) number\?", question):
        found = re.findall(rf"special magic {city[1]} number is:? (\d+)", before)
    else:
        found = re.findall(r"The pass key is (\d+)", before)
    return found[-1] if found else ""


class Oracle:
    """In place of an `InferenceModel` over bytes.

    Args:
        answer: the text that it answers with, given the number it has found.
        replica, replicas: as of an `InferenceModel`.
        interrupt_after: questions after which it fails with KeyboardInterrupt; None: never.
    """

    is_lead = True
    topology = None
    device = torch.device("cpu")

    def __init__(
        self,
        answer: Callable[[str], str] = lambda number: f"{number}.",
        replica: int = 0,
        replicas: int = 1,
        interrupt_after: int | None = None,
    ) -> None:
        self.answer, self.replica, self.replicas = answer, replica, replicas
        self.interrupt_after = interrupt_after
        self.tokens_read = self.questions = self.steps = 0

    def empty_context(self, batch_size: int = 1, *, padding: Any = None, reserve: int = 0) -> DecoderContext:
        assert batch_size == 1
        return DecoderContext(0, ((),))

    def absorb(self, tokens: Tensor, context: DecoderContext) -> DecoderContext:
        new = tuple(tokens[0].tolist())
        self.tokens_read += len(new)
        return DecoderContext(context.length + len(new), (context.layers[0] + new,))

    def advance(self, tokens: Tensor, context: DecoderContext) -> tuple[Tensor, DecoderContext]:
        context = self.absorb(tokens, context)
        self.steps += 1
        text = TOKENIZER.decode(context.layers[0])
        prompt, said = cut(text)
        if not said:
            if self.questions == self.interrupt_after:
                raise KeyboardInterrupt
            self.questions += 1
        answer = TOKENIZER.encode(self.answer(look_up(prompt)))
        rest = answer[len(said) :]
        logits = torch.zeros(1, 1, 260)
        logits[0, 0, rest[0] if rest else TOKENIZER.eod] = 1.0
        logits[0, 0, 258] = 2.0  # no id of the tokenizer: never to be chosen
        return logits, context


def cut(text: str) -> tuple[str, str]:
    """The prompt and what was answered so far."""
    prompt = re.match(r"(.*number is *|.*pass key is)(?=[^\n]*\Z)", text, re.DOTALL)
    assert prompt is not None
    return prompt[0], text[prompt.end() :]


def distinct_prefixes(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that must be read when no common beginning is read twice, but for the last token of each prompt."""
    return len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt))}) + len(prompts)
