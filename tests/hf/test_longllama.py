"""The LongLLaMA that ships inside folders against the formulas of its inference, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from megayoco.config import ModelConfig
from megayoco.convert.llama import names
from megayoco.hf import modeling_longllama
from megayoco.hf.cache_longllama import LongLlamaCache
from megayoco.hf.configuration_longllama import LongLlamaConfig
from megayoco.hf.modeling_longllama import LongLlamaForCausalLM
from megayoco.model.decoder import build_decoder
from megayoco.model.inference import InferenceModel
from megayoco.model.parameters import canonical_parameters
from tests.longllama_reference import Layer, Reference, greedy, mask_positions, random_state_dict, select_rows

W = 8
FIELDS: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=W,
    last_context_length=4,
    mem_layers=[0, 2],
    mem_dtype="float64",
    rope_theta=5e3,
    rms_norm_eps=1e-5,
)
PAD = 0


def both(**changes: Any) -> tuple[LongLlamaForCausalLM, Reference]:
    fields = {**FIELDS, **changes}
    state = random_state_dict(fields)
    model = LongLlamaForCausalLM._from_config(LongLlamaConfig(**fields), dtype=torch.float64)
    assert model.load_state_dict(state, strict=False).missing_keys == (
        ["lm_head.weight"] if fields.get("tie_word_embeddings") else []
    )
    return model.eval(), Reference(state, fields)


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def assert_caches(found: LongLlamaCache | None, expected: list[Layer] | None, valid: Tensor | None = None) -> None:
    """All six tensors of all layers; where there is padding, of what is none."""
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    for got, layer in zip(found.to_legacy_cache(), expected, strict=True):
        for number, (a, b) in enumerate(zip(got, layer, strict=True)):
            assert a.shape == b.shape
            if number == 5:  # masks: which, not by how much
                assert torch.equal(a == 0, b == 0)
            elif number in (3, 4) and b.shape[2]:
                seen = (layer[5] == 0).expand_as(b)
                torch.testing.assert_close(a[seen].double(), b[seen].double(), rtol=1e-9, atol=1e-9)
            elif number in (0, 1) and valid is not None and b.shape[2]:
                seen = valid[:, None, -b.shape[2] :, None].bool().expand_as(b)
                torch.testing.assert_close(a[seen], b[seen], rtol=1e-9, atol=1e-9)
            else:
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def compare(model: LongLlamaForCausalLM, reference: Reference, ids: Tensor, **options: Any) -> LongLlamaCache | None:
    """Logits and caches of one call, where the mask, if there is one, is not 0."""
    past = options.pop("past", None)
    expected, after = reference.forward(ids, past=past, **options)
    got = model(ids, past_key_values=None if past is None else tuple(past), **options)
    mask = options.get("attention_mask")
    valid = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    real = valid.bool()
    torch.testing.assert_close(got.logits[real], expected[real], rtol=1e-9, atol=1e-9)
    assert_caches(got.past_key_values, after, mask)
    return got.past_key_values  # type: ignore[no-any-return]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("length", "last"), [(3, None), (W, W), (6, 4), (11, 4), (12, 4), (29, 5), (29, 1), (3 * W, W), (3 * W + 1, W)]
)
def test_inputs_of_any_length(length, last, use_cache):
    model, reference = both()
    compare(model, reference, tokens(2, length), use_cache=use_cache, last_context_length=last)


@pytest.mark.parametrize(
    "changes",
    [
        dict(mem_attention_grouping=(3, 2)),
        dict(mem_attention_grouping=[1, 100]),
        dict(torch_attention=True),
        dict(torch_attention=True, mem_attention_grouping=[2, 3]),
        dict(mem_positionals=False),
        dict(mem_layers=[1]),
        dict(tie_word_embeddings=True),
        dict(use_cache=False),
    ],
    ids=str,
)
def test_fields_of_the_config(changes):
    model, reference = both(**changes)
    mask = torch.ones(2, 21)
    mask[1, :9] = 0
    compare(model, reference, tokens(2, 21))
    compare(model, reference, tokens(2, 21), attention_mask=mask)


def test_without_memory_layers_inputs_of_one_window_are_a_llama():
    model, reference = both(mem_layers=[], last_context_length=W)
    compare(model, reference, tokens(2, W), use_cache=False)
    cache = compare(model, reference, tokens(2, W))
    # and what no layer would remember is not cut off
    with pytest.raises(ValueError, match=r"9 tokens are more than last_context_length 8.*the first 1 would be forgot"):
        model(tokens(1, W + 1))
    with torch.no_grad():
        _, past = reference.forward(tokens(2, W))
        expected, _ = reference.forward(tokens(2, 1), past=past)
        torch.testing.assert_close(model(tokens(2, 1), past_key_values=cache).logits, expected, rtol=1e-9, atol=1e-9)


def test_memory_in_sixteen_bits_rounds_what_is_stored_and_nothing_else():
    model, reference = both(mem_dtype="bfloat16")
    ids = tokens(2, 29)
    compare(model, reference, ids)
    exact, _ = both()[1].forward(ids)
    difference = (model(ids).logits - exact).abs().max() / exact.abs().max()
    assert 1e-5 < difference < 2e-2


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_other_dtypes_of_the_model(name):
    model, reference = both(mem_dtype="bfloat16" if name == "bfloat16" else "float32")
    ids = tokens(2, 29)
    expected, _ = reference.forward(ids)
    got = model.to(getattr(torch, name))(ids).logits
    assert got.dtype == getattr(torch, name)
    difference = (got.double() - expected).norm() / expected.norm()
    assert difference < {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[name]


def test_memory_in_eight_bits():
    model, reference = both(mem_dtype="float8_e4m3fn")
    compare(model, reference, tokens(2, 21))
    cache = model(tokens(3, 21)).past_key_values
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    expected = model(tokens(3, 21)[[2, 0, 0]]).past_key_values
    for a, b in zip(cache.to_legacy_cache()[0], expected.to_legacy_cache()[0], strict=True):
        assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("positions", ["mask", "arange"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [5, 27])
def test_padding(length, side, positions):
    model, reference = both()
    ids, mask = tokens(3, length), torch.ones(3, length, dtype=torch.long)
    for row, pads in ((1, 2), (2, length - 3)):  # whole windows of padding as well
        mask[row, slice(0, pads) if side == "left" else slice(length - pads, None)] = 0
    options = dict(position_ids=mask_positions(mask)) if positions == "mask" else {}
    for torch_attention in (False, True):
        model.config.torch_attention = torch_attention
        compare(model, reference, ids, attention_mask=mask, **options)


def test_decoding_before_at_and_after_the_window_is_full():
    model, reference = both()
    ids, cache = tokens(2, 14 + 2 * W + 3), None
    _, past = reference.forward(ids[:, :14])
    with torch.no_grad():
        cache = model(ids[:, :14]).past_key_values
        for t in range(14, ids.shape[1]):
            expected, past = reference.forward(ids[:, t : t + 1], past=past)
            got = model(ids[:, t : t + 1], past_key_values=cache)
            assert got.past_key_values is cache
            torch.testing.assert_close(got.logits, expected, rtol=1e-9, atol=1e-9)
            assert_caches(cache, past)
    assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("more", [2, 5, 21])
def test_long_additions_to_a_cache(more):
    model, reference = both()
    mask = torch.ones(2, 13 + more)
    mask[0, :3] = 0
    _, past = reference.forward(tokens(2, 13), attention_mask=mask[:, :13])
    compare(model, reference, tokens(2, more, seed=2), past=past, attention_mask=mask)


@pytest.mark.parametrize("scores", [1, 150])
def test_memory_is_read_in_blocks(monkeypatch, scores):
    monkeypatch.setattr(modeling_longllama, "SCORES", scores)
    model, reference = both()
    ids, mask = padded((45, 20))
    compare(model, reference, ids, attention_mask=mask, last_context_length=1)


def test_a_cache_of_memory_alone():
    model, reference = both()
    _, past = reference.forward(tokens(2, 13), use_cache=False)
    compare(model, reference, tokens(2, 11, seed=2), past=past, use_cache=True)
    compare(model, reference, tokens(2, 11, seed=2), past=past, use_cache=False)


def generate(model: LongLlamaForCausalLM, ids: Tensor, **options: Any) -> Any:
    options = dict(max_new_tokens=14, do_sample=False, pad_token_id=PAD, eos_token_id=None) | options
    torch.manual_seed(4)
    return model.generate(ids, **options)


def padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    ids, mask = torch.full((len(lengths), max(lengths)), PAD), torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, -length:], mask[row, -length:] = tokens(1, length, seed=length)[0], 1
    return ids, mask


def test_greedy_generation():
    model, reference = both()
    for ids, mask in ((tokens(2, 13), None), padded((13, 2, 9))):
        expected, _ = greedy(reference, ids, 14, mask)
        assert torch.equal(generate(model, ids, attention_mask=mask), expected)
        assert len(expected[:, -14:].unique()) > 8


def test_generation_without_cache_reads_everything_again_at_every_step():
    model, reference = both()
    ids = tokens(2, 13)
    expected = ids
    for _ in range(6):
        logits, _ = reference.forward(expected, use_cache=False)
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, ids, use_cache=False, max_new_tokens=6), expected)
    with pytest.raises(ValueError, match="leave out past_key_values"):
        generate(model, ids, use_cache=False, past_key_values=LongLlamaCache(model.config))


def test_sampling():
    model, reference = both()
    expected, past, fed = tokens(2, 13), None, tokens(2, 13)
    torch.manual_seed(4)
    for _ in range(10):
        logits, past = reference.forward(fed, past=past)
        fed = torch.multinomial(logits[:, -1].float().softmax(-1), 1)
        expected = torch.cat([expected, fed], 1)
    found = generate(model, tokens(2, 13), do_sample=True, top_k=0, max_new_tokens=10)
    assert torch.equal(found, expected)


def test_beam_search_finds_what_the_reference_scores_the_same():
    model, reference = both()
    ids, mask = padded((13, 7))
    options = dict(attention_mask=mask, num_beams=3, num_return_sequences=2, length_penalty=0.0)
    found = generate(model, ids, return_dict_in_generate=True, output_scores=True, **options)
    simple = naive_beams(reference, ids, mask, beams=3, new_tokens=14)
    for row in range(2):
        for place in range(2):
            sequence, score = simple[row][place]
            assert torch.equal(found.sequences[2 * row + place], sequence)
            assert abs(float(found.sequences_scores[2 * row + place]) - score) < 1e-4
    assert not torch.equal(found.sequences[0], generate(model, ids, attention_mask=mask)[0])


def naive_beams(
    reference: Reference, ids: Tensor, mask: Tensor, beams: int, new_tokens: int
) -> list[list[tuple[Tensor, float]]]:
    """For each row the best sequences and their sums of log probabilities, best first."""
    results = []
    for row in range(len(ids)):
        logits, past = reference.forward(ids[row : row + 1], mask[row : row + 1], mask_positions(mask)[row : row + 1])
        seen, sequences = mask[row : row + 1], ids[row : row + 1]
        scores = torch.zeros(1, dtype=torch.float64)
        for step in range(new_tokens):
            total = scores[:, None] + logits[:, -1].log_softmax(-1)
            scores, best = total.flatten().topk(beams)
            rows, chosen = best // total.shape[1], best % total.shape[1]
            sequences = torch.cat([sequences[rows], chosen[:, None]], 1)
            seen = torch.cat([seen[:1].expand(beams, -1), torch.ones(beams, 1, dtype=torch.long)], 1)
            if step + 1 < new_tokens:
                assert past is not None
                positions = mask_positions(seen)[:, -1:]
                logits, past = reference.forward(chosen[:, None], seen, positions, past=select_rows(past, rows))
        results.append([(sequences[i], float(scores[i])) for i in range(beams)])
    return results


def test_turns_continue_a_cache():
    model, reference = both()
    ids, mask = padded((13, 7))
    cache, past, fed = LongLlamaCache(model.config), None, ids
    for turn in range(3):
        answered = generate(model, ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5)
        assert cache.get_seq_length() == answered.shape[1] - 1  # the last token was not read yet
        expected, past = greedy(reference, fed, 5, mask, past=past)
        assert torch.equal(answered[:, -5:], expected[:, -5:])
        question = tokens(2, 4 + 6 * turn, seed=turn)
        fed = torch.cat([answered[:, -1:], question], 1)
        ids = torch.cat([answered, question], 1)
        mask = torch.cat([mask, torch.ones(2, 5 + question.shape[1], dtype=torch.long)], 1)
    # only what is new, with the mask of everything
    answered = generate(model, fed, attention_mask=mask, past_key_values=cache, max_new_tokens=5)
    expected, _ = greedy(reference, fed, 5, mask, past=past)
    assert torch.equal(answered, expected)
    with pytest.raises(ValueError, match=r"has read (\d+) tokens, and input_ids has 12: give those and new ones"):
        generate(model, tokens(2, 12), past_key_values=cache)


def test_decoding_moves_nothing_that_is_in_memory():
    model, _ = both()
    with torch.no_grad():
        cache = model(tokens(1, 61)).past_key_values
        parts = list(cache.layers[0].parts)
        places = [(part.key.data_ptr(), part.value.data_ptr()) for part in parts]
        assert len(parts) < 6  # of eight windows
        for t in range(3 * W):
            model(tokens(1, 1, seed=t), past_key_values=cache)
    assert cache.layers[0].remembered > 61 + W and cache.layers[0].parts[: len(parts)] == parts
    assert [(part.key.data_ptr(), part.value.data_ptr()) for part in parts] == places
    assert cache.layers[1].remembered == 0


@pytest.mark.parametrize("keep", [1, 3, 11, 0])
def test_only_the_logits_asked_for_are_made(keep):
    model, _ = both()
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        expected = model(tokens(2, 21)).logits
        got = model(tokens(2, 21), logits_to_keep=keep).logits
        some = model(tokens(2, 21), logits_to_keep=torch.tensor([4, 20])).logits
    assert seen == [21, keep or 21, 2]
    torch.testing.assert_close(got, expected[:, -keep:])
    torch.testing.assert_close(some, expected[:, [4, 20]])


def test_inner_states_of_all_windows():
    model, _ = both()
    with torch.no_grad():
        outputs = model(tokens(2, 21), output_hidden_states=True, logits_to_keep=1)
        assert [state.shape for state in outputs.hidden_states] == [(2, 21, 32)] * 4
        torch.testing.assert_close(outputs.hidden_states[0], model.model.embed_tokens(tokens(2, 21)))
        torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1][:, -1:]), outputs.logits)
        embedded = model(inputs_embeds=model.model.embed_tokens(tokens(2, 21)))
        torch.testing.assert_close(embedded.logits[:, -1:], outputs.logits)


def gradients(model: LongLlamaForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("every", [1, 2])
def test_gradients_flow_through_memory_with_and_without_checkpointing(every):
    model, reference = both(gradient_checkpoint_every_ith=every)
    ids = tokens(2, 29)
    for tensor in reference.weights.values():
        tensor.requires_grad_()
    logits, _ = reference.forward(ids)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.train()
    plain = gradients(model, ids)
    model.activation_checkpointing_enable()
    calls = [0, 0, 0]
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    again = gradients(model, ids)
    windows = 5  # 25 tokens by windows of 8, and 4
    assert calls == [windows * (2 if number % every == 0 else 1) for number in range(3)]
    for name, expected in reference.weights.items():
        # transformers takes the loss in fp32
        torch.testing.assert_close(plain[name], expected.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again[name], plain[name], rtol=1e-9, atol=1e-12)
    model.config.mem_layers = []  # without the windows of memory the gradients are others
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})


def test_our_decoder_computes_the_same():
    model, _ = both()
    shape = ModelConfig(
        pattern="llama", dim=32, layers=3, hidden_dim=48, heads=4, vocab_size=64, memory_layers=(0, 2), memory_window=W,
        rope_theta=5e3, norm_eps=1e-5,
    )  # fmt: skip
    decoder = build_decoder(shape, None, dtype=torch.float64).eval()
    weights = model.state_dict()
    with torch.no_grad():
        for name, parameter in canonical_parameters(decoder).items():
            parameter.copy_(weights[names(shape)[name]])
        inference = InferenceModel.of(decoder)
        for length in (5, W, 4 * W):
            ids = tokens(2, length)
            ours = inference.advance(ids, inference.empty_context(2), last_only=False)[0]
            # our rotary tables are fp32
            torch.testing.assert_close(
                model(ids, last_context_length=W).logits, ours.double(), rtol=1e-5, atol=1e-5 * float(ours.abs().max())
            )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(last_context_length=0), "last_context_length must be 1 to max_position_embeddings 8, got 0"),
        (dict(last_context_length=W + 1), "got 9"),
        (dict(output_attentions=True), "output_attentions is not supported"),
        (dict(attention_mask=torch.ones(2, 4)), "attention_mask must be"),
        (dict(attention_mask=torch.ones(2, 1, 5, 5)), "attention_mask must be"),
        (dict(position_ids=torch.zeros(2, 4)), r"position_ids must be \(2, 5\)"),
        (dict(past_key_values=DynamicCache()), "DynamicCache has no place for memory"),
        (dict(past_key_values=((torch.zeros(2, 0, 0, 0),) * 2,) * 3), "six tensors for each of 3 layers"),
        (dict(past_key_values="one row"), "past_key_values has 1 rows, the input 2"),
        (dict(past_key_values="two rows", use_cache=False), "needs use_cache=True"),
        (dict(inputs_embeds=torch.zeros(2, 5, 32)), "exactly one of"),
        (dict(labels=torch.zeros(2, 5, dtype=torch.long), logits_to_keep=1), "leave out logits_to_keep"),
    ],
)
def test_what_a_call_cannot_do(options, message):
    model, _ = both()
    if isinstance(options.get("past_key_values"), str):
        rows = 1 if options["past_key_values"] == "one row" else 2
        options = options | dict(past_key_values=model(tokens(rows, 5)).past_key_values)
    with pytest.raises(ValueError, match=message):
        model(tokens(2, 5), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prefill_chunk_size=4), "prefill_chunk_size cannot be used"),
        (dict(cache_implementation="static"), "cache_implementation cannot be used"),
        (dict(past_key_values=DynamicCache()), "must be a LongLlamaCache"),
        (dict(prompt_lookup_num_tokens=2), "stateful"),
    ],
)
def test_what_generation_cannot_do(options, message):
    model, _ = both()
    with pytest.raises(ValueError, match=message):
        generate(model, tokens(1, 13), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(last_context_length=9), "last_context_length 9 is more than a window"),
        (dict(last_context_length=0), "last_context_length must be a positive integer, got 0"),
        (dict(mem_layers=[3]), "names layer 3, but the layers are 0 to 2"),
        (dict(mem_layers=[-1]), "names layer -1"),
        (dict(mem_layers=[1, 1]), "more than once"),
        (dict(mem_dtype="int8"), "mem_dtype must be one of"),
        (dict(mem_attention_grouping=[4]), r"must be \(heads, queries\)"),
        (dict(mem_attention_grouping=[0, 4]), "must be a positive integer, got 0"),
        (dict(num_key_value_heads=2), "num_key_value_heads must be 4 in LongLLaMA, got 2"),
        (dict(head_dim=16), "head_dim must be 8"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling .* is not supported"),
        (dict(rope_parameters={"rope_type": "llama3"}), "rope_parameters .* is not supported"),
        (dict(hidden_act="gelu"), "hidden_act must be silu"),
        (dict(attention_bias=True), "attention_bias True is not supported"),
        (dict(gradient_checkpoint_every_ith=0), "gradient_checkpoint_every_ith"),
    ],
    ids=str,
)
def test_configs_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        LongLlamaConfig(**{**FIELDS, **changes})


def test_the_base_may_stand_where_transformers_5_keeps_it():
    config = LongLlamaConfig(**FIELDS, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert config.rope_theta == 1e6 and LongLlamaConfig.from_dict(config.to_dict()).rope_theta == 1e6
