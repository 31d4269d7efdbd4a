"""Batches: the same global step in every layout, exact resume, targets and documents right, errors surface."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megayoco.config import DataConfig
from megayoco.data.batches import Batches, ValidationBatches, accumulation_steps
from megayoco.data.datasets import build_datasets
from megayoco.data.indexed_writer import IndexedWriter
from megayoco.errors import UserError

T = 6


class Counting:
    """Sample n holds the tokens 100 n, 100 n + 1, ...; borders as given for every sample."""

    def __init__(self, borders=(), num_samples=10**6, fails_at=10**9, num_targets=T):
        self.borders, self.num_samples, self.fails_at = list(borders), num_samples, fails_at
        self.num_targets = num_targets

    def __getitem__(self, number):
        if number >= self.fails_at:
            raise OSError("the disk is gone")
        return {
            "tokens": 100 * number + np.arange(T + 1),
            "borders": np.array(self.borders, np.int64),
            "num_targets": self.num_targets,
        }


def sample_numbers(step):
    return [(micro.tokens[:, 0] // 100).tolist() for micro in step]


def make(dataset=None, **kwargs):
    defaults = dict(batch_size=12, micro_batch_size=1, data_rank=0, data_size=1, prefetch=0)
    return Batches(dataset or Counting(), **(defaults | kwargs))


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("micro_batch_size", "data_size"), [(1, 1), (2, 1), (3, 2), (2, 3), (1, 12), (12, 1)])
def test_every_layout_reads_the_same_samples_at_the_same_place(micro_batch_size, data_size, prefetch):
    ranks = [
        make(micro_batch_size=micro_batch_size, data_rank=r, data_size=data_size, consumed_samples=5, prefetch=prefetch)
        for r in range(data_size)
    ]
    for step in range(3):
        by_rank = [sample_numbers(batches.next_step()) for batches in ranks]
        assert all(len(micros) == 12 // (micro_batch_size * data_size) for micros in by_rank)
        in_order = [n for micros in zip(*by_rank, strict=True) for rows in micros for n in rows]
        first = 5 + 12 * step
        assert in_order == list(range(first, first + 12))
        assert {batches.consumed_samples for batches in ranks} == {first + 12}
    for batches in ranks:
        batches.close()


def test_a_resumed_run_in_another_layout_goes_on_exactly():
    whole = make()
    expected = [n for _ in range(4) for rows in sample_numbers(whole.next_step()) for n in rows]
    first = make(prefetch=2)  # what was prefetched and not handed out does not count
    seen = [n for _ in range(2) for rows in sample_numbers(first.next_step()) for n in rows]
    first.close()
    rest = [
        make(micro_batch_size=3, data_rank=r, data_size=2, consumed_samples=first.consumed_samples) for r in range(2)
    ]
    for _ in range(2):
        by_rank = [sample_numbers(batches.next_step()) for batches in rest]
        seen += [n for micros in zip(*by_rank, strict=True) for rows in micros for n in rows]
    assert seen == expected


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """A blend of three small datasets, as the config describes it."""
    folder, prefixes = tmp_path_factory.mktemp("blend"), []
    for number, lengths in enumerate(([9, 30, 4, 61], [50, 2, 2, 40, 7], [11] * 8)):
        prefix = str(folder / f"source{number}")
        with IndexedWriter(prefix, 60_000) as writer:
            tokens = 1000 * number + np.arange(sum(lengths), dtype=writer.dtype)
            writer.add(tokens, np.array(lengths))
            writer.finish({})
        prefixes.append(prefix)
    train = [w for pair in zip((0.2, 0.5, 0.3), prefixes, strict=True) for w in pair]
    data = DataConfig(train=train, split="1,0,0", long_document_weight=1.5)
    return build_datasets(data, sequence_length=T, seed=7, vocab_size=60_000).train


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stopped_and_resumed_in_any_layouts_the_samples_stay_the_same(blend, data):
    """Any number of stops; data-parallel size, micro-batch, batch size and prefetch change at each of them."""
    consumed, steps = 0, 0
    for _ in range(data.draw(st.integers(1, 4), "parts")):
        ranks, micro = data.draw(st.integers(1, 4), "ranks"), data.draw(st.integers(1, 3), "micro")
        batch_size = ranks * micro * data.draw(st.integers(1, 3), "accumulation")
        prefetch, mask = data.draw(st.integers(0, 3), "prefetch"), data.draw(st.booleans(), "mask")
        steps = data.draw(st.integers(1, 3), "steps")
        layout = dict(batch_size=batch_size, micro_batch_size=micro, data_size=ranks, document_mask=mask)
        loaders = [
            make(blend, data_rank=r, prefetch=prefetch, consumed_samples=consumed, **layout) for r in range(ranks)
        ]
        for _ in range(steps):
            by_rank = [loader.next_step() for loader in loaders]
            rows = [row for micros in zip(*by_rank, strict=True) for m in micros for row in zip(*m[:2], strict=True)]
            for number, (tokens, targets) in enumerate(rows, start=consumed):
                expected = blend[number]["tokens"]
                assert tokens.tolist() == expected[:-1].tolist()
                assert all(t in (e, -100) for t, e in zip(targets.tolist(), expected[1:].tolist(), strict=True))
            consumed += batch_size
            assert len(rows) == batch_size
        for loader in loaders:
            assert loader.consumed_samples == consumed  # all that a checkpoint has to know
            loader.close()


def test_targets_are_the_next_tokens():
    (micro,) = make(Counting(borders=[3]), batch_size=2, micro_batch_size=2).next_step()
    assert micro.tokens.tolist() == [list(range(6)), list(range(100, 106))]
    assert micro.targets.tolist() == [list(range(1, 7)), list(range(101, 107))]
    assert micro.document_starts is None
    assert micro.tokens.dtype == micro.targets.dtype == torch.int64
    assert micro.tokens.is_contiguous() and micro.targets.is_contiguous()


@pytest.mark.parametrize(
    ("borders", "starts", "ignored"),
    [
        ([], [0, 0, 0, 0, 0, 0], []),
        ([2, 3], [0, 0, 2, 3, 3, 3], [1, 2]),
        ([1], [0, 1, 1, 1, 1, 1], [0]),
        ([5], [0, 0, 0, 0, 0, 5], [4]),
        ([6], [0, 0, 0, 0, 0, 0], [5]),  # only the last target belongs to the next document
    ],
)
def test_documents_are_told_apart(borders, starts, ignored):
    (micro,) = make(Counting(borders), batch_size=1, document_mask=True).next_step()
    assert micro.document_starts.tolist() == [starts]
    assert micro.document_starts.dtype == torch.int64
    assert micro.targets[0].tolist() == [-100 if t in ignored else t + 1 for t in range(T)]


@pytest.mark.parametrize("document_mask", [False, True])
def test_padding_takes_no_loss(document_mask):
    (micro,) = make(Counting(borders=[2], num_targets=4), batch_size=1, document_mask=document_mask).next_step()
    assert micro.targets[0].tolist() == [1, -100 if document_mask else 2, 3, 4, -100, -100]


@pytest.mark.parametrize(("batch_size", "micro", "ranks"), [(12, 5, 1), (12, 2, 4), (0, 1, 1)])
def test_a_batch_that_cannot_be_cut_is_refused_with_the_arithmetic(batch_size, micro, ranks):
    message = f"batch_size {batch_size} is no multiple of micro_batch_size {micro} x {ranks} .* = {micro * ranks}"
    with pytest.raises(UserError, match=message):
        make(batch_size=batch_size, micro_batch_size=micro, data_size=ranks)


def test_accumulation_steps():
    assert accumulation_steps(24, 2, 3) == 4


def test_an_error_in_the_background_surfaces_at_its_step():
    batches = make(Counting(fails_at=24), prefetch=2)
    for _ in range(2):
        batches.next_step()
    for _ in range(2):  # and again, if somebody tries to go on
        with pytest.raises(OSError, match="the disk is gone"):
            batches.next_step()
    assert batches.consumed_samples == 24


def test_the_thread_ends_with_its_batches():
    before = threading.active_count()
    batches = make(prefetch=1)
    batches.next_step()
    assert threading.active_count() == before + 1
    del batches
    gc.collect()
    for _ in range(100):
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


def validation(dataset, num_batches=8, **kwargs):
    defaults = dict(batch_size=4, micro_batch_size=1, data_rank=0, data_size=1)
    return ValidationBatches(dataset, num_batches=num_batches, **(defaults | kwargs))


def test_validation_gives_the_same_batches_every_time():
    batches = validation(Counting(), num_batches=3)
    seen = [[sample_numbers(step) for step in batches] for _ in range(2)]
    assert seen[0] == seen[1] == [[[4 * b + i] for i in range(4)] for b in range(3)]
    assert len(batches) == 3


@pytest.mark.parametrize(("micro", "ranks"), [(1, 1), (2, 2), (1, 4)])
def test_a_short_validation_set_is_read_once_and_no_sample_counts_twice(micro, ranks):
    dataset = Counting(num_samples=10)
    counted = []
    for r in range(ranks):
        batches = validation(dataset, micro_batch_size=micro, data_rank=r, data_size=ranks)
        assert len(batches) == 3  # 4 + 4 + 2
        for step in batches:
            assert len(step) == 4 // (micro * ranks)
            for m in step:
                counted += m.targets[m.targets != -100].tolist()
    assert sorted(counted) == sorted(t for n in range(10) for t in (100 * n + np.arange(1, T + 1)).tolist())
