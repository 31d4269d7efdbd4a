"""Asks a model the prompts of a retrieval evaluation and counts its answers.

Answers are greedy. Two rules judge them, both reported: `exact`, the first integer of the answer is the number; and
`substring`, YOCO's own: the number occurs anywhere in the answer, also within a longer one.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megayoco.config.evaluation import RetrievalOptions
from megayoco.data.tokenizer import Tokenizer
from megayoco.evaluate.cases import Prompt, RetrievalTask
from megayoco.evaluate.plots import heat_map
from megayoco.evaluate.prefix import shared_prefill
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.results import ResultsFolder, settings_of
from megayoco.evaluate.subject import Subject
from megayoco.evaluate.work import Item, Record, work_through, writes
from megayoco.generate.generation import generate
from megayoco.generate.sampling import GREEDY
from megayoco.model.inference import InferenceModel

logger = logging.getLogger(__name__)

_INTEGER = re.compile(r"\d+", re.ASCII)
_COMPLETE = re.compile(r"\d+\D", re.ASCII)
TENTHS = 10
"""Rows of the table where depths are drawn."""


def run_retrieval(
    model: InferenceModel,
    tokenizer: Tokenizer,
    task: RetrievalTask,
    options: RetrievalOptions,
    output: Path | None = None,
    progress: Progress | None = None,
    subject: Subject = Subject(),  # noqa: B008 (immutable)
) -> dict[str, float]:
    """Ask all prompts, count, and write the results. Collective over all ranks; the same on any layout.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        task: the prompts.
        options: what the task was made from.
        output: folder of the results, used by the first rank; a folder with a part of them is completed. None: none.
        progress: told after each prompt, on the first rank.
        subject: what is known of the model.

    Returns:
        Accuracies: NAME/LENGTH exact answers of a length, NAME/LENGTH/substring by the other rule, NAME/average and
        NAME/average/substring over all prompts; with several needles NAME/LENGTH/nN for each number N of them.

    Raises:
        UserError: the folder cannot be used.
    """
    cases = {case.key: case for group in task.groups for case in group}
    notes = _length_note(task, subject)
    for note in notes:
        _tell(model, note)
    folder = None
    if output is not None:
        settings = settings_of(task.name, options, subject, text=task.identity)
        folder = ResultsFolder(output, settings)

    def evaluate(keys: Sequence[str]) -> Iterator[Record]:
        prompts = task.build([cases[key] for key in keys])
        return ask(model, tokenizer, prompts, options)

    groups = [[Item(case.key, case.length) for case in group] for group in task.groups]
    records = work_through(model, groups, evaluate, folder, progress, _describe)
    if repeated := sum(record["repeats"] for record in records):
        notes.append(f"{repeated:,} prompts are longer than the haystack and read it more than once")
        _tell(model, notes[-1])
    summary = summarise(task.name, records)
    if folder is not None and writes(model):
        draw(folder.path / "heatmap.png", task.name, records, task.unit)
        folder.finish(summary, table(records), subject, notes)
    return summary


def ask(
    model: InferenceModel, tokenizer: Tokenizer, prompts: Sequence[Prompt], options: RetrievalOptions
) -> Iterator[Record]:
    """The record of each prompt, in the order in which their common beginnings save most."""
    reserve = options.max_new_tokens
    rows = [prompt.tokens for prompt in prompts]
    for number, context, rest in shared_prefill(model, rows, chunk=options.prefill_chunk, reserve=reserve):
        prompt = prompts[number]
        new: list[int] = []
        for token in generate(
            model,
            rest,
            options.max_new_tokens,
            GREEDY,
            stop=(tokenizer.eod,),
            prefill_chunk=options.prefill_chunk,
            vocab_size=tokenizer.vocab_size,
            context=context,
        ):
            if token != tokenizer.eod:
                new.append(token)
            if is_decided(tokenizer.decode(new), prompt.answer):
                break
        yield record_of(prompt, tokenizer.decode(new))


def record_of(prompt: Prompt, output: str) -> Record:
    """What is kept of an answer."""
    case = prompt.case
    return {
        "key": case.key,
        "length": case.length,
        "needles": case.needles,
        "depth": round(prompt.depth, 6),
        "drawn": prompt.drawn,
        "trial": case.trial,
        "query": case.query,
        "prompt_tokens": len(prompt.tokens),
        "answer": prompt.answer,
        "output": output,
        "exact": is_exact(output, prompt.answer),
        "substring": prompt.answer in output,
        "repeats": prompt.repeats,
    }


def is_exact(output: str, answer: str) -> bool:
    """Whether the first integer of an answer is the number asked for."""
    found = _INTEGER.search(output)
    return found is not None and found[0] == answer


def is_decided(output: str, answer: str) -> bool:
    """Whether no further token can change what the two rules say of an answer."""
    return answer in output and _COMPLETE.search(output) is not None


def mean(records: Sequence[Record], rule: str) -> float:
    """Share of the answers that are right by a rule."""
    return sum(record[rule] for record in records) / len(records)


def summarise(name: str, records: Sequence[Record]) -> dict[str, float]:
    """The flat scalars of an evaluation; see `run_retrieval`."""
    scalars: dict[str, float] = {}

    def add(place: str, part: Sequence[Record]) -> None:
        scalars[f"{name}/{place}"] = mean(part, "exact")
        scalars[f"{name}/{place}/substring"] = mean(part, "substring")

    several = len({record["needles"] for record in records}) > 1
    for length, of_length in grouped(records, lambda record: record["length"]).items():
        add(str(length), of_length)
        if several:
            for needles, part in grouped(of_length, lambda record: record["needles"]).items():
                scalars[f"{name}/{length}/n{needles}"] = mean(part, "exact")
    add("average", records)
    return scalars


def depth_name(record: Record) -> str:
    """The row that a record belongs to: its depth in percent, or the tenth that a drawn one lies in."""
    if record["drawn"]:
        tenth = min(int(record["depth"] * TENTHS), TENTHS - 1)
        return f"{100 * tenth // TENTHS}-{100 * (tenth + 1) // TENTHS}"
    return f"{100 * record['depth']:.3g}"


def table(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per length, number of needles and depth."""
    cells = grouped(records, lambda record: (record["length"], record["needles"], depth_order(depth_name(record))))
    return [
        {
            "length": length,
            "needles": needles,
            "depth_percent": depth_name(part[0]),
            "prompts": len(part),
            "exact": round(mean(part, "exact"), 6),
            "substring": round(mean(part, "substring"), 6),
        }
        for (length, needles, _), part in cells.items()
    ]


def depth_order(name: str) -> float:
    """Sorts the names of rows."""
    return float(name.partition("-")[0])


def draw(path: Path, name: str, records: Sequence[Record], unit: str) -> None:
    """Heat maps of exact answers, length by depth, one for each number of needles."""
    rows = table(records)
    depths = sorted({row["depth_percent"] for row in rows}, key=depth_order)
    lengths = sorted({row["length"] for row in rows})
    counts = sorted({row["needles"] for row in rows})
    exact = {(row["needles"], row["depth_percent"], row["length"]): row["exact"] for row in rows}
    panels = {
        f"{count} needle{'s' * (count > 1)}" if len(counts) > 1 else "": [
            [exact.get((count, depth, length)) for length in lengths] for depth in depths
        ]
        for count in counts
    }
    title = f"{name}: {mean(records, 'exact'):.1%} of {len(records):,} answers exact"
    heat_map(
        path,
        title,
        panels,
        [f"{depth} %" for depth in depths],
        [f"{length:,}" for length in lengths],
        f"length, {unit}",
    )


def grouped(records: Sequence[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    """The records by a key, keys ascending."""
    groups = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return dict(sorted(groups.items()))


def _describe(records: Sequence[Record]) -> str:
    return f"exact {mean(records, 'exact'):.3f}" if records else ""


def _length_note(task: RetrievalTask, subject: Subject) -> list[str]:
    if subject.trained_length is None:
        return []
    case = max((case for group in task.groups for case in group), key=lambda case: case.length)
    longest = case.length if task.unit == "tokens" else len(task.build([case])[0].tokens)
    if longest <= subject.trained_length:
        return []
    return [
        f"prompts of up to {longest:,} tokens; the model was trained on sequences of up to {subject.trained_length:,}"
    ]


def _tell(model: InferenceModel, note: str) -> None:
    if writes(model):
        logger.warning("%s", note)
