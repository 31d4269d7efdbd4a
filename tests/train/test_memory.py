"""The memory that a run is expected to need: model states counted exactly, activations against measured peaks."""

from __future__ import annotations

import types
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megayoco.config import DataConfig, ModelConfig, ParallelConfig, PhaseConfig, RunConfig
from megayoco.errors import UserError
from megayoco.model.decoder import build_decoder
from megayoco.ops import attention_store
from megayoco.ops.attention_store import KeyValueStore, attention_over_store
from megayoco.ops.retention import _group_tokens as real_group_tokens
from megayoco.parallel.sequence import SequenceAxis
from megayoco.train import activations, memory
from megayoco.train.activations import StageBlocks, Work, step_activations, whole_model
from megayoco.train.memory import (
    MemoryEstimate,
    block_parameters,
    check_memory,
    choose_bands,
    estimate_memory,
    estimate_phase,
    possible_bands,
    resolve_bands,
    stage_blocks,
)

SHAPE: dict[str, Any] = dict(dim=128, layers=4, hidden_dim=384, heads=4, kv_heads=2, vocab_size=512)
MODELS: dict[str, dict[str, Any]] = {
    "retention": dict(SHAPE, self_heads=2),
    "window": dict(SHAPE, self_mixer="window", window=96),
    "llama": dict(SHAPE, pattern="llama"),
    "longllama": dict(SHAPE, pattern="llama", memory_layers=(1, 3), memory_window=256),
    "memory": dict(SHAPE, self_heads=2, self_layers=3, memory_layers=(1,), memory_window=128),
}
FP32: dict[str, Any] = {"zero_optimization": {"stage": 0}}


def run_config(model: str = "llama", length: int = 32, bands: Any = None, batch: int = 8, **parallel: Any) -> RunConfig:
    phase = PhaseConfig(
        sequence_length=length, steps=1, batch_size=batch, micro_batch_size=2, learning_rate=1.0, bands=bands
    )
    return RunConfig(
        model=ModelConfig(**MODELS[model]),
        parallel=ParallelConfig(**parallel),
        data=DataConfig(train="x"),
        phases=[phase],
        output_dir="out",
    )


def layout(**sizes: int) -> Any:
    return types.SimpleNamespace(**{"tensor": 1, "pipeline": 1, "sequence": 1, "data": 1, **sizes})


# -- activations, measured ---------------------------------------------------------------------------------------------


def measured_peak(function: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator has handed out at once inside `function`, those of kernels included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each has a workspace of its own in the attention kernel
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function()
    finally:
        torch.set_num_threads(threads)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    for _, _, change in sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"):
        now += change
        peak = max(peak, now)
    return peak


def predicted_and_measured(
    name: str,
    tokens: int,
    bands: int = 1,
    checkpointing: bool = False,
    order: str = "fused",
    dtype: torch.dtype = torch.float32,
    documents: bool = False,
) -> tuple[float, int]:
    model = ModelConfig(**MODELS[name])
    decoder = build_decoder(model, None, dtype=dtype, activation_checkpointing=checkpointing).train()
    decoder.set_bands(bands, order)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients are model states, not activations
    ids = torch.randint(0, model.vocab_size, (1, tokens))
    starts = (torch.arange(tokens) // 100 * 100).expand(1, -1) if documents else None
    peak = measured_peak(lambda: decoder(ids, ids, starts)[0].backward())
    stage = decoder.stage()
    sizes = [float(sum(p.numel() for p in some)) for some in (stage.self_parameters(), stage.cross_parameters())]
    work = Work(
        model=model, batch=1, length=tokens, width=dtype.itemsize, bands=bands, order=order, checkpointing=checkpointing
    )
    expected = step_activations(work, whole_model(model), (sizes[0], sizes[1]))
    return expected.total - tokens * 24, peak  # the token ids were there before


@pytest.mark.parametrize(
    ("name", "bands"),
    [*((name, 1) for name in MODELS), *((name, bands) for name in ("retention", "window") for bands in (4, 16))],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_a_step_within_ten_percent_of_the_peak(name: str, checkpointing: bool, bands: int) -> None:
    predicted, peak = predicted_and_measured(name, 1024 if bands == 1 else 2048, bands, checkpointing)
    assert predicted == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("name", ["retention", "window"])
def test_activations_in_other_forms(name: str) -> None:
    for options in (dict(bands=4, order="split"), dict(documents=True), dict(dtype=torch.bfloat16, bands=4)):
        predicted, peak = predicted_and_measured(name, 2048, **options)  # type: ignore[arg-type]
        assert predicted == pytest.approx(peak, rel=0.1), options


def test_memory_of_a_chunk_of_constant_size_grows_by_keys_values_and_contexts_only() -> None:
    model = ModelConfig(preset="yoco-3b")

    def total(length: int) -> activations.Activations:
        work = Work(model=model, batch=1, length=length, width=2, bands=length // 8192, gpu=True)
        return step_activations(work, whole_model(model))

    small, large = total(2**18), total(2**20)
    tokens = 2**20 - 2**18
    # the two figures of docs/long_context.md: 12 KiB of keys, values and gradients, 2.4 KiB of states
    grown = large.shared + large.shared_gradients - small.shared - small.shared_gradients
    assert grown == tokens * 12 * 1024
    assert large.contexts - small.contexts == pytest.approx(tokens * 2.4 * 1024, rel=0.02)
    assert large.total - small.total == pytest.approx(
        grown + large.contexts - small.contexts + tokens * 24
    )  # token ids, targets, document starts


def slices_of(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many keys' gradients are made at a time, in the code and in the estimate."""
    for module in (attention_store, activations):
        monkeypatch.setattr(module, "KEYS_PER_SLICE", keys)


@pytest.mark.parametrize("order", ["fused", "split"])
def test_measured_peaks_grow_by_what_is_kept_per_token_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """Three lengths in chunks of 128 tokens."""
    slices_of(256, monkeypatch)
    lengths = (512, 1024, 1536)
    found = [predicted_and_measured("retention", length, length // 128, order=order) for length in lengths]
    model = ModelConfig(**MODELS["retention"])
    kept = 2 * model.num_kv_heads * model.head_dim * (4 + 4)  # keys and values, and their gradients
    kept += 4 * model.dim if order == "split" else 0
    kept += model.num_self_layers * model.num_self_heads * model.self_head_dim**2 * 4 / 128
    for before, after in pairwise(found):
        grown = [y - x for x, y in zip(before, after, strict=True)]
        assert grown == pytest.approx([512 * kept] * 2, rel=1e-3)


def test_gradients_of_keys_take_what_a_slice_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    slices_of(1024, monkeypatch)
    model, R = ModelConfig(**MODELS["retention"]), 64

    def measured_and_predicted(left: int) -> tuple[int, float]:
        """Of R rows and so many tokens left of them."""
        store = KeyValueStore(*torch.zeros(4, 1, left + R, model.num_kv_heads, model.head_dim))
        q = torch.zeros(1, R, model.heads, model.head_dim, requires_grad=True)
        peak = measured_peak(lambda: attention_over_store(q, store, scale=1.0).sum().backward())
        work = Work(model=model, batch=1, length=left + R, width=4, bands=left // R)
        return peak, activations.mixer_backward_bytes(work, "cross", R)

    half, one, three = (measured_and_predicted(left) for left in (512, 1024, 3072))
    assert one[0] - half[0] == 512 * 2 * model.num_kv_heads * model.head_dim * 4
    assert one[1] - half[1] == pytest.approx(one[0] - half[0], rel=0.15)  # a slice holds the rows' own keys or others
    assert three == one


@pytest.mark.parametrize("tokens", [256, 5000])
@pytest.mark.parametrize(("heads", "dim"), [(2, 128), (4, 1024)])
def test_groups_of_retention_are_those_of_the_operation(tokens: int, heads: int, dim: int) -> None:
    model = ModelConfig(**{**SHAPE, "dim": dim, "self_heads": heads})
    work = Work(model=model, batch=3, length=tokens, width=4)
    like = torch.empty(3, tokens, heads, dim // heads)
    assert activations._group_tokens(work) == real_group_tokens(like, like, activations._piece(work), 4)


@pytest.mark.parametrize(("window", "chunk", "ranks"), [(1, 8, 2), (6, 8, 1), (6, 2, 2), (6, 3, 4), (40, 8, 2)])
def test_what_a_rank_keeps_of_a_window_is_what_the_sequence_axis_keeps(window: int, chunk: int, ranks: int) -> None:
    model = ModelConfig(**{**MODELS["window"], "window": window})
    work = Work(model=model, batch=1, length=chunk * ranks * 64, width=4, sequence=ranks, bands=64)
    axis = SequenceAxis(None, 0, ranks)  # type: ignore[arg-type]
    assert activations._carried(work) == axis._kept(chunk, window - 1)


def test_a_stage_keeps_what_its_micro_batches_under_way_need() -> None:
    work = Work(model=ModelConfig(**MODELS["retention"]), batch=1, length=1024, width=4)
    blocks = ["embedding", "retention", "retention"]
    one, three = (step_activations(work, StageBlocks(blocks, number)) for number in (1, 3))
    assert three.layers == 3 * one.layers
    banded = Work(model=work.model, batch=1, length=1024, width=4, bands=4)
    one, three = (step_activations(banded, StageBlocks(blocks, number)) for number in (1, 3))
    assert three.layers == one.layers and three.contexts == 3 * one.contexts


# -- model states ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "precision", "per_parameter"),
    [
        (0, "fp32", 16),
        (1, "fp32", 4 + 4 + 12 / 4),
        (2, "fp32", 4 + 4 / 4 + 12 / 4),
        (3, "fp32", 20 / 4),
        (1, "bf16", 2 + 2 + 12 / 4),
        (3, "bf16", 16 / 4),
    ],
)
def test_bytes_of_model_states_by_zero_stage(stage: int, precision: str, per_parameter: float) -> None:
    config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": precision == "bf16"}}
    estimate = estimate_memory(run_config(), config, layout(data=4))
    count = ModelConfig(**MODELS["llama"]).parameter_count()["total"]
    assert estimate.weights + estimate.gradients + estimate.optimizer == pytest.approx(count * per_parameter)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_blocks_add_up(name: str, tied: bool) -> None:
    model = ModelConfig(**MODELS[name], tie_embeddings=tied)
    kinds = whole_model(model).kinds
    assert sum(block_parameters(model, kind, 1) for kind in kinds) == model.parameter_count()["total"]
    # of two key-value heads each of four ranks holds one whole
    assert block_parameters(model, "shared_kv", 4) == block_parameters(model, "shared_kv", 2)


def test_layouts_and_checkpointing_reduce_the_estimate() -> None:
    plain = estimate_memory(run_config(), FP32, layout())
    # but for norms, which every rank has
    assert estimate_memory(run_config(tensor=2), FP32, layout(tensor=2)).weights == pytest.approx(
        plain.weights / 2, rel=0.01
    )
    stages = estimate_memory(run_config(pipeline=2), FP32, layout(pipeline=2))
    assert plain.weights * 0.49 < stages.weights < plain.weights * 0.6
    long = run_config(length=1024)
    recompute = estimate_memory(run_config(length=1024, activation_checkpointing=True), FP32, layout())
    assert recompute.activations < estimate_memory(long, FP32, layout()).activations / 2
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    moved = estimate_memory(run_config(), offload, layout())
    assert moved.optimizer == 0
    assert moved.host == plain.weights * 3


def test_zero_3_holds_whole_parameters_for_a_while() -> None:
    config = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1000}, "bf16": {"enabled": True}}
    run = run_config("retention", length=1024)
    count = run.model.parameter_count()["total"]
    assert estimate_phase(run, 0, config, layout(data=4), 1).gathered == 1000 * 2 * 3 / 4
    assert estimate_phase(run, 0, config, layout(data=4), 4).gathered == count * 2 * 3 / 4


def test_stages_are_those_of_the_pipeline() -> None:
    stages = stage_blocks(run_config("retention", pipeline=2), 0, layout(pipeline=2))
    assert [kind for stage in stages for kind in stage.kinds] == list(
        whole_model(ModelConfig(**MODELS["retention"])).kinds
    )
    assert [stage.in_flight for stage in stages] == [2, 1]


def test_impossible_memory_is_refused_with_need_and_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_host_memory", lambda: 8.0 * memory.GIB)
    need = MemoryEstimate(2 * memory.GIB, memory.GIB, memory.GIB, memory.GIB, 0)
    check_memory(need, torch.device("cpu"), 1)
    with pytest.raises(UserError, match=r"5\.0 GiB per process.*has 8\.0 GiB free.*has 4\.0 GiB.*parallel.tensor"):
        check_memory(need, torch.device("cpu"), 2)
    for model, helps in (
        ("retention", True),
        ("llama", False),
        ("memory", False),
    ):  # a chunk that cannot fit: cut it once more
        with pytest.raises(UserError) as error:
            check_memory(need, torch.device("cpu"), 2, run_config(model))
        assert ("parallel.bands" in str(error.value)) == helps
    # an estimate that the tolerance of the activations could save is not refused
    check_memory(MemoryEstimate(2 * memory.GIB, 0, 0, 2.1 * memory.GIB, 0), torch.device("cpu"), 2)


# -- bands: auto -------------------------------------------------------------------------------------------------------


def test_auto_takes_the_fewest_bands_that_fit() -> None:
    run = run_config("retention", length=2**16, bands="auto")
    needs = {n: estimate_phase(run, 0, FP32, layout(), n, gpu=False) for n in possible_bands(run, 0, layout())}
    assert list(needs) == [2**i for i in range(9)]
    for wanted in (1, 2, 8, 64):
        choice = choose_bands(run, 0, FP32, layout(), needs[wanted].device / memory.AUTO_SHARE, gpu=False)
        assert choice.bands == wanted
        assert f"phase 0: {wanted} (auto), chunks of {2**16 // wanted:,} tokens" in choice.line
        assert memory.size_text(needs[wanted].device) in choice.line
    with pytest.raises(UserError, match=r"phases\.0: bands auto .* 256, with chunks of 256 tokens.*parallel\.sequence"):
        choose_bands(run, 0, FP32, layout(), 1e6, gpu=False)


def test_auto_cuts_what_one_rank_owns() -> None:
    run = run_config("window", length=3 * 2**10, bands="auto")
    assert list(possible_bands(run, 0, layout(sequence=2))) == [1, 2, 3, 4, 6]
    assert list(possible_bands(run_config("window", length=100), 0, layout())) == [1]


def test_auto_is_one_without_shared_keys_and_values() -> None:
    choice = choose_bands(run_config("llama", length=2**20, bands="auto"), 0, FP32, layout(), 1.0)
    assert choice.bands == 1 and "llama" in choice.line
    choice = choose_bands(run_config("memory", length=2**20, bands="auto"), 0, FP32, layout(), 1.0)
    assert choice.bands == 1 and "memory" in choice.line
    assert list(possible_bands(run_config("memory", length=2**20), 0, layout())) == [1]


def test_auto_of_every_phase_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_host_memory", lambda: 1e12)
    phases = [run_config("retention", length=1024, bands=bands).phases[0] for bands in ("auto", 2, None)]
    run = run_config("retention", bands=None)
    run = RunConfig(
        model=run.model, parallel=ParallelConfig(bands="auto"), data=run.data, phases=phases, output_dir="out"
    )
    resolved, lines = resolve_bands(run, FP32, layout(), torch.device("cpu"), 1)
    assert [resolved.phase_bands(number) for number in range(3)] == [1, 2, 1]
    assert [line.split(",")[0] for line in lines] == ["phase 0: 1 (auto)", "phase 2: 1 (auto)"]
    # what is not resolved counts with the most bands
    assert estimate_memory(run, FP32, layout()).device <= estimate_memory(resolved, FP32, layout()).device
