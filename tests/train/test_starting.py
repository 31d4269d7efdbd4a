"""What `model.init_from` may name, and how its shape and the config's go together."""

import dataclasses

import pytest
import torch
import yaml

from megayoco.config import ModelConfig
from megayoco.convert.export import write_export
from megayoco.convert.names import tensor_shapes
from megayoco.data.tokenizer import build_tokenizer
from megayoco.errors import UserError
from megayoco.parallel.shards import Shard
from megayoco.train.starting import StartingState, check_start, load_run, read_start, start_lines

MODEL = ModelConfig(dim=16, layers=2, hidden_dim=24, heads=2, vocab_size=264, kv_heads=1)


@pytest.fixture
def folder(tmp_path):
    tensors = {name: torch.randn(shape) for name, shape in tensor_shapes(MODEL).items()}
    write_export(tmp_path / "start", MODEL, tensors, build_tokenizer("ByteTokenizer"), facts={"tokens": 1234})
    return str(tmp_path / "start")


def config(tmp_path, **model):
    phase = dict(sequence_length=8, steps=2, batch_size=1, learning_rate=1e-3)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": {"train": "x"}, "phases": [phase], "output_dir": "out"}))
    return str(path)


def test_the_shape_comes_from_the_folder_and_another_rotary_base_from_the_config(folder, tmp_path):
    run = load_run(config(tmp_path, init_from=folder, rope_theta=1e6), [])
    assert run.model == dataclasses.replace(MODEL, init_from=folder, rope_theta=1e6)
    check_start(read_start(folder), run.model)
    # defaults spelled out are no difference
    check_start(read_start(folder), dataclasses.replace(run.model, self_layers=1, self_heads=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 4}, "model.layers is 4, in model.init_from .* it is 2. Leave the shape out of the config"),
        ({"norm_eps": 1e-3}, "model.norm_eps is 0.001, in model.init_from .* it is 1e-05"),
        ({"pattern": "llama"}, "model.pattern is 'llama', in model.init_from .* it is 'yoco'"),
    ],
)
def test_another_shape_is_refused(folder, change, message):
    with pytest.raises(UserError, match=message):
        check_start(read_start(folder), dataclasses.replace(MODEL, init_from=folder, **change))


def test_a_llama_may_get_a_memory(tmp_path):
    llama = dataclasses.replace(MODEL, pattern="llama")
    tensors = {name: torch.randn(shape) for name, shape in tensor_shapes(llama).items()}
    folder = str(tmp_path / "llama")
    write_export(folder, llama, tensors, build_tokenizer("ByteTokenizer"))
    run = load_run(config(tmp_path, init_from=folder, memory_layers=[1], memory_window=4), [])
    assert run.model.layer_pattern() == ["block", "memory"]
    assert tensor_shapes(run.model) == tensor_shapes(llama)
    check_start(read_start(folder), run.model)


def test_a_yoco_may_not(folder):
    model = dataclasses.replace(MODEL, init_from=folder, memory_layers=(0,), memory_window=4)
    with pytest.raises(UserError, match=r"model.memory_layers is \[0\], in model.init_from .* it is \[\]"):
        check_start(read_start(folder), model)


def test_a_folder_that_is_not_there_is_told_with_the_key(tmp_path):
    with pytest.raises(UserError, match=r"model.init_from: nowhere does not exist"):
        load_run(config(tmp_path, init_from="nowhere"), [])


def test_what_people_should_know(folder):
    weights, model = read_start(folder), dataclasses.replace(MODEL, init_from=folder)
    own = build_tokenizer("ByteTokenizer")
    assert start_lines(weights, model, own) == [f"from {folder}, after 1,234 tokens"]
    other = build_tokenizer("ByteTokenizer")
    other.vocab_size = 300
    assert "of 257 ids, the data is of ByteTokenizer with 300" in start_lines(weights, model, other)[1]


def test_any_part_of_any_shard_is_read(folder):
    weights = read_start(folder)
    state, name = StartingState(weights), "layers.0.ffn.down_proj.weight"
    full = weights.tensors[name]
    shard = Shard((16, 24), 1, 8, 16)
    assert torch.equal(state.read(name, "weight", shard, 5, 40), full[:, 8:16].flatten()[5:45])
