"""What benchmarks/memory_decode.py compares: one function in two ways, behind contexts as a text would leave them."""

from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import memory_decode

    monkeypatch.setattr(memory_decode, "WINDOW", 16)
    monkeypatch.setattr(memory_decode, "SHAPE", {**memory_decode.SHAPE, "dim": 32, "hidden_dim": 24, "layers": 6})
    return memory_decode


def test_concatenated_memory_is_the_same_function(benchmark, monkeypatch):
    assert benchmark.compare_logits() < 1e-5
    wrong = lambda q, *rest: q  # noqa: E731
    monkeypatch.setattr(benchmark, "concatenated", wrong)
    with pytest.raises(RuntimeError, match="differ from those of `memory`"):
        benchmark.compare_logits()


def test_a_point_has_the_cache_of_its_subject(benchmark):
    token = 2 * 2 * 4 * 4  # bytes: keys and values of two heads of 4 in fp32
    model = benchmark.build("memory")
    context = benchmark.context_of(model, 100, 4)
    # two layers remember everything; the others the open window: it began at 88
    assert benchmark.cache_bytes(context) == token * (2 * 100 + 4 * (100 - 88))
    llama = benchmark.context_of(benchmark.build("LLaMA"), 100, 4)
    assert benchmark.cache_bytes(llama) == token * 6 * 100
