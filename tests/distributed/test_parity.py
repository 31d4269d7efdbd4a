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

# Which models run at which layout. Not all with all: every model meets every axis, checkpointing and a high ZeRO stage,
# and every layout two models at least, of different mixers or heads.
RETENTION, WINDOW, WIDE, TIED, LLAMA = "yoco-retention", "yoco-window", "yoco-wide", "yoco-tied", "llama"


def each(*groups: tuple[Case, tuple[str, ...]]) -> Any:
    """Runs a test with every model of every case."""
    pairs = [(model, case) for case, models in groups for model in models]
    return pytest.mark.parametrize(("model", "case"), pairs, ids=str)


FLOAT64 = each(
    (Case(world=2, tensor=2), (RETENTION, LLAMA)),
    (Case(world=4, tensor=4), (WINDOW, TIED)),
    (Case(world=4, tensor=4, micro_batch=8, checkpointing=True), (RETENTION, LLAMA)),
    (Case(world=2, pipeline=2), (RETENTION, TIED)),
    (Case(world=2, pipeline=2, micro_batch=4, checkpointing=True), (WINDOW, LLAMA)),
    (Case(world=4, pipeline=4, micro_batch=1), (RETENTION, TIED, LLAMA)),
    (Case(world=2, micro_batch=1, checkpointing=True), (WINDOW, TIED)),
    (Case(world=4, tensor=2, pipeline=2), (RETENTION, TIED)),
    (Case(world=4, tensor=2, pipeline=2, checkpointing=True, documents=False), (WINDOW, TIED, LLAMA)),
    (Case(world=4, tensor=2, micro_batch=4), (WINDOW, TIED)),
    (Case(world=4, pipeline=2, micro_batch=1, checkpointing=True), (RETENTION, LLAMA)),
)

SEQUENCE = each(
    (Case(world=2, sequence=2), (WIDE, TIED)),
    (Case(world=4, sequence=4, micro_batch=1, checkpointing=True), (RETENTION, WIDE, LLAMA)),
    (Case(world=4, sequence=2, tensor=2, micro_batch=8), (RETENTION, LLAMA)),
    (Case(world=4, sequence=2, pipeline=2, checkpointing=True), (RETENTION, WIDE, TIED)),
)

SEQUENCE_FP32 = each(
    (Case(world=4, sequence=2, zero=1, dtype=torch.float32), (WIDE, LLAMA)),
    (Case(world=4, sequence=2, zero=2, dtype=torch.float32), (RETENTION, WIDE)),
    (Case(world=4, sequence=2, zero=3, dtype=torch.float32), (RETENTION, LLAMA)),
    (Case(world=4, sequence=2, pipeline=2, zero=1, dtype=torch.float32, micro_batch=4), (RETENTION, WIDE)),
)

BANDS = each(
    (Case(world=2, bands=4, order="split"), (RETENTION, TIED)),
    (Case(world=2, sequence=2, bands=4), (WIDE, TIED)),
    (Case(world=4, sequence=4, bands=4, micro_batch=1, checkpointing=True, tokens=32), (WIDE,)),
    (Case(world=4, sequence=4, bands=4, micro_batch=8, checkpointing=True, tokens=32), (RETENTION, TIED)),
    (Case(world=4, sequence=2, tensor=2, bands=4, micro_batch=8), (RETENTION, TIED)),
    (Case(world=4, sequence=2, tensor=2, bands=2, order="split", documents=False), (RETENTION, WIDE)),
    (Case(world=4, sequence=2, pipeline=2, bands=4), (WIDE, TIED)),
    (Case(world=4, pipeline=4, bands=3, micro_batch=1, checkpointing=True), (RETENTION, TIED)),
)

BANDS_FP32 = each(
    (Case(world=4, sequence=2, bands=4, zero=1, dtype=torch.float32), (RETENTION, TIED)),
    (Case(world=4, sequence=2, bands=4, zero=3, dtype=torch.float32), (RETENTION,)),
    (Case(world=2, bands=3, zero=3, dtype=torch.float32, micro_batch=4, checkpointing=True), (RETENTION, TIED)),
    (Case(world=4, sequence=2, pipeline=2, bands=4, zero=1, dtype=torch.float32), (TIED,)),
)

FP32 = each(
    (Case(world=2, zero=0, dtype=torch.float32), (RETENTION, LLAMA)),
    (Case(world=2, zero=1, dtype=torch.float32), (WINDOW, TIED)),
    (Case(world=2, zero=2, dtype=torch.float32), (RETENTION, TIED)),
    (Case(world=2, zero=3, dtype=torch.float32), (WINDOW, LLAMA)),
    (Case(world=2, zero=2, dtype=torch.float32, micro_batch=4, checkpointing=True), (WINDOW, LLAMA)),
    (Case(world=2, zero=3, dtype=torch.float32, micro_batch=4, checkpointing=True), (RETENTION, TIED)),
    (Case(world=4, tensor=2, zero=2, dtype=torch.float32), (RETENTION, LLAMA)),
    (Case(world=4, tensor=2, zero=3, dtype=torch.float32, checkpointing=True), (WINDOW, TIED)),
    (Case(world=4, pipeline=2, zero=1, dtype=torch.float32), (RETENTION, TIED)),
    (Case(world=4, tensor=2, pipeline=2, zero=1, dtype=torch.float32, checkpointing=True), (WINDOW, LLAMA)),
)


_PLAIN: dict[str, Any] = dict(documents=False)
_CROSS: dict[str, Any] = dict(documents=False, cross_batch=CrossBatchConfig(range=5))
_NEIGHBOUR: dict[str, Any] = dict(documents=False, cross_batch=CrossBatchConfig(range=6, negatives="neighbour"))
# farther than the micro-batches of two replicas
_FAR: dict[str, Any] = dict(
    documents=False, cross_batch=CrossBatchConfig(range=10, stepping=False, negatives="neighbour")
)

MEMORY = [
    ("longllama", Case(world=2, tensor=2, **_CROSS)),
    ("longllama", Case(world=4, tensor=4, micro_batch=4, checkpointing=True, **_CROSS)),
    ("longllama", Case(world=2, pipeline=2, micro_batch=4, checkpointing=True, **_CROSS)),
    ("longllama", Case(world=4, pipeline=2, **_CROSS)),
    ("longllama", Case(world=2, micro_batch=4, checkpointing=True, **_CROSS)),
    ("longllama", Case(world=4, tensor=2, pipeline=2, **_PLAIN)),
    ("yoco-memory", Case(world=4, tensor=4, **_PLAIN)),
    ("yoco-memory", Case(world=4, tensor=2, pipeline=2, micro_batch=4, **_CROSS)),
    ("longllama", Case(world=2, sequence=2, **_PLAIN)),
    ("longllama", Case(world=4, sequence=4, micro_batch=4, checkpointing=True, **_CROSS)),
    ("longllama", Case(world=4, tensor=2, sequence=2, micro_batch=4, **_CROSS)),
    ("longllama", Case(world=4, pipeline=2, sequence=2, checkpointing=True, **_CROSS)),
    ("yoco-memory", Case(world=4, pipeline=2, sequence=2, **_PLAIN)),
    ("longllama", Case(world=2, **_NEIGHBOUR)),
    ("longllama", Case(world=4, micro_batch=1, checkpointing=True, **_FAR)),
    ("longllama", Case(world=4, pipeline=2, micro_batch=1, checkpointing=True, **_NEIGHBOUR)),
    ("yoco-memory", Case(world=4, sequence=2, checkpointing=True, **_NEIGHBOUR)),
]

ROWS = [
    ("longllama", Case(world=4, tensor=2, pipeline=2, row=6, micro_batch=4, **_CROSS)),
    ("longllama", Case(world=4, sequence=2, row=6, checkpointing=True, **_NEIGHBOUR)),
    (RETENTION, Case(world=2, sequence=2, bands=4, row=24)),
    (WINDOW, Case(world=4, pipeline=2, sequence=2, bands=2, row=24)),
]

MEMORY_FP32 = [
    *(Case(world=2, zero=stage, dtype=torch.float32, **_CROSS) for stage in (0, 1, 2, 3)),
    Case(world=4, pipeline=2, zero=1, dtype=torch.float32, **_CROSS),
    Case(world=4, tensor=2, zero=3, dtype=torch.float32, checkpointing=True, **_CROSS),
    Case(world=4, sequence=2, zero=3, dtype=torch.float32, checkpointing=True, **_NEIGHBOUR),
]


def check(workers: Workers, model: str, case: Case, loss_tolerance: float, tolerance: float) -> None:
    data = packed_batch(tokens=case.tokens)
    loss, wanted = one_process(model, data, case.dtype, case.documents, case.cross_batch, case.rows_together, case.row)
    results = workers.run(parallel_step, model, case, data, world=case.world)
    for rank, (got_loss, _) in enumerate(results):
        assert got_loss == pytest.approx(loss, rel=loss_tolerance), f"rank {rank}"
    got = results[0][1]
    assert got.keys() == wanted.keys()  # a parameter without gradient is a failure, not a skip
    for name, expected in wanted.items():
        error = (got[name] - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


@FLOAT64
def test_float64_loss_and_every_gradient_equal_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)


@pytest.mark.parametrize(("model", "case"), MEMORY, ids=str)
def test_float64_of_memory_layers_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    """Samples of four windows, some of which see those of other samples of the same micro-batch."""
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)


@pytest.mark.parametrize(("model", "case"), ROWS, ids=str)
def test_float64_of_a_mean_over_rows_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    """Windows and samples with all targets, few and none."""
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)


@pytest.mark.parametrize("case", MEMORY_FP32, ids=str)
def test_fp32_of_memory_layers_equals_one_process(workers: Workers, case: Case) -> None:
    check(workers, "longllama", case, loss_tolerance=1e-6, tolerance=1e-5)


@SEQUENCE
def test_float64_of_a_shared_sequence_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    """Chunks of 12 and 6 tokens; document borders inside them and on their edges; a window of 20."""
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)


@SEQUENCE_FP32
def test_fp32_of_a_shared_sequence_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-6, tolerance=1e-5)


@BANDS
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


@BANDS_FP32
def test_fp32_in_bands_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-6, tolerance=1e-5)


@FP32
def test_fp32_zero_stages_equal_one_process(workers: Workers, model: str, case: Case) -> None:
    check(workers, model, case, loss_tolerance=1e-6, tolerance=1e-5)


def test_bf16_weights_cut_by_zero_3_while_building_are_those_of_one_process(workers: Workers) -> None:
    got = workers.run(zero3_bf16_weights, "yoco-retention", world=2)[0]
    expected = canonical_parameters(build_decoder(model_config("yoco-retention"), None, seed=SEED))
    assert got.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(got[name], parameter.detach().bfloat16()), name


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("longllama", Case(world=4, tensor=2, pipeline=2, checkpointing=True)),
        ("yoco-memory", Case(world=4, pipeline=2, micro_batch=1)),
    ],
    ids=str,
)
def test_float64_of_padding_before_memory_layers_equals_one_process(workers: Workers, model: str, case: Case) -> None:
    """Two documents in each row, as padding in front of an example makes them."""
    check(workers, model, case, loss_tolerance=1e-12, tolerance=1e-9)
