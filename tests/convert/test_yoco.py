"""The official layout: a checkpoint written out by hand gives the logits of the reference, and ours goes back to it."""

import argparse
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from megayoco.convert.formats import read_weights, recognise, write_weights
from megayoco.convert.yoco import _REQUIRED
from megayoco.errors import UserError
from tests.convert.models import assert_same, listing, logits, random_weights
from tests.model import reference

PARAMS = dict(dim=32, n_layers=4, hidden_dim=48, n_self_heads=2, n_attn_heads=4, n_attn_kv_heads=2, vocab_size=264)


def official_state(window, seed=0):
    """A state dict as the official code has it, by the list of its keys and shapes."""
    D, F, V, kv = 32, 48, 264, 16
    shapes = {"embed_tokens.weight": (V, D), "output_projection.weight": (V, D), "layer_norm.weight": (D,)}
    shapes |= {f"cross_decoder.{name}_proj.weight": (kv, D) for name in "kv"}
    shapes["cross_decoder.kv_layer_norm.weight"] = (D,)
    for half, mixers in (("self", "qkv" if window else "qkvg"), ("cross", "q")):
        for i in range(2):
            layer = f"{half}_decoder.layers.{i}"
            shapes |= {f"{layer}.{name}_layer_norm.weight": (D,) for name in ("mixer", "final")}
            shapes |= {f"{layer}.mixer.{name}_proj.weight": (D, D) for name in (*mixers, "out")}
            shapes |= {f"{layer}.ffn.fc1.weight": (F, D), f"{layer}.ffn.gate.weight": (F, D)}
            shapes[f"{layer}.ffn.fc2.weight"] = (D, F)
            if half == "self" and not window:
                shapes[f"{layer}.mixer.gt_proj.weight"] = (2, D)
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {n: 1 + 0.1 * v if v.dim() == 1 else 2 * v * v.shape[1] ** -0.5 for n, v in values.items()}


def official_logits(params, w, tokens):
    """(T, V): the stack of the official code around the parts of the reference."""
    eps, theta = params.get("norm_eps", 1e-5), params.get("rope_theta", 1e4)
    shape = SimpleNamespace(
        norm_eps=eps, rope_theta=theta, window=params.get("sliding_window"), self_head_dim=32 // params["n_self_heads"]
    )
    head_dim = 32 // params["n_attn_heads"]

    def feed_forward(layer, x):
        y = reference._norm(x, w[f"{layer}.final_layer_norm.weight"], eps)
        inner = torch.nn.functional.silu(y @ w[f"{layer}.ffn.fc1.weight"].T) * (y @ w[f"{layer}.ffn.gate.weight"].T)
        return x + inner @ w[f"{layer}.ffn.fc2.weight"].T

    x = 32**0.5 * w["embed_tokens.weight"][tokens]
    mixer = reference._window if "sliding_window" in params else reference._retention
    for layer in ("self_decoder.layers.0", "self_decoder.layers.1"):
        y = reference._norm(x, w[f"{layer}.mixer_layer_norm.weight"], eps)
        x = feed_forward(layer, x + mixer(shape, w, f"{layer}.mixer", y))
    h = reference._norm(x, w["cross_decoder.kv_layer_norm.weight"], eps)
    k, v = (reference._heads(h @ w[f"cross_decoder.{n}_proj.weight"].T, head_dim) for n in "kv")
    k, v = (t.repeat_interleave(2, 0) for t in (reference._rotate(k, theta), v))
    for layer in ("cross_decoder.layers.0", "cross_decoder.layers.1"):
        y = reference._norm(x, w[f"{layer}.mixer_layer_norm.weight"], eps)
        q = reference._rotate(reference._heads(y @ w[f"{layer}.mixer.q_proj.weight"].T, head_dim), theta)
        y = reference._attention(q, k, v, len(tokens)) @ w[f"{layer}.mixer.out_proj.weight"].T
        x = feed_forward(layer, x + y)
    return reference._norm(x, w["layer_norm.weight"], eps) @ w["output_projection.weight"].T


def write_official(folder, params, state):
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "checkpoint.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.mark.parametrize(
    "extra", [{"rope_theta": 5e5}, {"sliding_window": 5, "norm_eps": 1e-3}], ids=["retention", "window"]
)
def test_official_checkpoints_give_the_logits_of_the_reference(tmp_path, extra):
    params, state = PARAMS | extra, official_state("sliding_window" in extra)
    folder = write_official(tmp_path / "official", params, state)
    assert recognise(folder) == recognise(folder / "checkpoint.pth") == "yoco"
    weights = read_weights(folder)
    tokens = torch.arange(30) * 7 % 257
    expected = official_logits(params, state, tokens)
    difference = (logits(weights, tokens) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5

    write_weights(tmp_path / "back", "yoco", weights)
    assert listing(tmp_path / "back") == {"checkpoint.pth", "params.json"}
    found = torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    defaults = {"rope_theta": 1e4, "norm_eps": 1e-5}
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == PARAMS | defaults | extra


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["retention", "window"])
def test_out_and_in_is_exact(tmp_path, name, dtype):
    weights = random_weights(name, dtype=dtype)  # the window model's head is tied
    write_weights(tmp_path / "f", "yoco", weights)
    found = read_weights(tmp_path / "f")
    assert_same(found, weights)
    assert found.tokenizer.identity() == weights.tokenizer.identity()
    # the tied head costs the file nothing
    size = weights.model.parameter_count()["total"] * dtype.itemsize
    assert size < (tmp_path / "f" / "checkpoint.pth").stat().st_size < size + 15_000  # of zip, less than the embedding


def test_training_checkpoints_have_a_prefix_and_more_than_weights(tmp_path):
    state = official_state(False)
    content = {
        "model": {f"decoder.model.{name}": value for name, value in state.items()},
        "args": argparse.Namespace(lr=1e-3),
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(3)}}},
        "extra_state": {"epoch": 3},
    }
    folder = write_official(tmp_path, PARAMS, state)
    torch.save(content, folder / "checkpoint_last.pt")
    assert_same(read_weights(folder / "checkpoint_last.pt"), read_weights(folder))
    content["model"]["version"] = torch.ones(1)
    torch.save(content, folder / "checkpoint_last.pt")
    with pytest.raises(UserError, match=r"under `model` there is version, where names begin with decoder\.model\."):
        read_weights(folder / "checkpoint_last.pt")


def test_the_weights_tell_the_heads_of_retention(tmp_path, caplog):
    state = official_state(False)
    folder = write_official(tmp_path / "wrong", PARAMS | {"n_self_heads": 4}, state)
    with caplog.at_level(logging.WARNING):
        weights = read_weights(folder)
    assert "says n_self_heads 4, but self_decoder.layers.0.mixer.gt_proj.weight has 2 rows" in caplog.text
    assert_same(weights, read_weights(write_official(tmp_path / "right", PARAMS, state)))


def test_an_odd_number_of_layers_leaves_one_out(tmp_path):
    folder = write_official(tmp_path, PARAMS | {"n_layers": 5}, official_state(False))
    assert read_weights(folder).model.layer_pattern() == ["retention"] * 2 + ["shared_kv"] + ["cross"] * 2


def refused(folder, *parts):
    with pytest.raises(UserError) as caught:
        read_weights(folder, "yoco")
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", _REQUIRED)
def test_params_that_are_missing(tmp_path, missing):
    params = {name: value for name, value in PARAMS.items() if name != missing}
    refused(write_official(tmp_path, params, official_state(False)), f"params.json lacks {missing}.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 2}, "unknown key n_kv_heads. Known are dim, n_layers"),
        ({"model_parallel_size": 2}, "model_parallel_size is 2"),
        ({"n_layers": 1}, "n_layers must be a number of at least 2, got 1"),
        ({"n_attn_heads": 5}, "heads must divide dim"),
        ({"dim": "big"}, "dim"),
        ({"sliding_window": 8}, "holds what the model lacks, self_decoder.layers.0.mixer.g_proj.weight, "),
        ({"n_layers": 6}, "lacks the tensor cross_decoder.layers.2.ffn.fc1.weight, "),
        ({"hidden_dim": 64}, "self_decoder.layers.0.ffn.fc1.weight has shape (48, 32), params.json asks for (64, 32)"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_params_that_do_not_fit(tmp_path, changes, message):
    refused(write_official(tmp_path, PARAMS | changes, official_state(False)), message, str(tmp_path))


def test_harmless_params_of_a_run(tmp_path):
    params = PARAMS | {"max_batch_size": 8, "max_seq_len": 4096, "model_parallel_size": 1, "load_checkpoint": False}
    read_weights(write_official(tmp_path, params, official_state(False)))


def test_missing_files(tmp_path):
    folder = write_official(tmp_path, PARAMS, official_state(False))
    (folder / "checkpoint.pth").unlink()
    refused(folder, "cannot read", "checkpoint.pth")
    (folder / "params.json").unlink()
    refused(folder, "params.json", "The official layout needs it")


def test_models_that_it_cannot_express(tmp_path):
    for name, message in (("uneven", "halves of equal depth"), ("llama", "no pattern llama")):
        with pytest.raises(UserError, match=message):
            write_weights(tmp_path / "f", "yoco", random_weights(name))
    assert listing(tmp_path) == set()
