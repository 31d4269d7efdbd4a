"""Distributions against numbers worked out by hand, and the draws against the distribution."""

import math
from collections import Counter

import pytest
import torch

from megayoco.errors import UserError
from megayoco.generate.sampling import GREEDY, Sampler, Sampling, probabilities

P = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor(P).log() + 7  # a constant changes nothing


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (dict(), P),
        (dict(temperature=0.5), [p * p / 0.3 for p in P]),
        (dict(temperature=0.0), [0, 1, 0, 0]),
        (dict(temperature=1e-300), [0, 1, 0, 0]),
        (dict(temperature=1e300), [0.25] * 4),
        (dict(top_k=1), [0, 1, 0, 0]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=99), P),
        (dict(top_p=1.0), P),
        (dict(top_p=1e-9), [0, 1, 0, 0]),
        (dict(top_p=0.39), [0, 1, 0, 0]),
        (dict(top_p=0.41), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.71), [0, 4 / 9, 2 / 9, 3 / 9]),
        # of the two that are left after top_k, the first holds 4/7 = 0.571
        (dict(top_k=2, top_p=0.57), [0, 1, 0, 0]),
        (dict(top_k=2, top_p=0.58), [0, 4 / 7, 0, 3 / 7]),
        # the temperature comes first: the squares are 16, 9, 4, 1 of 30
        (dict(temperature=0.5, top_p=0.53), [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_probabilities(values, expected):
    p = probabilities(LOGITS, Sampling(**values))
    assert p.dtype == torch.float64
    assert p.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert float(p.sum()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("values", [dict(top_k=2), dict(top_p=0.3)], ids=str)
def test_ties_go_to_the_lower_ids(values):
    assert probabilities(torch.zeros(5), Sampling(**values)).tolist() == [0.5, 0.5, 0, 0, 0]


@pytest.mark.parametrize("values", [dict(), dict(temperature=0.7, top_k=3), dict(top_p=0.8)], ids=str)
def test_draws_follow_the_probabilities(values):
    sampling = Sampling(**values, seed=5)
    sampler = Sampler(sampling)
    counts = Counter(sampler(LOGITS) for _ in range(4000))
    for token, p in enumerate(probabilities(LOGITS, sampling).tolist()):
        # five standard deviations; what cannot be drawn never is
        assert counts[token] == pytest.approx(4000 * p, abs=5 * math.sqrt(4000 * p * (1 - p))), token


def test_the_seed_decides_and_none_does_not():
    def draws(seed):
        sampler = Sampler(Sampling(seed=seed))
        return [sampler(torch.zeros(1000)) for _ in range(8)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


class Constant:
    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.39999, 1), (0.40001, 2), (1.0, 3), (1.5, 3)])
def test_a_draw_at_the_border_is_a_token_that_can_be_drawn(draw, token):
    sampler = Sampler(Sampling())
    sampler._random = Constant(draw)
    assert sampler(torch.tensor([0.0, 0.4, 0.2, 0.4, 0.0]).log()) == token


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=0)], ids=["greedy", "drawn"])
def test_ids_beyond_the_vocabulary_and_forbidden_ones_are_not_chosen(sampling):
    logits = torch.tensor([-math.inf, 0.0, 0.0, 50.0])
    assert {Sampler(sampling, vocab_size=3)(logits) for _ in range(20)} <= {1, 2}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(UserError, match="not finite"):
        Sampler(GREEDY)(torch.tensor([0.0, bad]))
    with pytest.raises(UserError, match="not finite"):
        Sampler(Sampling())(torch.full((3,), -math.inf))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(temperature=-0.1), "temperature must be a number of at least 0"),
        (dict(temperature=math.nan), "temperature"),
        (dict(temperature=math.inf), "temperature"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(top_p=1.01), "top_p"),
        (dict(top_p=math.nan), "top_p"),
    ],
    ids=str,
)
def test_values_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
