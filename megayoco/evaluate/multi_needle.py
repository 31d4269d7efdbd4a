"""Several needles in a haystack: the numbers of N cities, of which one is asked for, or each in turn. YOCO's prompt.

Source: YOCO, arXiv 2405.05254, section 4.2 "Multi-Needle Evaluation", and its evaluation code: N - 1 needles are
distractors, k - 1 of them at random places before the one that is asked for and the others behind it, k drawn from
1 .. N - 1. Differs from that code as needle.py says, and:

- all cities of a prompt are different; the code's list names some of them more than once;
- room is kept for all needles, so no prompt is longer than its label; the code always keeps 150 tokens;
- `query` all asks for every needle of a prompt; the code asks for the one at the depth.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from megayoco.config.evaluation import MultiNeedleOptions
from megayoco.data.tokenizer import Tokenizer
from megayoco.evaluate.cases import Case, Prompt, PromptWriter, RetrievalTask, draws, wanted_lengths
from megayoco.evaluate.haystack import Filler, Haystack
from megayoco.evaluate.needle import CITIES, LARGEST_NUMBER, LONGEST_CITY, longest_text, prompt_text
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.retrieval import run_retrieval
from megayoco.evaluate.subject import Subject
from megayoco.model.inference import InferenceModel


def needle(city: str, number: int) -> str:
    """The sentence that is hidden; not that of a single needle."""
    return f"The special magic {city} number is: {number}"


def needle_places(rng: random.Random, needles: int, depth: float) -> tuple[list[float], int]:
    """Where the needles stand, as shares of the text, ascending, and which of them is at the depth."""
    if needles == 1:
        return [depth], 0
    before = rng.randint(1, needles - 1) - 1
    left = sorted(rng.uniform(0, depth) for _ in range(before))
    right = sorted(rng.uniform(depth, 1) for _ in range(needles - 1 - before))
    return [*left, depth, *right], before


class MultiNeedlePrompts:
    """The prompts of one evaluation."""

    def __init__(self, tokenizer: Tokenizer, options: MultiNeedleOptions, haystack: Haystack) -> None:
        self._tokenizer, self._seed, self._haystack = tokenizer, options.seed, haystack
        self._asks_all = options.query == "all"
        self._writer = PromptWriter(tokenizer, options)

    def check(self, length: int, needles: int) -> None:
        """Raises UserError if prompts of `length` tokens with so many needles cannot be made."""
        self._writer.check(length, longest_text([needle(LONGEST_CITY, LARGEST_NUMBER)] * needles))

    def build(self, cases: Sequence[Case]) -> list[Prompt]:
        """The prompts of cases of one length and trial, which share their text."""
        length, trial = cases[0].length, cases[0].trial
        filler = self._haystack.filler(self._tokenizer, draws(self._seed, "text", length, trial), length)
        return [self._prompt(case, filler) for case in cases]

    def _prompt(self, case: Case, filler: Filler) -> Prompt:
        rng = draws(self._seed, "needles", case.length, case.needles, case.depth, case.trial)
        places, at_depth = needle_places(rng, case.needles, case.depth or 0.0)
        cities = rng.sample(CITIES, case.needles)
        numbers = [rng.randint(1, LARGEST_NUMBER) for _ in cities]
        asked = case.query if self._asks_all else at_depth
        sentences = [needle(city, number) for city, number in zip(cities, numbers, strict=True)]

        def text(budget: int) -> str:
            borders = [0, *(int(place * budget) for place in places), budget]
            fillers = [filler.part(begin, end) for begin, end in itertools.pairwise(borders)]
            parts = [part for pair in zip(fillers, [*sentences, ""], strict=True) for part in pair][:-1]
            return prompt_text(parts, cities[asked])

        tokens, budget = self._writer.fit(text, case.length)
        answer = str(numbers[asked])
        return Prompt(case, places[asked], tokens, answer, self._asks_all, filler.repeats(budget))


def multi_needle_task(tokenizer: Tokenizer, options: MultiNeedleOptions, trained_length: int | None) -> RetrievalTask:
    """The evaluation, checked and ready. Raises UserError for lengths or a haystack that do not serve."""
    lengths = wanted_lengths(options, trained_length)
    haystack = Haystack.open(options.haystack)
    prompts = MultiNeedlePrompts(tokenizer, options, haystack)
    counts = sorted(set(options.needles))
    prompts.check(lengths[0], counts[-1])
    groups = [
        [
            Case(length, depth, trial, needles, query)
            for needles in counts
            for depth in sorted(set(options.depths))
            for query in range(needles if options.query == "all" else 1)
        ]
        for length in lengths
        for trial in range(options.trials)
    ]
    return RetrievalTask("multi-needle", groups, prompts.build, haystack.identity)


def check(tokenizer: Tokenizer, options: MultiNeedleOptions, trained_length: int | None) -> None:
    """Raises the UserError that `run` would."""
    multi_needle_task(tokenizer, options, trained_length)


def run(
    model: InferenceModel,
    tokenizer: Tokenizer,
    options: MultiNeedleOptions,
    output: Path | None = None,
    progress: Progress | None = None,
    subject: Subject = Subject(),  # noqa: B008 (immutable)
) -> dict[str, float]:
    """Evaluate; see `run_retrieval`."""
    task = multi_needle_task(tokenizer, options, subject.trained_length)
    return run_retrieval(model, tokenizer, task, options, output, progress, subject)
