"""The decoder against independent implementations, and its ways of reading a sequence against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megayoco.config import ModelConfig
from megayoco.errors import UserError
from megayoco.model.decoder import Decoder, build_decoder
from megayoco.model.inference import InferenceModel
from megayoco.model.parameters import canonical_parameters, count_parameters, load_canonical
from megayoco.presets import PRESETS
from tests.model.reference import yoco_logits

SHAPE: dict[str, Any] = dict(dim=32, layers=4, hidden_dim=48, heads=4, kv_heads=2, vocab_size=64)
MODELS: dict[str, dict[str, Any]] = {
    "retention": dict(SHAPE, self_heads=2),
    "window": dict(SHAPE, self_heads=4, self_mixer="window", window=7),
    "window-of-one": dict(SHAPE, self_mixer="window", window=1),
    "three-self-layers": dict(SHAPE, self_layers=3),
    "one-self-layer": dict(SHAPE, self_layers=1),
    "tied": dict(SHAPE, tie_embeddings=True),
    "llama": dict(SHAPE, pattern="llama"),
}
YOCO = [name for name in MODELS if name != "llama"]


def build(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Decoder:
    return build_decoder(ModelConfig(**MODELS[name]), None, seed=5, dtype=dtype, **kwargs)


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    model = InferenceModel.of(decoder)
    return model.advance(ids, model.empty_context(ids.shape[0]), last_only=False)[0]


@pytest.mark.parametrize("name", YOCO)
def test_yoco_equals_the_equations_written_out(name):
    decoder, ids = build(name), tokens(2, 41)
    weights = {key: value.detach() for key, value in canonical_parameters(decoder).items()}
    expected = torch.stack([yoco_logits(decoder.config, weights, row) for row in ids])
    # the reference takes its angles by another route, both in fp32
    torch.testing.assert_close(logits(decoder, ids), expected, rtol=0, atol=2e-6)


def test_llama_equals_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    decoder = build("llama", torch.float32)
    config = decoder.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    )
    names = {
        "mixer_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "mixer.out_proj": "self_attn.o_proj",
        "mixer": "self_attn",
        "ffn": "mlp",
    }
    ours = canonical_parameters(decoder)
    state = {}
    for name, value in ours.items():
        for mine, other in names.items():
            if f".{mine}." in name:
                name = name.replace(f".{mine}.", f".{other}.")
                break
        state[name if name.startswith("lm_head") else f"model.{name}"] = value.detach()
    theirs.load_state_dict(state)
    ids = tokens(2, 33)
    targets = torch.roll(ids, -1, 1)
    targets[:, -1] = -100
    loss_sum, count = decoder(ids, targets)
    (loss_sum / count).backward()
    output = theirs(ids, labels=ids)
    output.loss.backward()
    torch.testing.assert_close(logits(decoder, ids), output.logits, rtol=1e-5, atol=1e-6)
    assert loss_sum.item() / count.item() == pytest.approx(output.loss.item(), rel=1e-6)
    gradients = dict(theirs.named_parameters())
    torch.testing.assert_close(
        ours["embed_tokens.weight"].grad, gradients["model.embed_tokens.weight"].grad, rtol=1e-4, atol=1e-7
    )
    torch.testing.assert_close(
        ours["layers.0.mixer.k_proj.weight"].grad,
        gradients["model.layers.0.self_attn.k_proj.weight"].grad,
        rtol=1e-4,
        atol=1e-7,
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("borders", [[1] * 23, [7, 1, 15], [22, 1]], ids=["one-by-one", "ragged", "decode-last"])
def test_reading_in_chunks_equals_reading_at_once(name, borders):
    decoder, ids = build(name), tokens(3, 23)
    expected = logits(decoder, ids)
    model = InferenceModel.of(decoder)
    context, got = model.empty_context(3), []
    for chunk in ids.split(borders, 1):
        part, context = model.advance(chunk, context, last_only=False)
        got.append(part)
    assert context.length == 23
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_absorbed_tokens_skip_the_cross_decoder_and_change_nothing(name):
    decoder, ids = build(name), tokens(2, 30)
    rows: list[int] = []
    for layer in decoder.layers[decoder.self_layers :]:
        layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[1]))
    model = InferenceModel.of(decoder)
    context = model.absorb(ids[:, :17], model.empty_context(2))
    context = model.absorb(ids[:, 17:21], context)
    assert rows == []
    last, _ = model.advance(ids[:, 21:], context)
    # the last position alone entered each cross layer
    assert rows == [1] * (len(decoder.layers) - decoder.self_layers)
    torch.testing.assert_close(last[:, 0], logits(decoder, ids)[:, -1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_documents_packed_in_a_row_do_not_see_each_other(name):
    """Loss and gradients of two documents in one row are those of the documents alone (rotary is relative)."""
    ids = tokens(1, 29)
    targets = torch.roll(ids, -1, 1)
    targets[0, [12, 28]] = -100
    starts = torch.zeros_like(ids)
    starts[0, 13:] = 13

    def gradients(*calls: tuple[Tensor, ...]) -> tuple[float, dict[str, Tensor]]:
        decoder = build(name)
        total = torch.stack([decoder(*call)[0] for call in calls]).sum()
        total.backward()
        return total.item(), {key: value.grad for key, value in canonical_parameters(decoder).items()}

    packed_loss, packed = gradients((ids, targets, starts))
    alone_loss, alone = gradients((ids[:, :13], targets[:, :13]), (ids[:, 13:], targets[:, 13:]))
    # fp32 angles at other positions: equal to their rounding
    assert packed_loss == pytest.approx(alone_loss, rel=1e-6)
    for key, expected in alone.items():
        torch.testing.assert_close(packed[key], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()) + 1e-12)
    unmasked_loss, _ = gradients((ids, targets))
    assert abs(unmasked_loss - alone_loss) > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_no_gradient(name):
    ids = tokens(2, 19)
    results = []
    for checkpointing in (False, True):
        decoder = build(name, activation_checkpointing=checkpointing)
        loss, _ = decoder(ids, torch.roll(ids, -1, 1))
        loss.backward()
        results.append({key: value.grad for key, value in canonical_parameters(decoder).items()})
    for key, expected in results[0].items():
        assert torch.equal(results[1][key], expected), key


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns_and_is_counted(name):
    decoder, ids = build(name), tokens(2, 19)
    loss, count = decoder(ids, torch.roll(ids, -1, 1))
    loss.backward()
    assert int(count) == ids.numel()
    assert all(bool(value.grad.abs().sum() > 0) for value in canonical_parameters(decoder).values())
    assert count_parameters(decoder) == decoder.config.parameter_count()["total"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_on_the_meta_device_with_the_counted_parameters(preset):
    model = ModelConfig(preset=preset)
    with torch.device("meta"):
        decoder = build_decoder(model, None)
    assert count_parameters(decoder) == model.parameter_count()["total"]


def test_initial_weights_follow_the_official_distributions():
    model = ModelConfig(dim=256, layers=2, hidden_dim=512, heads=4, vocab_size=2048)
    parameters = canonical_parameters(build_decoder(model, None, seed=0))
    xavier = (6 / (256 + 256)) ** 0.5
    for name, bound in {
        "layers.0.mixer.q_proj.weight": xavier * 2**-2.5,
        "layers.0.mixer.out_proj.weight": xavier * 2**-1,
        "layers.1.mixer.q_proj.weight": 256**-0.5,
        "layers.0.ffn.down_proj.weight": 512**-0.5,
        "shared_kv.v_proj.weight": 256**-0.5,
        "lm_head.weight": 256**-0.5,
    }.items():
        largest = float(parameters[name].abs().max().detach())
        assert 0.99 * bound < largest <= bound, name
    embedding = parameters["embed_tokens.weight"].detach()
    assert float(embedding.std()) == pytest.approx(256**-0.5, rel=0.01)
    assert not torch.equal(parameters["layers.0.mixer.q_proj.weight"], parameters["layers.0.mixer.k_proj.weight"])


@pytest.mark.parametrize("std", [None, 0.2])
def test_the_initial_spread_of_a_llama_can_be_chosen(std):
    config = ModelConfig(
        pattern="llama", dim=64, layers=2, hidden_dim=96, heads=4, vocab_size=128, init_std=std, memory_layers=(1,),
        memory_window=8,
    )  # fmt: skip
    for name, parameter in canonical_parameters(build_decoder(config, None)).items():
        if parameter.dim() == 2:
            assert parameter.float().std().item() == pytest.approx(std or 0.02, rel=0.05), name


def test_rope_theta_reaches_every_layer():
    decoder, ids = build("retention"), tokens(1, 20)
    before = logits(decoder, ids)
    decoder.set_rope_theta(500.0)
    changed = logits(decoder, ids)
    assert not torch.equal(before, changed)
    other = build_decoder(ModelConfig(**dict(MODELS["retention"], rope_theta=500.0)), None, seed=5, dtype=torch.float64)
    torch.testing.assert_close(changed, logits(other, ids), rtol=0, atol=0)


def test_a_missing_context_is_an_error():
    decoder, ids = build("retention"), tokens(1, 4)
    with pytest.raises(TypeError):
        decoder.layers[0](decoder.embed_tokens(ids), None)
    model = InferenceModel.of(decoder)
    context = model.empty_context()
    with pytest.raises(ValueError, match="context"):
        model.advance(ids, context._replace(layers=context.layers[:-1]))


def test_loading_names_what_does_not_fit():
    source = {key: value.detach().clone() for key, value in canonical_parameters(build("retention")).items()}
    target = build_decoder(ModelConfig(**MODELS["retention"]), None, seed=9, dtype=torch.float64)
    load_canonical(target, source)
    assert all(torch.equal(value, source[key]) for key, value in canonical_parameters(target).items())
    with pytest.raises(UserError, match=r"lacks 1 tensors.*norm\.weight"):
        load_canonical(target, {key: value for key, value in source.items() if key != "norm.weight"})
    with pytest.raises(UserError, match="shape"):
        load_canonical(target, dict(source, **{"norm.weight": torch.ones(5)}))
    with pytest.raises(UserError, match="extra"):
        load_canonical(target, dict(source, extra=torch.ones(1)))
