"""From logits to the next token: greedy, or drawn by temperature, top-k, top-p and min-p; repetitions can be penalised.

Order, as in transformers: repetition penalty, temperature, top-k, top-p, min-p, draw. Each filter sees what the ones
before it left.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megayoco.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Raises UserError for values out of range."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token (greedy), whatever top_k, top_p and min_p say."""

    top_k: int | None = None
    """Draw among the k most likely tokens only."""

    top_p: float | None = None
    """Draw among the fewest most likely tokens that hold at least this share of the probability (after top_k).
    Source: Holtzman et al. 2019, arXiv 1904.09751."""

    min_p: float | None = None
    """Draw among the tokens at least this many times as likely as the most likely one (after temperature).
    Source: Nguyen et al. 2024, arXiv 2407.01082."""

    repetition_penalty: float | None = None
    """Divides the positive logits of tokens that were there before, prompt included, and multiplies the negative ones;
    above 1 makes them rarer, also when greedy. Source: CTRL, Keskar et al. 2019, arXiv 1909.05858, section 4.1."""

    repetition_window: int | None = None
    """Penalise the tokens among the last so many only. None: among all."""

    seed: int | None = None
    """The same seed gives the same draws; None: other ones each time."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a number of at least 0 (0 is greedy), got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}. Leave it out to keep all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}. Leave it out to keep all tokens.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be from 0 to 1, got {self.min_p}. Leave it out to keep all tokens.")
        penalty, window = self.repetition_penalty, self.repetition_window
        if penalty is not None and not (math.isfinite(penalty) and penalty > 0):
            raise UserError(f"repetition_penalty must be a number above 0 (1 penalises nothing), got {penalty}.")
        if window is not None and window < 1:
            raise UserError(f"repetition_window must be at least 1, got {window}. Leave it out to penalise all tokens.")
        if window is not None and penalty is None:
            raise UserError(f"repetition_window {window} penalises nothing without a repetition_penalty. Give one.")


GREEDY = Sampling(temperature=0.0)


def penalise(logits: Tensor, history: Sequence[int], sampling: Sampling) -> Tensor:
    """The logits after the repetition penalty; themselves without one.

    Args:
        logits: (V,), any floating dtype.
        history: the tokens so far, oldest first; ids from V on are left out.
        sampling: penalty and window.

    Returns:
        (V,), at least fp32 where there is a penalty: a half would round it away.
    """
    if sampling.repetition_penalty is None:
        return logits
    recent = history if sampling.repetition_window is None else history[-sampling.repetition_window :]
    ids = torch.tensor([token for token in set(recent) if token < len(logits)], dtype=torch.int64, device=logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    seen = logits[ids]
    penalty = sampling.repetition_penalty
    logits[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that the next token is drawn from.

    Args:
        logits: (V,) or (B, V), any floating dtype, after the repetition penalty; -inf forbids a token.
        sampling: temperature, then top-k, then top-p, then min-p; ties at a border go to the lower id.

    Returns:
        float64, the shape of the logits, each row sums to 1; 0 for tokens that cannot be drawn.
    """
    # the largest becomes 0 before the division: no temperature overflows, and 0 / 1e-300 stays 0
    z = logits.double()
    z = z - z.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(z.argmax(-1), z.shape[-1]).double()
    z = z / sampling.temperature
    rows = z.reshape(-1, z.shape[-1])
    kept = None
    if sampling.top_k is not None and sampling.top_k < z.shape[-1]:
        kept = _largest(rows, sampling.top_k)
        rows = _only(rows, kept)
    if sampling.top_p is not None and sampling.top_p < 1:
        rows = _only(rows, _nucleus(rows, sampling.top_p, kept))
    if sampling.min_p:
        # the largest is 0, and stays: the probabilities' ratio to it is exp(z)
        rows = rows.masked_fill(rows < math.log(sampling.min_p), -torch.inf)
    return torch.softmax(rows, -1).reshape(z.shape)


def _largest(z: Tensor, k: int) -> Tensor:
    """Ids (B, k) of the k largest of (B, V), ascending; of equals at the border, the lower ids."""
    # not the ids of topk: which of equals it gives is not said. Not a sort: it takes most of a step's time
    border = z.topk(k, -1).values[:, -1:]
    above, equal = z > border, z == border
    places = k - above.sum(-1, keepdim=True)
    keep = above | (equal & (equal.cumsum(-1) <= places))
    return keep.nonzero()[:, 1].view(-1, k)


def _nucleus(z: Tensor, share: float, candidates: Tensor | None) -> Tensor:
    """Ids (B, n) of the fewest most likely tokens that hold `share`; a row that needs fewer than n repeats its first.

    `candidates`: ids (B, k), ascending, outside of which all are -inf; None: there are none such.
    """
    p = torch.softmax(z, -1)
    if candidates is not None:
        p = p.gather(-1, candidates)
    ordered, order = p.sort(descending=True, stable=True)
    if candidates is not None:
        order = candidates.gather(-1, order)
    # a token stays if those before it do not reach the share; the first always does
    before = ordered.cumsum(-1) - ordered
    return torch.where(before < share, order, order[:, :1])


def _only(z: Tensor, ids: Tensor) -> Tensor:
    """z (B, V) with -inf everywhere but at ids (B, n)."""
    return torch.full_like(z, -torch.inf).scatter_(-1, ids, z.gather(-1, ids))


class Sampler:
    """Chooses one token after another, with its own random state.

    Args:
        sampling: how.
        vocab_size: ids from here on are never chosen (rows that only pad the model's vocabulary). None: all may be.
    """

    def __init__(self, sampling: Sampling, vocab_size: int | None = None) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._streams: list[random.Random] = []

    @property
    def needs_history(self) -> bool:
        """Whether the tokens so far matter; without a repetition penalty nobody has to keep them."""
        return self._sampling.repetition_penalty is not None

    def __call__(self, logits: Tensor, history: Sequence[int] | None = None) -> int:
        """The next token after logits (V,).

        Args:
            logits: (V,), any floating dtype.
            history: the tokens so far, prompt included; only a repetition penalty needs it.

        Raises:
            ValueError: a repetition penalty without history.
            UserError: the logits hold no finite largest value, so the weights do not.
        """
        return self.batch(logits[None], None if history is None else [history])[0]

    def batch(self, logits: Tensor, histories: Sequence[Sequence[int]] | None = None) -> list[int]:
        """The next token of each row of logits (B, V).

        Every row has its own random stream, so what it draws depends neither on its neighbours nor on their number; row
        0 draws what a lone prompt does. Rows keep their place from call to call.

        Raises:
            ValueError, UserError: as for one row.
        """
        logits = logits[:, : self._vocab_size]
        if self.needs_history:
            if histories is None:
                raise ValueError("a repetition penalty needs the tokens so far")
            rows = zip(logits, histories, strict=True)
            logits = torch.stack([penalise(row, history, self._sampling) for row, history in rows])
        if self._sampling.temperature == 0:
            return _most_likely(logits)
        _check_finite(logits.amax(-1).tolist())
        cumulative = probabilities(logits, self._sampling).cumsum(-1)
        total = cumulative[:, -1:]
        draws = torch.tensor(self._draws(len(logits)), dtype=total.dtype, device=total.device)[:, None] * total
        # never the whole sum, which rounding could give: no token exceeds it
        draws = torch.minimum(draws, torch.nextafter(total, torch.zeros_like(total)))
        # first token whose sum exceeds the draw: never one of probability 0, which adds nothing
        return torch.searchsorted(cumulative, draws, right=True)[:, 0].tolist()  # type: ignore[no-any-return]

    def _draws(self, count: int) -> list[float]:
        """One number in [0, 1) per row. They come from the CPU: the same seed draws the same on every device."""
        seed = self._sampling.seed
        for row in range(len(self._streams), count):
            self._streams.append(random.Random(seed if row == 0 or seed is None else f"{seed}, row {row}"))
        return [stream.random() for stream in self._streams[:count]]


def _most_likely(logits: Tensor) -> list[int]:
    """The first largest of each row (B, V), checked and fetched in one transfer."""
    largest = logits.max(-1)
    values, tokens = torch.stack((largest.values.double(), largest.indices.double())).tolist()
    _check_finite(values)
    return [int(token) for token in tokens]


def _check_finite(largest: Sequence[float]) -> None:
    if not all(map(math.isfinite, largest)):
        raise UserError(
            "the model's logits are not finite. Its weights are damaged, diverged in training, or need a wider --dtype."
        )
