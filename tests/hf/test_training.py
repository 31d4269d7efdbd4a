"""Training the transformers model: loss and gradients are the decoder's, with and without checkpointing and cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megayoco.hf import modeling_megayoco
from megayoco.hf.modeling_megayoco import MegaYocoForCausalLM
from megayoco.model.parameters import canonical_parameters
from tests.hf.models import BOTH, MODELS, build, hf_config, renamed, tokens


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(modeling_megayoco, "RETENTION_CHUNK", 8)


def labelled() -> tuple[Tensor, Tensor]:
    ids = tokens(2, 21)
    labels = ids.clone()
    labels[0, 4:9] = -100
    return ids, labels


def gradients(model: MegaYocoForCausalLM) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_decoders(name):
    decoder, model = build(name)
    model.train()
    ids, labels = labelled()
    targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    total, count = decoder(ids, targets)
    (total / count).backward()
    expected = {renamed(key): parameter.grad for key, parameter in canonical_parameters(decoder).items()}

    read = model(ids, labels=labels)
    # transformers takes logits and loss in fp32, in a float64 model too; so its gradients are compared in two ways
    torch.testing.assert_close(read.loss.double(), (total / count).detach(), rtol=1e-6, atol=0)
    exact = nn.functional.cross_entropy(read.logits.flatten(0, 1), targets.flatten())
    exact.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-11)
    model(ids, labels=labels).loss.backward()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-5)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(50)).loss.double()
    torch.testing.assert_close(summed, total.detach() / 50, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BOTH)
def test_checkpointing_and_cache_change_no_gradient(name):
    _, model = build(name)
    model.train()
    ids, labels = labelled()
    found = []
    for settings in (None, False, True):
        if settings is not None:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": settings})
            if settings:
                model.enable_input_require_grads()
        for use_cache in (True, False):
            read = model(ids, labels=labels, use_cache=use_cache)
            assert (read.past_key_values is not None) == (use_cache and settings is None)
            read.loss.backward()
            found.append(gradients(model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", BOTH)
def test_gradients_flow_through_the_cache(name):
    """Two pieces with a cache between them, and their whole."""
    _, model = build(name)
    model.train()
    ids = tokens(2, 21)
    weight = torch.randn(2, 21, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (model(ids).logits * weight).sum().backward()
    whole = gradients(model)
    first = model(ids[:, :13])
    second = model(ids[:, 13:14], past_key_values=first.past_key_values)
    third = model(ids[:, 14:], past_key_values=first.past_key_values)
    logits = torch.cat([part.logits for part in (first, second, third)], 1)
    (logits * weight).sum().backward()
    torch.testing.assert_close(gradients(model), whole, rtol=1e-8, atol=1e-9)


def test_what_cannot_be_trained_is_refused():
    _, model = build("retention")
    ids, labels = labelled()
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        model(ids, labels=labels, logits_to_keep=3)
    cache = model(ids).past_key_values
    model.train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="fill it twice"):
        model(ids, past_key_values=cache)


def test_initial_weights():
    model = MegaYocoForCausalLM(hf_config(MODELS["retention"], hidden_size=256, vocab_size=512, num_self_heads=8))
    decoder_bounds = {  # of uniform distributions
        "model.layers.0.self_attn.q_proj": 2**-2.5 * (6 / 512) ** 0.5,
        "model.layers.0.self_attn.gt_proj": 2**-2.5 * (6 / 264) ** 0.5,
        "model.layers.1.self_attn.o_proj": 2**-1 * (6 / 512) ** 0.5,
        "model.layers.2.self_attn.q_proj": 256**-0.5,
        "model.layers.3.mlp.down_proj": 48**-0.5,
        "model.k_proj": 256**-0.5,
        "lm_head": 256**-0.5,
    }
    for name, bound in decoder_bounds.items():
        weight = model.get_submodule(name).weight
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert (model.model.kv_norm.weight == 1).all()
