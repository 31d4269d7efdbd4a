"""YOCO folders for transformers: what they hold, and the way back. That transformers computes the same is tested in
tests/hf, and by --check in tests/tools/test_convert_checkpoint.py."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from megayoco.convert.formats import read_weights, recognise, write_weights
from megayoco.errors import UserError
from megayoco.hf import CODE_FILES
from megayoco.hf.modeling_megayoco import MegaYocoForCausalLM
from tests.convert.models import assert_same, listing, random_weights


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder to copy and damage."""
    folder = tmp_path_factory.mktemp("written") / "f"
    write_weights(folder, "hf", random_weights("retention")._replace(tokenizer=None))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["retention", "window", "uneven"])
def test_out_and_in_is_exact(tmp_path, name, dtype):
    weights = random_weights(name, dtype=dtype)
    write_weights(tmp_path / "f", "hf", weights)
    assert recognise(tmp_path / "f") == "hf"
    found = read_weights(tmp_path / "f")
    assert_same(found, weights)
    assert found.facts == weights.facts
    assert found.tokenizer.identity() == weights.tokenizer.identity()
    write_weights(tmp_path / "back", "megayoco", found)
    assert_same(read_weights(tmp_path / "back"), weights)


def test_what_a_folder_holds(tmp_path):
    weights = random_weights("retention")
    write_weights(tmp_path / "f", "hf", weights)
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer"}
    files |= {"tokenizer.json", "tokenizer_config.json", "configuration_megayoco.py", "modeling_megayoco.py"}
    assert listing(tmp_path / "f") == files
    for file in CODE_FILES:
        assert (tmp_path / "f" / file.name).read_bytes() == file.read_bytes()
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config == {
        "architectures": ["MegaYocoForCausalLM"],
        "model_type": "megayoco",
        "auto_map": {
            "AutoConfig": "configuration_megayoco.MegaYocoConfig",
            "AutoModel": "modeling_megayoco.MegaYocoModel",
            "AutoModelForCausalLM": "modeling_megayoco.MegaYocoForCausalLM",
        },
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_self_layers": 2,
        "self_mixer": "retention",
        "num_self_heads": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": None,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "layer_types": ["linear_attention"] * 2 + ["full_attention"] * 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 256,
        "pad_token_id": None,
        "dtype": "float32",
        "training_facts": weights.facts,
    }
    names = load_file(tmp_path / "f" / "model.safetensors").keys()
    assert {name for name in names if ".layers." not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.{name}.weight" for name in ("kv_norm", "k_proj", "v_proj")),
    }
    attention = {name.split("self_attn.")[1] for name in names if "layers.1.self_attn" in name}
    assert attention == {f"{name}_proj.weight" for name in ("q", "k", "v", "g", "gt", "o")}
    assert {name.split("self_attn.")[1] for name in names if "layers.2.self_attn" in name} == {
        "q_proj.weight",
        "o_proj.weight",
    }


def test_a_tied_head_is_absent_and_the_card_tells_the_window(tmp_path):
    weights = random_weights("window", dtype=torch.bfloat16)
    write_weights(tmp_path / "f", "hf", weights, shard_bytes=20_000)
    index = json.loads((tmp_path / "f" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    assert index["metadata"]["total_parameters"] == weights.model.parameter_count()["total"]
    assert index["metadata"]["total_size"] == 2 * weights.model.parameter_count()["total"]
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert (config["sliding_window"], config["tie_word_embeddings"], config["dtype"]) == (7, True, "bfloat16")
    assert config["layer_types"][0] == "sliding_attention"
    card = (tmp_path / "f" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| shared keys and values, per token | 64 (one pair for all 2 layers) |" in card  # 2 x 2 heads x 8 x 2 bytes
    assert "| windows, per sequence | 1,536 |" in card  # 2 layers x 2 x 6 tokens x 32 x 2 bytes
    assert "| 0 | 4,096 | 10000.0 |" in card and "| step | 7 |" in card
    assert "trust_remote_code=True" in card


def test_without_tokenizer_and_facts(tmp_path):
    weights = random_weights("retention")._replace(tokenizer=None, facts={})
    write_weights(tmp_path / "f", "hf", weights)
    assert not listing(tmp_path / "f") & {"tokenizer", "tokenizer.json", "generation_config.json"}
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert not config.keys() & {"max_position_embeddings", "eos_token_id"}
    found = read_weights(tmp_path / "f")
    assert_same(found, weights)
    assert (found.tokenizer, found.facts) == (None, {})
    assert "Nothing was recorded." in (tmp_path / "f" / "README.md").read_text()


@pytest.mark.parametrize("name", ["retention", "window"])
def test_what_transformers_saves_comes_back(tmp_path, name):
    weights = random_weights(name)
    write_weights(tmp_path / "f", "hf", weights)
    MegaYocoForCausalLM.from_pretrained(tmp_path / "f").save_pretrained(tmp_path / "saved")
    found = read_weights(tmp_path / "saved")
    assert_same(found, weights)
    assert found.facts == weights.facts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MegaYocoModel"]}, "only MegaYocoForCausalLM can be read here"),
        ({"self_mixer": "mamba"}, "self_mixer"),
        ({"sliding_window": 4}, "window"),
        ({"num_self_layers": 4}, "self_layers"),
        ({"num_self_layers": 1}, "that is not what the other fields say"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters is"),
        ({"num_self_layers": 1, "layer_types": None}, "what the model lacks, model.layers.1.self_attn.g_proj.weight, "),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(written, tmp_path, changes, message):
    shutil.copytree(written, tmp_path / "f")
    path = tmp_path / "f" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path / "f")
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_window_of_one_token(tmp_path):
    model = random_weights("window").model
    model = dataclasses.replace(model, window=1)
    with pytest.raises(UserError, match="a window of one token"):
        write_weights(tmp_path / "f", "hf", random_weights(model))
    assert listing(tmp_path) == set()
