"""Passkey retrieval: a number in sentences that say nothing and repeat.

Two ways to say how long a prompt is. By `characters` of filler the prompts are LongLLaMA's, number for number: seed s
gives `numpy.random.seed(s)`, the characters before the key from randint(0, characters), the key from
randint(1, 50000). By `lengths` in tokens the filler is as many characters as fit, however many these are.

Source: Landmark Attention, arXiv 2305.16300, section 4.2, and the script of LongLLaMA, arXiv 2307.03170. They differ
here: the script repeats its filler 5000 times at most and knows no longer prompt; it stops after as many tokens as the
key has, here the answer ends with its first integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megayoco.config.evaluation import PasskeyOptions
from megayoco.data.tokenizer import Tokenizer
from megayoco.evaluate.cases import Case, Prompt, PromptWriter, RetrievalTask, draws, wanted_lengths
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.retrieval import run_retrieval
from megayoco.evaluate.subject import Subject
from megayoco.model.inference import InferenceModel

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you"
    " about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"
LARGEST_KEY = 49_999
LEAST_FILLER = len(FILLER)
GROUP = 10
"""Prompts that share their beginning and go to one replica; all of a length share it."""


def passkey_text(before: int, after: int, key: int) -> str:
    """The prompt with so many characters of filler before and after the line with the key."""
    return "\n".join([INSTRUCTION, filler(before), key_line(key), filler(after), QUESTION])


def key_line(key: int) -> str:
    """The line that says the key."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def filler(characters: int) -> str:
    """So many characters of the sentences that repeat."""
    return (f"{FILLER} " * (characters // (len(FILLER) + 1) + 1))[:characters]


def official_numbers(characters: int, seed: int) -> tuple[int, int]:
    """Characters before the key, and the key, as LongLLaMA's script draws them."""
    random = np.random.RandomState(seed)  # the numbers of numpy.random.seed, without its process-wide state
    return int(random.randint(0, characters)), int(random.randint(1, LARGEST_KEY + 1))


class PasskeyPrompts:
    """The prompts of one evaluation."""

    def __init__(self, tokenizer: Tokenizer, options: PasskeyOptions) -> None:
        self._seed, self._by_characters = options.seed, options.characters is not None
        self._writer = PromptWriter(tokenizer, options)

    def check(self, length: int) -> None:
        """Raises UserError if prompts of `length` tokens cannot be made."""
        if not self._by_characters:
            self._writer.check(length, passkey_text(0, LEAST_FILLER, LARGEST_KEY))

    def build(self, cases: Sequence[Case]) -> list[Prompt]:
        """The prompts of some cases."""
        return [self._official(case) if self._by_characters else self._fitted(case) for case in cases]

    def _official(self, case: Case) -> Prompt:
        before, key = official_numbers(case.length, self._seed + case.trial)
        tokens = self._writer.encode(passkey_text(before, case.length - before, key))
        return Prompt(case, before / case.length, tokens, str(key), drawn=True)

    def _fitted(self, case: Case) -> Prompt:
        rng = draws(self._seed, "passkey", case.length, case.depth, case.trial)
        depth = rng.random() if case.depth is None else case.depth
        key = rng.randint(1, LARGEST_KEY)
        per_token = len(FILLER) / max(len(self._writer.encode(FILLER)), 1)

        def text(budget: int) -> str:
            characters = int(budget * per_token)
            before = int(characters * depth)
            return passkey_text(before, characters - before, key)

        tokens, _ = self._writer.fit(text, case.length)
        return Prompt(case, depth, tokens, str(key), drawn=case.depth is None)


def passkey_task(tokenizer: Tokenizer, options: PasskeyOptions, trained_length: int | None) -> RetrievalTask:
    """The evaluation, checked and ready. Raises UserError for lengths that do not serve."""
    lengths = sorted(set(options.characters or wanted_lengths(options, trained_length)))
    prompts = PasskeyPrompts(tokenizer, options)
    prompts.check(lengths[0])
    depths: list[float | None] = [None] if options.depths is None else [*sorted(set(options.depths))]
    groups = []
    for length in lengths:
        cases = [Case(length, depth, trial) for trial in range(options.trials) for depth in depths]
        groups += [cases[begin : begin + GROUP] for begin in range(0, len(cases), GROUP)]
    return RetrievalTask("passkey", groups, prompts.build, {}, "tokens" if options.characters is None else "characters")


def check(tokenizer: Tokenizer, options: PasskeyOptions, trained_length: int | None) -> None:
    """Raises the UserError that `run` would."""
    passkey_task(tokenizer, options, trained_length)


def run(
    model: InferenceModel,
    tokenizer: Tokenizer,
    options: PasskeyOptions,
    output: Path | None = None,
    progress: Progress | None = None,
    subject: Subject = Subject(),  # noqa: B008 (immutable)
) -> dict[str, float]:
    """Evaluate; see `run_retrieval`."""
    task = passkey_task(tokenizer, options, subject.trained_length)
    return run_retrieval(model, tokenizer, task, options, output, progress, subject)
