"""Loss and every gradient do not depend on the parallel layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megayoco.config import CrossBatchConfig
from megayoco.model.decoder import build_decoder
from megayoco.model.parameters import canonical_parameters
from tests.distributed.steps import (
    SEED,
    Case,
    model_config,
    one_process,
    packed_batch,
    parallel_step,
    shared_sequence_steps,
    zero3_bf16_weights,
)
from tests.model.cases import CASES, batch, decoder, gradients
from tests.workers import Workers

MODELS = ["yoco-retention", "yoco-window", "llama", "yoco-tied"]

FLOAT64 = [
    Case(world=2, tensor=2),
    Case(world=4, tensor=4),
    Case(world=4, tensor=4, micro_batch=8, checkpointing=True),
    Case(world=2, pipeline=2),
    Case(world=2, pipeline=2, micro_batch=4, checkpointing=True),
    Case(world=4, pipeline=4, micro_batch=1),
    Case(world=2, micro_batch=1, checkpointing=True),
    Case(world=4, tensor=2, pipeline=2),
    Case(world=4, tensor=2, pipeline=2, checkpointing=True, documents=False),
    Case(world=4, tensor=2, micro_batch=4),
    Case(world=4, pipeline=2, micro_batch=1, checkpointing=True),
]

SEQUENCE = [
    Case(world=2, sequence=2),
    Case(world=4, sequence=4, micro_batch=1, checkpointing=True),
    Case(world=4, sequence=2, tensor=2, micro_batch=8),
    Case(world=4, sequence=2, pipeline=2, checkpointing=True),
]

BANDS = [
    Case(world=2, bands=4, order="split"),
    Case(world=2, sequence=2, bands=4),
    Case(world=4, sequence=4, bands=4, micro_batch=1, checkpointing=True, tokens=32),
    Case(world=4, sequence=2, tensor=2, bands=4, micro_batch=8),
    Case(world=4, sequence=2, tensor=2, bands=2, order="split", documents=False),
    Case(world=4, sequence=2, pipeline=2, bands=4),
    Case(world=4, pipeline=4, bands=3, micro_batch=1, checkpointing=True),
]

FP32 = [
    *(Case(world=2, zero=stage, dtype=torch.float32) for stage in (0, 1, 2, 3)),
    *(Case(world=2, zero=stage, dtype=torch.float32, micro_batch=4, checkpointing=True) for stage in (2, 3)),
    Case(world=4, tensor=2, zero=2, dtype=torch.float32),
    Case(world=4, tensor=2, zero=3, dtype=torch.float32, checkpointing=True),
    Case(world=4, pipeline=2, zero=1, dtype=torch.float32),
    Case(world=4, tensor=2, pipeline=2, zero=1, dtype=torch.float32, checkpointing=True),
]

SEQUENCE_FP32 = [
    *(Case(world=4, sequence=2, zero=stage, dtype=torch.float32) for stage in (1, 2, 3)),
    Case(world=4, sequence=2, pipeline=2, zero=1, dtype=torch.float32, micro_batch=4),
]

BANDS_FP32 = [
    *(Case(world=4, sequence=2, bands=4, zero=stage, dtype=torch.float32) for stage in (1, 3)),
    Case(world=2, bands=3, zero=3, dtype=torch.float32, micro_batch=4, checkpointing=True),
    Case(world=4, sequence=2, pipeline=2, bands=4, zero=1, dtype=torch.float32),
]


_PLAIN: dict[str, Any] = dict(documents=False)
_CROSS: dict[str, Any] = dict(documents=False, cross_batch=CrossBatchConfig(range=5))

MEMORY = [
    ("longllama", Case(world=2, tensor=2, **_CROSS)),
    ("longllama", Case(world=4, tensor=4, micro_batch=4, checkpointing=True, **_CROSS)),
    ("longllama", Case(world=2, pipeline=2, micro_batch=4, checkpointing=True, **_CROSS)),
    ("longllama", Case(world=4, pipeline=2, **_CROSS)),
    ("longllama", Case(world=2, micro_batch=4, checkpointing=True, **_CROSS)),
    ("longllama", Case(world=4, tensor=2, pipeline=2, **_PLAIN)),
    ("yoco-memory", Case(world=4, tensor=4, **_PLAIN)),
    ("yoco-memory", Case(world=4, tensor=2, pipeline=2, micro_batch=4, **_CROSS)),
]

MEMORY_FP32 = [
    *(Case(world=2, zero=stage, dtype=torch.float32, **_CROSS) for stage in (0, 1, 2, 3)),
    Case(world=4, pipeline=2, zero=1, dtype=torch.float32, **_CROSS),
    Case(world=4, tensor=2, zero=3, dtype=torch.float32, checkpointing=True, **_CROSS),
]


def check(workers: Workers, model: str, case: Case, loss_tolerance: float, tolerance: float) -> None:
    data = packed_batch(tokens=case.tokens)
    rows = None if case.cross_batch is None else case.micro_batch
    loss, wanted = one_process(model, data, case.dtype, case.documents, case.cross_batch, rows)
    results = workers.run(parallel_step, model, case, data, world=case.world)
    for rank, (got_loss, _) in enumerate(results):
        assert got_loss == pytest.approx(loss, rel=loss_tolerance), f"rank {rank}"
    got = results[0][1]
    assert got.keys() == wanted.keys()  # a parameter without gradient is a failure, not a skip
    for name, expected in wanted.items():
        error = (got[name] - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("case", FLOAT64, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_float64_loss_and_every_gradient_equal_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)


@pytest.mark.parametrize(("model", "case"), MEMORY, ids=str)
def test_float64_of_memory_layers_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    """Samples of four windows, some of which see those of other samples of the same micro-batch."""
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)


@pytest.mark.parametrize("case", MEMORY_FP32, ids=str)
def test_fp32_of_memory_layers_equals_one_process(workers: Workers, case: Case) -> None:
    check(workers, "longllama", case, loss_tolerance=1e-6, tolerance=1e-5)


@pytest.mark.parametrize("case", SEQUENCE, ids=str)
@pytest.mark.parametrize("model", ["yoco-retention", "yoco-wide", "yoco-tied", "llama"])
def test_float64_of_a_shared_sequence_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    """Chunks of 12 and 6 tokens; document borders inside them and on their edges; a window of 20."""
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)


@pytest.mark.parametrize("case", SEQUENCE_FP32, ids=str)
@pytest.mark.parametrize("model", ["yoco-retention", "yoco-wide", "llama"])
def test_fp32_of_a_shared_sequence_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-6, tolerance=1e-5)


@pytest.mark.parametrize("case", BANDS, ids=str)
@pytest.mark.parametrize("model", ["yoco-retention", "yoco-wide", "yoco-tied"])
def test_float64_in_bands_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    """Chunks of 2 to 12 tokens, a row without targets, rows that run compacted."""
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_number_of_bands_gives_every_gradient_to_twelve_digits(workers: Workers, ranks: int) -> None:
    """Chunks of 12, 6 and 3 tokens; the longer window covers several of them and of the documents."""
    steps = [
        (name, bands, "fused", batch(12 * bands, rows=1, seed=bands))
        for name in ("retention, one layer", "long window, one layer")
        for bands in range(1, 9)
    ]
    check_shared_sequences(workers, ranks, steps, 1e-12)


HARD = [
    "a chunk without targets",
    "no target at all",
    "one target, behind a chunk's edge",
    "borders on the edges of chunks",
    "documents shorter than a window",
    "documents of one token",
]


def test_cases_that_invite_mistakes_on_four_ranks(workers: Workers) -> None:
    """Chunks of 3 tokens: a window reaches over more than a whole band."""
    steps = [
        (name, 4, order, CASES[case]())
        for name, order in (("retention", "split"), ("long window", "fused"))
        for case in HARD
    ]
    check_shared_sequences(workers, 4, steps, 1e-11)


def check_shared_sequences(workers: Workers, ranks: int, steps: list[Any], tolerance: float) -> None:
    results = workers.run(shared_sequence_steps, steps, world=ranks)
    for step, parts in zip(steps, zip(*results, strict=True), strict=True):
        name, bands, _, data = step
        model = decoder(name)
        loss, _ = model(*data)
        assert sum(part for part, _ in parts) == pytest.approx(loss.item(), rel=1e-12, abs=1e-12)
        for parameter, expected in gradients(model, loss).items():
            got = torch.stack([part[parameter] for _, part in parts]).sum(0)
            # of keys that alone are seen the gradient is zero, and rounding is all that there is
            error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-4)
            assert error < tolerance, f"{name} in {bands} bands, {parameter}: relative error {error:.1e}"


@pytest.mark.parametrize("case", BANDS_FP32, ids=str)
@pytest.mark.parametrize("model", ["yoco-retention", "yoco-tied"])
def test_fp32_in_bands_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-6, tolerance=1e-5)


@pytest.mark.parametrize("case", FP32, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_fp32_zero_stages_equal_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-6, tolerance=1e-5)


def test_bf16_weights_cut_by_zero_3_while_building_are_those_of_one_process(workers: Workers) -> None:
    got = workers.run(zero3_bf16_weights, "yoco-retention", world=2)[0]
    expected = canonical_parameters(build_decoder(model_config("yoco-retention"), None, seed=SEED))
    assert got.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(got[name], parameter.detach().bfloat16()), name
