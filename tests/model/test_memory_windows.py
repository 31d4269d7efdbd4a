"""Models with a memory read a text in windows of a rule: in any chunks, rows and storage what a token-by-token dense
reference says, and as the released code of LongLLaMA does where its rule is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.convert import llama
from megayoco.errors import UserError
from megayoco.generate.generation import generate, generate_batch, pad_left, prefill
from megayoco.generate.sampling import GREEDY
from megayoco.generate.scoring import score, score_continuations
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.inference import DecoderContext, InferenceModel, cache_bytes
from megayoco.model.parameters import canonical_parameters
from megayoco.model.window_options import WindowOptions
from megayoco.ops.key_value_cache import STORAGES
from tests.generate.models import build
from tests.layers.memory_reference import windowed_logits
from tests.longllama_reference import Reference, mask_positions

W, V = 6, 24
SHAPE: dict[str, Any] = dict(dim=16, hidden_dim=12, heads=4, vocab_size=V, layers=3, pattern="llama")
LONGLLAMA = ModelConfig(**SHAPE, kv_heads=2, memory_layers=(1,), memory_window=W)
PLAIN_HEADS = ModelConfig(**SHAPE, memory_layers=(0, 2), memory_window=W)


def decoder(model: ModelConfig) -> Decoder:
    """Weights large enough for attention to choose."""
    built = build_decoder(model, None, seed=2, dtype=torch.float64)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter *= 12 if parameter.dim() == 2 else 1
    return built.eval()


def inference(model: ModelConfig = LONGLLAMA, storage: str | None = None, **use: int) -> InferenceModel:
    narrow = None if storage is None else STORAGES[storage]
    return InferenceModel.of(decoder(model), storage=narrow, windows=WindowOptions(**use).checked(model))


def text(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def begins(evicted: int, tokens: int) -> list[int]:
    """Of the windows, by a window that is filled and emptied token after token."""
    found, begin = [], 0
    for index in range(tokens):
        if index - begin == W:
            begin += evicted
        found.append(begin)
    return found


def in_chunks(model: InferenceModel, tokens: Tensor, chunks: list[int], context: DecoderContext) -> Tensor:
    """Logits after every token."""
    parts = []
    for part in tokens.split(chunks, 1):
        logits, context = model.advance(part, context, last_only=False)
        parts.append(logits)
    return torch.cat(parts, 1)


CHUNKS = [[29], [1] * 29, [5, 1, 14, 9], [6, 6, 17], [20, 2, 7]]


@pytest.mark.parametrize("capacity", [None, 1, 5, 40])
@pytest.mark.parametrize("evicted", [W, W // 2, 1, 4])
def test_any_chunks_give_what_every_token_sees_by_itself(evicted, capacity):
    use = {"evicted": evicted} if capacity is None else {"evicted": evicted, "capacity": capacity}
    model, ids = inference(**use), text(29)
    w = {name: x.detach() for name, x in canonical_parameters(decoder(LONGLLAMA)).items()}
    expected = windowed_logits(
        LONGLLAMA, w, torch.tensor(ids), begins(evicted, 29), capacity=capacity, exact=evicted < W
    )
    for chunks in CHUNKS:
        got = in_chunks(model, torch.tensor([ids]), chunks, model.empty_context())
        torch.testing.assert_close(got[0], expected, rtol=1e-11, atol=1e-12)


def test_the_rules_differ():
    """Or the test above would show nothing."""
    ids = torch.tensor([text(29)])
    uses: list[dict[str, int]] = [{}, {"evicted": 3}, {"evicted": 1}, {"capacity": 5}, {"last_context": 4}]
    models = [inference(**use) for use in uses]
    found = [model.advance(ids, model.empty_context())[0] for model in models]
    for number, logits in enumerate(found):
        assert all(not torch.allclose(logits, other, rtol=1e-3) for other in found[:number])


ROWS = [text(31, 1), text(1, 2), text(12, 3), text(30, 4), text(12, 5)]


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("use", [{"evicted": 3}, {"evicted": 1}, {"evicted": 4, "capacity": 7}], ids=str)
def test_rows_of_any_lengths_do_not_know_of_each_other(use, chunk):
    model = inference(**use)
    tokens, padding = pad_left(model, ROWS)
    context = model.empty_context(len(ROWS), padding=padding)
    together = in_chunks(model, tokens, [*[chunk] * (31 // chunk), *[31 % chunk] * (31 % chunk > 0)], context)
    for row, ids in enumerate(ROWS):
        alone, _ = model.advance(torch.tensor([ids]), model.empty_context(), last_only=False)
        torch.testing.assert_close(together[row, padding[row] :], alone[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["longllama", "memory"])
def test_batches_turns_and_scores_with_eviction(name):
    """A LLaMA and a YOCO with memory layers, through everything that reads a text."""
    model = InferenceModel.of(build(name, torch.float64), windows=WindowOptions(evicted=2, capacity=9))
    rows = [[(7 * i * i + 3 * r) % 250 for i in range(length)] for r, length in enumerate((23, 1, 17))]
    alone = [list(generate(model, row, 8, GREEDY, prefill_chunk=5)) for row in rows]
    assert generate_batch(model, rows, 8, GREEDY, prefill_chunk=7) == alone
    losses = score(model, rows[0], chunk=4).losses
    [(log_p, _)] = score_continuations(model, [(rows[0][:9], rows[0][9:])], chunk=6)
    assert log_p == pytest.approx(-float(losses[8:].sum()), rel=1e-6)


def test_branches_of_a_context_with_a_capacity():
    model = inference(evicted=2, capacity=4)
    prefix, ends = text(40, 5), [text(7, 6), text(23, 7), text(7, 8)]
    context = prefill(model, prefix, chunk=6)
    for end in [*ends, ends[0]]:
        got = model.advance(torch.tensor([end[-1:]]), prefill(model, end[:-1], chunk=4, context=context))[0]
        expected = model.advance(torch.tensor([prefix + end]), model.empty_context())[0]
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("storage", [None, "int8", "fp8"])
def test_a_capacity_bounds_the_memory(storage):
    """Of what is kept, and of the room that it lies in; what is stored narrow is read as it was stored."""
    model, endless = inference(storage=storage, evicted=2, capacity=20), inference(storage=storage, evicted=2)
    assert len(model.empty_context(reserve=10**6).layers) == 3
    context, longer, rooms = model.empty_context(reserve=10**6), endless.empty_context(), []
    tokens = text(600)
    for start in range(0, 600, 4):
        context = model.absorb(torch.tensor([tokens[start : start + 4]]), context)
        longer = endless.absorb(torch.tensor([tokens[start : start + 4]]), longer)
        rooms.append(context.layers[1]._buffer.key.shape[2])
    cache = context.layers[1]
    assert cache.tokens <= 20 + W
    assert cache_bytes(context) < cache_bytes(longer) / 8
    assert max(rooms) <= 2 * (20 + W + 4) + 64
    # the first memory layer stores what depends on nothing that was forgotten
    kept = longer.layers[1].part(600 - cache.tokens, 600)
    torch.testing.assert_close(cache.key, kept.key, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cache.value, kept.value, rtol=1e-12, atol=1e-12)


def reference(model: ModelConfig, last_context: int) -> Reference:
    foreign = llama.names(model)
    state = {foreign[name]: x.detach() for name, x in canonical_parameters(decoder(model)).items()}
    config = {
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.memory_window,
        "rms_norm_eps": model.norm_eps,
        "mem_layers": list(model.memory_layers),
        "mem_dtype": "float64",
        "last_context_length": last_context,
    }
    return Reference(state, config)


TOLERANCE: dict[str, Any] = dict(rtol=1e-5, atol=1e-6)
"""The reference takes angles in float64, we in fp32."""


@pytest.mark.parametrize("last_context", [1, 3, 6])
@pytest.mark.parametrize("length", [3, 6, 7, 12, 25])
def test_a_prompt_is_read_as_the_released_code_reads_it(length, last_context):
    model, ids = inference(PLAIN_HEADS, last_context=last_context), torch.tensor([text(length)])
    expected, _ = reference(PLAIN_HEADS, last_context).forward(ids)
    for chunk in (length, 1, 5):
        chunks = [*[chunk] * (length // chunk), *[length % chunk] * (length % chunk > 0)]
        got = in_chunks(model, ids, chunks, model.empty_context().announce(length))
        torch.testing.assert_close(got, expected, **TOLERANCE)


def test_decoding_over_the_overflow_and_appended_turns_as_the_released_code_does():
    model, oracle = inference(PLAIN_HEADS, last_context=4), reference(PLAIN_HEADS, 4)
    past, context = None, model.empty_context()
    for number, length in enumerate([15, *[1] * 9, 2, 4, 11, 1, 1, 3, 6]):
        turn, before = torch.tensor([text(length, number)]), context
        expected, past = oracle.forward(turn, past=past)
        got, context = model.advance(turn, before, last_only=False)
        torch.testing.assert_close(got, expected, **TOLERANCE)
        if length > 2:
            parts = in_chunks(model, turn, [1, length - 2, 1], before.announce(length))
            torch.testing.assert_close(parts, expected, **TOLERANCE)


@pytest.mark.parametrize("from_mask", [True, False], ids=["positions of the mask", "positions of the columns"])
def test_left_padding_as_in_the_released_code(from_mask):
    model, oracle = inference(PLAIN_HEADS, last_context=5), reference(PLAIN_HEADS, 5)
    rows = [text(21, 1), text(2, 2), text(9, 3), text(16, 4)]
    tokens, padding = pad_left(model, rows)
    mask = (torch.arange(21) >= torch.tensor(padding)[:, None]).long()
    past, context, fed = None, model.empty_context(4, padding=padding), tokens
    for step in range(9):
        positions = mask_positions(mask)[:, -fed.shape[1] :] if from_mask else None
        expected, past = oracle.forward(fed, mask, positions, past=past)
        got, context = model.advance(fed, context, last_only=False)
        for row in range(4):
            own = padding[row] if step == 0 else 0
            torch.testing.assert_close(got[row, own:], expected[row, own:], **TOLERANCE)
        fed = expected[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(fed)], 1)


def test_generation_announces_its_prompts():
    """What reads a prompt in chunks gives what one call gives."""
    model, ids = inference(PLAIN_HEADS, last_context=3), text(22)
    logits, context = model.advance(torch.tensor([ids]), model.empty_context(), last_only=False)
    expected = []
    for _ in range(6):
        expected.append(int(logits[0, -1].argmax()))
        logits, context = model.advance(torch.tensor([expected[-1:]]), context)
    assert list(generate(model, ids, 6, GREEDY, prefill_chunk=5)) == expected
    assert generate_batch(model, [ids], 6, GREEDY, prefill_chunk=4) == [expected]
    whole = model.advance(torch.tensor([ids[:-1]]), model.empty_context(), last_only=False)[0]
    losses = torch.nn.functional.cross_entropy(whole[0], torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(score(model, ids, chunk=5).losses.double(), losses, rtol=1e-5, atol=1e-5)
    [(log_p, _)] = score_continuations(model, [(ids[:15], ids[15:])], chunk=4)
    assert log_p == pytest.approx(-float(losses[14:].sum()), rel=1e-5)


def test_what_cannot_be_is_refused():
    plain = ModelConfig(**SHAPE)
    for use, message in (
        ({"evicted": 0}, "--memory-eviction must be at least 1, got 0."),
        ({"capacity": -1}, "--memory-capacity must be at least 1, got -1."),
        ({"evicted": 2, "last_context": 2}, "two ways to cut a text into windows"),
        ({"evicted": 7}, "--memory-eviction 7 exceeds the model's window of 6 tokens"),
        ({"last_context": 7}, "--last-context 7 exceeds the model's window of 6 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            WindowOptions(**use).checked(LONGLLAMA)
    with pytest.raises(UserError, match="--memory-capacity: the model has no memory layers"):
        WindowOptions(capacity=3).resolved(plain)
    assert WindowOptions().resolved(plain) == WindowOptions()
    assert WindowOptions(capacity=3).resolved(LONGLLAMA).evicted in range(1, W + 1)
    assert WindowOptions(last_context=3).resolved(LONGLLAMA) == WindowOptions(last_context=3)
