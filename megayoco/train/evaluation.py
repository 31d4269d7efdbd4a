"""Evaluations of the live model during a run.

Every data-parallel and sequence rank becomes a replica that answers prompts of its own, so no rank waits while others
work. The weights are used where they lie; nothing of the run's state is touched: no random state, no data, no
optimizer. A checkpoint that is due at the same step is written first, so a failing evaluation costs none.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from megayoco.config import RunConfig
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError
from megayoco.evaluate.evaluations import EVALUATIONS
from megayoco.evaluate.results import RESULTS
from megayoco.evaluate.subject import Subject
from megayoco.evaluate.work import first_rank_does
from megayoco.model.inference import InferenceModel
from megayoco.model.zero3 import whole_parameters
from megayoco.train.engine import Engine

SHOWN = 4
"""Scalars of an evaluation that its line on the console shows."""


def check_evaluations(run: RunConfig, tokenizer: Tokenizer, first_phase: int) -> None:
    """Everything that can be wrong with the evaluations of a run, before its first step.

    Raises:
        UserError: options that do not serve, a missing text, package or task.
    """
    shortest = min(phase.sequence_length for phase in run.phases[first_phase:])
    for name, options in run.evaluation.wanted().items():
        try:
            EVALUATIONS[name].check(tokenizer, options, shortest)
        except UserError as error:
            raise UserError(f"evaluation.{name.replace('-', '_')}: {error}") from error


class Evaluations:
    """The evaluations of a run.

    Args:
        run: what is wanted, and when.
        engine: the live model.
        tokenizer: the run's.
        directory: the run's; results go to `evaluation/stepN/NAME` in it.
        total_steps: of the run.
    """

    def __init__(self, run: RunConfig, engine: Engine, tokenizer: Tokenizer, directory: Path, total_steps: int) -> None:
        self._run, self._engine, self._tokenizer = run, engine, tokenizer
        self._directory = directory / "evaluation"
        self._total_steps = total_steps

    def due(self, step: int) -> bool:
        """Whether the model is evaluated after so many steps."""
        interval = self._run.evaluation.interval
        at_step = step == self._total_steps or (interval > 0 and step % interval == 0)
        return bool(self._run.evaluation.wanted()) and at_step

    def is_done(self, step: int) -> bool:
        """Whether all results of a step are there. Collective."""
        folders = [self._folder(step, name) for name in self._run.evaluation.wanted()]
        return bool(first_rank_does(lambda: all((folder / RESULTS).exists() for folder in folders)))

    def evaluate(self, step: int, phase: int, *, resuming: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
        """Name, scalars and seconds of each evaluation, as it ends. Collective.

        Args:
            step: finished steps.
            phase: number of the phase that the last of them belongs to.
            resuming: complete what an interrupted evaluation of this very state has left; else it is made anew.

        Raises:
            UserError: something that was there at the start of the run is gone.
        """
        # how long the sequences were that it has seen so far
        trained = max(phase.sequence_length for phase in self._run.phases[: phase + 1])
        subject = Subject({"run": str(self._directory.parent), "step": step}, trained)
        for name, options in self._run.evaluation.wanted().items():
            folder = self._folder(step, name)
            if not resuming:
                first_rank_does(partial(shutil.rmtree, folder, ignore_errors=True))
            started = time.perf_counter()
            with live_model(self._engine) as model:
                scalars = EVALUATIONS[name].load()(model, self._tokenizer, options, folder, None, subject)
            yield name, {**scalars, f"{name}/seconds": time.perf_counter() - started}

    def _folder(self, step: int, name: str) -> Path:
        return self._directory / f"step{step}" / name


@contextmanager
def live_model(engine: Engine) -> Iterator[InferenceModel]:
    """The model of a training engine for inference; training goes on as before afterwards. Collective.

    Under ZeRO 3 all parameters of this rank's part of the model are gathered meanwhile.
    """
    module = engine.module
    shared = [part for part in module.modules() if getattr(part, "sequence", None) is not None]
    axes = [part.sequence for part in shared]
    was_training = module.training
    try:
        module.eval()
        for part in shared:
            part.sequence = None
        with whole_parameters(list(module.parameters()), [module]):
            yield InferenceModel.of(module, engine.topology)
    finally:
        for part, axis in zip(shared, axes, strict=True):
            part.sequence = axis
        module.train(was_training)


def evaluation_line(name: str, scalars: dict[str, float]) -> str:
    """An evaluation on the console."""
    seconds = scalars[f"{name}/seconds"]
    shown = [
        f"{key.partition('/')[2]} {value:.4g}"
        for key, value in scalars.items()
        if not key.endswith(("/seconds", "/substring"))
    ]
    more = f", and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"{name}: {', '.join(shown[-SHOWN:])}{more} ({seconds:.1f} s)"


def for_tensorboard(scalars: dict[str, float]) -> dict[str, Any]:
    """The scalars under one heading."""
    return {f"evaluation/{key}": value for key, value in scalars.items()}
