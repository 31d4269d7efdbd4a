"""The mixer with a memory, in models, against LongLLaMA's mathematics written out token by token and row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megayoco.config import CrossBatchConfig, ModelConfig
from megayoco.layers.context import Positions
from megayoco.layers.linear import Builder
from megayoco.layers.memory_attention import MemoryAttention
from megayoco.model.blocks import MIXERS
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.parameters import canonical_parameters
from tests.layers.memory_reference import cross_batch_counts, longllama_logits, rotate

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = dict(dim=16, hidden_dim=12, heads=4, kv_heads=2, vocab_size=24, layers=3, pattern="llama")
LONGLLAMA = ModelConfig(**SHAPE, memory_layers=(1,), memory_window=4)


def tokens_and_targets(rows: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 24, (rows, length), generator=generator)
    return tokens, tokens.roll(-1, 1)


def decoder(model: ModelConfig = LONGLLAMA, checkpointing: bool = False) -> Decoder:
    """Weights large enough for attention to choose."""
    built = build_decoder(model, None, dtype=torch.float64, activation_checkpointing=checkpointing)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter *= 12 if parameter.dim() == 2 else 1
    return built


def loss_and_gradients(model: Decoder, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    loss, count = model(tokens, targets)
    loss = loss / count
    parameters = canonical_parameters(model)
    return [loss, *torch.autograd.grad(loss, [parameters[name] for name in sorted(parameters)])]


def reference(model: Decoder, tokens: Tensor, targets: Tensor, counts: list[int] | None) -> list[Tensor]:
    weights = {name: x.detach().clone().requires_grad_() for name, x in canonical_parameters(model).items()}
    logits = longllama_logits(model.config, weights, tokens, counts)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return [loss, *torch.autograd.grad(loss, [weights[name] for name in sorted(weights)])]


def compare(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("length", [3, 4, 12, 14])
def test_every_sample_by_itself_equals_the_reference(length: int) -> None:
    model, data = decoder(), tokens_and_targets(2, length)
    compare(loss_and_gradients(model, *data), reference(model, *data, None))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stepping", [True, False])
@pytest.mark.parametrize(("pack", "reach"), [(1, 2), (2, 2), (3, 0), (4, 3), (4, 6)])
def test_cross_batch_equals_the_reference(pack: int, reach: int, stepping: bool, checkpointing: bool) -> None:
    model, data = decoder(checkpointing=checkpointing), tokens_and_targets(3, 4 * pack)
    counts = cross_batch_counts(3 * pack, pack, reach, stepping)
    model.set_cross_batch(CrossBatchConfig(range=reach, stepping=stepping))
    compare(loss_and_gradients(model, *data), reference(model, *data, counts))


def test_evaluation_takes_no_part_in_cross_batch_training() -> None:
    model, data = decoder(), tokens_and_targets(2, 8)
    plain = model(*data)[0].item()
    model.set_cross_batch(CrossBatchConfig(range=3))
    assert model(*data)[0].item() != pytest.approx(plain, rel=1e-9)
    assert model.eval()(*data)[0].item() == pytest.approx(plain, rel=1e-13)
    model.train().set_cross_batch(None)
    assert model(*data)[0].item() == pytest.approx(plain, rel=1e-13)


def test_all_windows_of_one_sample_as_rows_are_the_windows_one_after_the_other() -> None:
    """Cross-batch over one sample with the whole range, one pass, and a fold over windows."""
    mixer = MIXERS["memory"](LONGLLAMA, "mixer", Builder(seed=1, dtype=torch.float64))
    assert isinstance(mixer, MemoryAttention)
    x = torch.randn(1, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 16, 16, dtype=torch.float64)

    def whole() -> Tensor:
        empty = mixer.empty_context(1, torch.float64, CPU)
        return mixer(x, Positions.of_chunk(0, 16, CPU), empty)[0]  # type: ignore[no-any-return]

    def folded() -> Tensor:
        context: Any = mixer.empty_context(1, torch.float64, CPU)
        outputs = []
        for first in range(0, 16, 4):
            y, context = mixer(x[:, first : first + 4], Positions.of_chunk(first, 4, CPU), context)
            outputs.append(y)
        return torch.cat(outputs, 1)

    leaves = [x, *mixer.parameters()]
    results = []
    for form, cross in ((whole, None), (folded, None), (whole, CrossBatchConfig(range=3))):
        mixer.cross_batch = cross
        y = form()
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    compare(results[1], results[0])
    compare(results[2], results[0])


def test_queries_meet_the_memory_with_their_place_and_keys_without() -> None:
    """Rotating the keys of the memory, or not the query, gives another result: what the reference leaves open."""
    model, (tokens, _) = decoder(), tokens_and_targets(1, 8)
    weights = {name: x.detach() for name, x in canonical_parameters(model).items()}
    expected = longllama_logits(LONGLLAMA, weights, tokens, None)
    moved = longllama_logits(LONGLLAMA, weights, tokens, None, rotate_memory=True)
    assert not torch.allclose(expected, moved, rtol=1e-3)
    turned = rotate(torch.ones(1, 2, 1, 4, dtype=torch.float64), 1e4)
    assert torch.equal(turned[:, 0], torch.ones(1, 1, 4)) and not torch.allclose(turned[:, 1], turned[:, 0])


def test_a_window_that_covers_the_sequence_is_llama() -> None:
    data = tokens_and_targets(2, 9)
    wide = decoder(replace(LONGLLAMA, memory_window=9))
    llama = decoder(ModelConfig(**SHAPE))
    compare(loss_and_gradients(wide, *data), loss_and_gradients(llama, *data))


def test_what_cannot_be_is_refused() -> None:
    model, (tokens, targets) = decoder(), tokens_and_targets(2, 8)
    starts = torch.zeros_like(tokens)
    assert torch.equal(model(tokens, targets, starts)[0], model(tokens, targets)[0])  # one document per row
    starts[1, 5:] = 5
    model.set_cross_batch(CrossBatchConfig(range=1))
    with pytest.raises(ValueError, match="cannot keep documents apart"):
        model(tokens, targets, starts)
    with pytest.raises(ValueError, match="7 tokens are no packs of windows of 4"):
        model(tokens[:, :7], targets[:, :7])
    with pytest.raises(ValueError, match="2 bands"):
        decoder(
            ModelConfig(**{**SHAPE, "pattern": "yoco", "layers": 4}, memory_layers=(0,), memory_window=4)
        ).set_bands(2)
    memory: Any = model.layers[1].mixer
    x, some = torch.zeros(2, 4, 16, dtype=torch.float64), memory.empty_context(2, torch.float64, CPU)
    _, right = memory(x, Positions.of_chunk(0, 4, CPU), some)
    with pytest.raises(ValueError, match="whole sequences"):
        memory(x, Positions.of_chunk(4, 4, CPU), right)
    with pytest.raises(ValueError, match="one after the other"):
        memory(x[:, :2], Positions.of_chunk(0, 4, CPU).rows(torch.tensor([[0, 2], [1, 3]])), some)


@pytest.mark.parametrize("self_mixer", ["retention", "window"])
def test_a_yoco_with_memory_in_its_self_decoder_reads_what_is_far(self_mixer: str) -> None:
    """A token of the first window changes what a query of the fourth sees, in the memory layer alone."""
    window = {"window": 2} if self_mixer == "window" else {}
    model = ModelConfig(
        dim=16, hidden_dim=12, heads=4, kv_heads=2, self_heads=2, vocab_size=24, layers=4, self_layers=3,
        self_mixer=self_mixer, memory_layers=(1,), memory_window=4, **window,
    )  # type: ignore[arg-type]  # fmt: skip
    assert model.layer_pattern() == [self_mixer, "memory", self_mixer, "shared_kv", "cross"]
    memory: Any = decoder(model).layers[1].mixer
    assert (memory.head_dim, memory.local_kv_heads) == (8, 2)
    x = torch.randn(1, 16, 16, dtype=torch.float64, requires_grad=True)
    y, _ = memory(x, Positions.of_chunk(0, 16, CPU), memory.empty_context(1, torch.float64, CPU))
    (gradient,) = torch.autograd.grad(y[0, 13].sum(), x)
    assert bool((gradient[0, :14].abs().sum(-1) > 0).all()) and not gradient[0, 14:].any()
