"""Datasets on several ranks: built once, the same everywhere, and an error of any rank reaches all."""

import os

from megayoco.config import DataConfig
from megayoco.data.batches import Batches
from megayoco.data.datasets import build_datasets
from megayoco.errors import UserError
from megayoco.parallel.agreement import all_ranks_agree


def build(train, cache_dir):
    with all_ranks_agree():
        return build_datasets(
            DataConfig(train=train, split="1,0,0", cache_dir=cache_dir), sequence_length=8, seed=1, vocab_size=60_000
        )


def read_samples(train, cache_dir, data_size):
    """What this rank reads in three steps, or the error's text."""
    import torch.distributed as dist

    try:
        built = build(train, cache_dir)
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


def read_with_own_disk(train, folder, unusable_rank):
    """As on nodes that share no file system: each rank has a cache of its own; one rank may have none."""
    import torch.distributed as dist

    rank = dist.get_rank()
    own = "/proc/nowhere" if rank == unusable_rank else os.path.join(folder, str(rank))
    return read_samples(train, own, 2)


def test_nodes_without_a_shared_file_system_build_their_own(numbered, workers, tmp_path):
    a = numbered("a", [30, 5, 64, 70])
    ranks = workers.run(read_with_own_disk, a, str(tmp_path / "nodes"), None, world=4)
    assert ranks[0] == ranks[2] != ranks[1] == ranks[3]
    assert len(list((tmp_path / "nodes").iterdir())) == 4


def test_an_error_of_any_rank_is_raised_on_all(numbered, workers, tmp_path):
    a = numbered("a", [30, 5, 64, 70])
    errors = workers.run(read_with_own_disk, a, str(tmp_path / "nodes"), 2, world=4)
    assert len(set(errors)) == 1
    assert "cannot write sample indices to /proc/nowhere" in errors[0]
