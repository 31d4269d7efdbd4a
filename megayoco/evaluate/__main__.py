"""Evaluate a trained model: python -m megayoco.evaluate NAME --model RUN_OR_MODEL_DIR --output DIR, alone or under any
launcher. The summary goes to stdout, progress and notes to stderr."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megayoco.data.command import positive_int
from megayoco.errors import UserError
from megayoco.evaluate.evaluations import EVALUATIONS, Evaluation, find_evaluation
from megayoco.evaluate.flags import add_flags, flag_of, options_from
from megayoco.generate.options import add_window_flags, window_options

PROGRAM = "python -m megayoco.evaluate"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def parse(arguments: Sequence[str]) -> tuple[str, argparse.Namespace, Any]:
    """Name of the evaluation, the general flags, and the evaluation's options.

    Raises:
        UserError: an unknown evaluation or flag, or a value that does not serve.
    """
    # launchers put theirs in front of everything
    arguments = [text for text in arguments if not re.fullmatch(r"--local[-_]rank=\d+", text)]
    if not arguments or arguments[0] in ("--help", "-h"):
        print(_overview())
        raise SystemExit(0)
    name, rest = arguments[0], arguments[1:]
    if name.startswith("-"):
        raise UserError(f"the name of an evaluation comes first: {', '.join(EVALUATIONS)}. See {PROGRAM} --help.")
    evaluation = find_evaluation(name)
    parser = _parser(name, evaluation)
    given = parser.parse_args(rest)
    window_options(given)
    return name, given, options_from(evaluation.options, given)


def _overview() -> str:
    width = max(map(len, EVALUATIONS))
    lines = [f"  {name:{width}}  {evaluation.summary}" for name, evaluation in EVALUATIONS.items()]
    return "\n".join(
        [f"usage: {PROGRAM} NAME --model DIR --output DIR [...]", "", *lines, "", f"{PROGRAM} NAME --help tells more."]
    )


def _parser(name: str, evaluation: Evaluation) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"{PROGRAM} {name}", description=f"{evaluation.summary}.".capitalize(), allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="a run directory, or the folder of a model")
    add("--output", required=True, metavar="DIR", help="folder of the results; the same command goes on in it")
    add("--overwrite", action="store_true", help="give up the results that --output holds")
    add("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    add(
        "--kv-dtype",
        choices=("model", "int8", "fp8"),
        default="model",
        help="what the growing keys and values are kept in: --dtype unless told",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1; a GPU where there is one")
    add("--tensor", type=positive_int, metavar="N", help="processes that share each layer of a copy of the model: 1")
    add("--pipeline", type=positive_int, metavar="N", help="processes that share a copy's stack of layers: 1")
    add_window_flags(parser, "all of them unless told, as in training")
    add_flags(parser, evaluation.options)
    return parser


def evaluate(name: str, given: argparse.Namespace, options: Any) -> dict[str, float]:
    """Open the model, run the evaluation. Collective."""
    from megayoco.evaluate.haystack import check_source
    from megayoco.evaluate.results import check, clear
    from megayoco.generate.opening import Placement, open_model

    # before the model, which may take minutes
    output = Path(given.output)
    check(output, given.overwrite)
    for field in ("haystack", "text"):
        if getattr(options, field, None) is not None:
            check_source(getattr(options, field), flag_of(field))
    storage = None if given.kv_dtype == "model" else given.kv_dtype
    opened = open_model(
        given.model,
        Placement(
            device=given.device,
            dtype=given.dtype,
            tensor=given.tensor,
            pipeline=given.pipeline or 1,
            copies=True,
            storage=storage,
            windows=window_options(given),
        ),
    )
    # these after torch, which takes seconds: a wrong path is told before
    from megayoco.evaluate.progress import ConsoleProgress
    from megayoco.evaluate.subject import describe
    from megayoco.evaluate.work import first_rank_does

    dtype = str(opened.model.dtype).removeprefix("torch.")
    memory = {flag.strip("-").replace("-", "_"): str(value) for flag, value in opened.model.windows.given().items()}
    subject = describe(
        opened.weights, shlex.join([*PROGRAM.split(), *sys.argv[1:]]), dtype=dtype, kv_dtype=storage or dtype, **memory
    )
    evaluation = find_evaluation(name)
    if given.overwrite:  # older results go when nothing is left that could be refused
        evaluation.check(opened.tokenizer, options, subject.trained_length)
        first_rank_does(lambda: clear(output))
    progress = ConsoleProgress(name)
    try:
        return evaluation.load()(opened.model, opened.tokenizer, options, output, progress, subject)
    finally:
        progress.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if another process ended, 2 for what the user has to change, 130 when interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # as torchrun and deepspeed say it: whoever reads all launchers' words needs seconds, and a mistake is told at once
    rank = os.environ.get("RANK", "0")
    try:
        name, given, options = parse(sys.argv[1:] if arguments is None else arguments)
        summary = evaluate(name, given, options)
    except UserError as error:
        if rank == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if rank == "0":
            print("error: interrupted. The same command goes on.", file=sys.stderr, flush=True)
        return 130
    except RuntimeError as error:
        # a traceback here would bury the one line of the process that ended first
        if not re.search("Connection (closed|reset) by peer|remote process exited", str(error)):
            raise
        print(f"error (rank {rank}): another process has ended; its message says why.", file=sys.stderr, flush=True)
        return 1
    if rank == "0":
        width = max(map(len, summary))
        for key, value in summary.items():
            print(f"{key:{width}}  {value:.4f}")
        written = sorted(path.name for path in Path(given.output).iterdir() if path.suffix in (".json", ".csv", ".png"))
        print(f"{given.output}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except KeyboardInterrupt:  # while torch was imported
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # a rank that waits for threads or peers would keep the launcher from ending the others
    os._exit(code)
