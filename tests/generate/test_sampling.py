"""Distributions against numbers worked out by hand and against transformers, and the draws against the distribution."""

import math
from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megayoco.errors import UserError
from megayoco.generate.sampling import GREEDY, Sampler, Sampling, penalise, probabilities

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
        # three quarters of 0.4 are 0.3, and of 16 they are 12
        (dict(min_p=0.74), [0, 4 / 7, 0, 3 / 7]),
        (dict(min_p=0.76), [0, 1, 0, 0]),
        (dict(min_p=0.74, temperature=0.5), [0, 1, 0, 0]),
        (dict(min_p=0.0), P),
        (dict(min_p=1.0), [0, 1, 0, 0]),
        (dict(min_p=0.26, temperature=1e-300), [0, 1, 0, 0]),
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


def test_rows_of_a_batch_are_filtered_alone():
    rows = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 3
    rows[2, 5] = -math.inf
    for values in (dict(), dict(top_k=4), dict(top_p=0.7), dict(top_k=9, top_p=0.7, min_p=0.1), dict(temperature=0.0)):
        together = probabilities(rows, Sampling(**values))
        alone = torch.stack([probabilities(row, Sampling(**values)) for row in rows])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


PENALTY = dict(repetition_penalty=1.3)


@pytest.mark.parametrize(
    "values",
    [
        dict(temperature=0.7),
        dict(top_k=7),
        dict(top_p=0.6),
        dict(min_p=0.2),
        PENALTY,
        dict(repetition_penalty=0.8),
        dict(temperature=1.7, top_k=20, top_p=0.9, min_p=0.05, **PENALTY),
        dict(temperature=0.4, top_k=5, top_p=0.99, min_p=0.3, **PENALTY),
        dict(temperature=3.0, top_k=40, top_p=0.5, min_p=0.9),
    ],
    ids=str,
)
def test_transformers_has_the_same_distribution(values):
    made = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    # the order of its GenerationMixin, which says so in no public place
    processors = LogitsProcessorList(make(values[name]) for name, make in made.items() if name in values)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        logits = torch.randn(50, generator=generator) * 3
        history = torch.randint(50, (30,), generator=generator)
        expected = torch.softmax(processors(history[None], logits[None].double())[0], 0)
        sampling = Sampling(**values)
        found = probabilities(penalise(logits.double(), history.tolist(), sampling), sampling)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_repetition_penalty_reaches_back_as_far_as_its_window():
    logits = torch.tensor([2.0, -2.0, 0.0, 4.0], dtype=torch.bfloat16)
    everything = penalise(logits, [0, 1, 1, 2, 9], Sampling(repetition_penalty=4.0))
    assert everything.tolist() == [0.5, -8, 0, 4]
    assert everything.dtype == torch.float32
    assert penalise(logits, [0, 1, 1, 2], Sampling(repetition_penalty=4.0, repetition_window=3)).tolist() == [
        2,
        -8,
        0,
        4,
    ]
    assert penalise(logits, [], Sampling(repetition_penalty=4.0)).tolist() == logits.tolist()
    assert logits.tolist() == [2, -2, 0, 4]  # the caller's own


@pytest.mark.parametrize("temperature", [0.0, 1e-9])
def test_the_sampler_penalises_what_its_history_holds(temperature):
    sampler = Sampler(Sampling(temperature=temperature, repetition_penalty=2.0), vocab_size=3)
    logits = torch.tensor([1.0, 1.5, 1.7, 9.0])
    assert sampler.needs_history
    assert not Sampler(GREEDY).needs_history
    assert sampler(logits, []) == 2
    assert sampler(logits, [2]) == 1
    assert sampler(logits, [2, 1, 3]) == 0
    assert sampler.batch(logits.expand(3, 4), [[2], [], [2, 1, 3]]) == [1, 2, 0]
    with pytest.raises(ValueError, match="needs the tokens so far"):
        sampler(logits)


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


def test_rows_draw_whatever_their_neighbours_do():
    def draws(rows, others):
        sampler = Sampler(Sampling(seed=7))
        return [sampler.batch(torch.cat([torch.zeros(rows, 1000), others])) for _ in range(6)]

    none, some = torch.zeros(0, 1000), torch.randn(2, 1000)
    few, many = draws(2, none), draws(2, some)
    assert [row[:2] for row in many] == few
    lone = Sampler(Sampling(seed=7))
    assert [row[0] for row in few] == [lone(torch.zeros(1000)) for _ in range(6)]
    assert all(len({row[column] for row in few}) > 3 for column in range(2))
    assert [row[0] for row in few] != [row[1] for row in few]


class Constant:
    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


@pytest.mark.parametrize(("draw", "token"), [(0.0, 1), (0.39999, 1), (0.40001, 2), (1.0, 3), (1.5, 3)])
def test_a_draw_at_the_border_is_a_token_that_can_be_drawn(draw, token, monkeypatch):
    monkeypatch.setattr("random.Random", lambda seed: Constant(draw))
    sampler = Sampler(Sampling())
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
    with pytest.raises(UserError, match="not finite"):
        Sampler(Sampling(top_k=2)).batch(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, bad]]))


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
        (dict(min_p=-0.1), "min_p must be from 0 to 1, got -0.1"),
        (dict(min_p=1.1), "min_p"),
        (dict(min_p=math.nan), "min_p"),
        (dict(repetition_penalty=0.0), "repetition_penalty must be a number above 0"),
        (dict(repetition_penalty=math.inf), "repetition_penalty"),
        (dict(repetition_penalty=1.2, repetition_window=0), "repetition_window must be at least 1, got 0"),
        (dict(repetition_window=5), "repetition_window 5 penalises nothing without a repetition_penalty"),
    ],
    ids=str,
)
def test_values_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(**values)
