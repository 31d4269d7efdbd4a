"""A model behind the interface of lm-evaluation-harness: text requests in, likelihoods and text out.

Only positions of continuations enter the cross-decoder, and logits exist for a few positions at a time. Requests are
sorted by length and cut into batches, the same ones on every process; the replicas of the model share the batches, and
all processes get all answers. So lm-eval sees one process everywhere, and results do not depend on the replicas.

Importing this module imports lm-eval, which takes seconds: harness.py does it when an evaluation runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megayoco.config.evaluation import StartToken
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.evaluate.cases import start_tokens
from megayoco.evaluate.results import ResultsFolder
from megayoco.evaluate.work import Item, Record, work_through
from megayoco.generate.generation import PREFILL_CHUNK, generate_batch, prefill
from megayoco.generate.sampling import Sampling
from megayoco.generate.scoring import score, score_continuations
from megayoco.generate.stopping import StopStrings
from megayoco.model.inference import InferenceModel

MAX_NEW_TOKENS = 256
"""For tasks that set no limit; lm-eval's own default."""

SAMPLING_SEED = 1234
"""For tasks that draw their text; lm-eval's default for torch."""

_GENERATION_KEYS = {
    "do_sample",
    "max_gen_toks",
    "min_p",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "until",
}

Pair = tuple[list[int], list[int]]
"""Ids of a context and of its continuation, neither empty."""

Report = Callable[[str, float, str], None]
"""report(kind, share, counts)"""

Request = TypeVar("Request")


class Truncation:
    """How much `max_length` has cut off; counts of this run."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.longest = 0

    def add(self, tokens: int, longest: int) -> None:
        """One request of `longest` tokens has lost its first `tokens`."""
        self.requests += 1
        self.tokens += tokens
        self.longest = max(self.longest, longest)


class _Generating(NamedTuple):
    """A prompt and how to continue it."""

    number: int
    """Place among the requests."""
    tokens: list[int]
    max_new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling


@register_model("megayoco")
class HarnessModel(TemplateLM):
    """An `InferenceModel` for lm-eval.

    Args:
        model: what this rank runs; every rank of every replica makes the same calls.
        tokenizer: the model's.
        batch_size: requests that are read together.
        max_length: the longest input in tokens, answers included; what exceeds it is cut off at the beginning, and
            counted in `truncation`. None: nothing is cut off.
        start_token: what stands before each context: the tokenizer's `bos` or `eod`, or nothing (`none`); `auto`: `bos`
            where there is one, else `eod`, but nothing before a conversation, whose template begins it. An empty
            context becomes `bos`, or else `eod`, in any case.
        prefill_chunk: tokens per row and call; a request longer than this is read alone.
        chat_template: Jinja template that makes a text of a conversation. None: conversations are refused.
        folder: where answers are kept as they come; those that are in it are not made again. None: nowhere.
        report: told on the first rank after each batch the kind of requests, the share of this kind that is done, and
            counts of them.

    Attributes:
        truncation: what `max_length` has cut off so far.
        requests: how many there have been.
        longest: tokens of the longest input so far.

    Raises:
        UserError: start_token names a token that the tokenizer lacks.
    """

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        start_token: StartToken = "auto",
        prefill_chunk: int = PREFILL_CHUNK,
        chat_template: str | None = None,
        folder: ResultsFolder | None = None,
        report: Report | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.text_tokenizer = tokenizer  # `tokenizer` is taken for one of transformers
        self.batch_size = batch_size
        self.max_length = max_length
        self.prefill_chunk = prefill_chunk
        self.truncation = Truncation()
        self.requests = 0
        self.longest = 0
        self._chat_template = chat_template
        self._folder = folder
        self._report = report
        conversation = chat_template is not None and start_token == "auto"
        self._start = start_tokens("none" if conversation else start_token, tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty context."""
        return (self._start or start_tokens("auto", self.text_tokenizer))[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, none added. Names of special tokens are tokens in conversations only, whose template writes
        them; elsewhere they are plain text."""
        special = self._chat_template is not None
        return self.text_tokenizer.encode_documents([string], allow_special=special)[0].tolist()  # type: ignore[no-any-return]

    # What lm-eval asks for

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the sum of log p (natural) over the continuation's tokens, and whether each
        of them was the most likely."""
        return self._scores("loglikelihood", [self._fitting(*self._pair(*request.args)) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The sum of log p over all tokens of each text; texts beyond `max_length` in disjoint windows, as in lm-eval:
        each token is predicted once, from as much as fits."""
        windows = [self._windows(self.tok_encode(request.args[0])) for request in requests]
        scores = iter(self._scores("loglikelihood_rolling", list(itertools.chain.from_iterable(windows))))
        return [sum(next(scores)[0] for _ in mine) for mine in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings, which is left out."""
        return self._answers(
            "generate_until",
            [self._generating(number, *request.args) for number, request in enumerate(requests)],
            self._generate,
            length=lambda job: len(job.tokens) + job.max_new_tokens,
            group=lambda job: job.sampling,
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        return self._scores("loglikelihood", pairs)

    # Conversations

    @property
    def tokenizer_name(self) -> str:
        return f"{self.text_tokenizer.type}-{self.text_tokenizer.identity()['sha256'][:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the model's answer (or the rest of its last answer) begins."""
        if self._chat_template is None:
            raise ValueError("this model was given no chat template")
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[chat_history],
            chat_template=self._chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **getattr(self.text_tokenizer, "special_names", dict)(),
        )
        return str(rendered[0][0])  # of the one conversation; what follows are indices

    # From text to tokens

    def _pair(self, context: str, continuation: str) -> Pair:
        """Both encoded together and cut where the context's own ids end, as lm-eval does."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before, after = [], self.tok_encode(continuation)
        if not after:
            raise UserError(f"the continuation {continuation!r} has no token of its own after {context[-40:]!r}.")
        return self._begun(before), after

    def _begun(self, context: list[int]) -> list[int]:
        """A context with what it begins with, which a chat template may have written already."""
        if not context:
            return [self.prefix_token_id]
        return context if context[:1] == self._start else [*self._start, *context]

    def _fitting(self, context: list[int], continuation: list[int]) -> Pair:
        """The last token is predicted but never read: `max_length` holds one token less than both together."""
        if self.max_length is None:
            return context, continuation
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation):,} tokens does not fit into max_length {self.max_length:,}."
                f" Give at least {len(continuation):,}, or leave it out."
            )
        total = len(context) + len(continuation) - 1
        if total <= self.max_length:
            return context, continuation
        self.truncation.add(total - self.max_length, total)
        return context[total - self.max_length :], continuation

    def _windows(self, tokens: list[int]) -> list[Pair]:
        longest = self.max_length or max(len(tokens), 1)
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, longest, 1)
        return [make_disjoint_window(window) for window in windows]

    def _generating(self, number: int, context: str, wanted: Mapping[str, Any]) -> _Generating:
        asked = normalize_gen_kwargs(dict(wanted), MAX_NEW_TOKENS)
        if asked.pop("num_beams", 1) != 1:
            raise UserError(f"a task wants num_beams {wanted['num_beams']}: beams are not supported. Set num_beams=1.")
        unknown = sorted(set(asked) - _GENERATION_KEYS)
        if unknown:
            known = ", ".join(sorted(_GENERATION_KEYS))
            raise UserError(f"generation argument {unknown[0]!r} of a task is not supported. There are {known}.")
        new = asked["max_gen_toks"]
        tokens = self._begun(self.tok_encode(context))
        if self.max_length is not None:
            room = self.max_length - new
            if room < 1:
                raise UserError(
                    f"max_length {self.max_length:,} has no room for {new:,} new tokens after a prompt. Give more than"
                    f" {new:,}, or fewer new tokens by gen_kwargs max_gen_toks=N."
                )
            if len(tokens) > room:
                self.truncation.add(len(tokens) - room, len(tokens) + new)
                tokens = tokens[-room:]
        until = tuple(text for text in asked["until"] if text)
        return _Generating(number, tokens, new, until, _sampling(asked))

    # From tokens to answers

    def _scores(self, kind: str, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Short pairs in batches; long ones alone, those with the same context one after the other, to read it once."""

        def alone(pair: Pair) -> Hashable:
            return tuple(pair[0]) if len(pair[0]) + len(pair[1]) > self.prefill_chunk else None

        def run(batch: Sequence[Pair]) -> Sequence[tuple[float, bool]]:
            if alone(batch[0]) is not None:
                # windows that depend on how long a request is have no beginning in common
                if self.model.empty_context(1).prompts is None:
                    return self._share_context(batch)
                return [score_continuations(self.model, [pair], chunk=self.prefill_chunk)[0] for pair in batch]
            return score_continuations(self.model, batch, chunk=self.prefill_chunk)

        answers = self._answers(kind, pairs, run, length=lambda pair: len(pair[0]) + len(pair[1]) - 1, group=alone)
        return [(log_p, greedy) for log_p, greedy in answers]

    def _share_context(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        common = pairs[0][0]
        start = prefill(self.model, common[:-1], chunk=self.prefill_chunk)
        answers = []
        for _, continuation in pairs:
            scores = score(self.model, [common[-1], *continuation], chunk=self.prefill_chunk, context=start)
            answers.append((-float(scores.losses.double().sum()), bool(scores.greedy.all())))
        return answers

    def _generate(self, jobs: Sequence[_Generating]) -> list[str]:
        ends = [StopStrings(self.text_tokenizer, job.until) for job in jobs]

        def finished(row: int, new: list[int]) -> bool:
            ends[row].push(new[-1])
            return ends[row].stopped is not None

        rows = generate_batch(
            self.model,
            [job.tokens for job in jobs],
            [job.max_new_tokens for job in jobs],
            # rows of other batches draw other numbers, though the prompts be the same
            replace(jobs[0].sampling, seed=SAMPLING_SEED + jobs[0].number),
            stop=(self.text_tokenizer.eod,),
            prefill_chunk=self.prefill_chunk,
            vocab_size=self.text_tokenizer.vocab_size,
            finished=finished,
        )
        return [self._text(row, job.until) for row, job in zip(rows, jobs, strict=True)]

    def _text(self, tokens: Sequence[int], until: Sequence[str]) -> str:
        end = StopStrings(self.text_tokenizer, until)
        return "".join(end.push(token) for token in tokens if token != self.text_tokenizer.eod) + end.finish()

    def _answers(
        self,
        kind: str,
        requests: Sequence[Request],
        run: Callable[[Sequence[Request]], Sequence[Any]],
        length: Callable[[Request], int],
        group: Callable[[Request], Hashable],
    ) -> list[Any]:
        """Runs requests of one group in batches, the longest first, and gives the answers in the order of requests."""
        sizes = [length(request) for request in requests]
        self.requests += len(requests)
        self.longest = max([self.longest, *sizes])
        groups: dict[Hashable, list[int]] = {}
        for number in sorted(range(len(requests)), key=lambda number: -sizes[number]):
            groups.setdefault(group(requests[number]), []).append(number)
        # a resumed evaluation must not take answers to other requests for these
        keys = [f"{kind}-{number}-{_digest(request)}" for number, request in enumerate(requests)]
        numbers = {key: number for number, key in enumerate(keys)}
        batches = [
            [Item(keys[number], sizes[number]) for number in members[start : start + self.batch_size]]
            for members in groups.values()
            for start in range(0, len(members), self.batch_size)
        ]

        def evaluate(keys: Sequence[str]) -> list[Record]:
            answers = run([requests[numbers[key]] for key in keys])
            return [{"key": key, "answer": answer} for key, answer in zip(keys, answers, strict=True)]

        def progress(done: float, total: float, counts: str) -> None:
            if self._report is not None:
                self._report(kind, done / total if total else 1.0, counts)

        records = work_through(self.model, batches, evaluate, self._folder, progress)
        # in the order of the batches
        answers = {record["key"]: record["answer"] for record in records}
        return [answers[key] for key in keys]


def _digest(request: Any) -> str:
    return blake2b(repr(request).encode(), digest_size=8).hexdigest()


def _sampling(asked: Mapping[str, Any]) -> Sampling:
    if not asked["do_sample"]:
        return Sampling(temperature=0.0, repetition_penalty=asked.get("repetition_penalty"))
    # 0 and -1 are other backends' words for no limit
    top_k = asked.get("top_k")
    return Sampling(
        temperature=asked.get("temperature", 1.0),
        top_k=top_k if top_k is not None and top_k > 0 else None,
        top_p=asked.get("top_p"),
        min_p=asked.get("min_p"),
        repetition_penalty=asked.get("repetition_penalty"),
    )
