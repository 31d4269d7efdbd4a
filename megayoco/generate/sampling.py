"""From logits to the next token: greedy, or drawn by temperature, top-k and top-p.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from megayoco.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises UserError for values out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy)."""

    top_k: int | None = None
    """Draw among the k most likely tokens only."""

    top_p: float | None = None
    """Draw among the fewest most likely tokens that hold at least this share of the probability (after top_k)."""

    seed: int | None = None
    """The same seed gives the same draws; None: other ones each time."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a number of at least 0 (0 is greedy), got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}. Leave it out to keep all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}. Leave it out to keep all tokens.")


GREEDY = Sampling(temperature=0.0)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that the next token is drawn from.

    Args:
        logits: (V,), any floating dtype; -inf forbids a token.
        sampling: temperature, then top-k, then top-p; ties at a border go to the lower id.

    Returns:
        (V,) float64, sums to 1; 0 for tokens that cannot be drawn.
    """
    # the largest becomes 0 before the division: no temperature overflows, and 0 / 1e-300 stays 0
    z = logits.double()
    z = z - z.max()
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(z.argmax(), len(z)).double()
    p = torch.softmax(z / sampling.temperature, 0)
    if sampling.top_k is None and sampling.top_p is None:
        return p
    ordered, order = p.sort(descending=True, stable=True)
    if sampling.top_k is not None:
        ordered[sampling.top_k :] = 0
        ordered = ordered / ordered.sum()
    if sampling.top_p is not None:
        # a token stays if those before it do not reach the share; the first always does
        before = ordered.cumsum(0) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p, 0)
        ordered = ordered / ordered.sum()
    return torch.zeros_like(p).scatter_(0, order, ordered)


class Sampler:
    """Chooses one token after another, with its own random state.

    Args:
        sampling: how.
        vocab_size: ids from here on are never chosen (rows that only pad the model's vocabulary). None: all may be.
    """

    def __init__(self, sampling: Sampling, vocab_size: int | None = None) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        # numbers come from the CPU: the same seed draws the same on every device
        self._random = random.Random(sampling.seed)

    def __call__(self, logits: Tensor) -> int:
        """The next token after logits (V,).

        Raises:
            UserError: the logits hold no finite largest value, so the weights do not.
        """
        logits = logits[: self._vocab_size]
        if not torch.isfinite(logits.max()):
            raise UserError(
                "the model's logits are not finite. Its weights are damaged, diverged in training, or need a wider"
                " --dtype."
            )
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        p = probabilities(logits, self._sampling)
        cumulative = p.cumsum(0)
        # first token whose sum exceeds the draw: never one of probability 0, which adds nothing
        draw = self._random.random() * float(cumulative[-1])
        token = int(torch.searchsorted(cumulative, torch.tensor(draw, dtype=p.dtype, device=p.device), right=True))
        # a draw that rounds up to the whole sum
        return token if token < len(p) else int(p.nonzero()[-1])
