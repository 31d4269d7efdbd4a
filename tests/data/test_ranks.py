"""Datasets on several ranks: built once, the same everywhere, and an error of rank 0 reaches all."""

from types import SimpleNamespace

from megayoco.data.batches import Batches
from megayoco.data.datasets import build_datasets, rank_zero_first
from megayoco.errors import UserError


def read_samples(train, cache_dir, data_size):
    """First tokens of the samples this rank reads in three steps, or the error's text."""
    import torch.distributed as dist

    data = SimpleNamespace(
        train=train, valid=None, split="1,0,0", tokenizer_type=None, tokenizer_model=None, cache_dir=cache_dir
    )
    try:
        built = build_datasets(data, sequence_length=8, num_samples=24, seed=1, vocab_size=60_000)
    except UserError as error:
        return str(error)
    rank = dist.get_rank() % data_size if dist.is_initialized() else 0
    batches = Batches(built.train, batch_size=8, micro_batch_size=2, data_rank=rank, data_size=data_size)
    steps = [batches.next_step() for _ in range(3)]
    batches.close()
    return [[micro.tokens.tolist() for micro in step] for step in steps]


def test_ranks_read_what_one_process_reads(numbered, workers, tmp_path):
    a, b = numbered("a", [30, 5, 64, 70]), numbered("b", [50, 51], first=10_000)
    blend = [0.6, a, 0.4, b]
    whole = read_samples(blend, str(tmp_path / "one"), 1)
    ranks = workers.run(read_samples, blend, str(tmp_path / "four"), 2, world=4)
    assert ranks[0] == ranks[2] != ranks[1] == ranks[3]
    joined = [[m for pair in zip(x, y, strict=True) for m in pair] for x, y in zip(*ranks[:2], strict=True)]
    assert joined == whole
    assert len(list((tmp_path / "four").iterdir())) == 2  # one folder per source, no temporary ones


def test_an_error_of_rank_0_is_raised_on_all(numbered, workers):
    a = numbered("a", [30, 5, 64, 70])
    errors = workers.run(read_samples, a, "/proc/nowhere", 2, world=4)
    assert len(set(errors)) == 1
    assert "cannot write sample indices" in errors[0]


def test_without_ranks_it_just_builds():
    assert rank_zero_first(lambda: 5) == 5
