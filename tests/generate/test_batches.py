"""Rows of a batch do not know of each other, however their lengths differ."""

import pytest
import torch

from megayoco.generate.generation import generate, generate_batch, pad_left
from megayoco.generate.sampling import GREEDY, Sampling
from megayoco.model.inference import cache_bytes
from megayoco.ops.key_value_cache import STORAGES
from tests.generate.models import MODELS, SHAPE, inference

V = SHAPE["vocab_size"]


def text(length, seed=1):
    return torch.randint(0, V, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [text(31, 1), text(1, 2), text(12, 3), text(30, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "float64"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_ragged_batch_equal_those_of_each_row_alone(name, chunk, dtype):
    model = inference(name, dtype)
    tokens, padding = pad_left(model, ROWS)
    context = model.empty_context(len(ROWS), padding=padding)
    logits = []
    for part in tokens.split(chunk, 1):
        out, context = model.advance(part, context, last_only=False)
        logits.append(out)
    together = torch.cat(logits, 1)
    for row, ids in enumerate(ROWS):
        alone, _ = model.advance(torch.tensor([ids]), model.empty_context(), last_only=False)
        difference = together[row, padding[row] :] - alone[0]
        assert float(difference.norm() / alone.norm()) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_what_fills_up_a_row_is_never_seen(name):
    model = inference(name, torch.float64)
    tokens, padding = pad_left(model, ROWS)
    noise = torch.where(torch.arange(31) < torch.tensor(padding)[:, None], 77, tokens)
    assert not torch.equal(noise, tokens)
    outs = [model.advance(x, model.empty_context(len(ROWS), padding=padding))[0] for x in (tokens, noise)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [3, 2048])
@pytest.mark.parametrize("name", MODELS)
def test_each_row_continues_as_it_would_alone(name, chunk):
    model = inference(name, torch.float64)
    limits = [9, 14, 1, 5]
    got = generate_batch(model, ROWS, limits, GREEDY, prefill_chunk=chunk, vocab_size=200)
    assert got == [
        list(generate(model, row, limit, GREEDY, vocab_size=200)) for row, limit in zip(ROWS, limits, strict=True)
    ]


def test_rows_end_at_their_stop_tokens_or_when_told():
    model = inference("retention", torch.float64)
    whole = generate_batch(model, ROWS, 12, GREEDY)
    stop = whole[1][4]
    got = generate_batch(model, ROWS, 12, GREEDY, stop=[stop])
    assert got == [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    told = generate_batch(model, ROWS, 12, GREEDY, finished=lambda row, new: row == 2 and len(new) == 3)
    assert told == [row[:3] if number == 2 else row for number, row in enumerate(whole)]


def test_draws_of_a_row_do_not_depend_on_its_neighbours():
    model = inference("window", torch.float64)
    sampling = Sampling(temperature=1.4, top_p=0.95, repetition_penalty=1.3, seed=5)
    first = generate_batch(model, ROWS, 8, sampling)
    others = generate_batch(model, [ROWS[0], text(40, 9), ROWS[2], ROWS[3]], 8, sampling)
    assert [first[i] == others[i] for i in range(4)] == [True, False, True, True]
    assert first == generate_batch(model, ROWS, 8, sampling)


def test_bad_batches():
    model = inference("llama")
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="every prompt"):
            generate_batch(model, prompts, 3, GREEDY)
    for limits in (0, [1, 0], [1]):
        with pytest.raises(ValueError, match="max_new_tokens"):
            generate_batch(model, [[1], [2]], limits, GREEDY)
    with pytest.raises(ValueError, match="padding of 1 rows"):
        model.empty_context(2, padding=[3])
    with pytest.raises(ValueError, match="0 wanted positions of a chunk of 0"):
        model.absorb(torch.empty(1, 0, dtype=torch.int64), model.empty_context())


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_can_be_continued_many_times(name):
    model = inference(name, torch.float64)
    prefix, ends = text(20, 5), [text(7, 6), text(3, 7), text(7, 8)]
    context = model.absorb(torch.tensor([prefix]), model.empty_context(reserve=64))
    for end in [*ends, ends[0]]:
        branch = model.absorb(torch.tensor([end[:-1]]), context)
        got, _ = model.advance(torch.tensor([end[-1:]]), branch)
        expected, _ = model.advance(torch.tensor([prefix + end]), model.empty_context())
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert context.length == 20


@pytest.mark.parametrize(("storage", "times"), [("int8", 1.0), ("fp8", 4.0)])
@pytest.mark.parametrize("name", ["retention", "window", "llama"])
def test_narrow_keys_and_values_change_logits_little_beside_a_bfloat16_model(name, storage, times):
    exact, narrow, half = inference(name), inference(name, storage=STORAGES[storage]), inference(name, torch.bfloat16)
    ids = torch.tensor([text(300, 3)])
    (wanted, right), (got, context), (rounded, _) = (
        model.advance(ids, model.empty_context(), last_only=False) for model in (exact, narrow, half)
    )
    error, usual = (float((x - wanted).norm() / wanted.norm()) for x in (got, rounded))
    assert 1e-4 < error < times * usual
    assert cache_bytes(context) < cache_bytes(right)
    # what is stored depends on no chunk: a YOCO stores what the self-decoder makes, which never reads the store
    if name != "llama":
        parts, context = [], narrow.empty_context()
        for part in ids.split(37, 1):
            out, context = narrow.advance(part, context, last_only=False)
            parts.append(out)
        assert float((torch.cat(parts, 1) - got).norm() / got.norm()) < 1e-3
