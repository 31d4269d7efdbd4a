"""Tasks of lm-evaluation-harness (lm-eval), through its own API: any model that we load, on any layout.

lm-eval builds the prompts, and judges and counts the answers; harness_model.py gives the answers. Every process builds
the same prompts and comes to the same counts. Answers are kept in the folder of results as they come, so an interrupted
evaluation goes on where it was. lm-eval is optional: the extra `eval` brings it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megayoco.config.evaluation import HarnessOptions
from megayoco.data.files import write_text_atomically
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.evaluate.cases import start_tokens
from megayoco.evaluate.progress import Progress
from megayoco.evaluate.results import RESULTS, TABLE, ResultsFolder, as_csv, settings_of, versions
from megayoco.evaluate.subject import Subject
from megayoco.evaluate.work import work_through, writes
from megayoco.model.inference import InferenceModel

if TYPE_CHECKING:
    from megayoco.evaluate.harness_model import HarnessModel, Report
    from megayoco.evaluate.harness_tasks import Tasks

logger = logging.getLogger(__name__)

LM_EVAL = "lm-eval>=0.4.12"
"""What the extra `eval` of setup.py asks for."""

BOOTSTRAP_ITERATIONS = 1000
"""Draws behind standard errors that have no formula; lm-eval's 100,000 would take processes of their own."""


def check(tokenizer: Tokenizer, options: HarnessOptions, trained_length: int | None = None) -> None:
    """Raises the UserError that `run` would before it asks the model: loads all tasks, with their data."""
    require_lm_eval()
    from megayoco.evaluate.harness_tasks import load_tasks

    start_tokens(options.start_token, tokenizer)
    if options.apply_chat_template:
        _chat_template(tokenizer)
    with _undisturbed(), _quiet(speaks=False):
        load_tasks(options, tokenizer)


def run(
    model: InferenceModel,
    tokenizer: Tokenizer,
    options: HarnessOptions,
    output: Path | None = None,
    progress: Progress | None = None,
    subject: Subject = Subject(),  # noqa: B008 (immutable)
) -> dict[str, float]:
    """Evaluate a model on tasks of lm-eval. Collective over all ranks; the same results on any layout.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        options: which tasks, and how.
        output: folder of the results, used by the first rank; a folder with a part of them is completed. None: none.
        progress: told after each request, on the first rank, where lm-eval's table is printed in the end, too.
        subject: what is known of the model.

    Returns:
        Every metric: harness/TASK/METRIC, or harness/TASK/METRIC/FILTER where a task filters answers before it judges
        them.

    Raises:
        UserError: lm-eval is missing, a task is unknown or cannot be used, or the folder cannot be used.
    """
    require_lm_eval()
    folder = None
    if output is not None:
        settings = settings_of("harness", options, subject, lm_eval=version("lm-eval"))
        folder = ResultsFolder(output, settings)
        # looks at the folder before the work begins
        work_through(model, [], lambda keys: [], folder)
    # late: they import lm-eval, which takes seconds
    from megayoco.evaluate.harness_model import HarnessModel
    from megayoco.evaluate.harness_tasks import load_tasks

    with _undisturbed(), _quiet(writes(model)):
        tasks = load_tasks(options, tokenizer)
        lm = HarnessModel(
            model,
            tokenizer,
            batch_size=options.batch_size,
            max_length=options.max_length,
            start_token=options.start_token,
            prefill_chunk=options.prefill_chunk,
            chat_template=_chat_template(tokenizer) if options.apply_chat_template else None,
            folder=folder,
            report=None if progress is None else _overall(progress, tasks.documents),
        )
        results = _evaluate(lm, tasks, options)
    notes = _notes(lm, options, subject)
    if writes(model):
        for note in notes:
            logger.warning("%s", note)
    summary = summarise(results)
    if folder is not None and writes(model):
        _write(folder.path, results, summary, notes, settings, subject)
    if progress is not None and writes(model):
        _print_table(results)
    return summary


def require_lm_eval() -> None:
    """Raises UserError if lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f'the evaluation harness needs lm-eval, which is not installed: pip install "{LM_EVAL}"')


def _evaluate(lm: HarnessModel, tasks: Tasks, options: HarnessOptions) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    results = simple_evaluate(
        model=lm,
        tasks=tasks.roots,
        task_manager=tasks.manager,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        limit=options.limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        log_samples=options.log_samples,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        gen_kwargs=options.gen_kwargs,
    )
    assert results is not None
    return dict(results)


def summarise(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of lm-eval's results as flat scalars, without their standard errors."""
    summary = {}
    for row in rows(results):
        parts = ["harness", row["task"], row["metric"], row["filter"]]
        summary["/".join(parts[:3] if row["filter"] == "none" else parts)] = row["value"]
    return summary


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task and metric: task, metric, filter, value, standard error if there is one, and examples shown."""
    table = []
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kind}")
            table.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": kind,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, (int, float)) else None,
                    "shots": results["n-shot"].get(task),
                }
            )
    return table


def _notes(lm: HarnessModel, options: HarnessOptions, subject: Subject) -> list[str]:
    notes = []
    if options.limit is not None:
        notes.append(f"only the first {options.limit:,} documents of each task were asked")
    cut = lm.truncation
    if cut.requests:
        notes.append(
            f"{cut.requests:,} of {lm.requests:,} requests exceed max_length {options.max_length:,} tokens and lost"
            f" their beginnings, {cut.tokens:,} tokens in all; the longest has {cut.longest:,}"
        )
    if subject.trained_length is not None and lm.longest > subject.trained_length:
        notes.append(
            f"the longest request has {lm.longest:,} tokens, the model was trained on at most"
            f" {subject.trained_length:,}"
        )
    return notes


def _write(
    path: Path,
    results: Mapping[str, Any],
    summary: Mapping[str, float],
    notes: Sequence[str],
    settings: Mapping[str, Any],
    subject: Subject,
) -> None:
    """results.json in lm-eval's own format, with what we know besides under `megayoco`; the table as CSV; samples."""
    from lm_eval.utils import handle_non_serializable

    def as_json(value: Any, indent: int | None) -> str:
        return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False) + "\n"

    ours = {**settings, "summary": summary, "notes": notes, "command": subject.command, "versions": versions()}
    whole = {key: value for key, value in results.items() if key != "samples"}
    for task, samples in results.get("samples", {}).items():
        name = f"samples_{task.replace(os.sep, '_')}.jsonl"
        write_text_atomically(path / name, "".join(as_json(sample, None) for sample in samples))
    write_text_atomically(path / TABLE, as_csv(rows(results)))
    write_text_atomically(path / RESULTS, as_json({**whole, "megayoco": ours}, 2))


def _print_table(results: Mapping[str, Any]) -> None:
    from lm_eval.utils import make_table

    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))


def _chat_template(tokenizer: Tokenizer) -> str:
    from megayoco.generate.chat_format import find_template

    place = None if tokenizer.model is None else Path(tokenizer.model)
    found = None if place is None else find_template(place if place.is_dir() else place.parent)
    if found is None:
        raise UserError(
            "apply_chat_template: the model's tokenizer has no chat template (chat_template.jinja, or the key"
            " chat_template of tokenizer_config.json). Leave the option out, or add the template."
        )
    return found[0]


def _overall(progress: Progress, documents: Counter[str]) -> Report:
    """One progress of all kinds of requests, which lm-eval makes one after the other: each counts by its documents."""
    done: Counter[str] = Counter()

    def report(kind: str, share: float, text: str) -> None:
        done[kind] = share * documents[kind]  # type: ignore[assignment]  # a float is as good
        progress(sum(done.values()), sum(documents.values()), f"{kind} {text}")

    return report


@contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval seeds every generator of the process, and reads two variables: all are put back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (lm-eval seeds this one)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    # its workers would be forked from a process with threads; and every rank wants the results, not the first only
    wanted = {"DISABLE_MULTIPROC": "1", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _quiet(speaks: bool) -> Iterator[None]:
    """Only the first rank says something: all would say the same. It leaves out a hint that lm-eval has for each task
    that makes its own data."""
    everything, hints = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.api.task")
    level = everything.level
    hints.addFilter(_is_no_hint)
    try:
        if speaks:
            yield
        else:
            everything.setLevel(logging.CRITICAL)
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    finally:
        everything.setLevel(level)
        hints.removeFilter(_is_no_hint)


def _is_no_hint(record: logging.LogRecord) -> bool:
    return "Custom kwargs can be passed" not in str(record.msg)
