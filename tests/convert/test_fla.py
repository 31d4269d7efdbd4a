"""YOCO folders of flash-linear-attention: what its code computes from them, written out, is what our model computes."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megayoco.config import ModelConfig
from megayoco.convert.formats import read_weights, recognise, write_weights
from megayoco.errors import UserError
from tests.convert.models import assert_same, listing, logits, random_weights
from tests.generate.models import SHAPE
from tests.model import reference

MODELS = {
    "retention": ModelConfig(**SHAPE, self_heads=2, rope_theta=3e4),
    "window": ModelConfig(**SHAPE, self_heads=2, self_mixer="window", window=6, self_layers=1, rope_theta=3e4),
}


def turn(x, theta, interleaved, kind):
    """(H, T, K): rotary embedding as in fla/modules/rotary.py, and in fla/layers/yoco_attn.py for `yoco`."""
    K = x.shape[-1]
    exponent = torch.linspace(0, 1, K // 2) if kind == "yoco" else torch.arange(0, K, 2) / K
    angle = torch.outer(torch.arange(x.shape[1]).float(), 1 / theta**exponent)
    if interleaved:
        cos, sin = angle.cos().repeat_interleave(2, -1), angle.sin().repeat_interleave(2, -1)
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    else:
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        turned = torch.cat((-x[..., K // 2 :], x[..., : K // 2]), -1)
    return x * cos + turned * sin


def their_logits(config, w, tokens):
    """(T, V) by config and tensors of a folder, after fla/models/yoco/modeling_yoco.py and fla/layers/yoco_attn.py."""
    own, cross, eps = config["self_decoder_attn"], config["cross_decoder_attn"], config["norm_eps"]

    def norm(x, name):
        return reference._norm(x, w[f"{name}.weight"], eps)

    def heads(x, name, count):
        return (x @ w[f"{name}.weight"].T).unflatten(-1, (count, -1)).transpose(0, 1)

    def feed_forward(x, layer):
        y = norm(x, f"{layer}.mlp_norm")
        gate, up = (y @ w[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return x + (torch.nn.functional.silu(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T

    def own_attention(y, layer):
        q, k, v = (heads(y, f"{layer}.attn.{name}_proj", own["num_heads"]) for name in "qkv")
        interleaved, kind = (False, "fla") if own["type"] == "swa" else (True, own["rope_inv_freq"])
        q, k = (turn(x, own["rope_theta"], interleaved, kind) for x in (q, k))
        if own["type"] == "swa":
            return reference._attention(q, k, v, own["window_size"])
        decay = torch.nn.functional.logsigmoid(y @ w[f"{layer}.attn.gk_proj.weight"].T) / own["gate_logit_normalizer"]
        total = decay.cumsum(0).T
        fade = (total[:, :, None] - total[:, None]).masked_fill(torch.ones(len(y), len(y)).triu(1).bool(), -math.inf)
        out = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 * fade.exp()) @ v
        gate = heads(y, f"{layer}.attn.g_proj", own["num_heads"])
        return (reference._norm(out, None, eps) * torch.nn.functional.silu(gate)).transpose(0, 1).flatten(1)

    x = math.sqrt(config["hidden_size"]) * w["model.embeddings.weight"][tokens]
    half = config["num_self_decoder_layers"]
    for i in range(half):
        layer = f"model.self_layers.{i}"
        x = x + own_attention(norm(x, f"{layer}.attn_norm"), layer) @ w[f"{layer}.attn.o_proj.weight"].T
        x = feed_forward(x, layer)
    h = norm(x, "model.shared_kv_builder.kv_norm")
    k, v = (heads(h, f"model.shared_kv_builder.{name}_proj", cross["num_kv_heads"]) for name in "kv")
    k = turn(k, cross["rope_theta"], True, cross["rope_inv_freq"])
    k, v = (y.repeat_interleave(cross["num_heads"] // cross["num_kv_heads"], 0) for y in (k, v))
    for i in range(config["num_hidden_layers"] - half):
        layer = f"model.cross_layers.{i}"
        q = heads(norm(x, f"{layer}.attn_norm"), f"{layer}.attn.q_proj", cross["num_heads"])
        q = turn(q, cross["rope_theta"], True, cross["rope_inv_freq"])
        x = x + reference._attention(q, k, v, len(x)) @ w[f"{layer}.attn.o_proj.weight"].T
        x = feed_forward(x, layer)
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def assert_same_logits(weights, folder):
    tokens = torch.arange(30) * 7 % 257
    config = json.loads((folder / "config.json").read_text())
    theirs, ours = their_logits(config, load_file(folder / "model.safetensors"), tokens), logits(weights, tokens)
    assert (theirs - ours).abs().max() / ours.abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in(tmp_path, name):
    weights = random_weights(MODELS[name])
    write_weights(tmp_path / "f", "fla", weights)
    assert recognise(tmp_path / "f") == "fla"
    assert_same_logits(weights, tmp_path / "f")
    found = read_weights(tmp_path / "f")
    assert_same(found, weights)
    assert found.facts == weights.facts
    assert found.tokenizer.identity() == weights.tokenizer.identity()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of each model to copy and change."""
    parent = tmp_path_factory.mktemp("written")
    for name, model in MODELS.items():
        write_weights(parent / name, "fla", random_weights(model)._replace(tokenizer=None))
    return parent


def edit(folder, changes):
    """Change config.json; a dictionary changes the section of its key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "theta"),
    # head dims 16 and 8: the same frequencies by other bases, as exponents 2j/K end at 1 - 2/K
    [
        ("retention", (1e4 ** (1 / (1 - 2 / 16)), 1e4 ** (1 / (1 - 2 / 8)))),
        ("window", (1e4 ** (8 / 7), 1e4 ** (4 / 3))),
    ],
)
def test_frequencies_of_their_own_kind(written, tmp_path, name, theta):
    shutil.copytree(written / name, tmp_path / "f")
    kinds = [{"rope_theta": base, "rope_inv_freq": "fla"} for base in theta]
    edit(tmp_path / "f", {"self_decoder_attn": kinds[0], "cross_decoder_attn": kinds[1]})
    found = read_weights(tmp_path / "f")
    assert found.model.rope_theta == pytest.approx(1e4, rel=1e-12)
    assert_same_logits(found, tmp_path / "f")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "retention",
            {"self_decoder_attn": {"type": "gated_deltanet"}},
            "type is 'gated_deltanet'; we have gated_reten",
        ),
        ("retention", {"self_decoder_attn": {"gate_logit_normalizer": 8.0}}, "gate_logit_normalizer is 8.0"),
        ("retention", {"self_decoder_attn": {"rope_theta": 1e4}}, "different rotary frequencies"),
        ("retention", {"self_decoder_attn": {"rope_inv_freq": "fla"}}, "different rotary frequencies"),
        ("retention", {"self_decoder_attn": {"rope_inv_freq": "ntk"}}, "rope_inv_freq is 'ntk'"),
        ("window", {"self_decoder_attn": {"rope_theta": 3e4}}, "different rotary frequencies"),
        ("window", {"self_decoder_attn": {"num_v_heads": 1}}, "num_v_heads is 1"),
        ("window", {"self_decoder_attn": {"qkv_bias": True}}, "qkv_bias is true"),
        ("window", {"self_decoder_attn": {"window_size": None}}, "has no window_size"),
        ("retention", {"cross_decoder_attn": {"qk_norm": True}}, "qk_norm is true"),
        ("retention", {"cross_decoder_attn": {"window_size": 64}}, "window_size is 64"),
        ("retention", {"attnres_block_size": 4}, "attnres_block_size is 4"),
        ("retention", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ("retention", {"norm_eps": 0}, "norm_eps must be a positive number"),
        ("retention", {"num_self_decoder_layers": 3}, "lacks the tensor model.self_layers.2"),
        ("retention", {"cross_decoder_attn": None}, "has no section cross_decoder_attn"),
    ],
    ids=str,
)
def test_what_our_pattern_cannot_express(written, tmp_path, name, changes, message):
    shutil.copytree(written / name, tmp_path / "f")
    edit(tmp_path / "f", changes)
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / "f")
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_width_that_only_the_weights_tell(written, tmp_path):
    shutil.copytree(written / "retention", tmp_path / "f")
    edit(tmp_path / "f", {"intermediate_size": None, "hidden_ratio": 4})
    assert_same(read_weights(tmp_path / "f"), random_weights(MODELS["retention"]))


def test_a_pattern_that_it_does_not_have(tmp_path):
    with pytest.raises(UserError, match="has no pattern llama"):
        write_weights(tmp_path / "f", "fla", random_weights("llama"))
    assert listing(tmp_path) == set()
