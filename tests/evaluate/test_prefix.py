"""Prompts with common beginnings: each is answered as if it were alone, and no common beginning is read twice."""

import random

import pytest
import torch

from megayoco.evaluate.prefix import branches, common_prefix, shared_prefill
from megayoco.generate.generation import prefill
from megayoco.model.inference import InferenceModel
from megayoco.model.window_options import WindowOptions
from tests.evaluate.oracle import Oracle, distinct_prefixes
from tests.generate.models import MODELS, build

TRUNK = [(5 * i * i + i) % 250 for i in range(60)]
PROMPTS = {
    "caterpillar": [[*TRUNK[:depth], 251, depth, *TRUNK[depth:], 252] for depth in (0, 7, 20, 21, 59)],
    "nested": [TRUNK[:9], TRUNK[:30], TRUNK[:30], [*TRUNK[:30], 1], TRUNK],
    "strangers": [[1, 2, 3], [4], [2, 2]],
    "tree": [[*TRUNK[:a], 7, *TRUNK[:b], b] for a in (3, 12) for b in (0, 5, 6, 30)],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_each_prompt_is_continued_as_if_it_were_alone(name, prompts):
    model = InferenceModel.of(build(name, torch.float64))

    def logits(tokens, context):
        context = prefill(model, tokens[:-1], chunk=7, context=context)
        return model.advance(torch.tensor([tokens[-1:]]), context)[0]

    seen = []
    for number, context, rest in shared_prefill(model, prompts, chunk=8, reserve=3):
        seen.append(number)
        assert context.length + len(rest) == len(prompts[number]) and len(rest) > 0
        torch.testing.assert_close(
            logits(rest, context), logits(prompts[number], None), rtol=1e-9, atol=1e-9, msg=str(number)
        )
    assert sorted(seen) == list(range(len(prompts)))


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_no_common_beginning_is_read_twice(prompts):
    model = Oracle()
    for _, context, rest in shared_prefill(model, prompts, chunk=8):
        prefill(model, rest, context=context)
    assert model.tokens_read == distinct_prefixes(prompts)


def test_windows_that_depend_on_the_prompt_share_nothing():
    model = InferenceModel.of(build("longllama", torch.float64), windows=WindowOptions(last_context=3))
    prompts = PROMPTS["caterpillar"]
    for number, context, rest in shared_prefill(model, prompts, chunk=8):
        assert (context.length, rest) == (0, prompts[number])
        whole, _ = model.advance(torch.tensor([rest]), model.empty_context())
        context = prefill(model, rest[:-1], chunk=7, context=context.announce(len(rest)))
        got, _ = model.advance(torch.tensor([rest[-1:]]), context)
        torch.testing.assert_close(got, whole, rtol=1e-9, atol=1e-9)
    assert number == len(prompts) - 1


def test_any_prompts_in_any_order():
    rng = random.Random(4)
    for _ in range(300):
        prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 8))]
        model = Oracle()
        found = {}
        for number, context, rest in shared_prefill(model, prompts, chunk=3):
            found[number] = [*context.layers[0], *rest]
            prefill(model, rest, context=context)
        assert found == dict(enumerate(prompts))
        assert model.tokens_read == distinct_prefixes(prompts)


def test_common_prefix_leaves_a_token_to_be_read():
    assert common_prefix([1, 2, 3], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [1, 2]) == 1
    assert common_prefix([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert common_prefix([1], [1]) == 0


def test_branches_are_where_later_prompts_leave():
    assert branches([5, 9, 3, 7, 2], 0) == [2, 3, 5]
    assert branches([5, 9, 3, 7, 2], 3) == [5]
    assert branches([5, 5], 5) == []
    assert branches([], 0) == []
