"""Decoding from the contexts equals reading everything again, and the prompt is read once."""

import random

import pytest
import torch

from megayoco.generate.generation import cache_bytes, generate, prefill
from megayoco.generate.sampling import GREEDY, Sampling
from tests.generate.models import MODELS, SHAPE, build

PROMPT = random.Random(0).choices(range(SHAPE["vocab_size"]), k=23)


@torch.no_grad()
def logits_after(decoder, tokens):
    """(T, V): one pass over the whole sequence, without a cache."""
    return decoder.advance(torch.tensor([tokens]), decoder.empty_context(1), last_only=False)[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_the_one_that_a_full_forward_prefers(name, dtype):
    decoder = build(name, dtype)
    new = list(generate(decoder, PROMPT, 20, GREEDY, prefill_chunk=6))
    logits = logits_after(decoder, PROMPT + new[:-1])[len(PROMPT) - 1 :]
    assert new == logits.argmax(-1).tolist()
    assert len(set(new)) > 5  # a model that repeats itself would hide a wrong cache


@pytest.mark.parametrize("name", MODELS)
def test_prefill_chunks_do_not_matter(name):
    decoder = build(name, torch.float64)
    whole = prefill(decoder, PROMPT, chunk=len(PROMPT))
    for chunk in (1, 5, 22, 1000):
        context = prefill(decoder, PROMPT, chunk=chunk)
        assert context.length == whole.length == len(PROMPT)
        torch.testing.assert_close(context.layers, whole.layers, rtol=1e-10, atol=1e-10)


def test_same_draws_for_every_chunk_size():
    decoder = build("retention", torch.float64)
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=11)
    texts = [list(generate(decoder, PROMPT, 15, sampling, prefill_chunk=chunk)) for chunk in (1, 4, 2048)]
    assert texts[0] == texts[1] == texts[2]


def count_tokens(decoder):
    """Tokens that entered each layer, by its number; filled as the model runs."""
    counts = dict.fromkeys(range(len(decoder.layers)), 0)

    def hook(number):
        def add(module, arguments):
            counts[number] += arguments[0].shape[1]

        return add

    for number, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(hook(number))
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_is_read_once_and_leaves_before_the_cross_decoder(name):
    decoder = build(name)
    counts = count_tokens(decoder)
    assert len(list(generate(decoder, PROMPT, 9, GREEDY, prefill_chunk=6))) == 9
    read, wanted = len(PROMPT) + 8, 9
    assert decoder.self_layers == {"uneven": 1, "llama": 4}.get(name, 2)
    for number, tokens in counts.items():
        assert tokens == (read if number < decoder.self_layers else wanted), f"layer {number}"


def test_counts_times_and_context_of_a_generation():
    decoder = build("retention")
    generation = generate(decoder, PROMPT, 4, GREEDY)
    assert (generation.prompt_tokens, generation.new_tokens, generation.context.length) == (23, 0, 0)
    next(generation)
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds == 0
    assert (generation.new_tokens, generation.context.length) == (1, 23)
    assert len(list(generation)) == 3
    assert generation.decode_seconds > 0
    assert (generation.new_tokens, generation.context.length) == (4, 26)


def test_a_context_is_continued_without_reading_it_again():
    decoder = build("window", torch.float64)
    first = generate(decoder, PROMPT, 5, GREEDY)
    new = list(first)
    counts = count_tokens(decoder)
    # the last new token was chosen, never read
    second = list(generate(decoder, [new[-1], *PROMPT[:3]], 5, GREEDY, context=first.context))
    assert counts[0] == 4 + 4
    assert second == list(generate(decoder, PROMPT + new + PROMPT[:3], 5, GREEDY))


def test_stops_at_a_stop_token_and_gives_it():
    decoder = build("llama")
    new = list(generate(decoder, PROMPT, 10, GREEDY))
    stop = next(token for token in new[2:] if token not in new[:2])
    until = new.index(stop) + 1
    assert list(generate(decoder, PROMPT, 10, GREEDY, stop=[stop, 9999])) == new[:until]


def test_padding_rows_of_the_vocabulary_are_never_chosen():
    decoder = build("llama")
    drawn = list(generate(decoder, PROMPT, 30, Sampling(temperature=50.0, seed=1), vocab_size=3))
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "constant", "per_token"),
    [
        # state (2, 16, 16) and log-decay (2,) of 2 layers; keys and values of 2 heads of 8, once
        ("retention", 2 * (2 * 16 * 16 + 2), 2 * 2 * 8),
        # 6 keys and values of 4 heads of 8 in 2 layers
        ("window", 2 * 2 * 6 * 32, 2 * 2 * 8),
        ("llama", 0, 4 * 2 * 2 * 8),
    ],
)
def test_cache_bytes(name, constant, per_token):
    for length in (10, 20):
        context = prefill(build(name), PROMPT[:length])
        assert cache_bytes(context) == 4 * (constant + per_token * length)
    bf16 = cache_bytes(prefill(build(name, torch.bfloat16), PROMPT[:10]))
    # the state stays in fp32
    assert bf16 == (4 if name == "retention" else 2) * constant + 2 * per_token * 10


def test_bad_arguments():
    decoder = build("llama")
    with pytest.raises(ValueError, match="no token"):
        generate(decoder, [], 1, GREEDY)
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        generate(decoder, PROMPT, 0, GREEDY)
    with pytest.raises(ValueError, match="prefill_chunk 0"):
        generate(decoder, PROMPT, 1, GREEDY, prefill_chunk=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prefill(decoder, PROMPT, chunk=0)
