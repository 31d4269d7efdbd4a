"""Needle in a haystack: the number of a city, hidden in a long text. YOCO's prompt.

Source: YOCO, arXiv 2405.05254, section 4.2 "Needle-In-A-Haystack", and its evaluation code. It differs from that code:

- a prompt is filled to its label to the word, and never beyond; the code keeps 150 tokens free and stops at a line;
- all depths of one length and trial share one text, which goes on behind the needle; the code draws two;
- text, city and number follow from seed, length, depth and trial, so one cell can be computed alone;
- what stands before the prompt is an option (`start_token`); the code always has bos;
- it ends, and exact answers are counted beside the code's rule (retrieval.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megayoco.config.evaluation import NeedleOptions
from megayoco.data.tokenizer import Tokenizer
from megayoco.evaluate.cases import Case, Prompt, PromptWriter, RetrievalTask, draws, wanted_lengths
from megayoco.evaluate.haystack import Filler, Haystack
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.retrieval import run_retrieval
from megayoco.evaluate.subject import Subject
from megayoco.model.inference import InferenceModel

INSTRUCTION = (
    "There is a special magic number inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the magic number there. "
)
LARGEST_NUMBER = 50_000
CITIES = tuple(
    name.strip()
    for name in """
    Almaty, Amman, Amsterdam, Antananarivo, Astana, Athens, Baghdad, Bangalore, Bangkok, Barcelona, Beirut, Belgrade,
    Berlin, Bratislava, Brussels, Bucharest, Budapest, Buenos Aires, Cairo, Chicago, Colombo, Copenhagen, Dakar,
    Damascus, Delhi, Doha, Dubai, Helsinki, Ho Chi Minh City, Istanbul, Jakarta, Johannesburg, Kampala, Khartoum,
    Kigali, Kuala Lumpur, Lagos, Lima, Lisbon, Los Angeles, Madrid, Maputo, Melbourne, Mexico City, Moscow, Mumbai,
    Nairobi, Oslo, Paris, Port Louis, Rabat, San Francisco, Santiago, Sarajevo, Seattle, Seoul, Shanghai, Sofia, Sydney,
    Tashkent, Thimphu, Tokyo, Toronto, Tunis, Vancouver, Victoria, Vienna, Yangon, Yerevan
    """.split(",")
)
LONGEST_CITY = max(CITIES, key=len)
LEAST_FILLER = 8
"""Words of text around each needle at least, so that a depth means something."""


def needle(city: str, number: int) -> str:
    """The sentence that is hidden."""
    return f"The special magic {city} number is {number} . "


def question(city: str) -> str:
    """What a prompt ends with; the number follows."""
    return f"What is the special magic {city} number? The special magic {city} number is "


def prompt_text(parts: Sequence[str], city: str) -> str:
    """The whole prompt around the parts of the text, needles among them."""
    return f"{INSTRUCTION}{chr(10).join([*parts, question(city)])} "


def longest_text(needles: Sequence[str]) -> str:
    """A prompt that is as long as one with these needles and hardly any text around them can be."""
    return prompt_text([word for sentence in needles for word in (sentence, "some " * LEAST_FILLER)], LONGEST_CITY)


class NeedlePrompts:
    """The prompts of one evaluation."""

    def __init__(self, tokenizer: Tokenizer, options: NeedleOptions, haystack: Haystack) -> None:
        self._tokenizer, self._seed, self._haystack = tokenizer, options.seed, haystack
        self._writer = PromptWriter(tokenizer, options)

    def check(self, length: int) -> None:
        """Raises UserError if prompts of `length` tokens cannot be made."""
        self._writer.check(length, longest_text([needle(LONGEST_CITY, LARGEST_NUMBER)]))

    def build(self, cases: Sequence[Case]) -> list[Prompt]:
        """The prompts of cases of one length and trial, which share their text."""
        length, trial = cases[0].length, cases[0].trial
        filler = self._haystack.filler(self._tokenizer, draws(self._seed, "text", length, trial), length)
        return [self._prompt(case, filler) for case in cases]

    def _prompt(self, case: Case, filler: Filler) -> Prompt:
        rng = draws(self._seed, "needle", case.length, case.depth, case.trial)
        city, number = rng.choice(CITIES), rng.randint(1, LARGEST_NUMBER)
        depth = case.depth or 0.0

        def text(budget: int) -> str:
            before = int(budget * depth)
            return prompt_text([filler.part(0, before), needle(city, number), filler.part(before, budget)], city)

        tokens, budget = self._writer.fit(text, case.length)
        return Prompt(case, depth, tokens, str(number), repeats=filler.repeats(budget))


def needle_task(tokenizer: Tokenizer, options: NeedleOptions, trained_length: int | None) -> RetrievalTask:
    """The evaluation, checked and ready. Raises UserError for lengths or a haystack that do not serve."""
    lengths = wanted_lengths(options, trained_length)
    haystack = Haystack.open(options.haystack)
    prompts = NeedlePrompts(tokenizer, options, haystack)
    prompts.check(lengths[0])
    groups = [
        [Case(length, depth, trial) for depth in sorted(set(options.depths))]
        for length in lengths
        for trial in range(options.trials)
    ]
    return RetrievalTask("needle", groups, prompts.build, haystack.identity)


def check(tokenizer: Tokenizer, options: NeedleOptions, trained_length: int | None) -> None:
    """Raises the UserError that `run` would."""
    needle_task(tokenizer, options, trained_length)


def run(
    model: InferenceModel,
    tokenizer: Tokenizer,
    options: NeedleOptions,
    output: Path | None = None,
    progress: Progress | None = None,
    subject: Subject = Subject(),  # noqa: B008 (immutable)
) -> dict[str, float]:
    """Evaluate; see `run_retrieval`."""
    task = needle_task(tokenizer, options, subject.trained_length)
    return run_retrieval(model, tokenizer, task, options, output, progress, subject)
