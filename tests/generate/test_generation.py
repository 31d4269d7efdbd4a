"""Decoding from the contexts equals reading everything again, and the prompt is read once."""

import random

import pytest
import torch

from megayoco.generate.generation import generate, prefill
from megayoco.generate.sampling import GREEDY, Sampling
from megayoco.model.inference import cache_bytes
from megayoco.ops.key_value_cache import KeyValueCache
from tests.generate.models import MODELS, SHAPE, build, inference

PROMPT = random.Random(0).choices(range(SHAPE["vocab_size"]), k=23)


def logits_after(name, dtype, tokens):
    """(T, V): the training module's forward of the whole sequence, which has no cache."""
    decoder, normed = build(name, dtype), []
    decoder.head.norm.register_forward_hook(lambda module, inputs, output: normed.append(output))
    ids = torch.tensor([tokens])
    with torch.no_grad():
        decoder(ids, ids)
    return normed[0][0] @ decoder.head.weight.t()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_every_token_is_the_one_that_a_full_forward_prefers(name, dtype):
    model = inference(name, dtype)
    new = list(generate(model, PROMPT, 20, GREEDY, prefill_chunk=6))
    logits = logits_after(name, dtype, PROMPT + new[:-1])[len(PROMPT) - 1 :]
    assert new == logits.argmax(-1).tolist()
    assert len(set(new)) > 5  # a model that repeats itself would hide a wrong cache


def values(context):
    """The tensors of a context."""
    caches = (KeyValueCache,)
    return [(x.key, x.value) if isinstance(x, caches) else tuple(x) for x in context.layers]


@pytest.mark.parametrize("name", MODELS)
def test_prefill_chunks_do_not_matter(name):
    model = inference(name, torch.float64)
    whole = prefill(model, PROMPT, chunk=len(PROMPT))
    for chunk in (1, 5, 22, 1000):
        context = prefill(model, PROMPT, chunk=chunk)
        assert context.length == whole.length == len(PROMPT)
        torch.testing.assert_close(values(context), values(whole), rtol=1e-10, atol=1e-10)


def test_same_draws_for_every_chunk_size():
    model = inference("retention", torch.float64)
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95, seed=11)
    texts = [list(generate(model, PROMPT, 15, sampling, prefill_chunk=chunk)) for chunk in (1, 4, 2048)]
    assert texts[0] == texts[1] == texts[2]


def count_tokens(model):
    """Tokens that entered each layer, by its number; filled as the model runs."""
    layers = [*model.stage.self_layers, *model.stage.cross_layers]
    counts = dict.fromkeys(range(len(layers)), 0)

    def hook(number):
        def add(module, arguments):
            counts[number] += arguments[0].shape[1]

        return add

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(hook(number))
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_is_read_once_and_leaves_before_the_cross_decoder(name):
    model = inference(name)
    counts = count_tokens(model)
    assert len(list(generate(model, PROMPT, 9, GREEDY, prefill_chunk=6))) == 9
    read, wanted = len(PROMPT) + 8, 9
    assert len(model.stage.self_layers) == {"uneven": 1, "llama": 4, "longllama": 4, "memory": 3}.get(name, 2)
    for number, tokens in counts.items():
        assert tokens == (read if number < len(model.stage.self_layers) else wanted), f"layer {number}"


def test_counts_times_and_context_of_a_generation():
    model = inference("retention")
    generation = generate(model, PROMPT, 4, GREEDY)
    assert (generation.prompt_tokens, generation.new_tokens, generation.context.length) == (23, 0, 0)
    next(generation)
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds == 0
    assert (generation.new_tokens, generation.context.length) == (1, 23)
    assert len(list(generation)) == 3
    assert generation.decode_seconds > 0
    assert (generation.new_tokens, generation.context.length) == (4, 26)


def test_a_context_is_continued_without_reading_it_again():
    model = inference("window", torch.float64)
    first = generate(model, PROMPT, 5, GREEDY)
    new = list(first)
    counts = count_tokens(model)
    # the last new token was chosen, never read
    second = list(generate(model, [new[-1], *PROMPT[:3]], 5, GREEDY, context=first.context))
    assert counts[0] == 4 + 4
    assert second == list(generate(model, PROMPT + new + PROMPT[:3], 5, GREEDY))


def test_stops_at_a_stop_token_and_gives_it():
    model = inference("llama")
    new = list(generate(model, PROMPT, 10, GREEDY))
    stop = next(token for token in new[2:] if token not in new[:2])
    until = new.index(stop) + 1
    assert list(generate(model, PROMPT, 10, GREEDY, stop=[stop, 9999])) == new[:until]


def test_padding_rows_of_the_vocabulary_are_never_chosen():
    model = inference("llama")
    drawn = list(generate(model, PROMPT, 30, Sampling(temperature=50.0, seed=1), vocab_size=3))
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
        context = prefill(inference(name), PROMPT[:length])
        assert cache_bytes(context) == 4 * (constant + per_token * length)
    bf16 = cache_bytes(prefill(inference(name, torch.bfloat16), PROMPT[:10]))
    # the state stays in fp32
    assert bf16 == (4 if name == "retention" else 2) * constant + 2 * per_token * 10


def test_bad_arguments():
    model = inference("llama")
    with pytest.raises(ValueError, match="no token"):
        generate(model, [], 1, GREEDY)
    with pytest.raises(ValueError, match="max_new_tokens 0"):
        generate(model, PROMPT, 0, GREEDY)
    with pytest.raises(ValueError, match="prefill_chunk 0"):
        generate(model, PROMPT, 1, GREEDY, prefill_chunk=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prefill(model, PROMPT, chunk=0)
