"""Training by bands gives the loss and every gradient of the plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.layers.context import KeyValues
from megayoco.model.bands import Bands, Stage, banded_loss, banded_stage
from megayoco.model.decoder import Decoder, build_decoder

VOCAB = 40
MODELS: dict[str, dict[str, Any]] = {
    "retention": dict(self_heads=2),
    "window": dict(self_mixer="window", window=6, self_heads=4),
    "tied": dict(self_heads=2, tie_embeddings=True, self_layers=1, layers=3),
}


def decoder(name: str, dtype: torch.dtype = torch.float64, checkpointing: bool = False) -> Decoder:
    shape = dict(dim=16, layers=4, hidden_dim=24, heads=4, kv_heads=2, vocab_size=VOCAB)
    return build_decoder(
        ModelConfig(**{**shape, **MODELS[name]}), None, seed=5, dtype=dtype, activation_checkpointing=checkpointing
    )


def batch(tokens: int, rows: int = 2, share: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets of which about `share` count, and documents with borders everywhere."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
    targets = torch.where(torch.rand(rows, tokens, generator=generator) < share, ids.roll(-1, 1), -100)
    new = torch.rand(rows, tokens, generator=generator) < 0.12
    starts = torch.where(new, torch.arange(tokens), 0).cummax(1).values
    return ids, targets, starts


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: Decoder, bands: Bands, data: tuple[Tensor, Tensor, Tensor | None], tolerance: float) -> None:
    tokens, targets, starts = data
    expected_sum, expected_count = model(tokens, targets, starts)
    expected = gradients(model, expected_sum / 7)
    got_sum, count = banded_loss(model.stage(), bands, tokens, targets, starts)
    got = gradients(model, got_sum / 7)
    assert count == expected_count
    torch.testing.assert_close(got_sum, expected_sum, rtol=tolerance, atol=1e-12)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.1e}"
    with torch.no_grad():
        value, _ = banded_loss(model.stage(), bands, tokens, targets, starts)
    torch.testing.assert_close(value, expected_sum.detach(), rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("order", ["fused", "split"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_equals_the_plain_models(name: str, count: int, order: str) -> None:
    # chunks of 48 down to 6 tokens: longer and shorter than the window, no multiple of the retention's pieces
    assert_equal(decoder(name), Bands(count, order=order), batch(48), 1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.95])
def test_rows_without_target_change_nothing(name: str, share: float) -> None:
    assert_equal(decoder(name), Bands(3, rows=5), batch(48, rows=3, share=share, seed=2), 1e-12)
    assert_equal(decoder(name), Bands(3, rows=5, order="split"), batch(48, rows=3, share=share, seed=2), 1e-12)


def test_a_single_target() -> None:
    tokens, targets, starts = batch(48)
    for place in (0, 15, 16, 47):
        only = torch.full_like(targets, -100)
        only[1, place] = targets[1, place]
        # the gradients of queries that see little are differences of nearly equal numbers
        assert_equal(decoder("retention"), Bands(3), (tokens, only, starts), 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_without_documents_and_with_recomputation(name: str) -> None:
    tokens, targets, _ = batch(40, rows=1)
    assert_equal(decoder(name, checkpointing=True).train(), Bands(4), (tokens, targets, None), 1e-12)


def test_borders_on_the_edges_of_chunks() -> None:
    tokens, targets, starts = batch(32, rows=1)
    starts = torch.arange(32)[None] // 8 * 8
    for name in MODELS:
        assert_equal(decoder(name), Bands(4), (tokens, targets, starts), 1e-12)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(list(MODELS)),
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 12),
    st.floats(0, 1),
    st.integers(0, 99),
    st.sampled_from(["fused", "split"]),
)
def test_any_cut(name: str, count: int, chunk: int, rows: int, share: float, seed: int, order: str) -> None:
    data = batch(count * chunk, share=share, seed=seed)
    assert_equal(decoder(name), Bands(count, rows=rows, order=order), data, 1e-11)


def test_bf16_stays_within_its_rounding() -> None:
    data = batch(64, rows=1)
    wide, narrow = decoder("retention", torch.float32), decoder("retention", torch.bfloat16)
    expected = gradients(wide, wide(*data)[0])
    plain = gradients(narrow, narrow(*data)[0])
    got = gradients(narrow, banded_loss(narrow.stage(), Bands(8), *data)[0])
    for name, gradient in expected.items():
        size = gradient.norm()
        # many chunks are summed in fp32, so the error does not grow with their number
        assert (got[name] - gradient).norm() / size < 1.5 * (plain[name] - gradient).norm() / size + 0.01, name


def test_the_gradient_for_an_earlier_stage_is_scaled_without_rounding_the_factor() -> None:
    model, factor = decoder("retention", torch.bfloat16), 1 / 11
    tokens, targets, starts = batch(64, rows=1)
    first, second = split_stages(model, 2, 2)
    with torch.no_grad():
        hidden, _ = banded_stage(first, Bands(4), tokens, starts)
    got = []
    for scale in (1.0, factor):
        leaf = hidden.clone().requires_grad_()
        (banded_loss(second, Bands(4), leaf, targets, starts)[0] * scale).backward()
        assert leaf.grad is not None
        got.append(leaf.grad.double())
    expected, scaled = got[0] * factor, got[1]
    # one rounding per element, without a common direction
    assert abs((scaled * expected).sum() / expected.square().sum() - 1) < 3e-4


def split_stages(model: Decoder, border: int, pattern_shared: int) -> tuple[Stage, Stage]:
    """The model cut in front of block `border` of [self layers, shared, cross layers]."""
    layers = list(model.layers)
    own, cross = layers[: model.self_layers], layers[model.self_layers :]
    assert pattern_shared == len(own)
    if border <= len(own):
        first = Stage(model.embed_tokens, own[:border], None, [], None)
        return first, Stage(None, own[border:], model.shared_kv, cross, model.head)
    behind = border - len(own) - 1
    first = Stage(model.embed_tokens, own, model.shared_kv, cross[:behind], None)
    return first, Stage(None, [], None, cross[behind:], model.head)


@pytest.mark.parametrize("border", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["retention", "window"])
def test_stages_of_a_pipeline(name: str, border: int) -> None:
    model = decoder(name)
    tokens, targets, starts = batch(48, share=0.5)
    expected_sum, _ = model(tokens, targets, starts)
    expected = gradients(model, expected_sum)
    first, second = split_stages(model, border, 2)
    hidden, shared = banded_stage(first, Bands(4, rows=7), tokens, starts)
    # what crosses the border are leaves of the next stage
    leaf = hidden.detach().requires_grad_()
    received = None if shared is None else KeyValues(*(x.detach().requires_grad_() for x in shared))
    loss, _ = banded_loss(second, Bands(4, rows=7), leaf, targets, starts, received)
    model.zero_grad()
    loss.backward()
    back = [(hidden, leaf.grad)]
    if shared is not None and received is not None:
        back += [(made, taken.grad) for made, taken in zip(shared, received, strict=True)]
    torch.autograd.backward([x for x, _ in back], [g for _, g in back])
    torch.testing.assert_close(loss, expected_sum, rtol=1e-12, atol=0)
    for parameter_name, gradient in expected.items():
        got = dict(model.named_parameters())[parameter_name].grad
        error = (got - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-12, f"{parameter_name}: {error:.1e}"


def test_a_middle_stage_passes_keys_and_values_on() -> None:
    model = decoder("retention")
    tokens, targets, starts = batch(48)
    expected = gradients(model, model(tokens, targets, starts)[0])
    layers = list(model.layers)
    stages = [
        Stage(model.embed_tokens, layers[:1], None, [], None),
        Stage(None, layers[1:2], model.shared_kv, layers[2:3], None),
        Stage(None, [], None, layers[3:], model.head),
    ]
    model.zero_grad()
    hidden, _ = banded_stage(stages[0], Bands(3), tokens, starts)
    hidden, shared = banded_stage(stages[1], Bands(3), hidden, starts)
    banded_loss(stages[2], Bands(3), hidden, targets, starts, shared)[0].backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-11, atol=1e-13)


def test_backward_runs_once() -> None:
    model = decoder("retention")
    loss, _ = banded_loss(model.stage(), Bands(2), *batch(16))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        banded_loss(decoder("retention").stage(), Bands(5), *batch(16))
