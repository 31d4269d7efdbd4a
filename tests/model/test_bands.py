"""Training by bands gives the loss and every gradient of the plain model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megayoco.config import ModelConfig
from megayoco.layers.context import KeyValues
from megayoco.model.bands import Bands, Stage, banded_loss, banded_stage
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.ops.attention_store import KeyValueStore
from tests.model.cases import CASES, batch, decoder, gradients

COMMON = ("retention", "window", "tied")


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
@pytest.mark.parametrize("name", COMMON)
def test_every_gradient_equals_the_plain_models(name: str, count: int, order: str) -> None:
    # chunks of 48 down to 6 tokens: longer and shorter than the window, no multiple of the retention's pieces
    assert_equal(decoder(name), Bands(count, order=order), batch(48), 1e-12)


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.95])
def test_rows_without_target_change_nothing(name: str, share: float) -> None:
    assert_equal(decoder(name), Bands(3, rows=5), batch(48, rows=3, share=share, seed=2), 1e-12)
    assert_equal(decoder(name), Bands(3, rows=5, order="split"), batch(48, rows=3, share=share, seed=2), 1e-12)


@pytest.mark.parametrize("name", COMMON)
def test_without_documents_and_with_recomputation(name: str) -> None:
    tokens, targets, _ = batch(40, rows=1)
    assert_equal(decoder(name, checkpointing=True).train(), Bands(4), (tokens, targets, None), 1e-12)


@pytest.mark.parametrize("order", ["fused", "split"])
@pytest.mark.parametrize("name", ["retention", "long window"])
@pytest.mark.parametrize("case", CASES)
def test_cases_that_invite_mistakes(case: str, name: str, order: str) -> None:
    """Four chunks of 12 tokens; on several ranks: tests/distributed/test_parity.py."""
    assert_equal(decoder(name), Bands(4, rows=5, order=order), CASES[case](), 1e-10)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(COMMON),
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


def test_bf16_gradients_of_many_chunks_are_as_near_as_those_of_one() -> None:
    """Summed in fp32: with bf16 sums over the 64 chunks the errors are 1.4 times the plain step's, at most 2.5."""
    data = batch(128, rows=1)
    wide, narrow = decoder("retention", torch.float32), decoder("retention", torch.bfloat16)
    exact = gradients(wide, wide(*data)[0])
    plain = gradients(narrow, narrow(*data)[0])
    got = gradients(narrow, banded_loss(narrow.stage(), Bands(64), *data)[0])
    ratios = {name: float((got[name] - x).norm() / (plain[name] - x).norm()) for name, x in exact.items()}
    assert max(ratios.values()) < 1.6, ratios
    assert sum(ratios.values()) / len(ratios) < 1.15, ratios


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["fused", "split"])
@pytest.mark.parametrize("name", ["retention", "window"])
def test_a_second_step_is_bit_equal(name: str, order: str, dtype: torch.dtype) -> None:
    """Every sum has a fixed order, and nothing reads memory before it is written: torch fills it with NaN here."""
    model, bands, data = decoder(name, dtype), Bands(4, rows=5, order=order), batch(48, share=0.5)
    torch.use_deterministic_algorithms(True)
    try:
        steps = []
        for _ in range(2):
            loss, _ = banded_loss(model.stage(), bands, *data)
            steps.append({"loss": loss.detach(), **gradients(model, loss)})
    finally:
        torch.use_deterministic_algorithms(False)
    for what, first in steps[0].items():
        assert first.isfinite().all() and torch.equal(first, steps[1][what]), what


def test_a_step_draws_no_random_numbers() -> None:
    """The self half runs twice: what it drew the second time would have to be what it drew the first time."""
    model = decoder("retention", checkpointing=True).train()
    before = torch.get_rng_state()
    banded_loss(model.stage(), Bands(4), *batch(48))[0].backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """The memory of all keys, values and gradients that were ever in a store."""
    made: list[StorageWeakRef] = []
    check = KeyValueStore.__post_init__

    def noted(self: KeyValueStore) -> None:
        check(self)
        tensors = (self.key, self.value, self.dkey, self.dvalue)
        made.extend(StorageWeakRef(x.untyped_storage()) for x in tensors if x is not None)

    monkeypatch.setattr(KeyValueStore, "__post_init__", noted)
    return made


@pytest.mark.parametrize("order", ["fused", "split"])
def test_keys_values_and_their_gradients_are_gone_before_the_optimizer_step(
    stored: list[StorageWeakRef], order: str
) -> None:
    """The optimizer's own temporaries then find their room; the losses of a step are still there."""
    model = decoder("retention")
    losses = [banded_loss(model.stage(), Bands(4, order=order), *batch(48, seed=seed))[0] for seed in range(2)]
    assert stored and all(memory.expired() for memory in stored)
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        value, _ = banded_loss(model.stage(), Bands(4), *batch(48))
    assert all(memory.expired() for memory in stored)


@pytest.mark.parametrize("border", [3, 4])
def test_a_stage_without_head_lets_go_of_them_in_its_backward(stored: list[StorageWeakRef], border: int) -> None:
    model = decoder("retention")
    tokens, targets, starts = batch(48)
    first, second = split_stages(model, border, 2)
    hidden, shared = banded_stage(first, Bands(4), tokens, starts)
    leaf = hidden.detach().requires_grad_()
    assert shared is not None
    received = KeyValues(*(x.detach().requires_grad_() for x in shared))
    loss, _ = banded_loss(second, Bands(4), leaf, targets, starts, received)
    loss.backward()
    torch.autograd.backward([hidden, *shared], [leaf.grad, *(x.grad for x in received)])
    assert stored and all(memory.expired() for memory in stored)


def test_backward_runs_once() -> None:
    model = decoder("retention")
    loss, _ = banded_loss(model.stage(), Bands(2), *batch(16))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_tokens_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        banded_loss(decoder("retention").stage(), Bands(5), *batch(16))


def test_bands_need_shared_keys_and_values() -> None:
    model = build_decoder(ModelConfig(pattern="llama", dim=8, layers=1, hidden_dim=8, heads=2, vocab_size=8), None)
    with pytest.raises(ValueError, match="2 bands for a model with layers whose keys and values grow"):
        model.set_bands(2)
