"""LLaMA folders: a model of transformers comes in and goes out bit for bit, with the same logits on both sides."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megayoco.convert.formats import read_weights, recognise, write_weights
from megayoco.data.tokenizer import ByteTokenizer
from megayoco.data.tokenizer.export import write_for_transformers
from megayoco.errors import UserError
from tests.convert.models import TIED_LLAMA, assert_same, listing, logits, random_weights

SIZES = dict(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
)


def build(tied, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES, tie_word_embeddings=tied, rope_theta=5e4, bos_token_id=None, eos_token_id=256, **changes
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(1 + 0.1 * torch.randn_like(value) if "norm" in name else torch.randn_like(value) * 0.3)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def theirs(request, tmp_path_factory):
    """A model of transformers and the folder that it wrote, in shards."""
    folder = tmp_path_factory.mktemp("llama") / "theirs"
    model = build(request.param)
    model.save_pretrained(folder, max_shard_size="40KB")
    write_for_transformers(ByteTokenizer(), folder)
    return model, folder


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy to damage."""
    return shutil.copytree(theirs[1], tmp_path / "copy")


def test_in_and_out_is_exact(theirs, tmp_path):
    model, source = theirs
    assert len(list(source.glob("model-*.safetensors"))) > 2 and recognise(source) == "llama"
    tokens = torch.arange(40) * 5 % 257
    weights = read_weights(source)
    assert weights.tokenizer.encode("ä") == ByteTokenizer().encode("ä") and weights.tokenizer.eod == 256
    assert weights.facts == {"sequence_length": 512}
    expected = model(tokens[None]).logits[0].detach()
    torch.testing.assert_close(logits(weights, tokens), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))

    write_weights(tmp_path / "ours", "megayoco", weights)
    write_weights(tmp_path / "back", "llama", read_weights(tmp_path / "ours"), shard_bytes=40_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(loaded(tokens[None]).logits[0], expected)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is model.config.tie_word_embeddings
    changes = {"head_dim": 8, "training_facts": {"sequence_length": 512}}
    ignored = {"transformers_version", "_name_or_path", "pad_token_id"}
    old, new = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (model.config, loaded.config))
    assert new == old | changes


def test_what_a_folder_holds(tmp_path):
    weights = random_weights("llama")
    write_weights(tmp_path / "f", "hf", weights)
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer"}
    assert listing(tmp_path / "f") == files | {"tokenizer.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert (config["model_type"], config["max_position_embeddings"]) == ("llama", 4096)
    assert (config["bos_token_id"], config["eos_token_id"], config["dtype"]) == (None, 256, "float32")
    assert json.loads((tmp_path / "f" / "generation_config.json").read_text())["pad_token_id"] == 256
    assert AutoConfig.from_pretrained(tmp_path / "f").rope_parameters == {"rope_theta": 1e4, "rope_type": "default"}
    found = read_weights(tmp_path / "f", "hf")
    assert_same(found, weights)
    assert found.facts == weights.facts
    assert found.tokenizer.identity() == weights.tokenizer.identity()
    card = (tmp_path / "f" / "README.md").read_text()
    assert "keys and values, per token | 512 (4 layers)" in card  # 2 x 2 heads x 8 x 4 bytes x 4 layers
    assert "custom_code" not in card and "4,096 tokens" in card


def test_weights_of_torch_and_what_old_versions_stored(theirs, tmp_path):
    model, source = theirs
    state = model.state_dict() | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    # transformers 4
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = read_weights(tmp_path)
    assert weights.tokenizer is None
    assert_same(weights, read_weights(source))


def test_a_tied_head_that_is_stored_must_be_the_embedding(tmp_path):
    weights = random_weights(TIED_LLAMA)
    write_weights(tmp_path / "f", "llama", weights)
    path = tmp_path / "f" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    assert_same(read_weights(tmp_path / "f"), weights)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        read_weights(tmp_path / "f")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"attention_bias": True}, "attention_bias is true; our layers have no bias"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"mem_layers": [1]}, "mem_layers is [1]; a LLaMA has no memory layers"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        ({"head_dim": 16}, "head_dim is 16; our heads have hidden_size / num_attention_heads = 8"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}}, "rope_parameters scales"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters scales"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling scales"),
        (
            {"rope_parameters": {"rope_theta": "1e4"}},
            'rope_parameters: rope_theta must be a positive number, got "1e4"',
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 3}, "heads"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive number, got 0"),
        ({"hidden_size": "32"}, 'hidden_size must be a positive number, got "32"'),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"vocab_size": 256}, "embed_tokens.weight has shape (264, 32), config.json asks for (256, 32)"),
        ({"num_hidden_layers": 1}, "holds what the model lacks, model.layers.1.input_layernorm.weight, "),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.input_layernorm.weight, "),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_our_pattern_cannot_express(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        read_weights(folder, "llama")
    assert message in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_gives_more_ids_than_the_model_has(tmp_path):
    model = type(TIED_LLAMA)(pattern="llama", dim=32, layers=2, hidden_dim=48, heads=4, vocab_size=256)
    weights = random_weights(model)._replace(tokenizer=None)
    write_weights(tmp_path / "f", "llama", weights)
    with pytest.raises(UserError, match="the tokenizer has 257 ids, the model's vocabulary 256"):
        read_weights(tmp_path / "f", tokenizer=ByteTokenizer())
    write_for_transformers(ByteTokenizer(), tmp_path / "f")
    with pytest.raises(UserError, match="the tokenizer has 257 ids"):
        read_weights(tmp_path / "f")


def test_a_pattern_that_it_has_no_name_for(tmp_path):
    with pytest.raises(UserError, match="pattern yoco is no LLaMA"):
        write_weights(tmp_path / "f", "llama", random_weights("retention"))
    assert listing(tmp_path) == set()


def test_a_tokenizer_without_form_in_transformers_is_told(tmp_path, monkeypatch, caplog):
    def refuse(tokenizer, folder):
        raise UserError("no such form.")

    monkeypatch.setattr("megayoco.convert.transformers_folder.write_for_transformers", refuse)
    with caplog.at_level(logging.WARNING):
        write_weights(tmp_path / "f", "llama", random_weights("llama"))
    assert "the tokenizer has no files for transformers. no such form." in caplog.text
    assert read_weights(tmp_path / "f").tokenizer.identity() == ByteTokenizer().identity()
