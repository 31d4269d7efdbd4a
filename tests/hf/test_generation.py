"""generate() of transformers with the model's cache, against generation that reads everything again at each step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from megayoco.hf.modeling_megayoco import MegaYocoForCausalLM
from tests.hf.models import BOTH, build, tokens

PAD = 1


def generate(model: MegaYocoForCausalLM, ids: Tensor, **kwargs: Any) -> Tensor:
    kwargs = dict(max_new_tokens=12, do_sample=False, pad_token_id=PAD) | kwargs
    torch.manual_seed(4)
    return model.generate(ids, **kwargs)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "ways",
    [
        dict(do_sample=False),
        dict(do_sample=True, num_return_sequences=2),
        dict(num_beams=3),
        dict(num_beams=2, num_return_sequences=2, do_sample=True),
    ],
    ids=["greedy", "sampling", "beams", "beam-sampling"],
)
def test_the_cache_changes_nothing(name, ways):
    _, model = build(name)
    ids = tokens(2, 11)
    cached = generate(model, ids, **ways)
    assert torch.equal(cached, generate(model, ids, use_cache=False, **ways))
    assert len(cached.unique()) > 10


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "ways",
    [
        dict(prefill_chunk_size=3),
        dict(num_beams=2),
        dict(cache_implementation="static"),
        dict(cache_implementation="static", prefill_chunk_size=1),
    ],
)
def test_left_padded_batch_equals_each_sequence_alone(name, ways):
    _, model = build(name)
    prompts = [tokens(1, length, seed=length) for length in (13, 4, 9)]
    padded = torch.full((3, 13), PAD)
    for row, prompt in enumerate(prompts):
        padded[row, 13 - prompt.shape[1] :] = prompt
    together = generate(model, padded, attention_mask=(padded != PAD).long(), disable_compile=True, **ways)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, num_beams=ways.get("num_beams", 1), use_cache=False)
        assert torch.equal(together[row, 13:], alone[0, prompt.shape[1] :])


@pytest.mark.parametrize("name", BOTH)
def test_turns_continue_a_cache(name):
    _, model = build(name)
    cache, ids = DynamicCache(config=model.config), tokens(2, 5)
    for turn in range(3):
        seen = dict(max_new_tokens=4, attention_mask=torch.ones_like(ids))  # the answers may hold PAD
        answered = generate(model, ids, past_key_values=cache, **seen)
        assert cache.get_seq_length() == answered.shape[1] - 1  # the last token was not read yet
        assert torch.equal(answered, generate(model, ids, use_cache=False, **seen))
        ids = torch.cat([answered, tokens(2, 3, seed=turn)], 1)


@pytest.mark.parametrize("ways", [dict(prompt_lookup_num_tokens=3), dict(assistant_model="window")])
def test_windows_can_be_rolled_back_and_retention_refuses(ways):
    _, window = build("window")
    _, retention = build("retention")
    if "assistant_model" in ways:
        ways = dict(assistant_model=window)
    ids = tokens(1, 3).repeat(1, 5)
    assert torch.equal(generate(window, ids, **ways), generate(window, ids))
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(retention, ids, **ways)
    if "assistant_model" in ways:
        with pytest.raises(ValueError, match="rolled back"):
            generate(window, ids, assistant_model=retention)
