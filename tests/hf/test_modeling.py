"""The transformers model against the decoder that trains, and its ways of reading a sequence against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from megayoco.hf import modeling_megayoco
from megayoco.hf.modeling_megayoco import MegaYocoForCausalLM, gated_retention
from megayoco.model.inference import InferenceModel
from megayoco.ops.retention import empty_state, gated_retention_naive
from tests.hf.models import ATTENTIONS, BOTH, MODELS, build, decoder_logits, hf_config, tokens

EXACT = dict(rtol=0, atol=1e-10)


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(modeling_megayoco, "RETENTION_CHUNK", 8)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def in_pieces(
    model: MegaYocoForCausalLM,
    ids: Tensor,
    sizes: list[int],
    mask: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits of all tokens, read piece by piece into one cache."""
    cache, logits, end = DynamicCache(config=model.config), [], 0
    for part in ids.split(sizes, 1):
        start, end = end, end + part.shape[1]
        seen = None if mask is None else mask[:, :end]
        places = None if positions is None else positions[:, start:end]
        read = model(part, attention_mask=seen, position_ids=places, past_key_values=cache)
        logits.append(read.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_decoders(name, attention):
    decoder, model = build(name, attention=attention)
    ids = tokens(2, 41)
    torch.testing.assert_close(model(ids).logits, decoder_logits(decoder, ids), **EXACT)


@pytest.mark.parametrize("name", BOTH)
def test_logits_equal_the_decoders_in_fp32(name):
    decoder, model = build(name, torch.float32)
    ids = tokens(1, 41)
    expected = decoder_logits(decoder, ids)
    assert (model(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_pieces_equal_the_whole(name, attention):
    _, model = build(name, attention=attention)
    ids = tokens(2, 41)
    torch.testing.assert_close(in_pieces(model, ids, [9, 1, 17, 1, 1, 12]), model(ids).logits, **EXACT)


@pytest.mark.parametrize("name", BOTH)
def test_decoding_equals_the_decoders(name):
    decoder, model = build(name)
    ids, cache = tokens(1, 20), DynamicCache(config=model.config)
    inference = InferenceModel.of(decoder)
    context = inference.empty_context()
    for part in ids.split([13, *[1] * 7], 1):
        expected, context = inference.advance(part, context)
        got = model(part, past_key_values=cache, logits_to_keep=1).logits
        torch.testing.assert_close(got, expected, **EXACT)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", BOTH)
def test_only_wanted_rows_enter_the_cross_decoder(name, attention):
    _, model = build(name, attention=attention)
    ids, seen = tokens(2, 23), []
    whole = model(ids).logits
    model.model.layers[2].register_forward_hook(lambda layer, args, output: seen.append(args[0].shape[1]))
    for rows in (1, 5, 23, 40):
        torch.testing.assert_close(model(ids, logits_to_keep=rows).logits, whole[:, -rows:], **EXACT)
    cache = model(ids[:, :12], logits_to_keep=1).past_key_values
    rest = model(ids[:, 12:], past_key_values=cache, logits_to_keep=4).logits
    torch.testing.assert_close(rest, whole[:, -4:], **EXACT)
    assert seen == [1, 5, 23, 23, 1, 4]
    numbers = torch.tensor([0, 7, 22])
    torch.testing.assert_close(model(ids, logits_to_keep=numbers).logits, whole[:, numbers], **EXACT)


@pytest.mark.parametrize("sizes", [[20], [6, 14], [1] * 20])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", BOTH)
def test_left_padding_is_not_seen(name, attention, sizes):
    _, model = build(name, attention=attention)
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 11, 3)):
        mask[row, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = in_pieces(model, ids, sizes, mask, positions)
    early = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=2).logits
    unplaced = model(ids, attention_mask=mask).logits
    for row, padding in enumerate((0, 11, 3)):
        alone = model(ids[row : row + 1, padding:]).logits
        torch.testing.assert_close(logits[row, padding:], alone[0], **EXACT)
        torch.testing.assert_close(early[row], alone[0, -2:], **EXACT)
        # only distances matter, but the fp32 angles of other positions are rounded otherwise
        torch.testing.assert_close(unplaced[row, padding:], alone[0], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", BOTH)
def test_right_padding_is_not_seen(name):
    _, model = build(name)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 13:] = 0
    read = model(ids, attention_mask=mask)
    alone = model(ids[1:, :13])
    torch.testing.assert_close(read.logits[1:, :13], alone.logits, **EXACT)
    if name == "retention":  # a window remembers padding as tokens that nobody sees
        for layer, expected in zip(read.past_key_values.layers[:2], alone.past_key_values.layers[:2], strict=True):
            torch.testing.assert_close(layer.recurrent_states[0][1:], expected.recurrent_states[0], **EXACT)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", BOTH)
def test_packed_sequences_do_not_see_each_other(name, attention):
    _, model = build(name, attention=attention)
    ids, lengths = tokens(1, 40), [3, 13, 8, 1, 15]  # borders inside chunks of 8 and on one
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, position_ids=positions)
    assert packed.past_key_values is None
    alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed.logits, alone, **EXACT)
    torch.testing.assert_close(model(ids, position_ids=positions, logits_to_keep=3).logits, alone[:, -3:], **EXACT)


@pytest.mark.parametrize("name", BOTH)
def test_the_context_is_constant_but_for_one_pair_of_keys_and_values(name):
    _, model = build(name)
    ids, numbers = tokens(2, 30), []
    for length in (12, 30):
        layers = model(ids[:, :length]).past_key_values.layers
        assert layers[3].keys is None  # the second cross layer reads what the first one keeps
        assert layers[2].keys.shape == layers[2].values.shape == (2, 2, length, 8)
        held = [layer.recurrent_states[0] if name == "retention" else layer.keys for layer in layers[:2]]
        numbers.append([state.shape for state in held])
    assert numbers[0] == numbers[1] == [(2, 2, 16, 16) if name == "retention" else (2, 4, 6, 8)] * 2


def test_retention_equals_the_naive_recurrence():
    B, T, H, K = 2, 29, 3, 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, K, dtype=torch.float64, generator=generator) for _ in range(3))
    log_decay = -torch.rand(B, T, H, dtype=torch.float64, generator=generator).exp2().log2()
    left = empty_state(B, H, K, dtype=torch.float64)._replace(state=torch.randn(B, H, K, K, dtype=torch.float64))
    y, right = gated_retention_naive(q, k, v, log_decay, left)
    got, state = gated_retention(*(x.transpose(1, 2) for x in (q, k, v, log_decay)), left.state)
    torch.testing.assert_close(got.transpose(1, 2), y, **EXACT)
    torch.testing.assert_close(state, right.state, **EXACT)


def test_the_state_of_a_bf16_model_is_fp32():
    _, model = build("retention", torch.bfloat16)
    ids, cache = tokens(2, 20), DynamicCache(config=model.config)
    for part in ids.split([17, 1, 1, 1], 1):
        logits = model(part, past_key_values=cache).logits
        cache.reorder_cache(torch.tensor([1, 0]))
        for layer in cache.layers[:2]:
            state = layer.recurrent_states[0]
            assert state.dtype == torch.float32
            assert (state != state.bfloat16()).any()  # and was not rounded on its way
    assert logits.dtype == torch.bfloat16


def test_autocast_leaves_the_state_in_fp32():
    _, model = build("retention", torch.float32)
    ids = tokens(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        state = model(ids).past_key_values.layers[0].recurrent_states[0]
    assert state.dtype == torch.float32
    layer, seen = model.model.layers[0], {}
    for name in ("k", "v", "gt"):
        projection = getattr(layer.self_attn, f"{name}_proj")
        projection.register_forward_hook(lambda m, args, output, name=name: seen.update({name: output}))
    with torch.autocast("cpu", torch.bfloat16):
        model(ids)
    table = modeling_megayoco.rotary_table(torch.arange(20)[None], 16, model.config.rope_theta)
    k = modeling_megayoco.heads(seen["k"], 16, table) * 16**-0.5
    v = modeling_megayoco.heads(seen["v"], 16)
    log_decay = torch.nn.functional.logsigmoid(seen["gt"].float().transpose(1, 2)) / 16
    exact = gated_retention(k, k, v, log_decay.double(), torch.zeros(1, 2, 16, 16, dtype=torch.float64))[1]
    torch.testing.assert_close(state.double(), exact, rtol=1e-5, atol=1e-5)  # bf16 products would leave 1e-2


@pytest.mark.parametrize("name", BOTH)
def test_inner_states_are_those_of_all_tokens(name):
    _, model = build(name, attention="eager")
    read = model(tokens(2, 9), logits_to_keep=1, output_hidden_states=True, output_attentions=True)
    assert read.logits.shape == (2, 1, 64)
    assert [x.shape for x in read.hidden_states] == [(2, 9, 32)] * 5
    assert [x.shape for x in read.attentions] == [(2, 4, 9, 9)] * (4 if name == "window" else 2)


@pytest.mark.parametrize("name", BOTH)
def test_embeddings_in_place_of_ids(name):
    _, model = build(name)
    ids = tokens(2, 9)
    given = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(given, model(ids).logits, **EXACT)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=given)


def test_a_plain_cache_serves_windows():
    _, model = build("window")
    ids, cache = tokens(2, 25), DynamicCache()
    logits = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([14, 10, 1], 1)], 1)
    torch.testing.assert_close(logits, model(ids).logits, **EXACT)


@pytest.mark.parametrize("name", BOTH)
def test_a_static_cache_serves(name):
    _, model = build(name)
    ids, cache = tokens(2, 25), StaticCache(config=model.config, max_cache_len=40)
    pieces = [model(part, past_key_values=cache, logits_to_keep=1).logits for part in ids.split([14, 10, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).logits[:, [13, 23, 24]], **EXACT)


def test_what_would_be_silently_wrong_is_refused():
    _, retention = build("retention")
    _, window = build("window")
    ids = tokens(1, 6)
    for model, cache, message in (
        (retention, DynamicCache(), "no place for retention states"),
        (retention, ((ids, ids),), "no place for retention states"),
        (retention, DynamicCache(config=window.config), "DynamicSlidingWindowLayer for layer 0"),
        (window, DynamicCache(config=retention.config), "LinearAttentionLayer for layer 0"),
        (window, DynamicCache(config=hf_config(MODELS["window"], num_self_layers=3)), "SlidingWindowLayer for layer 2"),
        (window, DynamicCache(config=hf_config(MODELS["window"], num_self_layers=1)), "DummyLayer for layer 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model(ids, past_key_values=cache)
    cache = DynamicCache(config=retention.config)
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="rolled back"):
        retention(ids, past_key_values=cache)
    for model in (retention, window):
        with pytest.raises(ValueError, match=r"\(1, 1, 6, 6\)"):
            model(ids, attention_mask=torch.ones(1, 1, 6, 6))
        with pytest.raises(ValueError, match=r"only \['full_attention'\]"):
            model(ids, attention_mask={"full_attention": None})
        with pytest.raises(ValueError, match="cover the 12 tokens so far, got 6"):
            model(ids, attention_mask=torch.ones_like(ids), past_key_values=model(ids).past_key_values)
        with pytest.raises(ValueError, match="generate_batch"):
            model(ids, cache=object())
