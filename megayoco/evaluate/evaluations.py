"""The evaluations by name. Their modules are imported when one is run: the layers they need take seconds."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from megayoco.config import evaluation as config
from megayoco.data.tokenizer import Tokenizer
from megayoco.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        options: the dataclass of its options.
        module: holds `run(model, tokenizer, options, output=None, progress=None, subject=Subject())`, which returns
            flat scalars, and `check(tokenizer, options, trained_length)`.
        summary: what it does, in a line.
    """

    options: type[Any]
    module: str
    summary: str

    def load(self) -> Callable[..., dict[str, float]]:
        """Its `run`."""
        return import_module(self.module).run  # type: ignore[no-any-return]

    def check(self, tokenizer: Tokenizer, options: Any, trained_length: int | None) -> None:
        """Raises the UserError that `run` would for these options, before there is a model."""
        import_module(self.module).check(tokenizer, options, trained_length)


EVALUATIONS = {
    "needle": Evaluation(
        config.NeedleOptions, "megayoco.evaluate.needle", "find a number in a long text, at all lengths and depths"
    ),
    "multi-needle": Evaluation(
        config.MultiNeedleOptions, "megayoco.evaluate.multi_needle", "find one, or all, of several numbers"
    ),
    "passkey": Evaluation(config.PasskeyOptions, "megayoco.evaluate.passkey", "find a number in sentences that repeat"),
    "dictionary": Evaluation(
        config.DictionaryOptions, "megayoco.evaluate.dictionary", "look up random keys that were defined far before"
    ),
    "perplexity": Evaluation(
        config.PerplexityOptions, "megayoco.evaluate.perplexity", "loss by position in long documents"
    ),
    "harness": Evaluation(
        config.HarnessOptions, "megayoco.evaluate.harness", "tasks of lm-evaluation-harness, and your own"
    ),
}


def find_evaluation(name: str) -> Evaluation:
    """An evaluation by its name. Raises UserError with the nearest one, or all."""
    if name in EVALUATIONS:
        return EVALUATIONS[name]
    nearest = difflib.get_close_matches(name, EVALUATIONS, 1, 0.5)
    hint = f"Did you mean {nearest[0]}?" if nearest else f"There are {', '.join(EVALUATIONS)}."
    raise UserError(f"there is no evaluation {name!r}. {hint}")
