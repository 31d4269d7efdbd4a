"""EasyLM's streams of tensors: byte for byte what flax and EasyLM write, and both ways without a changed bit."""

import json
import shutil

import msgpack
import numpy as np
import pytest
import torch

from megayoco.convert import easylm
from megayoco.convert.formats import read_weights, recognise, write_weights
from megayoco.convert.weights import Cast
from megayoco.errors import UserError
from tests.convert.models import LONGLLAMA, PLAIN_LLAMA, assert_same, listing, logits, random_weights

CONFIG = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_sequence_length=6,
    rms_norm_eps=1e-5,
    mem_layers=[1, 2],
    rope_theta=10000.0,
)


def flax_bytes(array):
    """`flax.serialization.to_bytes` of one array, written out from its source."""
    inner = msgpack.packb((array.shape, array.dtype.name, array.tobytes("C")), use_bin_type=True)
    return msgpack.packb(msgpack.ExtType(1, inner), strict_types=True)


def easylm_arrays(weights):
    """The parameter tree of EasyLM, by path. Queries and keys turn neighbouring channels there."""
    tree = {}
    for name, value in weights.tensors.items():
        array = value.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = array.reshape(4, 2, 4, 32)  # heads, first and second of a pair, pairs, in
            array = np.stack([heads[:, 0], heads[:, 1]], axis=2).reshape(32, 32)
        parts = name.split(".")
        if parts[0] == "layers":
            inside = {
                "mixer_norm": ("attention_norm", "kernel"),
                "ffn_norm": ("ffn_norm", "kernel"),
                "q_proj": ("attention", "wq", "kernel"),
                "k_proj": ("attention", "wk", "kernel"),
                "v_proj": ("attention", "wv", "kernel"),
                "out_proj": ("attention", "wo", "kernel"),
                "gate_proj": ("feed_forward", "w1", "kernel"),
                "down_proj": ("feed_forward", "w2", "kernel"),
                "up_proj": ("feed_forward", "w3", "kernel"),
            }[parts[-2]]
            key = ("transformer", "h", parts[1], *inside)
        else:
            outside = {
                "embed_tokens": ("transformer", "wte", "embedding"),
                "norm": ("transformer", "ln_f", "kernel"),
                "lm_head": ("lm_head", "kernel"),
            }
            key = outside[parts[0]]
        tree[key] = array if key[-1] == "embedding" else np.ascontiguousarray(array.T)
    return tree


@pytest.fixture
def folder(tmp_path):
    """What EasyLM's StreamingCheckpointer leaves, with a config beside it."""
    weights = random_weights(LONGLLAMA)
    path = tmp_path / "easylm"
    path.mkdir()
    packer = msgpack.Packer()
    with (path / "streaming_params").open("wb") as file:
        for key, array in easylm_arrays(weights).items():
            file.write(packer.pack((key, flax_bytes(array))))
    (path / "llama_config.json").write_text(json.dumps(CONFIG))
    return path


def test_what_easylm_writes_is_read_and_written_again(folder, tmp_path):
    assert recognise(folder) == "easylm" and recognise(folder / "streaming_params") == "easylm"
    weights = random_weights(LONGLLAMA)
    found = read_weights(folder)
    assert_same(found, weights._replace(tokenizer=None))
    assert found.tokenizer is None and found.facts == {}
    assert_same(read_weights(folder / "streaming_params"), weights)
    # the same records, whatever their order
    write_weights(tmp_path / "again", "easylm", found)
    assert records(tmp_path / "again" / "streaming_params") == records(folder / "streaming_params")
    tokens = torch.arange(20) * 7 % 264
    assert torch.equal(logits(found, tokens), logits(weights, tokens))


def records(path):
    with path.open("rb") as file:
        return {tuple(key): value for key, value in msgpack.Unpacker(file, max_buffer_size=0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [LONGLLAMA, PLAIN_LLAMA], ids=["memory", "plain"])
def test_there_and_back_is_exact(tmp_path, model, dtype):
    weights = random_weights(model)
    weights = weights._replace(tensors=Cast(weights.tensors, dtype))
    write_weights(tmp_path / "there", "easylm", weights)
    assert listing(tmp_path / "there") == {"streaming_params", "llama_config.json", "tokenizer"}
    found = read_weights(tmp_path / "there")
    assert_same(found, weights)
    assert found.facts == weights.facts and found.tokenizer.identity() == weights.tokenizer.identity()
    config = json.loads((tmp_path / "there" / "llama_config.json").read_text())
    window = 6 if model is LONGLLAMA else 4096
    assert (config["max_sequence_length"], config["mem_layers"]) == (window, list(model.memory_layers))
    assert (config["cross_batch_range"], config["eos_token_id"]) == (0, 256)
    write_weights(tmp_path / "hub", "longllama", found)
    assert_same(read_weights(tmp_path / "hub"), weights)


def test_a_train_state_gives_its_parameters(folder):
    path = folder / "streaming_params"
    packer = msgpack.Packer()
    with path.open("rb") as file:
        stored = list(msgpack.Unpacker(file, max_buffer_size=0))
    path.unlink()
    extra = [(("step",), msgpack.packb(5)), (("opt_state", "0", "mu", "lm_head"), flax_bytes(np.ones(3, np.float32)))]
    with (folder / "streaming_train_state_100").open("wb") as file:
        for key, value in [*extra, *(((("params", "params", *key)), value) for key, value in stored)]:
            file.write(packer.pack((key, value)))
    assert_same(read_weights(folder), random_weights(LONGLLAMA))


def test_large_tensors_are_cut_as_flax_cuts_them(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(easylm, "_CHUNK_BYTES", 4000)
    write_weights(tmp_path / "cut", "easylm", read_weights(folder))
    assert_same(read_weights(tmp_path / "cut"), random_weights(LONGLLAMA))
    value = records(tmp_path / "cut" / "streaming_params")[("transformer", "wte", "embedding")]
    content = msgpack.unpackb(value, ext_hook=lambda code, data: msgpack.unpackb(data))
    assert list(content) == ["__msgpack_chunked_array__", "shape", "chunks"]
    assert content["__msgpack_chunked_array__"] is True and content["shape"] == {"0": 264, "1": 32}
    assert [len(chunk[2]) for chunk in content["chunks"].values()] == [4000] * 8 + [1792]
    assert content["chunks"]["0"][:2] == [[1000], "float32"]
    monkeypatch.setattr(easylm, "_MOST_BYTES", 5000)
    with pytest.raises(UserError, match=r"has 33,792 bytes, and a record of EasyLM holds 4 GiB\. Choose --dtype"):
        write_weights(tmp_path / "none", "easylm", read_weights(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": None}, "has no num_attention_heads"),
        ({"mem_layers": [7]}, "names layer 7, but the layers are 0 to 3"),
        ({"mem_layers": "1"}, "mem_layers must be a list"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"vocab_size": 256}, "has shape (264, 32), llama_config.json asks for (256, 32)"),
        ({"intermediate_size": 64}, "has shape (32, 48), llama_config.json asks for (32, 64)"),
        ({"num_hidden_layers": 3}, "holds what the model lacks, transformer.h.3.attention.wk.kernel"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit(folder, changes, message):
    (folder / "llama_config.json").write_text(json.dumps(CONFIG | changes))
    with pytest.raises(UserError) as caught:
        read_weights(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_streams(folder):
    path = folder / "streaming_params"
    whole = path.read_bytes()
    for content in (whole[:-5], b"\x00" + whole, b"PK\x03\x04 no stream", msgpack.packb([["lm_head", "kernel"], b"x"])):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged or no stream of EasyLM"):
            read_weights(folder)
    odd = msgpack.packb((["lm_head", "kernel"], flax_bytes(np.ones(3, np.int32))))
    path.write_bytes(odd)
    with pytest.raises(UserError, match=r"lm_head\.kernel has dtype int32"):
        read_weights(folder)
    path.unlink()
    with pytest.raises(UserError, match="holds no streaming_params"):
        read_weights(folder)


def test_which_of_several_streams_is_asked(folder):
    for step in (10, 20):
        shutil.copy(folder / "streaming_params", folder / f"streaming_params_{step}")
    assert_same(read_weights(folder), random_weights(LONGLLAMA))
    (folder / "streaming_params").unlink()
    with pytest.raises(UserError, match=r"holds streaming_params_10, streaming_params_20\. Give the path of one"):
        read_weights(folder)
    assert_same(read_weights(folder / "streaming_params_20"), random_weights(LONGLLAMA))


def test_without_a_config(folder):
    (folder / "llama_config.json").unlink()
    with pytest.raises(UserError, match="Write the fields of EasyLM's LLaMAConfig"):
        read_weights(folder, "easylm")
